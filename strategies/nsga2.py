"""NSGA-II: the whole trade-off between the objective and costs in one search, not one point of it.

Source: Deb, Pratap, Agarwal & Meyarivan, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE
TEC 6(2), 2002; the names of its parts are given below.
"""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import RecipeError
from autocompress.proposals import check_count, check_share, random_generator
from autocompress.space import Codes
from autocompress.trial import Batch, Outcome
from strategies.breeding import Breeding, Generation, objective_values


def domination(values: Values, violation: Values) -> NDArray[np.bool_]:
    """Return which point dominates which, `(n, n)`: row i, column j says that i dominates j.

    A feasible point dominates every infeasible one; of two infeasible ones that of less violation
    dominates; of two feasible ones the one that is no worse in anything and better in something
    (section VI, definition 1).

    Args:
        values: `(n, d)`, larger is better; without meaning where infeasible.
        violation: `(n,)`, 0 where feasible.
    """
    no_worse = np.ones((len(values), len(values)), dtype=np.bool_)
    better = np.zeros_like(no_worse)
    for column in values.T:
        no_worse &= column[:, None] >= column
        better |= column[:, None] > column
    feasible = violation == 0
    both = feasible[:, None] & feasible
    return np.where(both, no_worse & better, violation[:, None] < violation)


def front_ranks(values: Values, violation: Values) -> NDArray[np.int64]:
    """Return the front of every point, `(n,)`: 0 if none dominates it, 1 if only points of front 0 do, ...

    The "fast non-dominated sort" of section III-A: O(d n^2).

    Args:
        values: `(n, d)`, larger is better.
        violation: `(n,)`, 0 where feasible.
    """
    dominates = domination(values, violation)
    dominators = dominates.sum(axis=0)
    ranks = np.full(len(values), -1, dtype=np.int64)
    rank = 0
    while (ranks < 0).any():
        front = np.flatnonzero((dominators == 0) & (ranks < 0))
        ranks[front] = rank
        dominators -= dominates[front].sum(axis=0)
        rank += 1
    return ranks


def crowding_distance(values: Values) -> Values:
    """Return how much room each point of one front has, `(n,)`; infinite at the ends (section III-B).

    Args:
        values: `(n, d)`. A dimension in which all are equal has no ends and counts for nothing.
    """
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        ascending = column[order]
        span = ascending[-1] - ascending[0]
        if span > 0:
            distance[order[1:-1]] += (ascending[2:] - ascending[:-2]) / span
            distance[order[[0, -1]]] = np.inf
    return distance


def crowded_order(values: Values, violation: Values) -> NDArray[np.int64]:
    """Return the positions of the points, best first: by front, then by room, then as given.

    That is the "crowded-comparison operator" of section III-B as an order.

    Args:
        values: `(n, d)`, larger is better.
        violation: `(n,)`, 0 where feasible.
    """
    ranks = front_ranks(values, violation)
    room = np.zeros(len(values))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        front = ranks == rank
        room[front] = crowding_distance(values[front])
    return np.lexsort((-room, ranks))


