"""Callbacks of the training loop, one feature in each file."""
