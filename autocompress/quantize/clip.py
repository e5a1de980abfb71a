"""Clip and quantize: small weights become zero, the others share levels; rate and bits are chosen together.

Source: Tung & Mori, "CLIP-Q: Deep Network Compression Learning by In-Parallel Pruning-Quantization", CVPR
2018, section 3.1. There rate and bits of each layer are found by Bayesian optimization; here the hundred and
more combinations of one layer are all tried, on its weights alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.codebook import huffman_lengths

RATES: Final = tuple(step / 20 for step in range(19))
"""0 to .9: AlexNet's layers ended at .21 to .96 in the source."""

BITS: Final = tuple(range(2, 9))


def clip_and_quantize(weight: Tensor, rate: float, bits: int) -> tuple[Tensor, Tensor]:
    """Return clipped and quantized weights, and for each the index of its level.

    The share `rate` of positive weights that are smallest becomes 0, and as large a share of negative ones.
    What is left of the axis on both sides is divided evenly into 2^bits - 1 intervals; the level of each is
    the mean of its weights. Index 0 is zero.

    Args:
        weight: Of any shape.
        rate: 0 to below 1.
        bits: 2 to 8.

    Raises:
        QuantizationError: Rate or bits are out of range.
    """
    _check(rate, bits)
    flat = weight.detach().flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    ends = []
    for sign in (-1, 1):
        side = flat * sign
        values = side[side > 0].sort().values
        left = values[math.floor(rate * len(values)) :]
        if len(left):
            kept |= side >= left[0]
            ends.append((float(left[0]), float(left[-1])))
        else:
            ends.append((0.0, 0.0))
    (low, far_low), (high, far_high) = ends
    levels = (1 << bits) - 1
    # Both sides are laid end to end, so that each has intervals in proportion to its length. The side with
    # weights of one magnitude alone has no length, and still needs a level.
    below, above = far_low - low, far_high - high
    share = below / (below + above) if below + above > 0 else 0.5
    negative = min(max(round(levels * share), int(far_low > 0)), levels - int(far_high > 0))
    index = torch.zeros_like(flat, dtype=torch.int64)
    for side, start, length, count, first in (
        (-flat, low, below, negative, 1),
        (flat, high, above, levels - negative, 1 + negative),
    ):
        of_side = kept & (side > 0)
        if of_side.any():
            place = (side[of_side] - start) / max(length, 1e-30) * count
            index[of_side] = first + place.long().clamp(0, count - 1)
    sums = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, index, flat.double())
    means = sums / torch.bincount(index, minlength=levels + 1).clamp_min(1)
    means[0] = 0.0
    return means[index].to(weight).reshape(weight.shape), index.reshape(weight.shape)


class _ClipQ(torch.autograd.Function):
    """Clip and quantize; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rate: float, bits: int) -> Tensor:
        """Return the levels of the weights."""
        return clip_and_quantize(weight, rate, bits)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the weights, clipped ones too: they can come back."""
        return gradients[0], None, None


class ClippedWeights(nn.Module):
    """A quantizer of weights that clips and quantizes them anew in every pass: `QuantizedLayer(weight=...)`.

    The layer's own weights stay in floating point and learn; after the last step `clip_and_quantize` gives
    what is stored.

    Args:
        rate: Share of weights that are 0.
        bits: Of an index of a level.

    Raises:
        QuantizationError: Rate or bits are out of range.
    """

    def __init__(self, rate: float, bits: int) -> None:
        """Hold rate and bits."""
        super().__init__()
        _check(rate, bits)
        self.rate, self.bits = rate, bits

    def forward(self, weight: Tensor) -> Tensor:
        """Return the levels of the weights, in their shape."""
        return cast(Tensor, _ClipQ.apply(weight, self.rate, self.bits))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Say what it does."""
        return f"rate={self.rate}, {self.bits} bits"


@dataclass(frozen=True)
class Clipping:
    """Rate and bits of a layer, and what they cost.

    Attributes:
        rate: Share of weights that are 0.
        bits: Of an index of a level.
        size_bytes: Indices in a Huffman code with its table, zeros among them, and 4 bytes a level.
        error: Squared error of the weights relative to their squares; smaller is better.
    """

    rate: float
    bits: int
    size_bytes: int
    error: float


def clippings(
    weight: Tensor, *, rates: Sequence[float] = RATES, bits: Sequence[int] = BITS
) -> tuple[Clipping, ...]:
    """Return what each combination of rate and bits costs a layer, in rising order of rates, then bits."""
    energy = float(weight.detach().double().square().sum())
    result = []
    for rate in rates:
        for width in bits:
            rounded, index = clip_and_quantize(weight, rate, width)
            counts = torch.bincount(index.flatten(), minlength=1 << width).tolist()
            lengths = huffman_lengths(counts)
            coded = sum(times * length for times, length in zip(counts, lengths, strict=True))
            size = math.ceil(coded / 8) + 5 * len(counts)
            squares = float((rounded - weight.detach()).double().square().sum())
            result.append(Clipping(rate, width, size, squares / energy if energy else 0.0))
    return tuple(result)


def choose_clipping(options: Sequence[Clipping], weights: int, price: float) -> Clipping:
    """Return the combination whose error plus price times size, as a share of 32-bit floats, is least.

    One price for all layers spends the bytes where they save the most error.

    Args:
        options: Of `clippings`.
        weights: How many weights the layer has.
        price: Of the whole size, in relative error; 0 takes the least error, of equal ones the smallest.

    Raises:
        QuantizationError: There are no options, or the price is negative.
    """
    if not options or price < 0:
        raise QuantizationError(f"there must be options and a price of 0 or more, got {price!r}")
    return min(options, key=lambda o: (o.error + price * o.size_bytes / (4 * weights), o.size_bytes))


def _check(rate: float, bits: int) -> None:
    if not 0 <= rate < 1:
        raise QuantizationError(f"rate must be 0 or more and below 1, got {rate!r}")
    if isinstance(bits, bool) or bits not in BITS:
        raise QuantizationError(f"bits must be {BITS[0]}..{BITS[-1]}, got {bits!r}")
