"""Grids as a device's scheme asks for them."""

from torch import nn

from autocompress.latency.target import Scheme
from autocompress.quantize.grid import Grid, Levels, activation_grid, weight_grid
from autocompress.quantize.layer import out_axis, out_channels


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


def scales_of(scheme: Scheme, layer: nn.Module) -> tuple[int, int | None]:
    """Return how many scales the weights of a layer have, and along which of their axes.

    One a channel where the device allows it: where it has both, that is better. Groups of a transposed
    convolution share an axis of the weights, and one scale.
    """
    grouped = isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1
    if "per_channel" not in scheme.granularity or grouped:
        return 1, None
    return out_channels(layer), out_axis(layer)
