"""Compression policies: lists of passes, each of which makes a trained network smaller, or better."""
