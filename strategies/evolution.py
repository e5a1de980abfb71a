"""Evolution: aging (Real et al.) and elitist (Once-for-All), with budgets kept by repair, not by rejection.

A child over the budget gets genes of its feasible parent back, in random order, a sixth of them at a time
and no more than needed; all children of a generation are repaired at once. The work of a generation is thus
bounded whatever the budget; the loop of the once-for-all repository never ends where nothing fits.
"""

from collections.abc import Callable
from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import EvaluationError
from autocompress.proposals import Asked, check_count, check_share, fresh_sample, random_generator
from autocompress.space import Codes
from autocompress.trial import Batch

# Rounds in which children that were asked before are replaced by others, each mutated twice as strongly.
MAX_ATTEMPTS = 6
MAX_RATE = 0.5
# A child over the budget gets each gene of its parent back with these probabilities, one after the other,
# until it fits: genes that came back stay. After the last step it is its parent.
REPAIR_STEPS = np.arange(1, 6) / 6

Propose = Callable[[int, int], tuple[Codes, Codes]]
"""Given how many and the attempt, from 0: children and for each a feasible parent, `(n, choices)` both."""


@final
class _Breeding:
    """Feasible children, none asked before."""

    def __init__(
        self, constraints: Constraints, rng: np.random.Generator, *, rate: float, deduplicate: bool
    ) -> None:
        constraints.check_feasible()
        self._constraints = constraints
        self._rng = rng
        self._rate = rate
        self._asked = Asked(constraints.space) if deduplicate else None

    def founders(self, n: int) -> Codes:
        """Return up to `n` random feasible rows; fewer where the space is exhausted."""
        if self._asked is None:
            return self._constraints.sample(n, self._rng)
        return fresh_sample(self._constraints, n, self._rng, self._asked)

    def mutants(self, parents: Codes, attempt: int) -> Codes:
        """Mutate every parent, at least one gene each; more genes at later attempts."""
        space = self._constraints.space
        rate = self._rate
        if attempt:
            rate = min(MAX_RATE, max(rate, 1 / len(space.choices)) * 2**attempt)
        return space.mutate(parents, self._rng, rate=rate)

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
            proposed = self._repaired(*propose(min(n, missing * 2**attempt), attempt))
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


def _scored(batch: Batch, objective: str) -> tuple[Codes, Values]:
    """Return the rows that were measured, with their finite values.

    Raises:
        EvaluationError: Rows were measured, but not on the objective.
    """
    measured = batch.measured
    if not measured.any():
        return batch.codes[:0], np.zeros(0)
    if objective not in batch.metrics:
        given = ", ".join(batch.metrics) or "nothing"
        raise EvaluationError(f"the search maximises {objective!r}, but the evaluator gives {given}")
    values = np.asarray(batch.metrics[objective], dtype=np.float64)
    usable = measured & np.isfinite(values)
    return batch.codes[usable], values[usable]


@final
class AgingEvolution:
    """Steady state: each child is a mutant of the best of a random sample; the oldest member dies.

    Children are made as soon as a sample's worth of founders was told, or nothing is left to be told, and
    at most a population's worth waits to be told: a search that asks one at a time and one that asks a
    thousand at a time both work. Infeasible and failed members never enter the population; while it is
    empty, random architectures are asked.

    Source: Real et al., Regularized Evolution for Image Classifier Architecture Search, AAAI 2019 (there
    too: population 100, sample 25, one mutation a child). Repair and deduplication are added here.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        population: int = 100,
        sample_size: int | None = None,
        mutation_rate: float = 0.0,
        deduplicate: bool = True,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            population: How many members live, and how many random founders there are.
            sample_size: Members that compete to be the parent of a child, drawn with repetition; by
                default a quarter of the population, as in the paper.
            mutation_rate: Probability that a gene changes; 0 changes exactly one gene a child.
            deduplicate: Never ask an architecture twice.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        self._population = check_count("population", population)
        wanted = max(1, self._population // 4) if sample_size is None else sample_size
        self._sample_size = check_count("sample_size", wanted, at_most=self._population)
        self._objective = objective
        self._rng = random_generator(seed)
        rate = check_share("mutation_rate", mutation_rate)
        self._breeding = _Breeding(constraints, self._rng, rate=rate, deduplicate=deduplicate)
        # Oldest first.
        self._codes: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._values: Values = np.zeros(0)
        self._founders_left = self._population
        self._untold = 0

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures: founders first, then children of the present population."""
        if self._founders_left:
            wanted = min(n, self._founders_left)
            rows = self._breeding.founders(wanted)
            self._founders_left = self._founders_left - wanted if len(rows) == wanted else 0
        elif self._untold and len(self._values) < self._sample_size:
            rows = self._codes[:0]
        else:
            room = min(n, max(0, self._population - self._untold))
            breeding = self._breeding
            rows = breeding.children(room, self._propose) if len(self._values) else breeding.founders(room)
        self._untold += len(rows)
        return rows

    def tell(self, batch: Batch) -> None:
        """Let the measured rows be born in their order; then the oldest die."""
        self._untold = max(0, self._untold - len(batch))
        codes, values = _scored(batch, self._objective)
        self._codes = np.vstack([self._codes, codes])[-self._population :]
        self._values = np.concatenate([self._values, values])[-self._population :]

    def _propose(self, n: int, attempt: int) -> tuple[Codes, Codes]:
        contestants = self._rng.integers(len(self._values), size=(n, self._sample_size))
        winners = contestants[np.arange(n), self._values[contestants].argmax(axis=1)]
        parents = self._codes[winners]
        return self._breeding.mutants(parents, attempt), parents


