"""Random networks that fit tight limits, exactly as rejection would draw them, at a fraction of the draws.

Where one network in a thousand fits, a thousand draws make one. Here genes are drawn in proportion to
`exp(-sum_m t_m c_m / limit_m)`, so that most draws cost about what the limits allow, and a draw that fits is
kept with probability `exp(-sum_m t_m (1 - c_m / limit_m))`: what is kept is uniform over the genes that fit.
That is exponential tilting (Asmussen & Glynn, Stochastic Simulation, 2007, V.1 and VI.2), made exact by
rejection. Costs are sums of small tables, so variable elimination draws from it choice by choice. Limits on
maxima forbid settings outright. The tilt minimises Chernoff's bound on the share that fits, and the share of
draws that is kept is the share that fits, divided by that bound.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autocompress.cost import AdditiveCost, Cost, Factor, Values, eliminated, merged
from autocompress.space import Codes

# Where a step of the elimination would join larger tables, tilting costs more than it saves.
MAX_ENTRIES = 1_000_000
# A tilt that leaves next to nothing but the cheapest network.
MAX_TILT = 1e4


@dataclass(frozen=True, eq=False)
class _Step:
    """How one choice is drawn, given the choices before it.

    Attributes:
        position: Of the choice.
        given: Positions that its probabilities depend on.
        strides: Turn codes of `given` into a column of `cumulative`.
        cumulative: `(options - 1, settings of given)`: the probability of an option up to this one.
    """

    position: int
    given: tuple[int, ...]
    strides: tuple[int, ...]
    cumulative: Values


@dataclass(frozen=True, eq=False)
class Tilted:
    """Genes in proportion to the exponential of minus their tilted costs.

    Attributes:
        limits: Absolute limits on the costs that add up, `(sums,)`.
        costs: These costs, in the same order.
        tilts: What each of them weighs, 0 or more, `(sums,)`.
        log_bound: Logarithm of Chernoff's bound: of all genes, at most this share fits.
        steps: How to draw the choices, the first one first.
    """

    limits: Values
    costs: tuple[AdditiveCost, ...]
    tilts: Values
    log_bound: float
    steps: tuple[_Step, ...]

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Codes, Values]:
        """Draw genes, and the probability with which each that fits is to be kept.

        Returns:
            Genes `(n, choices)`, not canonical, and probabilities `(n,)`.
        """
        # Choice by choice, so that what one step reads and writes is contiguous.
        columns = np.zeros((len(self.steps), n), dtype=np.int64)
        for step, uniform in zip(self.steps, rng.random(columns.shape), strict=True):
            setting = np.zeros(n, dtype=np.int64)
            for position, stride in zip(step.given, step.strides, strict=True):
                setting += stride * columns[position]
            for cumulative in step.cumulative:
                columns[step.position] += cumulative.take(setting) <= uniform
        genes = np.ascontiguousarray(columns.T)
        room = np.zeros(n)
        for cost, limit, tilt in zip(self.costs, self.limits, self.tilts, strict=True):
            room += tilt * (1.0 - cost.of(genes) / limit)
        return genes, np.exp(-np.maximum(room, 0.0))


def tilted(costs: Mapping[str, Cost], limits: Mapping[str, float]) -> Tilted | None:
    """Return the best tilt for these limits.

    Args:
        costs: Metric to cost; those of `limits` at least, all over the same choices.
        limits: Metric to positive limit, at least one.

    Returns:
        `None` if no setting fits a limit on a maximum.

    Raises:
        CostError: The tables would be too large.
    """
    from scipy.optimize import minimize

    sums = {metric: cost for metric in limits if isinstance(cost := costs[metric], AdditiveCost)}
    scale = np.array([limits[metric] for metric in sums])
    counts = next(iter(costs.values())).counts
    # What no setting may exceed has weight 0 above its limit.
    allowed = [
        Factor(factor.positions, np.where(factor.values > limits[metric], -np.inf, 0.0))
        for metric in limits
        if metric not in sums
        for factor in costs[metric].factors
    ]

    def bounded(tilts: Values) -> tuple[float, tuple[_Step, ...]]:
        weights = list(allowed)
        constant = float(tilts.sum())
        for cost, tilt, limit in zip(sums.values(), tilts, scale, strict=True):
            weights += [Factor(factor.positions, -tilt / limit * factor.values) for factor in cost.factors]
            constant -= tilt * cost.constant / limit
        log_mean, steps = _backwards(merged(weights, np.add), counts)
        return constant + log_mean, steps

    tilts = np.zeros(len(sums))
    log_bound, steps = bounded(tilts)
    if log_bound == -np.inf:
        return None
    if sums:
        bounds = [(0.0, MAX_TILT)] * len(sums)
        tilts = minimize(lambda tilts: bounded(tilts)[0], tilts, method="L-BFGS-B", bounds=bounds).x
        log_bound, steps = bounded(tilts)
    return Tilted(scale, tuple(sums.values()), tilts, log_bound, steps)


def _backwards(factors: list[Factor], counts: tuple[int, ...]) -> tuple[float, tuple[_Step, ...]]:
    """Return the logarithm of the mean weight of all genes, and how to draw them, first choice first."""
    total, steps = 0.0, []
    for position in range(len(counts) - 1, -1, -1):
        joined, factors = eliminated(factors, position, np.add, at_most=MAX_ENTRIES, what="the budget")
        if joined is None:
            even = np.arange(1, counts[position])[:, None] / counts[position]
            steps.append(_Step(position, (), (), even))
            continue
        axis = joined.positions.index(position)
        weights = np.moveaxis(joined.values, axis, -1)
        most = weights.max(axis=-1, keepdims=True)
        # Settings from which nothing fits are never drawn; their rows only must not be `nan`.
        cumulative = np.exp(weights - np.where(np.isfinite(most), most, 0.0)).cumsum(axis=-1)
        sums = cumulative[..., -1]
        with np.errstate(divide="ignore"):
            message = most[..., 0] + np.log(sums / counts[position])
        given = (*joined.positions[:axis], *joined.positions[axis + 1 :])
        shape = message.shape
        strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        shares = (cumulative / np.where(sums > 0, sums, 1.0)[..., None]).reshape(-1, counts[position])
        steps.append(_Step(position, given, strides, np.ascontiguousarray(shares[:, :-1].T)))
        if given:
            factors = merged([*factors, Factor(given, message)], np.add)
        else:
            total += float(message)
    return total, tuple(reversed(steps))
