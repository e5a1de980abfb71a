"""A constrained optimum over the networks of a space, restated over choices that are free of each other.

What makes rows of codes awkward is removed once: genes without effect, choices that must agree, options that
no optimum needs. What is left is a `Program`, which the solvers work on, and the way back.
"""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import MAX_FACTOR_ENTRIES, AdditiveCost, Cost, Factor, MaximumCost, merged
from autocompress.errors import CostError
from autocompress.space import Codes, SearchSpace

AnyCost = TypeVar("AnyCost", bound=Cost)

Clause = tuple[tuple[int, tuple[int, ...]], ...]
"""What must not occur together: choices by position, each with the options of it that count."""

# Solvers and bounds add up in another order than prices, and solvers have tolerances: what is over a limit
# by less than this, relatively, is left to the exact check of what they find.
SLACK = 1e-9
# Rows of a table that are made canonical at once, and comparisons of options that are worth their time.
CHUNK_ROWS = 65_536
MAX_COMPARISONS = 20_000_000


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        codes: `(1, choices)`, or `None` if it has no solution.
        bound: No solution has a lower value; `-inf` if the solver knows none.
        proven: Whether `codes` is optimal, or, without codes, whether there is no solution.
        message: In the solver's words.
    """

    codes: Codes | None
    bound: float
    proven: bool
    message: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise a sum over independent choices, subject to limits on other costs.

    Attributes:
        value: What to minimise.
        limits: Costs over the same choices, and what each may be at most.
        forbidden: Combinations that must not occur.
        decides: For each choice of the space, which choice here decides it, `(choices of the space,)`.
        options: For each choice here, the codes of the space that its options stand for.
    """

    value: AdditiveCost
    limits: tuple[tuple[Cost, float], ...]
    forbidden: tuple[Clause, ...]
    decides: NDArray[np.int64]
    options: tuple[NDArray[np.int64], ...]

    def expand(self, codes: Codes) -> Codes:
        """Return the rows of the space, `(n, choices of the space)`, that rows here stand for."""
        taken = [options[codes[:, choice]] for choice, options in enumerate(self.options)]
        expanded: Codes = np.stack([taken[choice] for choice in self.decides], axis=1)
        return expanded


def conditions(space: SearchSpace) -> list[dict[int, tuple[int, ...]]]:
    """Return for each choice when it has an effect: what it hangs on, with the codes it needs there."""
    result: list[dict[int, tuple[int, ...]]] = []
    for choice in space.choices:
        needed: dict[int, tuple[int, ...]] = {}
        for name, allowed in choice.active_when:
            parent = space.positions[name]
            codes = tuple(space.choices[parent].code(option) for option in allowed)
            for position, kept in [*result[parent].items(), (parent, codes)]:
                known = needed.get(position, kept)
                needed[position] = tuple(code for code in kept if code in known)
        result.append(needed)
    return result


def make_program(
    space: SearchSpace,
    value: AdditiveCost,
    limits: Sequence[tuple[Cost, float]],
    ties: Sequence[Sequence[int]] = (),
    forbidden: Sequence[Mapping[int, int]] = (),
) -> Program:
    """Restate an optimum over canonical rows.

    Args:
        space: The space.
        value: What to minimise.
        limits: Costs of the space, and what each may be at most.
        ties: Positions of choices that take the same option wherever they have an effect.
        forbidden: Positions and codes; not all of them may occur with an effect.

    Raises:
        CostError: A factor over choices with conditions makes too large a table.
    """
    decides = np.arange(len(space.choices))
    for group in ties:
        joined = np.isin(decides, decides[list(group)])
        decides[joined] = decides[joined].min()
    first, decides = np.unique(decides, return_inverse=True)
    counts = tuple(int(space.counts[position]) for position in first)

    def restated(cost: AnyCost) -> AnyCost:
        factors = [_tied(factor, decides) for factor in _of_networks(cost, space)]
        return replace(cost, counts=counts, factors=tuple(merged(factors, cost.join)))

    return Program(
        restated(value),
        tuple((restated(cost), limit) for cost, limit in limits),
        tuple(_clauses(space, forbidden, decides)),
        decides,
        tuple(np.arange(count) for count in counts),
    )


def _of_networks(cost: Cost, space: SearchSpace) -> list[Factor]:
    """Return factors that price every row as `cost` prices its canonical row.

    Compiled costs do that already; a table of a user may give genes without effect a value.
    """
    needed = conditions(space)
    result = []
    for factor in cost.factors:
        scope = tuple(sorted({*factor.positions, *(p for q in factor.positions for p in needed[q])}))
        if not any(needed[position] for position in scope):
            result.append(factor)
            continue
        shape = tuple(int(space.counts[position]) for position in scope)
        entries = math.prod(shape)
        if entries > MAX_FACTOR_ENTRIES:
            raise CostError(
                f"{cost.metric} depends on choices {list(factor.positions)}, whose conditions join choices "
                f"{list(scope)} in one table of {entries} entries; at most {MAX_FACTOR_ENTRIES}: let fewer "
                "choices depend on each other"
            )
        values = np.empty(entries)
        for start in range(0, entries, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, entries)
            codes = np.zeros((stop - start, len(space.choices)), dtype=np.int64)
            codes[:, scope] = np.stack(np.unravel_index(np.arange(start, stop), shape), axis=1)
            canonical = space.canonical(codes)
            values[start:stop] = factor.values[tuple(canonical[:, p] for p in factor.positions)]
        table = values.reshape(shape)
        unchanged = bool((table == factor.aligned(scope)).all())
        result.append(factor if unchanged else Factor(scope, table))
    return result


