"""Checks of a run or a model that need the model itself: replay, parity."""
