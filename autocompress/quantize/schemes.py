"""Grids as a device's scheme asks for them."""

from autocompress.latency.target import Scheme
from autocompress.quantize.grid import Grid, Levels, activation_grid, weight_grid


def levels_of(scheme: Scheme) -> Levels:
    """Return how levels lie; dynamic fixed point is evenly spaced at a scale that is a power of two."""
    return "power_of_two_scale" if scheme.levels == "dynamic_fixed_point" else scheme.levels


def weights_of(scheme: Scheme, bits: int) -> Grid:
    """Return the grid of weights of a width."""
    return weight_grid(bits, levels_of(scheme), symmetric=scheme.weights == "symmetric")


def activations_of(scheme: Scheme, bits: int, *, positive: bool) -> Grid:
    """Return the grid of activations of a width, which are never negative where they are positive."""
    symmetric = scheme.activations == "symmetric"
    return activation_grid(bits, positive=positive, symmetric=symmetric, levels=levels_of(scheme))


def per_channel(scheme: Scheme) -> bool:
    """Whether weights have a scale a channel: where the device has both, that is better."""
    return "per_channel" in scheme.granularity
