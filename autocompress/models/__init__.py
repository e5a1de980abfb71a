"""Well-known networks in plain PyTorch: what pruning is tried on."""
