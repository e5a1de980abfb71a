"""What the evolutionary strategies share: children that fit the budget and are new, generation by generation.

A child over the budget gets genes of its feasible parent back, in random order, a sixth of them at a time
and no more than needed; all children of a generation are repaired at once. The work of a generation is thus
bounded whatever the budget; the loop of the once-for-all repository never ends where nothing fits.
"""

from collections.abc import Callable
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import EvaluationError
from autocompress.proposals import Asked, fresh_sample
from autocompress.space import Codes
from autocompress.trial import Batch

# Rounds in which children that were asked before are replaced by others, each mutated twice as strongly.
MAX_ATTEMPTS = 6
MAX_RATE = 0.5
# A round proposes at most so many, or as many as are wanted. Under tight budgets random rows are far dearer.
MAX_PROPOSALS = 64
# A child over the budget gets each gene of its parent back with these probabilities, one after the other,
# until it fits: genes that came back stay. After the last step it is its parent.
REPAIR_STEPS = np.arange(1, 6) / 6

# Random genes that an exchanged child may raise once more, if they fit.
FILLING = 16

Propose = Callable[[int, int], tuple[Codes, Codes]]
"""Given how many and the attempt, from 0: children and for each a feasible parent, `(n, choices)` both."""


@final
class Breeding:
    """Feasible children, none asked before."""

    def __init__(
        self,
        constraints: Constraints,
        rng: np.random.Generator,
        *,
        rate: float,
        exchange: float = 0.0,
        deduplicate: bool = True,
    ) -> None:
        """Start with nothing asked.

        Args:
            constraints: Space, costs and limits.
            rng: The strategy's own generator.
            rate: Probability that a gene of a mutant changes; at least one does.
            exchange: Share of the mutants that are exchanges, see `exchanged`.
            deduplicate: Never return a row twice.

        Raises:
            InfeasibleBudgetError: Nothing fits.
        """
        constraints.check_feasible()
        self._constraints = constraints
        self._rng = rng
        self._rate, self._exchange = rate, exchange
        self._asked = Asked(constraints.space) if deduplicate else None

    def founders(self, n: int) -> Codes:
        """Return up to `n` random feasible rows; fewer where the space is exhausted."""
        if self._asked is None:
            return self._constraints.sample(n, self._rng)
        return fresh_sample(self._constraints, n, self._rng, self._asked)

    def know(self, codes: Codes) -> None:
        """Do not propose these canonical rows `(n, choices)` any more: they were told, asked or not."""
        if self._asked is not None:
            self._asked.fresh(codes)

    def mutants(self, parents: Codes, attempt: int) -> Codes:
        """Mutate every parent, at least one gene each; more genes at later attempts."""
        space = self._constraints.space
        rate = self._rate
        if attempt:
            rate = min(MAX_RATE, max(rate, 1 / len(space.choices)) * 2**attempt)
        mutants = space.mutate(parents, self._rng, rate=rate)
        if self._exchange:
            chosen = self._rng.random(len(parents)) < self._exchange
            mutants[chosen] = self.exchanged(parents[chosen], raised=1 + attempt)
        return mutants

    def exchanged(self, parents: Codes, *, raised: int) -> Codes:
        """Raise genes of feasible parents by one option, lower others until they fit, raise what still does.

        Near the budget a gene can grow only where another shrinks, which one change at random does not do,
        and its repair undoes.

        Args:
            parents: `(n, choices)`.
            raised: How many genes at first.

        Returns:
            Canonical and feasible, of the shape given; the parent where lowering all others is not enough.
        """
        space, fits = self._constraints.space, self._constraints.feasible
        children, grown = parents.copy(), np.zeros(parents.shape, dtype=np.bool_)
        for _ in range(raised):
            able = space.active(children) & (children < space.counts - 1)
            children, at = self._stepped(children, able, 1)
            grown |= at
        for _ in range(int(space.counts.sum())):
            broken = np.flatnonzero(~fits(children))
            able = (children[broken] > 0) & ~grown[broken]
            if not able.any():
                break
            children[broken] = self._stepped(children[broken], able, -1)[0]
        children = np.where(fits(children)[:, None], children, parents)
        for _ in range(FILLING):
            able = space.active(children) & (children < space.counts - 1)
            larger = self._stepped(children, able, 1)[0]
            children = np.where(fits(larger)[:, None], larger, children)
        return children

    def _stepped(self, codes: Codes, able: NDArray[np.bool_], step: int) -> tuple[Codes, NDArray[np.bool_]]:
        """Move one random gene of those able in every row; return canonical rows, and which gene it was."""
        draws = np.where(able, self._rng.random(codes.shape), -1.0)
        at = (draws == draws.max(axis=1, keepdims=True)) & able
        return self._constraints.space.canonical(codes + step * at), at

    def crossed(self, first: Codes, second: Codes) -> Codes:
        """Take each gene from either parent."""
        return self._constraints.space.crossover(first, second, self._rng)

    def children(self, n: int, propose: Propose) -> Codes:
        """Return `n` feasible rows not asked before; random ones where the parents have no new children."""
        if self._asked is None:
            return self._repaired(*propose(n, 0))
        found: list[Codes] = []
        missing = n
        for attempt in range(MAX_ATTEMPTS):
            # Twice as many at each later attempt: what they have in common with earlier rows is dropped.
            count = min(max(n, MAX_PROPOSALS), missing * 2**attempt)
            proposed = self._repaired(*propose(count, attempt))
            found.append(self._asked.fresh(proposed, at_most=missing))
            missing -= len(found[-1])
            if not missing:
                break
        else:
            found.append(self.founders(missing))
        return np.vstack(found)

    def _repaired(self, children: Codes, parents: Codes) -> Codes:
        """Return the children, those over the budget moved towards their parents until they fit."""
        broken = np.flatnonzero(~self._constraints.feasible(children))
        if not len(broken):
            return children
        wild, tame = children[broken], parents[broken]
        # Every step of every child at once: a few hundred rows cost little more than a few.
        back = self._rng.random(wild.shape) < REPAIR_STEPS[:, None, None]
        steps = self._constraints.space.canonical(np.where(back, tame, wild).reshape(-1, wild.shape[1]))
        fits = self._constraints.feasible(steps).reshape(len(REPAIR_STEPS), len(broken))
        repaired = steps[fits.argmax(axis=0) * len(broken) + np.arange(len(broken))]
        children = children.copy()
        # Where no step fits, the parent does; without duplicates it is dropped later.
        children[broken] = np.where(fits.any(axis=0, keepdims=True).T, repaired, tame)
        return children


