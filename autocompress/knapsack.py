"""Dynamic programming for a separable value under one separable limit: the multiple-choice knapsack.

Labels, pairs of cost and value that a prefix of the choices can reach, are extended choice by choice. Those
that another label dominates are dropped, and those that cannot beat the best known network even with the
linear relaxation of what is left. With integer costs there are never more labels than cost units within the
limit: this is the textbook's table without its empty cells. With other costs it is as exact.

Source: Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11: the relaxation on convex hulls,
the reduction of options by it, and dynamic programming with dominance.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Values

# Sums in two orders differ in their last bits.
ROUNDING = 1e-12
Found = tuple[list[int] | None, float, bool]
"""Options, a lower bound of all values, and whether the options are proven; no options: nothing fits."""

# Labels after one choice; to extend so many by 50 options takes some 200 MB.
MAX_LABELS = 100_000


@dataclass(frozen=True, eq=False)
class _Choice:
    """The useful options of one choice, by rising cost and falling value."""

    codes: NDArray[np.int64]
    costs: Values
    values: Values

    def only(self, kept: NDArray[np.bool_]) -> "_Choice":
        return _Choice(self.codes[kept], self.costs[kept], self.values[kept])

    def hull(self) -> NDArray[np.int64]:
        """Return the options on the lower convex hull of value over cost, by rising cost."""
        chain: list[int] = []
        for point in range(len(self.costs)):
            while len(chain) > 1:
                before, last = chain[-2], chain[-1]
                run, rise = self.costs[last] - self.costs[before], self.values[last] - self.values[before]
                far = self.costs[point] - self.costs[before], self.values[point] - self.values[before]
                if rise * far[0] < far[1] * run:
                    break
                chain.pop()
            chain.append(point)
        return np.array(chain, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Relaxation:
    """The linear relaxation of some choices for every room: linear between corners, which are real.

    Attributes:
        costs: Rising, `(corners,)`.
        values: Falling, `(corners,)`.
        steps: Which choice goes one option up its hull from each corner to the next, `(corners - 1,)`.
    """

    costs: Values
    values: Values
    steps: NDArray[np.int64]


class _Choices:
    """All choices, and their steps along the hulls, the most efficient first."""

    def __init__(self, choices: Sequence[_Choice]) -> None:
        self.choices = choices
        self.hulls = [choice.hull() for choice in choices]
        pairs = list(zip(choices, self.hulls, strict=True))
        costs = np.concatenate([np.diff(choice.costs[hull]) for choice, hull in pairs])
        values = np.concatenate([np.diff(choice.values[hull]) for choice, hull in pairs])
        owners = np.repeat(np.arange(len(choices)), [len(hull) - 1 for hull in self.hulls])
        self.slopes = values / costs
        order = np.argsort(self.slopes, kind="stable")
        self.slopes, self._costs, self._values = self.slopes[order], costs[order], values[order]
        self._owners = owners[order]

    def relaxed(self, first: int) -> _Relaxation:
        """Return the relaxation of the choices from `first` on."""
        rest = self._owners >= first
        cost = sum(float(choice.costs[0]) for choice in self.choices[first:])
        value = sum(float(choice.values[0]) for choice in self.choices[first:])
        return _Relaxation(
            np.cumsum(np.append(cost, self._costs[rest])),
            np.cumsum(np.append(value, self._values[rest])),
            self._owners[rest],
        )

    def completion(self, first: int, corner: int) -> list[int]:
        """Return the codes of the choices from `first` on at one corner of their relaxation."""
        taken = np.bincount(self.relaxed(first).steps[:corner], minlength=len(self.choices))
        return [
            int(self.choices[choice].codes[self.hulls[choice][taken[choice]]])
            for choice in range(first, len(self.choices))
        ]


def _efficient(costs: Values, values: Values) -> _Choice:
    """Return the options that no other dominates."""
    order = np.lexsort((values, costs))
    kept = order[_falling(values[order])]
    return _Choice(kept, costs[kept], values[kept])


def _falling(values: Values) -> NDArray[np.bool_]:
    """Return which entries are less than all before them."""
    return values < np.minimum.accumulate(np.append(np.inf, values))[:-1]


def search(values: Sequence[Values], costs: Sequence[Values], room: float, deadline: float) -> Found:
    """Find the options of least value in sum whose costs in sum are at most `room`.

    Args:
        values: Of the options of each choice, `(options,)`.
        costs: Likewise.
        room: May be infinite.
        deadline: Of `time.monotonic`, when to stop with what there is.

    Returns:
        Options, a lower bound of all values, and whether the options are proven; not if the time or
        `MAX_LABELS` ran out.
    """
    choices = [_efficient(*tables) for tables in zip(costs, values, strict=True)]
    whole = _Choices(choices)
    relaxed = whole.relaxed(0)
    if relaxed.costs[0] > room:
        return None, math.inf, True
    corner = int(np.searchsorted(relaxed.costs, room, side="right")) - 1
    best, codes = float(relaxed.values[corner]), whole.completion(0, corner)
    if corner == len(relaxed.steps):
        return codes, best, True  # all that can be gained fits
    tolerance = ROUNDING * float(np.abs(relaxed.values).max())
    reduced = _reduced(choices, -float(whole.slopes[corner]), room, best - tolerance)
    if not all(len(choice.codes) for choice in reduced):
        return codes, best, True
    return _improved(_Choices(reduced), room, (codes, best), tolerance, deadline)


def _improved(
    core: _Choices, room: float, known: tuple[list[int], float], tolerance: float, deadline: float
) -> Found:
    """Extend labels choice by choice, as long as they can be better than what is known."""
    codes, best = known
    costs, values = np.zeros(1), np.zeros(1)
    stages: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of each label: parent, option
    for stage, choice in enumerate(core.choices):
        rest = core.relaxed(stage + 1)
        costs, values = np.add.outer(costs, choice.costs).ravel(), np.add.outer(values, choice.values).ravel()
        corners = np.searchsorted(rest.costs, room - costs, side="right") - 1
        reached = np.where(corners >= 0, values + rest.values[corners], np.inf)
        first = int(reached.argmin())
        if reached[first] < best:
            best = float(reached[first])
            parent, option = divmod(first, len(choice.codes))
            codes = [*traced([c.codes for c in core.choices], stages, parent), int(choice.codes[option])]
            codes += core.completion(stage + 1, int(corners[first]))
        lower = np.where(corners >= 0, values + np.interp(room - costs, rest.costs, rest.values), np.inf)
        kept = np.flatnonzero(lower < best - tolerance)
        kept = kept[np.lexsort((values[kept], costs[kept]))]
        kept = kept[_falling(values[kept])]
        if not len(kept):
            break
        if len(kept) > MAX_LABELS or time.monotonic() > deadline:
            return codes, min(best, float(lower[kept].min())), False
        stages.append((kept // len(choice.codes), kept % len(choice.codes)))
        costs, values = costs[kept], values[kept]
    return codes, best, True


def _reduced(choices: Sequence[_Choice], price: float, room: float, below: float) -> list[_Choice]:
    """Leave out options with which no solution is below a value, by the Lagrangian bound at one price."""
    charged = [choice.values + price * choice.costs for choice in choices]
    bound = sum(float(charges.min()) for charges in charged) - price * room
    return [
        choice.only(bound + charges - charges.min() < below)
        for choice, charges in zip(choices, charged, strict=True)
    ]


def traced(
    codes: Sequence[NDArray[np.int64]],
    stages: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    label: int,
) -> list[int]:
    """Return the codes that lead to a label of the last stage.

    Args:
        codes: Of the options of each choice.
        stages: For each choice so far, the parent and the option of every label.
        label: Its number.
    """
    path = []
    for choice, (parents, options) in zip(reversed(codes[: len(stages)]), reversed(stages), strict=True):
        path.append(int(choice[options[label]]))
        label = int(parents[label])
    return path[::-1]
