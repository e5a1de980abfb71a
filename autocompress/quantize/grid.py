"""Grids: which numbers a width can hold, and the scale that lays them over a range.

A number x becomes the integer `q = clip(round(x / s) + z, qmin, qmax)` and stands for `s (q - z)`. Real zero
is always exactly representable, as padding and ReLU need it: ranges are widened to hold 0, and z is an
integer.

Source of the affine form: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 2.1.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from autocompress.errors import QuantizationError
from autocompress.quantize.ops import WIDTHS

Levels = Literal["uniform", "power_of_two_scale", "logarithmic"]
"""Evenly spaced; evenly spaced at a scale that is a power of two; powers of two themselves."""

LEAST_SCALE: Final = 1e-12
"""A range of zeros alone would have scale 0."""


@dataclass(frozen=True)
class Grid:
    """The integers of a width.

    Attributes:
        bits: 2 to 8, or 16.
        signed: Whether integers are negative too. Unsigned grids without a zero point hold what ReLU gives.
        symmetric: Whether the zero point is 0; otherwise it is where the range puts it.
        narrow: Whether a signed grid leaves out its least integer, so that it has as many levels above as
            below zero. Runtimes want that of 8-bit weights; at few bits the level is worth keeping.
        levels: How the levels lie.

    Raises:
        QuantizationError: There is no such grid.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    levels: Levels = "uniform"

    def __post_init__(self) -> None:
        """Check the width."""
        if isinstance(self.bits, bool) or self.bits not in WIDTHS:
            raise QuantizationError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {self.bits!r}")
        if self.levels not in get_args(Levels):
            raise QuantizationError(f"levels must be one of {get_args(Levels)}, got {self.levels!r}")
        if self.levels == "logarithmic" and not self.symmetric:
            raise QuantizationError("logarithmic levels are symmetric around zero: they have no zero point")

    @property
    def qmin(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def qmax(self) -> int:
        """The greatest integer."""
        return (1 << (self.bits - self.signed)) - 1


def weight_grid(bits: int, levels: Levels = "uniform", *, symmetric: bool = True) -> Grid:
    """Return the grid of weights: signed; symmetric ones of 8 bits and more are narrow."""
    return Grid(bits, symmetric=symmetric, narrow=symmetric and bits >= 8, levels=levels)


def activation_grid(bits: int, *, positive: bool, symmetric: bool, levels: Levels = "uniform") -> Grid:
    """Return the grid of activations.

    Args:
        bits: Width.
        positive: Whether they are never negative, as after ReLU: then all levels are used above zero.
        symmetric: Whether the device knows no zero point; then others than positive ones are signed.
        levels: How the levels lie.
    """
    symmetric = symmetric or levels == "logarithmic"
    return Grid(bits, signed=symmetric and not positive, symmetric=symmetric or positive, levels=levels)


def scale_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point that lay a grid over ranges, each in the shape of `low`.

    Args:
        low: Least values; above 0 they are taken for 0.
        high: Greatest values; below 0 they are taken for 0.
        grid: The grid. For logarithmic levels the scale is the greatest level.

    Raises:
        QuantizationError: A bound is not finite, or a range is upside down.
    """
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise QuantizationError(
            "a range to quantize holds nan or infinity; look for overflow in the network, or for calibration "
            "images that are not finite"
        )
    if (low > high).any():
        raise QuantizationError(f"a range must not be upside down, got {low.tolist()}..{high.tolist()}")
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    zero_point = torch.zeros_like(low)
    if grid.levels == "logarithmic":
        return torch.maximum(-low, high).clamp_min(LEAST_SCALE), zero_point
    if grid.symmetric:
        scale = high / grid.qmax
        if grid.signed:
            scale = torch.maximum(scale, low / grid.qmin)
    else:
        scale = (high - low) / (grid.qmax - grid.qmin)
    scale = scale.clamp_min(LEAST_SCALE)
    if grid.levels == "power_of_two_scale":
        scale = power_of_two(scale)
    if not grid.symmetric:
        zero_point = (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)
    return scale, zero_point


def power_of_two(scale: Tensor) -> Tensor:
    """Return the next power of two that is not smaller: a smaller one would cut the range."""
    return torch.exp2(torch.ceil(torch.log2(scale) - 1e-6))


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return values of one an entry along an axis of `x`, or one for all, so that they broadcast to it."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def integers(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None = None) -> Tensor:
    """Return the integers of uniform levels that stand for numbers, as floats, in the shape of `x`."""
    s, z = along(scale, x, axis), along(zero_point, x, axis)
    return (x / s + z).round().clamp(grid.qmin, grid.qmax)


def quantized(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None = None) -> Tensor:
    """Return the nearest representable numbers, in the shape of `x`; without gradients.

    Logarithmic levels are `scale * 2^-k` for k = 0 .. K, their negatives where the grid is signed, and 0; the
    nearest one is chosen in the logarithm, and 0 below half of the least level. K is what `log_steps` says.

    Source of logarithmic levels: Miyashita et al., "Convolutional Neural Networks using Logarithmic Data
    Representation", 2016, section 3.
    """
    if grid.levels == "logarithmic":
        s = along(scale, x, axis)
        share = (x.abs() / s).clamp_max(1.0)
        steps = log_steps(grid)
        exponent = torch.log2(share.clamp_min(2.0 ** -(steps + 2))).round().clamp_min(-steps)
        level = torch.where(share < 2.0 ** -(steps + 1), torch.zeros_like(x), s * torch.exp2(exponent))
        return level * (torch.sign(x) if grid.signed else (x > 0).to(x))
    q = integers(x, scale, zero_point, grid, axis)
    return (q - along(zero_point, x, axis)) * along(scale, x, axis)


def log_steps(grid: Grid) -> int:
    """Return how often the greatest logarithmic level is halved: one code is zero, one bit may be the sign.

    At most 60 times, below which float32 ends.
    """
    return min((1 << (grid.bits - grid.signed)) - 2, 60)
