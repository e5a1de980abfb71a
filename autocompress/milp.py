"""Integer programming over costs: what bounds on single metrics cannot decide.

Binary variables say which option each choice takes; continuous ones, which setting each factor is at, tied
to the binaries by their marginals. A limit on a sum is one row over all factors, a limit on a maximum one row
for each. Solved by HiGHS through scipy.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import Cost, Factor, MaximumCost, Values
from autocompress.errors import BudgetError, CostError
from autocompress.program import SLACK, Clause, Program, Solution
from autocompress.space import Codes

# HiGHS proves optima up to 1e-6, so rows that exceed a limit by less are told apart at a larger scale only;
# that scale for all problems would cost it stability.
TOLERANCE = 1e-5
FINE_SCALE = 1e6

# A budget that only a handful of networks reach can take a solver hours; a person should hear of it sooner.
TIME_LIMIT_S = 60.0

# HiGHS stops at an absolute gap of 1e-6 and lets rows be over by 1e-7, which scipy cannot change. Values are
# scaled so that this gap is 1e-10 of what all choices together can change, limits so that the excess is 1e-9
# of what is left of them.
VALUE_SCALE = 1e4
ROOM_SCALE = 1e2

Columns = NDArray[np.int64]

# How scipy's milp ends.
OPTIMAL, INFEASIBLE = 0, 2


class Encoding:
    """A mixed-integer program in which every choice takes one option, to be extended by rows.

    Args:
        counts: Options of each choice.
        forbidden: Combinations that must not occur.
    """

    def __init__(self, counts: Sequence[int], forbidden: Sequence[Clause] = ()) -> None:
        self._starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self._lower = [0.0] * int(self._starts[-1])
        self._upper = [1.0] * int(self._starts[-1])
        self._rows: list[tuple[Columns, Values, float, float]] = []
        self._cells: dict[tuple[int, ...], Columns] = {}
        for position in range(len(counts)):
            self.row(self.options(position), np.ones(counts[position]), 1.0, 1.0)
        for clause in forbidden:
            literals = np.concatenate([self.options(position)[list(codes)] for position, codes in clause])
            self.row(literals, np.ones(len(literals)), -np.inf, len(clause) - 1.0)

    def options(self, position: int) -> Columns:
        """Return the columns of the options of one choice."""
        return np.arange(self._starts[position], self._starts[position + 1])

    def variable(self, lower: float, upper: float) -> int:
        """Add a continuous variable and return its column."""
        self._lower.append(lower)
        self._upper.append(upper)
        return len(self._lower) - 1

    def row(self, columns: Columns, weights: Values, lower: float, upper: float) -> None:
        """Ask for `lower <= weights @ columns <= upper`."""
        self._rows.append((columns, weights, lower, upper))

    def exclude(self, columns: Columns) -> None:
        """Fix variables at 0."""
        for column in columns:
            self._upper[column] = 0.0

    def settings(self, factor: Factor) -> Columns:
        """Return the columns that say which setting a factor is at, in its shape; all costs share them."""
        if len(factor.positions) == 1:
            return self.options(factor.positions[0])
        if factor.positions not in self._cells:
            shape = factor.values.shape
            cells = len(self._lower) + np.arange(factor.values.size).reshape(shape)
            self._lower += [0.0] * cells.size
            self._upper += [1.0] * cells.size
            self._cells[factor.positions] = cells
            for axis, position in enumerate(factor.positions):
                for option, column in enumerate(self.options(position)):
                    members = cells.take(option, axis=axis).ravel()
                    weights = np.ones(len(members) + 1)
                    weights[-1] = -1.0
                    self.row(np.append(members, column), weights, 0.0, 0.0)
        return self._cells[factor.positions]

    def minimise(self, columns: Columns, weights: Values, *, time_limit_s: float) -> Solution:
        """Minimise `weights @ columns`; the solver stops at an absolute gap of 1e-6, if no other."""
        from scipy import optimize, sparse

        objective = np.zeros(len(self._lower))
        np.add.at(objective, columns, weights)
        integrality = np.zeros(len(objective))
        integrality[: self._starts[-1]] = 1
        lengths = [len(row[0]) for row in self._rows]
        entries = (
            np.concatenate([row[1] for row in self._rows]),
            (np.repeat(np.arange(len(lengths)), lengths), np.concatenate([row[0] for row in self._rows])),
        )
        matrix = sparse.csr_array(entries, shape=(len(lengths), len(objective)))
        sides = ([row[2] for row in self._rows], [row[3] for row in self._rows])
        result = optimize.milp(
            objective,
            integrality=integrality,
            bounds=optimize.Bounds(np.array(self._lower), np.array(self._upper)),
            constraints=optimize.LinearConstraint(matrix, *sides),
            options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
        )
        codes = None
        if result.x is not None:
            taken = np.split(result.x[: self._starts[-1]], self._starts[1:-1])
            codes = np.array([[int(part.argmax()) for part in taken]], dtype=np.int64)
        bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        return Solution(codes, bound, result.status in (OPTIMAL, INFEASIBLE), str(result.message))


# Optima ------------------------------------------------------------------------------------------------


def least_value(program: Program, fits: Callable[[Codes], bool], *, time_limit_s: float) -> Solution:
    """Find a solution of least value that also fits exactly.

    Args:
        program: What to minimise.
        fits: Whether codes `(1, choices)` of the program keep every limit, without any tolerance. Solutions
            that do not are cut off one by one.
        time_limit_s: When to stop with what there is.
    """
    deadline = time.monotonic() + time_limit_s
    encoding = Encoding(program.value.counts, program.forbidden)
    for cost, limit in program.limits:
        _add_limit(encoding, cost, limit)
    columns, values, least = _above_least(encoding, program.value)
    spread = sum(float(np.ptp(factor.values)) for factor in program.value.factors) or 1.0
    scale = VALUE_SCALE / spread
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        found = encoding.minimise(columns, scale * values, time_limit_s=left)
        found = replace(found, bound=least + found.bound / scale)
        if found.codes is None or fits(found.codes):
            return found
        if left == 0:
            return replace(found, codes=None, proven=False)
        ones = np.ones(len(program.value.counts))
        taken = [encoding.options(position)[code] for position, code in enumerate(found.codes[0])]
        encoding.row(np.array(taken), ones, -np.inf, len(ones) - 1.0)


def _add_limit(encoding: Encoding, cost: Cost, limit: float) -> None:
    """Limit a cost: up to `SLACK` where it is a sum, exactly where it is a maximum."""
    if isinstance(cost, MaximumCost):
        for factor in cost.factors:
            encoding.exclude(encoding.settings(factor)[factor.values > limit])
        return
    columns, values, least = _above_least(encoding, cost)
    room = limit + SLACK * abs(limit) - least
    if room < 0:
        encoding.exclude(encoding.options(0))  # nothing fits
        return
    encoding.exclude(columns[values > room])
    within = values <= room
    if room > 0 and within.any():
        weights = ROOM_SCALE / room * values[within]
        encoding.row(columns[within], weights, -np.inf, ROOM_SCALE)


def _above_least(encoding: Encoding, cost: Cost) -> tuple[Columns, Values, float]:
    """Return the columns of a sum, each value less the least of its factor, and what is missing then."""
    shifted = [Factor(factor.positions, factor.values - factor.values.min()) for factor in cost.factors]
    least = cost.constant + sum(float(factor.values.min()) for factor in cost.factors)
    return *_sum_of(encoding, shifted), least


def _sum_of(encoding: Encoding, factors: Sequence[Factor]) -> tuple[Columns, Values]:
    """Return the columns of all settings of factors, and their values."""
    columns = [np.zeros(0, dtype=np.int64), *(encoding.settings(factor).ravel() for factor in factors)]
    values = [np.zeros(0), *(factor.values.ravel() for factor in factors)]
    return np.concatenate(columns), np.concatenate(values)


# Feasibility -------------------------------------------------------------------------------------------


def least_excess(
    costs: Mapping[str, Cost], limits: Mapping[str, float], forbidden: Sequence[Clause] = ()
) -> tuple[float, Codes]:
    """Find the architecture whose largest relative excess over any limit is least.

    Args:
        costs: Cost of each limited metric at least, all of one space.
        limits: Metric to absolute limit.
        forbidden: Combinations that must not occur.

    Returns:
        `max over metrics of cost / limit - 1`, and the codes `(1, choices)` that reach it (not canonical).

    Raises:
        BudgetError: What is forbidden leaves nothing.
        CostError: The solver gave no proven optimum.
    """
    excess, codes = _least_excess(costs, limits, 1.0, forbidden)
    if 0 < excess < TOLERANCE:
        # Where the fine scale fails, the first answer stands, proven up to the tolerance.
        with suppress(CostError):
            again = _least_excess(costs, limits, FINE_SCALE, forbidden)
            excess, codes = min((excess, codes), again, key=lambda found: found[0])
    return excess, codes


def _least_excess(
    costs: Mapping[str, Cost], limits: Mapping[str, float], scale: float, forbidden: Sequence[Clause]
) -> tuple[float, Codes]:
    """Solve with the excess in units of `1 / scale`."""
    encoding = Encoding(next(iter(costs.values())).counts, forbidden)
    # No network is below the minimum of a maximum: the solver need not look further once it is there.
    minima = [
        costs[m].minimum / limit - 1 for m, limit in limits.items() if isinstance(costs[m], MaximumCost)
    ]
    excess = encoding.variable(scale * max([-1.0, *minima]), np.inf)
    for metric, limit in limits.items():
        cost = costs[metric]
        if isinstance(cost, MaximumCost):
            # Factors of which no setting decides are left out.
            rows = [
                (encoding.settings(factor).ravel(), factor.values.ravel(), 0.0)
                for factor in cost.factors
                if factor.values.max() > cost.minimum
            ]
        else:
            rows = [(*_sum_of(encoding, cost.factors), cost.constant)]
        for columns, values, constant in rows:
            weights = np.append(scale * values / limit, -1.0)
            encoding.row(np.append(columns, excess), weights, -np.inf, scale * (1.0 - constant / limit))
    found = encoding.minimise(np.array([excess]), np.ones(1), time_limit_s=TIME_LIMIT_S)
    if found.proven and found.codes is None:
        raise BudgetError("no network at all is left by the ties and what is forbidden: give up one of them")
    if found.codes is None or not found.proven:
        raise CostError(
            f"the solver found no proven optimum for the joint budget in {TIME_LIMIT_S:g} s: "
            f"{found.message}; loosen one of its limits a little"
        )
    reached = [float(costs[m].of(found.codes)[0]) / limit - 1.0 for m, limit in limits.items()]
    return max(reached, default=-1.0), found.codes
