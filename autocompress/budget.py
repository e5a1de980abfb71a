"""Budgets, and the architectures of a space that fit one.

A `Budget` is what a person writes: limits, absolute or in percent of the largest network. Resolved against
a space and its costs it becomes `Constraints`, which price, check and draw architectures.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import METRIC_UNITS, Cost, Values
from autocompress.errors import BudgetError, CostError, InfeasibleBudgetError
from autocompress.space import Codes, SearchSpace
from autocompress.tilting import Tilted, tilted

_THOUSANDS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS: dict[str, dict[str, float]] = {
    "latency_ms": {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3},
    "macs": _THOUSANDS,
    "params": _THOUSANDS,
    "size_bytes": _THOUSANDS | _BYTES,
    "bops": _THOUSANDS,
    "peak_activation_bytes": _THOUSANDS | _BYTES,
    "energy_mj": {"": 1.0, "mJ": 1.0, "uJ": 1e-3, "J": 1e3},
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)\s*")

# Costs are sums of floats, which differ in their last bits with the order: a limit is met up to those.
ROUNDING = 1e-12

# Draws for one request before the sampler stops rejecting and constructs instead.
MAX_REJECTED_DRAWS = 100_000
# So many draws a round for each network that is missing, within bounds.
DRAWS_PER_MISSING, LEAST_DRAWS, MOST_DRAWS = 4, 256, 4_096
# Draws are tilted where certainly no larger share of all genes fits.
TIGHT = 0.3


def not_below(value: float) -> str:
    """Write a number with six digits, never below itself: a budget that is typed back must be feasible."""
    text = f"{value:.6g}"
    if float(text) >= value:
        return text
    # One unit of the sixth digit more.
    return f"{float(text) + 10.0 ** (math.floor(math.log10(value)) - 5):.6g}"


# Why a metric may have no cost.
_WITHOUT = {
    "latency_ms": " (latency needs a latency table)",
    "peak_activation_bytes": " (the peak of a cell is no sum: it needs all settings of it to be looked at)",
}


@dataclass(frozen=True)
class Limit:
    """At most `value`, absolute in the metric's unit or in percent of the largest network."""

    metric: str
    value: float
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.metric} <= {self.value:g}{'%' if self.percent else ''}"


def parse_limit(metric: str, value: float | str) -> Limit:
    """Read one limit.

    Args:
        metric: A metric of `METRIC_UNITS`, or `flops`, which means `macs`: as in the pruning and NAS
            literature and in thop, a multiply-accumulate counts once.
        value: A number in the metric's unit, or text such as `"60%"`, `"300M"`, `"2.5ms"`, `"4MiB"`.

    Raises:
        BudgetError: Unknown metric, wrong unit, or not a positive number.
    """
    metric = "macs" if metric == "flops" else metric
    if metric not in METRIC_UNITS:
        raise BudgetError(f"a budget limits {', '.join(METRIC_UNITS)} or flops (MACs), not {metric!r}")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise BudgetError(f"{metric} must be a number such as 300, '60%' or '300M', got {value!r}")
        number, unit = float(match[1]), match[2]
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{metric} must be a number or text, got {value!r}")
    else:
        # An integer may be too large for a float.
        number, unit = float(value) if abs(value) < sys.float_info.max else math.inf, ""
    units = _UNITS[metric] | {"%": 1.0}
    if unit not in units:
        allowed = ", ".join(repr(name) for name in _UNITS[metric] if name)
        raise BudgetError(f"{metric} takes no unit, {allowed} or '%', got {unit!r} in {value!r}")
    number *= units[unit]
    if not 0 < number < math.inf:
        raise BudgetError(f"{metric} must be positive and finite, got {value!r}")
    return Limit(metric, number, percent=unit == "%")


def limits_of(text: str) -> dict[str, float | str]:
    """Split `"latency_ms=60%,flops=300M"` into metric and limit.

    Raises:
        BudgetError: It reads otherwise, or limits a metric twice.
    """
    pairs: dict[str, float | str] = {}
    for part in text.split(","):
        metric, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise BudgetError(f"a budget reads metric=limit[,metric=limit], got {part!r} in {text!r}")
        if metric in pairs:
            raise BudgetError(f"a budget limits each metric once, got {metric!r} twice in {text!r}")
        pairs[metric] = value
    return pairs


