"""Taking the drift of a shared machine out of interleaved samples.

Another program on the next core, or a change of clock, slows everything that runs in that moment by nearly
the same factor. Neighbours in time, which are other items, say by how much: on a machine under load this
took the difference between two halves of a profile from 16 % to 2 %.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

NEIGHBOURS: Final = 10
"""Samples on each side that say how fast the machine was; some milliseconds."""

SWEEPS: Final = 3
LEAST_MS: Final = 1e-6
"""One nanosecond: a shorter time has no logarithm worth taking."""


def group_medians(values: Vector, groups: NDArray[np.int64], count: int) -> Vector:
    """Return the median of each of `count` groups, shape `(count,)`; every group has a value."""
    order = np.lexsort((values, groups))
    ordered = values[order]
    sizes = np.bincount(groups, minlength=count)
    starts = np.cumsum(sizes) - sizes
    middle: Vector = (ordered[starts + (sizes - 1) // 2] + ordered[starts + sizes // 2]) / 2
    return middle


DISTURBED: Final = 1.5
"""By what the machine must be slower than it typically is for a stretch of samples to be discarded: what
computes and what moves memory then slow down by different factors, and no one factor restores both."""


def without_drift(samples_ms: Sequence[float], items: Sequence[int]) -> tuple[Vector, Vector]:
    """Return samples as they would be at the typical speed of the machine, in ms.

    The logarithm of a sample is that of its item, plus that of the machine in that moment, plus noise.
    Items are medians over their samples; the machine is the median over 20 neighbours in time, the sample
    itself left out, so that noise stays as large as it is. Both are found in turn (median polish). The median
    over all samples of the machine's part is zero.

    Source: Tukey, Exploratory Data Analysis, 1977, chapter 11 (median polish).

    Args:
        samples_ms: In the order of time.
        items: Position of the item of each sample, from 0.

    Returns:
        The samples, unchanged if there are too few for a window; and by what the machine was slower in each
        moment than it typically was, a factor. Both have the shape of the samples.
    """
    values = np.log(np.maximum(np.asarray(samples_ms, dtype=np.float64), LEAST_MS))
    if len(values) <= 2 * NEIGHBOURS:
        return np.exp(values), np.ones(len(values))
    _, groups = np.unique(np.asarray(items, dtype=np.int64), return_inverse=True)
    groups = groups.astype(np.int64)
    count = int(groups.max()) + 1
    machine = np.zeros(len(values))
    for _ in range(SWEEPS):
        residuals = values - group_medians(values - machine, groups, count)[groups]
        padded = np.pad(residuals, NEIGHBOURS, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1)
        others = np.delete(windows, NEIGHBOURS, axis=1)
        machine = np.median(others, axis=1)
        machine = machine - np.median(machine)
    return np.exp(values - machine), np.exp(machine)


def drift_percent(reference_ms: Sequence[float]) -> float | None:
    """Return the greatest difference between the medians of four quarters of time, in % of the median.

    Args:
        reference_ms: Samples of one item, in the order of time; `None` is returned for fewer than 8.
    """
    if len(reference_ms) < 8:
        return None
    quarters = [float(np.median(quarter)) for quarter in np.array_split(reference_ms, 4)]
    return 100 * (max(quarters) - min(quarters)) / float(np.median(reference_ms))
