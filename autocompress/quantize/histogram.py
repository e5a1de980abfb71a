"""Histograms of what a tensor held, from which ranges for any number of grids are read.

A network is calibrated once for all widths, so data are kept as counts and not as one range.
"""

import math
from typing import Final

import torch
from torch import Tensor

from autocompress.errors import QuantizationError

BINS: Final = 4096
"""Bins of magnitudes. The widest magnitude is in the upper half, so that 2048 and more are in use: as many as
the calibration of NVIDIA starts with."""

_LEAST_EXPONENT: Final = -100
# Of the width of bins, as a power of two: the edges stay normal float32 numbers.

_CHUNK: Final = 1 << 23
# torch.histc counts in float32, which holds integers up to 2^24.


class Histogram:
    """Counts of magnitudes, by sign, in bins that widen as larger values come.

    The width of bins is a power of two. Twice the width is then exactly two bins: nothing is lost or split as
    the histogram grows, and it depends neither on the order of the data nor on the batches they came in.

    Attributes:
        counts: `(2, BINS)`, float64: of values from 0 up, and of negative ones by magnitude.
        width: Of a bin; bin i holds magnitudes from `i * width` up to `(i + 1) * width`.
        least: Least value seen.
        greatest: Greatest value seen.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.counts = torch.zeros(2, BINS, dtype=torch.float64)
        self.width = 2.0**_LEAST_EXPONENT
        self.least, self.greatest = math.inf, -math.inf

    def observe(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape.

        Raises:
            QuantizationError: It is empty, or holds nan or infinity; nothing is counted then.
        """
        least, greatest = bounds(x)
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self._grow(max(-least, greatest))
        parts = torch.split(x.detach().flatten(), _CHUNK)
        for part in parts:
            if greatest >= 0:
                self.counts[0] += self._count(part)
            if least < 0:
                below = self._count(-part)
                # Zeros were counted with the values from 0 up.
                below[0] -= float((part == 0).sum())
                self.counts[1] += below

    def _count(self, x: Tensor) -> Tensor:
        return torch.histc(x.float(), BINS, 0.0, self.width * BINS).to(self.counts)

    def _grow(self, magnitude: float) -> None:
        """Widen bins until the magnitude is inside."""
        if magnitude == 0:
            return  # it is in the first bin at any width, and has no exponent
        exponent = max(math.frexp(magnitude)[1], _LEAST_EXPONENT + BINS.bit_length() - 1)
        factor = round(math.ldexp(1.0, exponent) / (self.width * BINS))
        if factor <= 1:
            return
        self.width *= factor
        if factor >= BINS:
            merged = self.counts.sum(1, keepdim=True)
        else:
            merged = self.counts.reshape(2, BINS // factor, factor).sum(2)
        self.counts = torch.cat([merged, merged.new_zeros(2, BINS - merged.shape[1])], dim=1)

    @property
    def magnitude(self) -> float:
        """The greatest magnitude seen.

        Raises:
            QuantizationError: Nothing was seen.
        """
        if self.least > self.greatest:
            raise QuantizationError("nothing was observed: feed calibration data before asking for a range")
        return max(-self.least, self.greatest)

    def quantile(self, share: float, *, magnitudes: bool = False) -> float:
        """Return the value below which a share of all values lies, to the width of a bin.

        Args:
            share: From 0 to 1.
            magnitudes: Of magnitudes instead of values.
        """
        above, below = self.counts
        edges = (torch.arange(BINS, dtype=torch.float64) + 1) * self.width
        if magnitudes:
            counts, values = above + below, edges
        else:
            # Negative bins, greatest magnitude first; each value is the upper edge.
            counts = torch.cat([below.flip(0), above])
            values = torch.cat([(self.width - edges).flip(0), edges])
        total = counts.cumsum(0)
        at = int(torch.searchsorted(total, share * float(total[-1])))
        value = float(values[min(at, len(values) - 1)])
        return min(
            max(value, 0.0 if magnitudes else self.least), self.magnitude if magnitudes else self.greatest
        )

    def filled(self) -> tuple[Tensor, Tensor]:
        """Return `(bins,)` centres of the bins that hold something, with their sign, and `(bins,)` counts."""
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
        values, counts = torch.cat([centres, -centres]), self.counts.flatten()
        return values[counts > 0], counts[counts > 0]


def bounds(x: Tensor) -> tuple[float, float]:
    """Return least and greatest value.

    Raises:
        QuantizationError: The tensor is empty, or holds nan or infinity.
    """
    if x.numel() == 0:
        raise QuantizationError(f"calibration data must not be empty, got a tensor of shape {tuple(x.shape)}")
    least, greatest = (float(bound) for bound in torch.aminmax(x.detach()))
    # One factor of two below the end of float32, so that the upper edge of a histogram is finite too.
    if not max(-least, greatest) < 2.0**127 or math.isnan(least):
        raise QuantizationError(
            f"calibration data must be finite, got values from {least} to {greatest}; look for overflow in "
            "the network, or for images that are not finite"
        )
    return least, greatest
