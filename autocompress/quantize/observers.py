"""Observers: what is fed batches of a tensor and then says which range a grid should be laid over."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import Grid, quantized, scale_of
from autocompress.quantize.histogram import Histogram, bounds
from autocompress.quantize.ranges import Range, kl_range, mse_range, percentile_range

SHRINK_STEPS: Final = 80
"""Shares 1.00, .99, .. .21 of the least and greatest weight at which errors are compared.

Source: Li et al., BRECQ, ICLR 2021, the search for scales of its published settings.
"""

COARSE: Final = 4
"""Of which every fourth is tried first: a third of the time for the same errors, to 1 % (tests)."""


class Observer(ABC):
    """Sees batches of a tensor, once for all grids."""

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take a batch into account; shapes may differ between batches, but for observed channels.

        Raises:
            QuantizationError: It is empty, holds nan or infinity, or has other channels than before. A tensor
                of zeros alone is legal: a channel behind ReLU can be dead.
        """

    @abstractmethod
    def range(self, grid: Grid) -> Range:
        """Return least and greatest value to be represented, `(1,)` or one a channel; for `scale_of`.

        Raises:
            QuantizationError: Nothing was observed, or there is no such range for the grid.
        """


@final
class MinMax(Observer):
    """From the least to the greatest value.

    Args:
        axis: Along which channels lie that have a range each; `None` for one range.
        momentum: Of what was seen before, for moving averages over batches; `None` for the extremes of all.
    """

    def __init__(self, axis: int | None = None, momentum: float | None = None) -> None:
        """Start with nothing."""
        if momentum is not None and not 0 <= momentum < 1:
            raise QuantizationError(f"momentum must be in 0..1, without 1, got {momentum!r}")
        self.axis, self.momentum = axis, momentum
        self._range: Range | None = None

    def observe(self, x: Tensor) -> None:
        """Take a batch into account."""
        bounds(x)
        low, high = extremes(x.detach(), self.axis)
        if self._range is not None:
            before_low, before_high = self._range
            if low.shape != before_low.shape:
                raise QuantizationError(
                    f"axis {self.axis} must have {len(before_low)} channels in every batch, got {len(low)}"
                )
            if self.momentum is None:
                low, high = torch.minimum(low, before_low), torch.maximum(high, before_high)
            else:
                low = before_low + (1 - self.momentum) * (low - before_low)
                high = before_high + (1 - self.momentum) * (high - before_high)
        self._range = low, high

    def range(self, grid: Grid) -> Range:
        """Return the range; the same for all grids."""
        if self._range is None:
            raise QuantizationError("nothing was observed: feed calibration data before asking for a range")
        return self._range


@final
class HistogramObserver(Observer):
    """A range read from the histogram of the whole tensor.

    Args:
        read: Returns the range of a histogram for a grid.
        histogram: Where to count; observers of several methods can share one, and one of them is fed.
    """

    def __init__(self, read: Callable[[Histogram, Grid], Range], histogram: Histogram | None = None) -> None:
        """Start with an empty histogram, if none is given."""
        self.read = read
        self.histogram = Histogram() if histogram is None else histogram

    def observe(self, x: Tensor) -> None:
        """Count a batch."""
        self.histogram.observe(x)

    def range(self, grid: Grid) -> Range:
        """Read the range for a grid."""
        return self.read(self.histogram, grid)


def default_percentile(histogram: Histogram, grid: Grid) -> Range:
    """Return the range of 99.99 % of the values."""
    return percentile_range(histogram, grid, 99.99)


READERS: Final[Mapping[str, Callable[[Histogram, Grid], Range]]] = {
    "percentile": default_percentile,
    "mse": mse_range,
    "kl": kl_range,
}
"""Methods that read a histogram."""

OBSERVERS: Final[Mapping[str, Callable[[], Observer]]] = {
    "minmax": MinMax,
    "moving_average": lambda: MinMax(momentum=0.9),
    **{name: partial(HistogramObserver, read) for name, read in READERS.items()},
}
"""Observers of one range for a tensor, by the name of the method."""


def observer(method: str) -> Observer:
    """Make an observer of one range for a tensor.

    Raises:
        QuantizationError: There is no such method.
    """
    if method not in OBSERVERS:
        raise QuantizationError(f"method must be one of {', '.join(OBSERVERS)}, got {method!r}")
    return OBSERVERS[method]()


def extremes(x: Tensor, axis: int | None) -> Range:
    """Return least and greatest value, `(1,)` or one an entry of an axis."""
    if axis is None:
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)
    low, high = torch.aminmax(x.movedim(axis, 0).flatten(1), dim=1)
    return low, high


def weight_range(weight: Tensor, grid: Grid, axis: int | None = None, method: str = "mse") -> Range:
    """Return the range of weights to be represented, `(1,)` or one an entry of an axis.

    Args:
        weight: Of any shape.
        grid: The grid that will be laid over the range.
        axis: Along which channels lie that have a range each.
        method: `minmax`; `mse`, whose error is least of `SHRINK_STEPS` shares of it; `percentile`; `kl`.

    Raises:
        QuantizationError: There is no such method for weights, or weights are not finite.
    """
    bounds(weight)
    weight = weight.detach()
    if method in ("minmax", "mse"):
        low, high = extremes(weight, axis)
        return (low, high) if method == "minmax" else _least_error(weight, low, high, grid, axis)
    if method not in READERS:
        names = ", ".join(("minmax", *READERS))
        raise QuantizationError(f"the method for weights must be one of {names}, got {method!r}")
    ranges = []
    for channel in (weight,) if axis is None else weight.unbind(axis):
        histogram = Histogram()
        histogram.observe(channel)
        ranges.append(READERS[method](histogram, grid))
    lows, highs = zip(*ranges, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _least_error(weight: Tensor, low: Tensor, high: Tensor, grid: Grid, axis: int | None) -> Range:
    """Return the share of each range at which the squared error of its weights is least."""
    rows = (weight[None] if axis is None else weight.movedim(axis, 0)).flatten(1).contiguous()
    room = torch.empty_like(rows)
    least = torch.full_like(low, torch.inf)
    best = torch.zeros_like(low)

    def compare(steps: Tensor) -> None:
        nonlocal least, best
        share = 1 - steps / 100
        error = _squared_error(rows, *scale_of(share * low, share * high, grid), grid, room)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, steps, best)

    # The error has one valley, but for ripples: every fourth share first, then those around the best.
    for step in range(0, SHRINK_STEPS, COARSE):
        compare(torch.full_like(low, step))
    coarse = best
    for offset in (*range(1 - COARSE, 0), *range(1, COARSE)):
        compare((coarse + offset).clamp(0, SHRINK_STEPS - 1))
    return (1 - best / 100) * low, (1 - best / 100) * high


def _squared_error(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, room: Tensor) -> Tensor:
    """Return the squared error of each row; `quantized` in place, which takes half of the time."""
    if grid.levels == "logarithmic":
        return (quantized(rows, scale, zero_point, grid, 0) - rows).square().sum(1)
    s, z = scale[:, None], zero_point[:, None]
    torch.div(rows, s, out=room)
    room.add_(z).round_().clamp_(grid.qmin, grid.qmax).sub_(z).mul_(s).sub_(rows)
    return room.square_().sum(1)
