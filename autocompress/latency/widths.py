"""Latency over widths: a grid of measured channel counts, and piecewise linear prices between them.

A channel search chooses input and output channels of every convolution: far too many pairs to measure. On a
device whose kernels work on whole vectors of channels, the time rises in steps; it is then measured where the
steps end, and a width costs what the end of its step costs.
"""

import dataclasses
import itertools
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from autocompress.errors import TableError
from autocompress.latency.correction import Figures
from autocompress.latency.keys import parse_op
from autocompress.latency.strict import Node
from autocompress.ops import (
    SEPARATOR,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    OpSpec,
    SqueezeExcite,
)

Axis = Literal["in", "out", "channels"]
"""Input and output channels of dense operations; the one width of depthwise and elementwise ones."""

Steps = Mapping[Axis, int]
"""Of how many channels the steps of each axis are; 1 where the time rises evenly."""

EVEN: Final[Steps] = dict.fromkeys(get_args(Axis), 1)
# A narrower grid costs more at the ends of a large range, where a straight line is far from a hyperbola.
DEFAULT_KNOTS: Final = 6


def axes_of(op: OpSpec) -> tuple[tuple[Axis, tuple[str, ...]], ...]:
    """Return the axes along which the width of an operation varies, each with the fields it sets.

    An operation of a user's own has none: it is priced by its own row only.
    """
    if type(op) is Conv2d and op.depthwise:
        return (("channels", ("in_channels", "out_channels", "groups")),)
    if type(op) is Conv2d and op.groups == 1:
        return ("in", ("in_channels",)), ("out", ("out_channels",))
    if type(op) is Linear:
        return ("in", ("in_features",)), ("out", ("out_features",))
    if type(op) is SqueezeExcite:
        return ("channels", ("channels",)), ("out", ("hidden",))
    if type(op) in (GlobalAvgPool, MaxPool, Add):
        return (("channels", ("channels",)),)
    return ()


def widths_of(op: OpSpec) -> tuple[int, ...]:
    """Return the width of an operation along each of its axes."""
    return tuple(getattr(op, names[0]) for _, names in axes_of(op))


def at_widths(op: OpSpec, widths: Sequence[int]) -> OpSpec:
    """Return the operation with other widths, one for each of its axes."""
    pairs = zip(axes_of(op), widths, strict=True)
    fields = {name: width for (_, names), width in pairs for name in names}
    return dataclasses.replace(op, **fields)


def family_of(op: OpSpec) -> str:
    """Return what operations of all widths have in common: the key with `*` for every width."""
    starred = {name for _, names in axes_of(op) for name in names}
    shown = (
        f"{field.name}={'*' if field.name in starred else getattr(op, field.name)}"
        for field in dataclasses.fields(op)
        if field.name in starred or getattr(op, field.name) != field.default
    )
    return f"{type(op).__name__}({','.join(shown)})"


