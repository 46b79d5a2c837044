"""Measurements that stand on a record: the training step beside transformers and a plain matrix product."""