@final
class Generation:
    """Rows that are asked in pieces of any size; over when all of them were asked and told."""

    def __init__(self, rows: Codes) -> None:
        """Hold rows `(n, choices)` to be asked."""
        self._waiting, self._untold = rows, 0

    @property
    def over(self) -> bool:
        """Whether all rows were asked and told."""
        return not len(self._waiting) and not self._untold

    def ask(self, n: int) -> Codes:
        """Return up to `n` of the rows that wait; none if the rest is to be told first."""
        rows, self._waiting = self._waiting[:n], self._waiting[n:]
        self._untold += len(rows)
        return rows

    def tell(self, n: int) -> None:
        """Count `n` rows as told; rows that were not asked, before the first ask, count for nothing."""
        self._untold = max(0, self._untold - n)


def objective_values(batch: Batch, objective: str) -> Values:
    """Return the objective of every row, `(n,)`: `nan` unless it was measured and is finite.

    Raises:
        EvaluationError: Rows were measured, but not on the objective.
    """
    measured = batch.measured
    if not measured.any():
        return np.full(len(batch), np.nan)
    if objective not in batch.metrics:
        given = ", ".join(batch.metrics) or "nothing"
        raise EvaluationError(f"the search maximises {objective!r}, but the evaluator gives {given}")
    values = np.asarray(batch.metrics[objective], dtype=np.float64)
    return np.where(measured & np.isfinite(values), values, np.nan)


def scored(batch: Batch, objective: str) -> tuple[Codes, Values]:
    """Return the rows that were measured, with their finite values.

    Raises:
        EvaluationError: Rows were measured, but not on the objective.
    """
    values = objective_values(batch, objective)
    usable = ~np.isnan(values)
    return batch.codes[usable], values[usable]
