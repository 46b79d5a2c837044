"""Ranks, process groups and how a model is sharded over them."""
