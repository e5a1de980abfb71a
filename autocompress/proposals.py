"""What strategies need to propose architectures: a generator of their own, and a memory of what was asked.

Everything here is deterministic in its arguments and the order of calls, and can be pickled.
"""

import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.errors import CostError, RecipeError
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import DISTANCE
from autocompress.trial import Batch

FIRST_DRAWS = 256
MAX_DRAWS = 4096
"""Requests for new random rows grow from the first to the second; nothing new in all means exhausted."""


def random_generator(seed: int) -> np.random.Generator:
    """Return the one generator of a strategy.

    Raises:
        RecipeError: The seed is not an integer of at least 0; `None` would differ from run to run.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise RecipeError(f"seed must be an integer >= 0, got {seed!r}")
    return np.random.default_rng(int(seed))


def check_share(name: str, value: float) -> float:
    """Return an option that is a share, once it is in 0..1.

    Raises:
        RecipeError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecipeError(f"{name} must be in 0..1, got {value!r}")
    return float(value)


def check_count(name: str, value: int, *, at_most: int | None = None) -> int:
    """Return an option that is a count, once it is an integer from 1 on.

    Raises:
        RecipeError: It is not, or is above `at_most`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RecipeError(f"{name} must be an integer >= 1, got {value!r}")
    if at_most is not None and value > at_most:
        raise RecipeError(f"{name} must be in 1..{at_most}, got {value!r}")
    return int(value)


def check_positive(name: str, value: float, *, zero: bool = False) -> float:
    """Return an option that is a finite number above 0, or also 0, once it is.

    Raises:
        RecipeError: It is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise RecipeError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")
    return float(value)


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return an option that is a name, once it is one of those allowed.

    Raises:
        RecipeError: It is not.
    """
    if value not in allowed:
        raise RecipeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


@final
class Asked:
    """The canonical rows that were asked so far."""

    def __init__(self, space: SearchSpace) -> None:
        """Start with none."""
        # One byte a gene for nearly every space: a million rows of 46 genes take 120 MB.
        self._type = np.min_scalar_type(int(space.counts.max()) - 1)
        self._known: set[bytes] = set()

    def __len__(self) -> int:
        """Return how many distinct rows were asked."""
        return len(self._known)

    def fresh(self, codes: Codes, *, at_most: int | None = None) -> Codes:
        """Return the rows never seen before, in their order, and remember those.

        Args:
            codes: Canonical, `(n, choices)`.
            at_most: Stop after this many; what follows is neither returned nor remembered.
        """
        rows = codes.astype(self._type)
        width = rows.shape[1] * rows.itemsize
        packed = rows.tobytes()
        known = self._known
        new: list[int] = []
        for row in range(len(rows)):
            if len(new) == at_most:
                break
            key = packed[row * width : (row + 1) * width]
            if key not in known:
                known.add(key)
                new.append(row)
        return codes if len(new) == len(codes) else codes[new]


def one_by_one(draw: Callable[[], Codes], n: int, choices: int) -> Codes:
    """Return up to `n` rows of `draw`, which gives one at a time, or none where none is left."""
    found: list[Codes] = [np.zeros((0, choices), dtype=np.int64)]
    while len(found) <= n and len(row := draw()):
        found.append(row)
    return np.vstack(found)


def fresh_sample(
    constraints: Constraints, n: int, rng: np.random.Generator, asked: Asked, *, at_least: float = 0.0
) -> Codes:
    """Draw up to `n` feasible architectures that were not asked before, and remember them as asked.

    Always ends: after about 8,000 feasible draws in a row without one new architecture the space counts
    as exhausted. One of N equally likely networks is then overlooked with probability `exp(-8000 / N)`.

    Args:
        constraints: What is feasible.
        n: How many.
        rng: Source of randomness.
        asked: What was asked before.
        at_least: Passed to `Constraints.sample`.

    Returns:
        Canonical codes `(m, choices)`; m < n only where the space is exhausted.
    """
    found: list[Codes] = [np.zeros((0, len(constraints.space.choices)), dtype=np.int64)]
    missing, draws = n, FIRST_DRAWS
    while missing > 0 and draws <= MAX_DRAWS:
        codes = constraints.sample(max(missing, draws), rng, at_least=at_least)
        rows = asked.fresh(codes, at_most=missing)
        draws = FIRST_DRAWS if len(rows) else 2 * draws
        missing -= len(rows)
        found.append(rows)
    return np.vstack(found)


def every_feasible(constraints: Constraints, *, at_most: int) -> Codes | None:
    """Return all networks that fit, in lexicographic order, `(n, choices)`; `None` if there are more.

    Rows grow choice by choice; what no completion of fits is dropped at once.

    Args:
        constraints: What fits.
        at_most: Most rows, also of unfinished ones.
    """
    space = constraints.space
    rows = np.zeros((1, 0), dtype=np.int64)
    for position, count in enumerate(space.counts.tolist()):
        options = np.tile(np.arange(count, dtype=np.int64), len(rows))[:, None]
        rows = np.hstack([np.repeat(rows, count, axis=0), options])
        padded = np.zeros((len(rows), len(space.choices)), dtype=np.int64)
        padded[:, : position + 1] = rows
        # Whether a choice has an effect depends on earlier ones only.
        keep = (options[:, 0] == 0) | space.active(padded)[:, position]
        try:
            for metric, limit in constraints.limits.items():
                keep &= constraints.costs[metric].lower_bound(rows) <= limit
        except CostError:
            return None  # the bounds would need tables that are too large
        rows = rows[keep]
        if len(rows) > at_most:
            return None
    return rows[constraints.feasible(rows)]


def compared_by(batch: Batch, objective: str) -> str:
    """Return the metric that tells networks apart best: the distance where it is told, else the objective."""
    return DISTANCE if DISTANCE in batch.metrics else objective


def qualities(batch: Batch, metric: str) -> dict[bytes, float]:
    """Return by row what was measured of it, turned so that more is better."""
    if metric not in batch.metrics:
        return {}
    sign = -1.0 if metric == DISTANCE else 1.0
    values = batch.metrics[metric]
    return {batch.codes[i].tobytes(): sign * float(values[i]) for i in np.flatnonzero(batch.measured)}