@dataclass(frozen=True)
class Budget:
    """Limits on several metrics at once, at most one each; all must hold."""

    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        """Refuse an empty budget and a metric limited twice."""
        metrics = [limit.metric for limit in self.limits]
        if not metrics:
            raise BudgetError(f"a budget needs at least one limit on {', '.join(METRIC_UNITS)}")
        if len(set(metrics)) != len(metrics):
            raise BudgetError(f"a budget limits each metric once, got {metrics}")

    @classmethod
    def of(cls, limits: Mapping[str, float | str]) -> "Budget":
        """Make a budget from metric and limit, for example `{"latency_ms": "60%", "flops": "300M"}`."""
        return cls(tuple(parse_limit(metric, value) for metric, value in limits.items()))

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `"latency_ms=60%,flops=300M"`."""
        return cls.of(limits_of(text))

    def __str__(self) -> str:
        return ", ".join(str(limit) for limit in self.limits)

    def resolve(self, space: SearchSpace, costs: Iterable[Cost]) -> "Constraints":
        """Make the limits absolute and make sure that some architecture fits all of them.

        Percentages are of the cost of the largest network: the last option of every choice.

        Args:
            space: The space.
            costs: Its costs; each metric of the budget must be among them.

        Raises:
            BudgetError: A limited metric has no cost, for example latency without a table.
            InfeasibleBudgetError: Nothing fits; says the reachable minimum and the nearest feasible budget.
        """
        by_metric = {cost.metric: cost for cost in costs}
        absolute = {}
        for limit in self.limits:
            if limit.metric not in by_metric:
                raise BudgetError(
                    f"the budget limits {limit.metric}, but there is no such cost here; priced are "
                    f"{', '.join(by_metric)}" + _WITHOUT.get(limit.metric, "")
                )
            largest = float(by_metric[limit.metric].of(space.largest())[0])
            value = limit.value / 100 * largest if limit.percent else limit.value
            absolute[limit.metric] = value * (1 + ROUNDING)
        constraints = Constraints(space, by_metric, absolute)
        constraints.check_feasible()
        return constraints


@dataclass(frozen=True, eq=False)
class Constraints:
    """The feasible part of a space: costs, and absolute limits on some of them.

    Attributes:
        space: The space.
        costs: Every priced metric, limited or not.
        limits: Metric to absolute limit; empty means that everything is feasible.
    """

    space: SearchSpace
    costs: Mapping[str, Cost]
    limits: Mapping[str, float]

    def price(self, codes: Codes) -> dict[str, Values]:
        """Return every cost of every row, metric to `(n,)`."""
        return {metric: cost.of(codes) for metric, cost in self.costs.items()}

    def violation(self, codes: Codes) -> Values:
        """Return the largest relative excess over any limit, `(n,)`; at most 0 is feasible."""
        worst = np.full(len(codes), -np.inf)
        for metric, limit in self.limits.items():
            np.maximum(worst, self.costs[metric].of(codes) / limit - 1.0, out=worst)
        return worst

    def feasible(self, codes: Codes) -> NDArray[np.bool_]:
        """Return which rows fit every limit, `(n,)`."""
        holds = np.ones(len(codes), dtype=np.bool_)
        for metric, limit in self.limits.items():
            holds &= self.costs[metric].of(codes) <= limit
        return holds

    def check_feasible(self) -> None:
        """Make sure that some architecture fits all limits.

        Raises:
            InfeasibleBudgetError: Names the reachable minimum of every metric and the nearest feasible
                budget: all limits that are too tight raised by the same smallest factor.
        """
        minima = {metric: self.costs[metric].minimum for metric in self.limits}
        if any(minima[metric] > limit for metric, limit in self.limits.items()):
            nearest = {metric: max(limit, minima[metric]) for metric, limit in self.limits.items()}
            if len(self.limits) > 1:
                nearest = Constraints(self.space, self.costs, nearest)._loosened()
            raise self._infeasible(minima, nearest)
        if len(self.limits) > 1 and self.witness is None:
            raise self._infeasible(minima, self._loosened())

    def _infeasible(self, minima: dict[str, float], nearest: dict[str, float]) -> InfeasibleBudgetError:
        asked = ", ".join(f"{metric} <= {limit:.6g}" for metric, limit in self.limits.items())
        reach = ", ".join(f"{metric} {value:.6g}" for metric, value in minima.items())
        near = ", ".join(f"{metric} <= {not_below(value)}" for metric, value in nearest.items())
        jointly = " one by one" if len(self.limits) > 1 else ""
        return InfeasibleBudgetError(
            f"no network of space {self.space.name!r} fits {asked}; the reachable minimum{jointly} is "
            f"{reach}; the nearest feasible budget is {near}",
            nearest,
        )

    @cached_property
    def witness(self) -> Codes | None:
        """One feasible row `(1, choices)`, `None` if there is none; exact, by integer programming."""
        if not self.limits:
            return self.space.smallest()
        tries = [self.space.smallest(), *(self.costs[metric].argmin() for metric in self.limits)]
        candidates = self.space.canonical(np.vstack(tries))
        fitting = candidates[self.feasible(candidates)]
        if len(fitting):
            return fitting[:1]
        if len(self.limits) == 1:
            return None  # the minimum itself does not fit
        from autocompress.milp import least_excess

        excess, codes = least_excess(self.costs, self.limits)
        codes = self.space.canonical(codes)
        return codes if excess <= 0 and self.feasible(codes)[0] else None

    def _loosened(self) -> dict[str, float]:
        """The limits, those that bind raised together as little as possible."""
        from autocompress.milp import least_excess

        _, codes = least_excess(self.costs, self.limits)
        return {m: max(limit, float(self.costs[m].of(codes)[0])) for m, limit in self.limits.items()}

    def sample(self, n: int, rng: np.random.Generator, *, at_least: float = 0.0) -> Codes:
        """Draw `n` feasible architectures, uniform over genes, given that they fit; always ends.

        Draws that do not fit are rejected, up to 100,000 of them; under tight budgets draws are tilted
        towards cheap networks, and rejected so that the same distribution remains. What is then still
        missing (limits that hardly any network meets jointly) is constructed choice by choice, each option
        uniform among those from which every limit can still be met; such rows fit, but are not distributed
        as the rejected ones would have been.

        Args:
            n: How many.
            rng: Source of randomness.
            at_least: Also ask for at least this share of some limit, so that random networks are compared
                at the same budget and not far below it; ignored for rows that are constructed.

        Returns:
            Canonical codes `(n, choices)`, all feasible. Repetitions are possible.

        Raises:
            InfeasibleBudgetError: Nothing fits.
        """
        kept: list[Codes] = [np.zeros((0, len(self.space.choices)), dtype=np.int64)]
        count = drawn = 0
        while count < n and drawn < MAX_REJECTED_DRAWS:
            wanted = n - count
            # Nearly all the time of a few draws goes into the calls, not into the draws.
            draws = min(max(LEAST_DRAWS, DRAWS_PER_MISSING * wanted), MOST_DRAWS) if self.limits else wanted
            codes = self._drawn(draws, rng)
            drawn += draws
            if at_least > 0 and self.limits:
                codes = codes[self.violation(codes) >= at_least - 1.0]
            kept.append(codes[:wanted])
            count += len(kept[-1])
        if count < n:
            kept.append(self._construct(n - count, rng))
        return np.vstack(kept)

    def _drawn(self, n: int, rng: np.random.Generator) -> Codes:
        """Return those of `n` draws that fit."""
        if self._tilted is None:
            codes = self.space.sample(n, rng)
        else:
            genes, probabilities = self._tilted.draw(n, rng)
            codes = self.space.canonical(genes[rng.random(n) < probabilities])
        return codes[self.feasible(codes)]

    @cached_property
    def _tilted(self) -> Tilted | None:
        """How to draw under tight limits; `None` where they are not, or where that takes large tables."""
        if not self.limits:
            return None
        try:
            found = tilted(self.costs, self.limits)
        except CostError:
            return None
        return found if found is not None and found.log_bound < math.log(TIGHT) else None

    def _construct(self, n: int, rng: np.random.Generator) -> Codes:
        if self.witness is None:
            self.check_feasible()
        prefix = np.zeros((n, 0), dtype=np.int64)
        for count in self.space.counts.tolist():
            weights = rng.random((n, count))
            for option in range(count):
                column = np.full((n, 1), option, dtype=np.int64)
                extended = np.hstack([prefix, column])
                for metric, limit in self.limits.items():
                    weights[self.costs[metric].lower_bound(extended) > limit, option] = -1.0
            prefix = np.hstack([prefix, weights.argmax(axis=1)[:, None]])
        codes = self.space.canonical(prefix)
        # Bounds of several metrics, each exact, can still miss jointly: those rows become the witness.
        misses = ~self.feasible(codes)
        if misses.any() and self.witness is not None:
            codes[misses] = self.witness
        return codes