@final
class ElitistEvolution:
    """Generations: mutants and crossovers of the best architectures so far, which stay until beaten.

    A generation can be asked in pieces of any size; it closes when all of it was asked and told. Until then
    no more than the generation is proposed. If no member of the first generations could be measured, the
    next one is random again.

    Source: Cai et al., Once-for-All, ICLR 2020, and its repository (population 100, 25 parents, half
    mutants with rate 0.1, half crossovers). There kernel and expansion of a block mutate together; here
    every gene mutates on its own. Repair and deduplication are added here.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        population: int = 100,
        parent_ratio: float = 0.25,
        mutation_ratio: float = 0.5,
        mutation_rate: float = 0.1,
        deduplicate: bool = True,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            population: Children of a generation.
            parent_ratio: Parents as a share of the population; at least one.
            mutation_ratio: Share of the children that are mutants; the rest are crossovers.
            mutation_rate: Probability that a gene of a mutant changes; at least one does.
            deduplicate: Never ask an architecture twice.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        self._population = check_count("population", population)
        self._parents = max(1, round(check_share("parent_ratio", parent_ratio) * self._population))
        self._mutation_ratio = check_share("mutation_ratio", mutation_ratio)
        self._objective = objective
        self._rng = random_generator(seed)
        rate = check_share("mutation_rate", mutation_rate)
        self._breeding = _Breeding(constraints, self._rng, rate=rate, deduplicate=deduplicate)
        none: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        # Best first; equal ones in the order in which they were told.
        self._best, self._best_values = none, np.zeros(0)
        self._waiting = none
        self._untold = 0

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures of the present generation; none until the last one was told."""
        if not len(self._waiting) and not self._untold:
            if len(self._best):
                self._waiting = self._breeding.children(self._population, self._propose)
            else:
                self._waiting = self._breeding.founders(self._population)
        rows, self._waiting = self._waiting[:n], self._waiting[n:]
        self._untold += len(rows)
        return rows

    def tell(self, batch: Batch) -> None:
        """Keep the best so far; they become parents when the whole generation was told."""
        self._untold = max(0, self._untold - len(batch))
        codes, values = _scored(batch, self._objective)
        codes, values = np.vstack([self._best, codes]), np.concatenate([self._best_values, values])
        order = np.argsort(-values, kind="stable")[: self._parents]
        self._best, self._best_values = codes[order], values[order]

    def _propose(self, n: int, attempt: int) -> tuple[Codes, Codes]:
        # Crossovers of parents that have become alike bring nothing new: only mutants replace them.
        mutants = round(self._mutation_ratio * n) if attempt == 0 else n
        parents = self._best[self._rng.integers(len(self._best), size=n)]
        mutated = self._breeding.mutants(parents[:mutants], attempt)
        if mutants == n:
            return mutated, parents
        partners = self._best[self._rng.integers(len(self._best), size=n - mutants)]
        return np.vstack([mutated, self._breeding.crossed(parents[mutants:], partners)]), parents
