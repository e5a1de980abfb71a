"""Sparse training: weights that are easy to prune, before anything is removed."""
