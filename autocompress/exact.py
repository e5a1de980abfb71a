"""The proven optimum of an additive value under additive costs: integer programming, or knapsack labels.

Values that add up over blocks are log-probabilities of a factorised policy, sensitivities of bit widths, a
linear predictor: for those no strategy can do better than `solve`, and it says by how much an unproven
answer may miss.

Source: the integer program of Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, which
limits size, bit operations or latency; here with several limits at once, tables over several choices, ties
and forbidden combinations.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from autocompress import labels, milp
from autocompress.budget import Constraints, not_below
from autocompress.cost import AdditiveCost, Factor, Values
from autocompress.errors import AutocompressError, CostError, InfeasibleBudgetError, SpaceError
from autocompress.program import Program, Solution, conditions, make_program, thinned
from autocompress.space import Codes, Option, SearchSpace

Sense = Literal["maximize", "minimize"]
Method = Literal["auto", "milp", "dp"]


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best network that was found, and how good any network can be.

    Attributes:
        codes: Canonical, `(1, choices)`; keeps every limit, tie and forbidden combination exactly.
        value: Its value.
        bound: No network that fits has a better value.
        gap: `|bound - value| / |value|`; 0 if proven.
        proven: Whether no network is better, up to 1e-10 of what all choices together change in value.
        method: What found it, `milp` or `dp`.
        seconds: Wall-clock time.
    """

    codes: Codes
    value: float
    bound: float
    gap: float
    proven: bool
    method: str
    seconds: float


def separable(space: SearchSpace, vectors: Sequence[Any], metric: str) -> AdditiveCost:
    """Make a value of one score an option; a choice without effect scores nothing.

    With log-probabilities of independent choices it is the log-probability of the network.

    Args:
        space: The space.
        vectors: One a choice, `(options,)`, finite.
        metric: What the sum is called.

    Raises:
        CostError: A vector is missing, has a wrong length, is not finite, or not of numbers.
    """
    try:
        tables = [np.asarray(vector, dtype=np.float64) for vector in vectors]
    except (TypeError, ValueError) as error:
        raise CostError(
            f"{metric} needs a sequence of vectors of numbers, one a choice in the order of "
            f"{[choice.name for choice in space.choices]}, got {type(vectors).__name__}: {error}"
        ) from None
    shapes, wanted = [table.shape for table in tables], [(count,) for count in space.counts.tolist()]
    if shapes != wanted:
        raise CostError(f"{metric} needs one score an option, shapes {wanted}, got {shapes}")
    for choice, table in zip(space.choices, tables, strict=True):
        if not np.isfinite(table).all():
            raise CostError(
                f"{metric} of choice {choice.name!r} must be finite, got {table.tolist()}; what must not be "
                "taken goes into `forbidden`"
            )
    factors = [
        _where_active(space, position, needed, tables[position])
        for position, needed in enumerate(conditions(space))
    ]
    return AdditiveCost(metric, tuple(space.counts.tolist()), 0.0, tuple(factors))


def _where_active(
    space: SearchSpace, position: int, needed: Mapping[int, tuple[int, ...]], vector: Values
) -> Factor:
    scope = (*sorted(needed), position)
    table = np.zeros([int(space.counts[p]) for p in scope])
    table[np.ix_(*(needed[p] for p in scope[:-1]), range(len(vector)))] = vector
    return Factor(scope, table)


def solve(
    value: AdditiveCost,
    constraints: Constraints,
    *,
    sense: Sense,
    ties: Sequence[Sequence[str]] = (),
    forbidden: Sequence[Mapping[str, Option]] = (),
    time_limit_s: float = 60.0,
    method: Method = "auto",
) -> Optimum:
    """Find the network of best value among those that fit.

    Equal inputs give equal answers, unless the time ran out; which of several optima it is, is not said.

    Args:
        value: A sum over tables of the choices, such as `separable` makes.
        constraints: Limits on sums and maxima, which the answer keeps without any tolerance.
        sense: `"maximize"` or `"minimize"`.
        ties: Groups of choices that take the same option, as far as they have an effect.
        forbidden: Choices and options; a network has not all of them. A choice without effect has none.
        time_limit_s: After that the best network so far is returned, with its gap and `proven` false.
        method: `"dp"` (dynamic programming by labels) where value and limited costs are sums over single
            choices and nothing is forbidden; `"milp"` for all; `"auto"` takes the first where it can, and
            the second where the first gave up after half of the time.

    Raises:
        InfeasibleBudgetError: Nothing fits; has the nearest feasible budget.
        BudgetError: Ties and forbidden combinations leave nothing under any budget.
        SpaceError: Ties or forbidden combinations are not of the space.
        CostError: The value is of another space, the method cannot do it, or no network was found in time.
    """
    start = time.perf_counter()
    space = constraints.space
    _check(value, space, sense, method, time_limit_s)
    sign = -1.0 if sense == "maximize" else 1.0
    program = make_program(
        space,
        value.scaled(sign, 0.0),
        [(constraints.costs[metric], limit) for metric, limit in constraints.limits.items()],
        [_tie(space, group) for group in ties],
        [_assignment(space, assignment) for assignment in forbidden],
    )
    thin = thinned(program)
    if thin is None:
        raise _infeasible(constraints, program)
    found, used = _solved(thin, constraints, method, time_limit_s)
    if found.codes is None and found.proven:
        raise _infeasible(constraints, program)
    if found.codes is None:
        raise CostError(
            f"{used} found no network that fits in {time_limit_s:g} s, nor that there is none: "
            f"{found.message}; give it more time (time_limit_s) or loosen a limit"
        )
    codes = space.canonical(thin.expand(found.codes))
    reached = float(value.of(codes)[0])
    # A proven bound differs from the value by rounding only.
    bound = reached if found.proven else sign * min(found.bound, sign * reached)
    gap = 0.0 if bound == reached else abs(bound - reached) / max(abs(reached), 1e-300)
    return Optimum(codes, reached, bound, gap, found.proven, used, time.perf_counter() - start)