@final
class NSGA2:
    """Generations of crossovers and mutants; parents and children compete for a spread-out front.

    Everything asked fits the budget. Rows that were told as infeasible (`WarmStart`) live as long as there is
    nothing better: every feasible one dominates them, and so does what breaks the limits less.

    A generation can be asked in pieces of any size; it closes when all of it was asked and told. Failed rows
    have no children; while nothing else was told, the next generation is random again.

    Different from the paper: genes are options, so crossover takes each from either parent (instead of SBX),
    every child is mutated in at least one gene, and none is asked twice.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        costs: Sequence[str] | None = None,
        population: int = 20,
        crossover_rate: float = 0.9,
        mutation_rate: float = 0.0,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            costs: The metrics to minimise with it, such as `("latency_ms",)`; by default those that the
                budget limits, or the first that is priced if it limits none.
            population: How many survive, and how many children a generation has. With two objectives a larger
                one covers less of the front for up to thousands of evaluations: all that was evaluated counts
                for it, not the last population alone.
            crossover_rate: Probability that a child has two parents.
            mutation_rate: Probability that a gene changes; at least one does, and with 0 exactly one.

        Raises:
            RecipeError: An option is out of its range, or a cost is unknown.
            InfeasibleBudgetError: Nothing fits.
        """
        self._population = check_count("population", population)
        self._crossover_rate = check_share("crossover_rate", crossover_rate)
        rate = check_share("mutation_rate", mutation_rate)
        self._objective = objective
        self._constraints = constraints
        self._costs = _costs(constraints, costs)
        self._rng = random_generator(seed)
        self._breeding = Breeding(constraints, self._rng, rate=rate)
        # Best first, in the crowded order.
        self._codes: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._values: Values = np.zeros((0, 1 + len(self._costs)))
        self._violation: Values = np.zeros(0)
        self._told: list[tuple[Codes, Values, NDArray[np.bool_]]] = []
        self._founded = False
        self._generation = Generation(self._codes)

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures of the present generation; none until the last one was told."""
        if self._generation.over:
            self._survive()
            if self._founded and len(self._codes):
                rows = self._breeding.children(self._population, self._propose)
            else:
                rows = self._breeding.founders(self._population)
            self._founded = True
            self._generation = Generation(rows)
        return self._generation.ask(n)

    def tell(self, batch: Batch) -> None:
        """Learn outcomes; they compete with the parents when the whole generation was told."""
        self._generation.tell(len(batch))
        if not self._founded:
            self._breeding.know(batch.codes)
        objective = objective_values(batch, self._objective)
        refused = batch.outcomes == Outcome.INFEASIBLE
        usable = refused | ~np.isnan(objective)
        self._told.append((batch.codes[usable], objective[usable], refused[usable]))

    def _survive(self) -> None:
        """Keep the best of parents and children (section III-C)."""
        if not self._told:
            return
        codes, objective, refused = (np.concatenate(parts) for parts in zip(*self._told, strict=True))
        self._told = []
        violation = np.maximum(self._constraints.violation(codes), 0.0)
        # What others refuse is infeasible, also if it fits here.
        violation[refused] = np.maximum(violation[refused], np.finfo(np.float64).tiny)
        costs = [self._constraints.costs[metric].of(codes) for metric in self._costs]
        values = np.stack([np.where(violation > 0, 0.0, objective), *(-cost for cost in costs)], axis=1)
        codes = np.vstack([self._codes, codes])
        values = np.vstack([self._values, values])
        violation = np.concatenate([self._violation, violation])
        order = crowded_order(values, violation)[: self._population]
        self._codes, self._values, self._violation = codes[order], values[order], violation[order]

    def _propose(self, n: int, attempt: int) -> tuple[Codes, Codes]:
        first, second = self._winners(n), self._winners(n)
        # Crossovers of parents that have become alike bring nothing new: only mutants replace them.
        crosses = self._rng.random((n, 1)) < (self._crossover_rate if attempt == 0 else 0.0)
        parents = self._codes[first]
        crossed = self._breeding.crossed(parents, self._codes[second])
        children = self._breeding.mutants(np.where(crosses, crossed, parents), attempt)
        infeasible = self._violation[first] > 0
        if infeasible.any():
            # A child is repaired towards what fits; such a parent does not.
            parents[infeasible] = self._constraints.sample(int(infeasible.sum()), self._rng)
        return children, parents

    def _winners(self, n: int) -> NDArray[np.int64]:
        """Return the winners of `n` binary tournaments: members stand in order, so the smaller position."""
        winners: NDArray[np.int64] = self._rng.integers(len(self._codes), size=(n, 2)).min(axis=1)
        return winners


def _costs(constraints: Constraints, costs: Sequence[str] | None) -> tuple[str, ...]:
    """Return the costs to minimise, checked."""
    priced = list(constraints.costs)
    if costs is None:
        chosen = tuple(constraints.limits) or tuple(priced[:1])
    elif isinstance(costs, str):
        raise RecipeError(f"costs must be a list of metrics, such as [{costs}], got {costs!r}")
    else:
        chosen = tuple("macs" if metric == "flops" else metric for metric in costs)
    unknown = [metric for metric in chosen if metric not in constraints.costs]
    if unknown:
        raise RecipeError(f"costs must be among {', '.join(priced) or 'none'}, got {', '.join(unknown)}")
    if not chosen:
        raise RecipeError(
            f"NSGA-II minimises at least one cost, got none; priced are {', '.join(priced) or 'none'}; to "
            "maximise the objective alone, use evolution or elitist"
        )
    if len(set(chosen)) != len(chosen):
        raise RecipeError(f"costs must name each metric once, got {list(chosen)}")
    return chosen
