"""Evaluators: supernet slices and accuracy predictors."""
