"""Ranges that are read from a histogram: by percentile, by least error, by least divergence."""

from typing import Final

import torch
from torch import Tensor

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import Grid, quantized, scale_of
from autocompress.quantize.histogram import BINS, Histogram

Range = tuple[Tensor, Tensor]
"""Least and greatest value, each `(1,)` or one a channel."""

SHRINKS: Final = 2.0 ** (-torch.arange(0, 161, dtype=torch.float64) / 16)
"""Shares of the greatest value at which errors are compared: steps of 4 %, down to a thousandth. The error is
flat at its minimum, and data with outliers need small shares, of which even steps have few."""

START_BIN: Final = 128
"""Of the search for the least divergence, as NVIDIA's."""


def as_range(low: float, high: float) -> Range:
    """Return one range for a whole tensor."""
    return torch.tensor([low]), torch.tensor([high])


def percentile_range(histogram: Histogram, grid: Grid, percentile: float) -> Range:
    """Return the range that leaves out a share of the values, each `(1,)`.

    Symmetric signed grids leave out the largest magnitudes; others as large a share at either end.

    Raises:
        QuantizationError: The percentile is not in 50..100, or nothing was observed.
    """
    if not 50 < percentile <= 100:
        raise QuantizationError(f"percentile must be above 50 and at most 100, got {percentile!r}")
    share, magnitude = percentile / 100, histogram.magnitude
    if magnitude == 0:
        return as_range(0.0, 0.0)
    if grid.symmetric and grid.signed:
        limit = histogram.quantile(share, magnitudes=True)
        return as_range(max(histogram.least, -limit), min(histogram.greatest, limit))
    return as_range(histogram.quantile(1 - share), histogram.quantile(share))


def mse_range(histogram: Histogram, grid: Grid) -> Range:
    """Return the range whose quantization error, squared, is least over what was observed; each `(1,)`.

    Both ends shrink together, and then each alone, from where they are.

    Raises:
        QuantizationError: Nothing was observed.
    """
    if histogram.magnitude == 0:
        return as_range(0.0, 0.0)
    values, counts = histogram.filled()
    lows = SHRINKS * min(histogram.least, 0.0)
    highs = SHRINKS * max(histogram.greatest, 0.0)

    def best(low: Tensor, high: Tensor) -> int:
        scale, zero_point = scale_of(low, high, grid)
        rounded = quantized(values.expand(len(low), -1), scale, zero_point, grid, axis=0)
        return int(((rounded - values).square() @ counts).argmin())

    low = high = best(lows, highs)
    if lows[0] < 0 < highs[0]:
        for _ in range(2):
            high = best(lows[low].expand_as(highs), highs)
            low = best(lows, highs[high].expand_as(lows))
    return as_range(float(lows[low]), float(highs[high]))


def kl_range(histogram: Histogram, grid: Grid) -> Range:
    """Return the range whose histogram at the levels of the grid diverges least from the data's; each `(1,)`.

    For every limit of i bins of magnitudes, P is their histogram with the counts beyond the limit added to
    the last bin, and Q is that histogram without them, merged to the levels of the grid and spread back over
    the bins that are not empty; the limit with the least KL(P || Q) is taken, the largest of equal ones. The
    first bin is given the count of the second before: zeros of ReLU would decide alone otherwise.

    Where a zero point moves the grid over values of both signs, half of its levels count for magnitudes.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017; densities, as there, not cumulative sums as in
    HAQ. All limits are compared at once: with groups of bins g of sums S_g and n_g filled bins, the sum of
    P log Q is that of S_g log(S_g / n_g), so that cumulative sums over bins are all that is needed.

    Raises:
        QuantizationError: Levels are logarithmic, or nothing was observed.
    """
    if grid.levels == "logarithmic":
        raise QuantizationError("kl is made for evenly spaced levels; use mse for logarithmic ones")
    magnitude = histogram.magnitude
    unsigned = grid.symmetric and not grid.signed
    counts = histogram.counts[0].clone() if unsigned else histogram.counts.sum(0)
    of_one_sign = histogram.least >= 0 or histogram.greatest <= 0
    levels = 1 << (grid.bits if unsigned or (of_one_sign and not grid.symmetric) else grid.bits - 1)
    counts[0] = counts[1]
    used = min(int(magnitude / histogram.width) + 1, BINS)
    start = max(START_BIN, levels)
    limit = magnitude
    if used > start and counts.sum() > 0:
        divergence = _divergences(counts[:used], levels, start)
        # The last of equal ones, which clips least.
        bins = start + len(divergence) - 1 - int(divergence.flip(0).argmin())
        limit = min(bins * histogram.width, magnitude)
    return as_range(max(histogram.least, -limit), min(histogram.greatest, limit))


def _divergences(counts: Tensor, levels: int, start: int) -> Tensor:
    """Return KL(P || Q) for limits of `start` to all bins."""
    limits = torch.arange(start, len(counts) + 1)
    zero = counts.new_zeros(1)
    sums = torch.cat([zero, counts.cumsum(0)])
    filled = torch.cat([zero, (counts > 0).to(counts).cumsum(0)])
    logs = torch.cat([zero, torch.special.xlogy(counts, counts).cumsum(0)])
    # Bin b is of group b * levels // i: group g starts at the next integer of g * i / levels.
    edges = (torch.arange(levels + 1) * limits[:, None] + levels - 1) // levels
    masses, members = sums[edges].diff(dim=1), filled[edges].diff(dim=1).clamp_min(1)
    crossed = torch.special.xlogy(masses, masses / members).sum(1)
    total, inside, last = sums[-1], sums[limits], counts[limits - 1]
    tail = total - inside
    # P differs from the counts in its last bin alone. Where that is empty and the tail is not, Q has nothing
    # to stand for the tail: the logarithm makes the divergence infinite.
    held = torch.where(last > 0, masses[:, -1] / members[:, -1], zero)
    own = logs[limits] - torch.special.xlogy(last, last) + torch.special.xlogy(last + tail, last + tail)
    other = crossed + torch.special.xlogy(tail, held)
    divergence = (own - other) / total + (inside / total).log()
    return torch.nan_to_num(divergence, nan=torch.inf)
