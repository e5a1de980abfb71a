"""Integer programming over costs: what bounds on single metrics cannot decide.

Binary variables say which option each choice takes; continuous ones, which setting each factor is at, tied
to the binaries by their marginals. A limit on a sum is one row over all factors, a limit on a maximum one row
for each. Solved by HiGHS through scipy.
"""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from autocompress.cost import Cost, MaximumCost
from autocompress.errors import CostError
from autocompress.space import Codes

# HiGHS proves optima up to 1e-6, so rows that exceed a limit by less are told apart at a larger scale only;
# that scale for all problems would cost it stability.
TOLERANCE = 1e-5
FINE_SCALE = 1e6


# A budget that only a handful of networks reach can take a solver hours; a person should hear of it sooner.
TIME_LIMIT_S = 60.0


def least_excess(costs: Mapping[str, Cost], limits: Mapping[str, float]) -> tuple[float, Codes]:
    """Find the architecture whose largest relative excess over any limit is least.

    Args:
        costs: Cost of each limited metric, all of one space.
        limits: Metric to absolute limit.

    Returns:
        `max over metrics of cost / limit - 1`, and the codes `(1, choices)` that reach it (not canonical).

    Raises:
        CostError: The solver gave no proven optimum.
    """
    excess, codes = _solve(costs, limits, 1.0)
    if 0 < excess < TOLERANCE:
        # Where the fine scale fails, the first answer stands, proven up to the tolerance.
        with suppress(CostError):
            excess, codes = min(
                (excess, codes), _solve(costs, limits, FINE_SCALE), key=lambda found: found[0]
            )
    return excess, codes


def _solve(costs: Mapping[str, Cost], limits: Mapping[str, float], scale: float) -> tuple[float, Codes]:
    """Solve with the excess in units of `1 / scale`."""
    from scipy import optimize, sparse

    counts = next(iter(costs.values())).counts
    starts = np.concatenate(([0], np.cumsum(counts)))
    columns = int(starts[-1])
    excess = columns  # one variable for the excess, after the options
    columns += 1
    rows: list[tuple[list[int], list[float], float, float]] = []  # columns, weights, lower, upper
    for position, count in enumerate(counts):
        rows.append((list(range(starts[position], starts[position] + count)), [1.0] * count, 1.0, 1.0))
    least = -1.0
    for metric, limit in limits.items():
        cost = costs[metric]
        maximum = isinstance(cost, MaximumCost)
        sums: list[tuple[list[int], list[float]]] = []  # of each factor: columns, weights
        for factor in cost.factors:
            if maximum and factor.values.max() <= cost.minimum:
                continue  # no setting of it decides
            values = scale * factor.values / limit
            if len(factor.positions) == 1:
                first = int(starts[factor.positions[0]])
                sums.append((list(range(first, first + values.size)), values.tolist()))
                continue
            cells = np.arange(columns, columns + values.size).reshape(values.shape)
            columns += values.size
            for axis, position in enumerate(factor.positions):
                for option in range(values.shape[axis]):
                    members = cells.take(option, axis=axis).ravel().tolist()
                    rows.append(
                        ([*members, int(starts[position]) + option], [1.0] * len(members) + [-1.0], 0.0, 0.0)
                    )
            sums.append((cells.ravel().tolist(), values.ravel().tolist()))
        if maximum:
            rows += [([excess, *used], [-1.0, *weights], -np.inf, scale) for used, weights in sums]
            # No network is below: the solver need not look further once it is there.
            least = max(least, cost.minimum / limit - 1.0)
        else:
            used = [column for part, _ in sums for column in part]
            weights = [weight for _, part in sums for weight in part]
            rows.append(([excess, *used], [-1.0, *weights], -np.inf, scale * (1.0 - cost.constant / limit)))
    matrix = sparse.csr_array(
        (
            np.concatenate([row[1] for row in rows]),
            (
                np.concatenate([[index] * len(row[0]) for index, row in enumerate(rows)]),
                np.concatenate([row[0] for row in rows]),
            ),
        ),
        shape=(len(rows), columns),
    )
    objective = np.zeros(columns)
    objective[excess] = 1.0
    integrality = np.zeros(columns)
    integrality[: int(starts[-1])] = 1
    lower, upper = np.zeros(columns), np.ones(columns)
    lower[excess], upper[excess] = scale * least, np.inf
    result = optimize.milp(
        objective,
        integrality=integrality,
        bounds=optimize.Bounds(lower, upper),
        constraints=optimize.LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows]),
        options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None or result.status != 0:
        raise CostError(
            f"the solver found no proven optimum for the joint budget in {TIME_LIMIT_S:g} s: "
            f"{result.message}; "
            "loosen one of its limits a little"
        )
    codes = [int(result.x[starts[p] : starts[p + 1]].argmax()) for p in range(len(counts))]
    row = np.array([codes], dtype=np.int64)
    return max(float(costs[m].of(row)[0]) / limit - 1.0 for m, limit in limits.items()), row