def rounded_up(width: int, step: int) -> int:
    """Return the end of the step that a width is on."""
    return -(-width // step) * step


def rounded_widths(widths: Iterable[int], step: int, *, most: int | None = None) -> tuple[int, ...]:
    """Round channel choices up to the ends of a device's steps: more channels at the same cost.

    Args:
        widths: Channel counts.
        step: Of the device, such as `table steps` reports it.
        most: No width becomes greater; the greatest of `widths` by default.

    Returns:
        Ascending, without repetition.

    Raises:
        TableError: `step` is below 1, or `most` below one of the widths.
    """
    listed = list(widths)
    widest = max(listed, default=0)
    limit = widest if most is None else most
    if step < 1:
        raise TableError(f"step must be at least 1, got {step}")
    if limit < widest:
        raise TableError(f"most must be at least the widest of the widths ({widest}), got {most}")
    return tuple(sorted({min(rounded_up(width, step), limit) for width in listed}))


@dataclass(frozen=True)
class WidthGrid:
    """Which widths of which families are measured.

    Attributes:
        steps: By which widths are rounded up before they are looked up.
        knots: Family to the measured widths of each axis, ascending; every combination has a row.
    """

    steps: Steps
    knots: Mapping[str, tuple[tuple[int, ...], ...]]

    def price(self, op: OpSpec, row_ms: Mapping[str, float]) -> float | None:
        """Return the ms of an operation, multilinear between the steps of the knots around it.

        Args:
            op: Of any widths.
            row_ms: Key of an operation to its measured ms.

        Returns:
            `None` if the family is not in the grid, or a width is outside its knots: nothing is extrapolated.
        """
        axes = self.knots.get(family_of(op))
        if axes is None:
            return None
        corners: list[list[tuple[int, float]]] = []
        for (axis, _), width, knots in zip(axes_of(op), widths_of(op), axes, strict=True):
            # The step of the widest knot may end beyond it: there is no wider operation to measure.
            ends = [rounded_up(knot, self.steps[axis]) for knot in knots]
            end = rounded_up(width, self.steps[axis])
            if width > knots[-1] or end < ends[0]:
                return None
            above = bisect_left(ends, end)
            if ends[above] == end:
                corners.append([(knots[above], 1.0)])
                continue
            share = (end - ends[above - 1]) / (ends[above] - ends[above - 1])
            corners.append([(knots[above - 1], 1 - share), (knots[above], share)])
        return sum(
            math.prod(weight for _, weight in corner)
            * row_ms[at_widths(op, [width for width, _ in corner]).key]
            for corner in itertools.product(*corners)
        )

    @property
    def size(self) -> int:
        """Number of rows: all combinations of knots of all families."""
        return sum(math.prod(map(len, axes)) for axes in self.knots.values())

    def operations(self, ops: Iterable[OpSpec]) -> dict[str, OpSpec]:
        """Return the operations at all knots, by key; `ops` has one or more of each family."""
        found: dict[str, OpSpec] = {}
        seen: set[str] = set()
        for op in ops:
            family = family_of(op)
            if family in self.knots and family not in seen:
                seen.add(family)
                for widths in itertools.product(*self.knots[family]):
                    knot = at_widths(op, widths)
                    found[knot.key] = knot
        return found


def make_grid(ops: Iterable[OpSpec], *, knots: int = DEFAULT_KNOTS, steps: Steps = EVEN) -> WidthGrid:
    """Choose the widths to measure: evenly in the logarithm, on the ends of steps, both extremes among them.

    Args:
        ops: Every operation that will be priced.
        knots: Widths an axis, at most; at least 2.
        steps: Of the device.

    Raises:
        TableError: `knots` is below 2.
    """
    if knots < 2:
        raise TableError(f"a width grid needs at least 2 knots an axis, got {knots}")
    seen: dict[str, list[set[int]]] = {}
    axes: dict[str, list[Axis]] = {}
    for op in ops:
        widths = widths_of(op)
        if widths:
            family = family_of(op)
            sets = seen.setdefault(family, [set() for _ in widths])
            axes.setdefault(family, [axis for axis, _ in axes_of(op)])
            for known, width in zip(sets, widths, strict=True):
                known.add(width)
    return WidthGrid(
        dict(steps),
        {
            family: tuple(
                _knots(widths, knots, steps[axis]) for widths, axis in zip(sets, axes[family], strict=True)
            )
            for family, sets in seen.items()
        },
    )


def _knots(widths: set[int], count: int, step: int) -> tuple[int, ...]:
    most = max(widths)
    # Every width there is, on its step; no wider than the widest.
    places = sorted({min(rounded_up(width, step), most) for width in widths})
    if len(places) <= count:
        return tuple(places)
    goals = np.geomspace(places[0], places[-1], count)
    return tuple(sorted({min(places, key=lambda place: abs(place - goal)) for goal in goals}))


def read_grid(node: Node) -> WidthGrid:
    """Read a grid from JSON.

    Raises:
        TableError: Something is wrong; names the key.
    """
    members = node.object(("steps", "knots"))
    steps = members["steps"].object(get_args(Axis))
    knots: dict[str, tuple[tuple[int, ...], ...]] = {}
    for family, entry in members["knots"].object().items():
        axes = tuple(tuple(width.integer(1) for width in axis.list()) for axis in entry.list())
        if not axes or any(list(axis) != sorted(set(axis)) or not axis for axis in axes):
            raise entry.wrong("lists of widths, ascending, without repetition")
        knots[family] = axes
    return WidthGrid({axis: steps[axis].integer(1) for axis in get_args(Axis)}, knots)


@dataclass(frozen=True)
class WidthReport:
    """How a width grid was measured, and how far it is off between its knots.

    Attributes:
        measured_rows: Rows at knots.
        priced_rows: Different operations of the space, which the grid prices.
        families: Groups of operations that differ in widths only: layers of different shape.
        seconds: Wall-clock time of measuring rows and networks, the last process only if it was resumed.
        held_out_rows: Operations off the knots that were measured to check the interpolation.
        held_out: How interpolated rows differ from measured ones.
    """

    measured_rows: int
    priced_rows: int
    families: int
    seconds: float
    held_out_rows: int
    held_out: Figures

    @property
    def seconds_per_layer(self) -> float:
        """Wall-clock seconds for each layer of different shape."""
        return self.seconds / self.families


def grid_of_rows(row_ms: Mapping[str, float]) -> WidthGrid:
    """Return the grid that rows of single operations form: families with every combination of widths.

    Used to interpolate in tables that were not measured as a grid; the steps of the device are not known.
    """
    seen: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for key in row_ms:
        if SEPARATOR in key:
            continue
        try:
            op = parse_op(key)
        except TableError:
            continue
        if axes_of(op):
            seen[family_of(op)].add(widths_of(op))
    knots = {
        family: tuple(tuple(sorted(set(axis))) for axis in zip(*widths, strict=True))
        for family, widths in seen.items()
    }
    whole = {family: axes for family, axes in knots.items() if len(seen[family]) == math.prod(map(len, axes))}
    return WidthGrid(dict(EVEN), whole)


def ms_of(key: str, row_ms: Mapping[str, float], grid: WidthGrid | None) -> float | None:
    """Return the ms of a row: measured, or else interpolated; `None` if neither is possible."""
    known = row_ms.get(key)
    if known is not None or grid is None or SEPARATOR in key:
        return known
    try:
        return grid.price(parse_op(key), row_ms)
    except TableError:
        return None  # an operation of a user's own