def _check(value: AdditiveCost, space: SearchSpace, sense: str, method: str, time_limit_s: float) -> None:
    if value.counts != tuple(space.counts.tolist()):
        raise CostError(
            f"{value.metric} must be over the choices of space {space.name!r}, with "
            f"{space.counts.tolist()} options, got {list(value.counts)}"
        )
    if sense not in ("maximize", "minimize"):
        raise CostError(f"sense must be 'maximize' or 'minimize', got {sense!r}")
    if method not in ("auto", "milp", "dp"):
        raise CostError(f"method must be 'auto', 'milp' or 'dp', got {method!r}")
    if not 0 < time_limit_s < math.inf:
        raise CostError(f"time_limit_s must be positive and finite, got {time_limit_s}")


def _position(space: SearchSpace, name: str) -> int:
    if name not in space.positions:
        raise SpaceError(f"space {space.name!r} has no choice {name!r}; it has {list(space.positions)}")
    return space.positions[name]


def _tie(space: SearchSpace, group: Sequence[str]) -> list[int]:
    positions = [_position(space, name) for name in group]
    options = {space.choices[position].options for position in positions}
    if len(positions) < 2 or len(options) > 1:
        raise SpaceError(
            f"a tie joins two or more choices of the same options, got {list(group)} with options "
            f"{sorted(map(list, options))}"
        )
    return positions


def _assignment(space: SearchSpace, assignment: Mapping[str, Option]) -> dict[int, int]:
    if not assignment:
        raise SpaceError("a forbidden combination names at least one choice with its option, got none")
    positions = {name: _position(space, name) for name in assignment}
    return {positions[name]: space.choices[positions[name]].code(o) for name, o in assignment.items()}


def _solved(
    program: Program, constraints: Constraints, method: Method, time_limit_s: float
) -> tuple[Solution, str]:
    """Return what was found, and by which method."""
    start = time.perf_counter()
    space = constraints.space

    def fits(codes: Codes) -> bool:
        return bool(constraints.feasible(space.canonical(program.expand(codes)))[0])

    over_single_choices = labels.is_separable(program)
    if method == "dp" and not over_single_choices:
        raise CostError(
            "method 'dp' needs a value and limited costs that are sums over single choices, and nothing "
            "forbidden; take 'milp' or 'auto'"
        )
    if not over_single_choices or method == "milp":
        return milp.least_value(program, fits, time_limit_s=time_limit_s), "milp"
    # The other method, where it may be needed, gets as much time.
    share = 1.0 if method == "dp" else 0.5
    first = labels.least_value(program, fits, time_limit_s=share * time_limit_s)
    left = time_limit_s - (time.perf_counter() - start)
    if method == "dp" or first.proven or left <= 0:
        return first, "dp"
    second = milp.least_value(program, fits, time_limit_s=left)
    if second.proven:
        return second, "milp"
    bound = max(first.bound, second.bound)
    values = [math.inf if f.codes is None else float(program.value.of(f.codes)[0]) for f in (first, second)]
    better, used = (first, "dp") if values[0] < values[1] else (second, "milp")
    return replace(better, bound=bound), used


def _infeasible(constraints: Constraints, program: Program) -> AutocompressError:
    """Return what to raise where no network fits limits, ties and what is forbidden together."""
    limits = constraints.limits
    if not program.forbidden and len(program.options) == len(constraints.space.choices):
        constraints.check_feasible()
    costs = {metric: cost for metric, (cost, _) in zip(limits, program.limits, strict=True)}
    excess, codes = milp.least_excess({"": program.value, **costs}, limits, program.forbidden)
    if excess <= 0:
        return CostError(
            "the solver found nothing although something fits: a limit is met up to rounding only"
        )
    reached = constraints.price(constraints.space.canonical(program.expand(codes)))
    nearest = {metric: max(limit, float(reached[metric][0])) for metric, limit in limits.items()}
    asked = ", ".join(f"{metric} <= {limit:.6g}" for metric, limit in limits.items())
    near = ", ".join(f"{metric} <= {not_below(limit)}" for metric, limit in nearest.items())
    return InfeasibleBudgetError(
        f"no network of space {constraints.space.name!r} fits {asked} with these ties and forbidden "
        f"combinations; the nearest feasible budget is {near}",
        nearest,
    )
