"""Optimisers: Muon for matrices, AdamW for the rest, the learning-rate schedule and gradient clipping."""
