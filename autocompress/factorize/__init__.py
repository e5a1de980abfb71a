"""Low-rank and compact replacements of the layers of a trained network, as plain PyTorch modules."""
