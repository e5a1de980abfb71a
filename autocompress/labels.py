"""Programs of which all parts are sums over single choices: what knapsack searches can solve."""

import math
import time
from collections.abc import Callable

import numpy as np

from autocompress import knapsack, multi_knapsack
from autocompress.cost import AdditiveCost, Values
from autocompress.program import Program, Solution
from autocompress.space import Codes

# Sums in two orders differ in their last bits.
ROUNDING = 1e-12


def is_separable(program: Program) -> bool:
    """Whether value and costs are over single choices, and nothing is forbidden."""
    costs = [program.value, *(cost for cost, _ in program.limits)]
    return not program.forbidden and all(len(f.positions) == 1 for cost in costs for f in cost.factors)


def least_value(program: Program, fits: Callable[[Codes], bool], *, time_limit_s: float) -> Solution:
    """Find a solution of least value; as `milp.least_value`, for separable programs.

    Args:
        program: Thinned, so that limits on maxima, which forbid single options, have done so.
        fits: Whether codes `(1, choices)` of the program keep every limit, without any tolerance.
        time_limit_s: When to stop with what there is.

    Returns:
        Not proven if time or labels ran out, or if what was found exceeds a limit by rounding.
    """
    deadline = time.monotonic() + time_limit_s
    values, least = _above_least(program.value)
    limited = [(cost, limit) for cost, limit in program.limits if isinstance(cost, AdditiveCost)]
    tables = [_above_least(cost) for cost, _ in limited]
    pairs = zip(tables, limited, strict=True)
    room = np.array([limit + ROUNDING * abs(limit) - start for (_, start), (_, limit) in pairs])
    if (room < 0).any():
        return Solution(None, math.inf, True, "nothing fits")
    if len(limited) > 1:
        stacked = [np.stack(costs) for costs in zip(*(costs for costs, _ in tables), strict=True)]
        found, bound, proven = multi_knapsack.search(values, stacked, room, deadline)
    else:
        costs, available = (tables[0][0], float(room[0])) if limited else ([0 * v for v in values], math.inf)
        found, bound, proven = knapsack.search(values, costs, available, deadline)
    bound += least
    if found is None:
        return Solution(None, bound, proven, "nothing fits" if proven else "labels or time ran out")
    codes = np.array([found], dtype=np.int64)
    if not fits(codes):
        return Solution(None, bound, False, "what was found exceeds a limit by rounding")
    return Solution(codes, bound, proven, "" if proven else "labels or time ran out")


def _above_least(cost: AdditiveCost) -> tuple[list[Values], float]:
    """Return what each option costs more than the least of its choice, and the cost of all least ones."""
    tables = [np.zeros(count) for count in cost.counts]
    for factor in cost.factors:
        tables[factor.positions[0]] = factor.values
    least = [float(table.min()) for table in tables]
    return [table - low for table, low in zip(tables, least, strict=True)], cost.constant + sum(least)