def _tied(factor: Factor, decides: NDArray[np.int64]) -> Factor:
    """Return the factor over the choices that decide its own: the diagonal where two are one."""
    owners = [int(decides[position]) for position in factor.positions]
    scope = sorted(set(owners))
    letters = dict(zip(scope, string.ascii_letters, strict=False))
    diagonal = f"{''.join(letters[owner] for owner in owners)}->{''.join(letters.values())}"
    return Factor(tuple(scope), np.einsum(diagonal, factor.values))


def _clauses(
    space: SearchSpace, forbidden: Sequence[Mapping[int, int]], decides: NDArray[np.int64]
) -> list[Clause]:
    """Return what must not occur, as options of choices that are free of each other."""
    needed = conditions(space)
    clauses = []
    for assignment in forbidden:
        literals: dict[int, tuple[int, ...]] = {}
        wanted: list[tuple[int, tuple[int, ...]]] = [
            (position, (code,)) for position, code in assignment.items()
        ]
        # An option occurs only where its choice has an effect.
        wanted += [condition for position in assignment for condition in needed[position].items()]
        for position, codes in wanted:
            owner = int(decides[position])
            literals[owner] = tuple(code for code in codes if code in literals.get(owner, codes))
        if all(literals.values()):
            clauses.append(tuple(sorted(literals.items())))
    return clauses


# Fewer options -----------------------------------------------------------------------------------------


def thinned(program: Program) -> Program | None:
    """Leave out options that no optimum needs: over a limit in any company, or no better than another.

    An option is no better than another if it is at least as bad in every entry of value and costs. One of
    equal options stays, the first.

    Returns:
        A program with the same optimum, or `None` if a choice has no option left: nothing fits.
    """
    fitting = [np.ones(count, dtype=np.bool_) for count in program.value.counts]
    for cost, limit in program.limits:
        # A maximum is no sum, and exact.
        slack = 0.0 if isinstance(cost, MaximumCost) else SLACK * abs(limit)
        for position in range(len(fitting)):
            fitting[position] &= _least_with(cost, position) <= limit + slack
    if not all(kept.any() for kept in fitting):
        return None
    program = _only(program, fitting)
    named = {position for clause in program.forbidden for position, _ in clause}
    useful = [
        np.ones(count, dtype=np.bool_) if position in named else _undominated(_entries(program, position))
        for position, count in enumerate(program.value.counts)
    ]
    return _only(program, useful)


def _least_with(cost: Cost, position: int) -> NDArray[np.float64]:
    """Return for each option of a choice a lower bound of what networks with it cost."""
    least = np.full(cost.counts[position], cost.constant)
    for factor in cost.factors:
        if position not in factor.positions:
            least = cost.join(least, factor.values.min())
        else:
            axis = factor.positions.index(position)
            others = tuple(other for other in range(factor.values.ndim) if other != axis)
            least = cost.join(least, factor.values.min(axis=others))
    return least


def _entries(program: Program, position: int) -> NDArray[np.float64]:
    """Return all entries of value and limited costs by the option of one choice, `(options, entries)`."""
    parts = [np.zeros((program.value.counts[position], 0))]
    for cost, limit in [(program.value, math.inf), *program.limits]:
        for factor in cost.factors:
            if position in factor.positions:
                axis = factor.positions.index(position)
                slices = np.moveaxis(factor.values, axis, 0).reshape(factor.values.shape[axis], -1)
                # Of a maximum only what is over the limit counts.
                parts.append((slices > limit).astype(float) if isinstance(cost, MaximumCost) else slices)
    return np.hstack(parts)


def _undominated(entries: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows have no other row that is nowhere greater; the first of equal rows stays."""
    kept = np.ones(len(entries), dtype=np.bool_)
    if len(entries) * entries.size > MAX_COMPARISONS:
        return kept
    for option, row in enumerate(entries):
        others = kept.copy()
        others[option] = False
        below = (entries <= row).all(axis=1) & others
        equal = (entries == row).all(axis=1)
        equal[:option] = False
        kept[option] = not (below & ~equal).any()
    return kept


def _only(program: Program, kept: Sequence[NDArray[np.bool_]]) -> Program:
    """Return the program with these options of each choice."""
    counts = tuple(int(mask.sum()) for mask in kept)
    numbers = [np.cumsum(mask) - 1 for mask in kept]

    def restricted(cost: AnyCost) -> AnyCost:
        factors = [
            Factor(factor.positions, factor.values[np.ix_(*(kept[p] for p in factor.positions))])
            for factor in cost.factors
        ]
        return replace(cost, counts=counts, factors=tuple(factors))

    clauses = [
        tuple((p, tuple(int(numbers[p][code]) for code in codes if kept[p][code])) for p, codes in clause)
        for clause in program.forbidden
    ]
    return Program(
        restricted(program.value),
        tuple((restricted(cost), limit) for cost, limit in program.limits),
        tuple(clause for clause in clauses if all(codes for _, codes in clause)),
        program.decides,
        tuple(options[mask] for options, mask in zip(program.options, kept, strict=True)),
    )
