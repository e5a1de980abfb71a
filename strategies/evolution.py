"""Evolution: aging (Real et al.) and elitist (Once-for-All), with budgets kept by repair, not by rejection.

A child over the budget gets genes of its feasible parent back, in random order, a sixth of them at a time
and no more than needed; all children of a generation are repaired at once. The work of a generation is thus
bounded whatever the budget; the loop of the once-for-all repository never ends where nothing fits.
"""

from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.proposals import check_count, check_share, random_generator
from autocompress.space import Codes
from autocompress.trial import Batch
from strategies.breeding import Breeding, Generation, scored

# Where the elitist form is given no population, a generation is a tenth of what was told, within these
# bounds. A large one from the start makes a search of a few hundred evaluations a random one; a small one
# stays behind after thousands.
SMALLEST, LARGEST = 20, 100


@final
class AgingEvolution:
    """Steady state: each child is a mutant of the best of a random sample; the oldest member dies.

    Children are made as soon as a sample's worth of founders was told, or nothing is left to be told, and
    at most a population's worth waits to be told: a search that asks one at a time and one that asks a
    thousand at a time both work. Infeasible and failed members never enter the population; while it is
    empty, random architectures are asked.

    Source: Real et al., Regularized Evolution for Image Classifier Architecture Search, AAAI 2019 (there
    population 100 and sample 25 for 20,000 evaluations; one mutation a child, as here). Repair and
    deduplication are added here: where all neighbours of the population were asked, children mutate more
    strongly.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        population: int = 20,
        sample_size: int | None = None,
        mutation_rate: float = 0.0,
        exchange: float = 0.0,
        deduplicate: bool = True,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            population: How many members live, and how many random founders there are.
            sample_size: Members that compete to be the parent of a child, drawn with repetition; by
                default half of the population.
            mutation_rate: Probability that a gene changes; 0 changes exactly one gene a child.
            exchange: Share of the mutants in which one gene grows and others shrink for it, as far as the
                budget asks; for ordinal choices under one budget, such as bits.
            deduplicate: Never ask an architecture twice.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        self._population = check_count("population", population)
        wanted = max(1, self._population // 2) if sample_size is None else sample_size
        self._sample_size = check_count("sample_size", wanted, at_most=self._population)
        self._objective = objective
        self._rng = random_generator(seed)
        rate = check_share("mutation_rate", mutation_rate)
        share = check_share("exchange", exchange)
        self._breeding = Breeding(constraints, self._rng, rate=rate, exchange=share, deduplicate=deduplicate)
        # Oldest first.
        self._codes: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._values: Values = np.zeros(0)
        self._founders: Codes | None = None
        self._untold = 0

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures: founders first, then children of the present population."""
        if self._founders is None:
            self._founders = self._breeding.founders(self._population)
        if len(self._founders):
            rows, self._founders = self._founders[:n], self._founders[n:]
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
        if self._founders is None:
            self._breeding.know(batch.codes)
        codes, values = scored(batch, self._objective)
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
        population: int | None = None,
        parent_ratio: float = 0.25,
        mutation_ratio: float = 0.5,
        mutation_rate: float = 0.1,
        exchange: float = 0.0,
        deduplicate: bool = True,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            population: Children of a generation. By default a tenth of the rows told so far, from 20 to 100:
                as in Once-for-All for thousands of evaluations, and no random search for a hundred.
            parent_ratio: Parents as a share of the population; at least one.
            mutation_ratio: Share of the children that are mutants; the rest are crossovers.
            mutation_rate: Probability that a gene of a mutant changes; at least one does.
            exchange: Share of the mutants in which one gene grows and others shrink for it, as far as the
                budget asks; for ordinal choices under one budget, such as bits.
            deduplicate: Never ask an architecture twice.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        self._population = None if population is None else check_count("population", population)
        self._parent_ratio = check_share("parent_ratio", parent_ratio)
        self._mutation_ratio = check_share("mutation_ratio", mutation_ratio)
        self._objective = objective
        self._rng = random_generator(seed)
        rate = check_share("mutation_rate", mutation_rate)
        share = check_share("exchange", exchange)
        self._breeding = Breeding(constraints, self._rng, rate=rate, exchange=share, deduplicate=deduplicate)
        none: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        # Best first; equal ones in the order in which they were told.
        self._best, self._best_values = none, np.zeros(0)
        self._told = 0
        self._founded = False
        self._generation = Generation(none)

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures of the present generation; none until the last one was told."""
        if self._generation.over:
            size = self._generation_size
            if self._founded and len(self._best):
                rows = self._breeding.children(size, self._propose)
            else:
                rows = self._breeding.founders(size)
            self._founded = True
            self._generation = Generation(rows)
        return self._generation.ask(n)

    def tell(self, batch: Batch) -> None:
        """Keep the best so far; they become parents when the whole generation was told."""
        self._generation.tell(len(batch))
        self._told += len(batch)
        if not self._founded:
            self._breeding.know(batch.codes)
        codes, values = scored(batch, self._objective)
        codes, values = np.vstack([self._best, codes]), np.concatenate([self._best_values, values])
        # Later generations may have more parents.
        order = np.argsort(-values, kind="stable")[: self._parents_of(self._population or LARGEST)]
        self._best, self._best_values = codes[order], values[order]

    @property
    def _generation_size(self) -> int:
        grown = min(LARGEST, max(SMALLEST, self._told // 10))
        return grown if self._population is None else self._population

    def _parents_of(self, population: int) -> int:
        return max(1, round(self._parent_ratio * population))

    def _propose(self, n: int, attempt: int) -> tuple[Codes, Codes]:
        best = self._best[: self._parents_of(self._generation_size)]
        # Crossovers of parents that have become alike bring nothing new: only mutants replace them.
        mutants = round(self._mutation_ratio * n) if attempt == 0 else n
        parents = best[self._rng.integers(len(best), size=n)]
        mutated = self._breeding.mutants(parents[:mutants], attempt)
        if mutants == n:
            return mutated, parents
        partners = best[self._rng.integers(len(best), size=n - mutants)]
        return np.vstack([mutated, self._breeding.crossed(parents[mutants:], partners)]), parents
