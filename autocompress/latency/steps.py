"""Staircases: how many channels a device computes at once, learned from times over widths.

Kernels that work on vectors of 8, 16 or 32 channels take as long for 49 channels as for 64. Which step a
device has is learned from rows that differ in one width only; `probe_operations` lists rows worth measuring.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import TableError
from autocompress.latency.keys import parse_op
from autocompress.latency.measure import (
    Item,
    Measurement,
    Progress,
    Stopping,
    Timer,
    measure,
    summarize,
    time_once,
)
from autocompress.latency.plan import row_name
from autocompress.latency.runtime import Blocks, Run, pinned, prepare
from autocompress.latency.samples import SampleFile
from autocompress.latency.target import Target
from autocompress.latency.widths import Axis, at_widths, axes_of, family_of, widths_of
from autocompress.ops import SEPARATOR, Conv2d, OpSpec

Vector = NDArray[Any]

CANDIDATES: Final = (1, 2, 4, 8, 16, 32, 64)
MIN_WIDTHS: Final = 8
# Errors of steps within this factor of the least are alike, and an even rise within the other one is taken
# before any step; a line that rises less than so many errors is flat. With 2 % noise a step of 16 is then
# missed in 4 % of lines, and none is seen in a flat one (tests/latency/test_steps.py).
SIMILAR: Final = 1.5
EVEN_SIMILAR: Final = 1.2
FLAT: Final = 6
PROBE_FROM, PROBE_TO, PROBE_BY, PROBE_FIXED, PROBE_SIZE = 32, 96, 4, 64, 16
PROBE_STOPPING: Final = Stopping(0.02, 24, 24)


@dataclass(frozen=True)
class Staircase:
    """Times over one width, all else equal.

    Attributes:
        family: What was varied, with `*` for every width.
        axis: Which width.
        fixed: The other widths.
        widths: Ascending.
        median_ms: Of the rows.
        step: The number of channels that cost the same; 1 for an even rise and for a flat line.
        flat: Whether the width costs nothing that could be told from noise.
        errors_percent: Candidate step to the mean error of each width predicted by the others on its step (by
            its two neighbours for step 1), in %.
    """

    family: str
    axis: Axis
    fixed: tuple[int, ...]
    widths: tuple[int, ...]
    median_ms: tuple[float, ...]
    step: int
    flat: bool
    errors_percent: Mapping[int, float]


def learn_steps(row_ms: Mapping[str, float]) -> list[Staircase]:
    """Find the step of every line of rows that differ in one width only and have enough widths.

    Args:
        row_ms: Key of a row to its ms. Rows of whole blocks, and operations of a user's own, say nothing of
            single widths and are left out, and so are rows that took no time.
    """
    lines: defaultdict[tuple[str, Axis, tuple[int, ...]], dict[int, float]] = defaultdict(dict)
    for key, ms in row_ms.items():
        if SEPARATOR in key or ms <= 0:
            continue
        try:
            op = parse_op(key)
        except TableError:
            continue
        widths = widths_of(op)
        for index, (axis, _) in enumerate(axes_of(op)):
            fixed = (*widths[:index], *widths[index + 1 :])
            lines[family_of(op), axis, fixed][widths[index]] = ms
    return [
        _fit(family, axis, fixed, times)
        for (family, axis, fixed), times in lines.items()
        if len(times) >= MIN_WIDTHS
    ]


def _fit(family: str, axis: Axis, fixed: tuple[int, ...], times: Mapping[int, float]) -> Staircase:
    widths = np.array(sorted(times))
    ms = np.array([times[width] for width in widths])
    even = _even_error(widths, ms)
    errors = {1: even, **{step: _step_error(widths, ms, step) for step in CANDIDATES[1:]}}
    # All steps explain a flat line, of overhead only; the widest ones have the least noise.
    flat = bool(abs(ms[-1] / ms[0] - 1) <= FLAT * min(errors.values()))
    return Staircase(
        family,
        axis,
        fixed,
        tuple(widths.tolist()),
        tuple(ms.tolist()),
        1 if flat else _best_step(errors),
        flat,
        {step: 100 * error for step, error in errors.items()},
    )


def _best_step(errors: Mapping[int, float]) -> int:
    least = min(errors.values())
    if errors[1] <= EVEN_SIMILAR * least:
        return 1
    # Within a true step, every finer one explains the times as well.
    return max(step for step, error in errors.items() if error <= SIMILAR * least)


def _even_error(widths: Vector, ms: Vector) -> float:
    """Return the mean relative error of each width when it is interpolated between its two neighbours."""
    between = (widths[1:-1] - widths[:-2]) / (widths[2:] - widths[:-2])
    predicted = ms[:-2] + between * (ms[2:] - ms[:-2])
    return float(np.abs(predicted / ms[1:-1] - 1).mean())


def _step_error(widths: Vector, ms: Vector, step: int) -> float:
    """Return the mean relative error of each width when it is predicted by the others on its step.

    Infinite if less than half of the widths share their step with another.
    """
    levels = np.ceil(widths / step)
    errors = []
    for index, level in enumerate(levels):
        others = levels == level
        others[index] = False
        if others.any():
            errors.append(abs(np.median(ms[others]) / ms[index] - 1))
    return float(np.mean(errors)) if len(errors) >= len(widths) / 2 else float("inf")


def steps_of(staircases: Iterable[Staircase]) -> dict[Axis, int]:
    """Return one step an axis: that which explains its staircases together, flat ones left out."""
    lines: dict[Axis, list[Staircase]] = {axis: [] for axis in get_args(Axis)}
    for staircase in staircases:
        lines[staircase.axis].append(staircase)
    return {axis: _common_step(found) for axis, found in lines.items()}


def _common_step(staircases: Sequence[Staircase]) -> int:
    rising = [found for found in staircases if not found.flat]
    if not rising:
        return 1
    pooled = {step: sum(found.errors_percent[step] for found in rising) for step in CANDIDATES}
    return _best_step(pooled)


def probe_steps(
    target: Target,
    *,
    stopping: Stopping = PROBE_STOPPING,
    samples: SampleFile | None = None,
    timer: Timer = time_once,
    prepare: Callable[[Blocks, Target], Run] = prepare,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure the probe operations on a target of this machine; by key of their rows."""
    ops = probe_operations()
    items = [Item(row_name(op.key), partial(prepare, [("block", (op,))], target)) for op in ops]
    with pinned(target):
        found = measure(items, stopping=stopping, samples=samples, timer=timer, progress=progress)
    return {op.key: summarize(found[row_name(op.key)].steady_ms) for op in ops}


def probe_operations() -> list[OpSpec]:
    """Return operations whose times show the steps of a device: some 80 rows, seconds to measure."""
    size, fixed = PROBE_SIZE, PROBE_FIXED
    dense = [Conv2d(fixed, fixed, size, size, kernel=k, activation="relu") for k in (1, 3)]
    depthwise = Conv2d(fixed, fixed, size, size, kernel=3, groups=fixed, activation="relu")
    found: dict[str, OpSpec] = {}
    for op in (*dense, depthwise):
        base = widths_of(op)
        for index in range(len(base)):
            for width in range(PROBE_FROM, PROBE_TO + 1, PROBE_BY):
                varied = at_widths(op, (*base[:index], width, *base[index + 1 :]))
                found[varied.key] = varied
    return list(found.values())
