"""Data sets, supernet training and checkpoints."""
