"""Additive critic: what each option is worth is learned from whole networks, and spent where it costs least.

A decision is rewarded by the whole network in HAQ, and which of a hundred decisions earned it is left to the
critic. Here the critic is a sum of one term a decision, as in value decomposition; the terms have a Gaussian
posterior, so that a draw from it explores what is not yet known (Thompson sampling), and the budget is spent
on the options that gain most for their cost according to the draw. No network is built from decisions that
are all new: options lie within a step of the best network so far, where sums hold.

Sources: Sunehag et al., "Value-Decomposition Networks", AAMAS 2018 (a value that is the sum of values of
decisions, learned from the shared reward); Duvenaud et al., "Additive Gaussian Processes", NeurIPS 2011;
Eriksson et al., "Scalable Global Optimization via Local Bayesian Optimization", NeurIPS 2019 (Thompson
sampling in a region around the best). Their combination under a budget is of this project.
"""

from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.baselines import uniform_candidates
from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import RecipeError, SpaceError
from autocompress.proposals import (
    Asked,
    check_count,
    check_positive,
    fresh_sample,
    one_by_one,
    random_generator,
)
from autocompress.space import Codes
from autocompress.trial import Batch
from strategies.breeding import objective_values

Weights = NDArray[np.float64]
"""One a feature; each choice has as many features as options."""

LEAST_ERROR = 1e-9
# Terms change smoothly over about so many options; the rest of their prior is a line.
LENGTH = 2.0
# What one more option is expected to be worth, and how far terms may lie from that, in the logarithm of the
# error.
SLOPE, AMPLITUDE = 0.15, 0.3
# Rows far from the best in value say less of its neighbourhood: their noise grows with the square of it.
FAR = 0.05
ATTEMPTS = 6
MOST_WAITING = 64
# What costs as good as nothing must not outweigh everything else by any gain.
LEAST_SHARE = 1e-5


@final
class AdditiveCritic:
    """Asks the best network by a draw from the posterior, within a step of the best one so far.

    Learns the logarithm of the error, `1 - objective`. Starts from the uniform network. Choices must be
    ordinal, with their largest option the best by and large: that is all it expects beforehand.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        exploration: float = 0.25,
        noise: float = 0.01,
        reach: int = 1,
        remember: int = 1000,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise, at most 1.
            exploration: Width of the draws relative to the posterior's; 0 always takes its mean.
            noise: Standard deviation of the logarithm of the error from one evaluation to the next.
            reach: Options that a choice may be away from the best network so far.
            remember: Rows that are learned from, the best of all.

        Raises:
            RecipeError: An option is out of its range.
            SpaceError: A choice has no order.
            InfeasibleBudgetError: Nothing fits.
        """
        constraints.check_feasible()
        space = constraints.space
        if loose := [c.name for c in space.choices if not c.ordinal and len(c.options) > 1]:
            raise SpaceError(
                f"choices {loose} of space {space.name!r} have no order; take a strategy for any options, "
                "such as 'evolution'"
            )
        self._constraints, self._objective = constraints, objective
        self._exploration = check_positive("exploration", exploration, zero=True)
        self._noise = check_positive("noise", noise)
        self._reach, self._remember = check_count("reach", reach), check_count("remember", remember)
        self._rng = random_generator(seed)
        self._asked = Asked(space)
        self._firsts = np.cumsum(space.counts) - space.counts
        self._features = [_square_root(int(count)) for count in space.counts]
        means = [np.linalg.solve(root, SLOPE * np.arange(len(root))) for root in self._features]
        self._mean: Weights = np.concatenate(means)
        # Best first.
        self._rows, self._scores = space.smallest()[:0], np.zeros(0)
        self._waiting: set[bytes] = set()

    def ask(self, n: int) -> Codes:
        """Propose up to `n` rows, each by a draw of its own."""
        most = min(n, MOST_WAITING - len(self._waiting))
        rows = one_by_one(self._drawn, most, len(self._constraints.space.choices))
        self._waiting |= {row.tobytes() for row in rows}
        return rows

    def tell(self, batch: Batch) -> None:
        """Remember what was measured.

        Raises:
            EvaluationError: Rows were measured, but not on the objective.
            RecipeError: An objective is above 1.
        """
        self._asked.fresh(batch.codes)
        self._waiting -= {row.tobytes() for row in batch.codes}
        values = objective_values(batch, self._objective)
        usable = ~np.isnan(values) & self._constraints.feasible(batch.codes)
        if (values[usable] > 1).any():
            raise RecipeError(
                f"the logarithm of an error needs {self._objective!r} up to 1, got {values[usable].max()}; "
                "let the evaluator give shares"
            )
        scores = -np.log(np.maximum(1.0 - values[usable], LEAST_ERROR))
        rows = np.vstack([self._rows, batch.codes[usable]])
        scores = np.concatenate([self._scores, scores])
        # Rows that are told again must not count twice: their noise is not drawn anew.
        _, first = np.unique(rows, axis=0, return_index=True)
        first = np.sort(first)
        order = first[np.argsort(-scores[first], kind="stable")][: self._remember]
        self._rows, self._scores = rows[order], scores[order]

    def _drawn(self) -> Codes:
        """Return a row that was not asked before, `(1, choices)`; no row if none is left."""
        if not len(self._rows):
            uniform = self._asked.fresh(uniform_candidates(self._constraints)[:1])
            return uniform if len(uniform) else self._random()
        width = self._exploration
        for _ in range(ATTEMPTS):
            row = self._best_by(self._terms(width))
            if len(self._asked.fresh(row)):
                return row
            width = 2 * max(width, 0.1)
        return self._random()

    def _random(self) -> Codes:
        return fresh_sample(self._constraints, 1, self._rng, self._asked)

    def _encoded(self, codes: Codes) -> Values:
        """Return features of rows, `(n, sum of options)`, whose inner products are the prior's covariance."""
        parts = [root[codes[:, position]] for position, root in enumerate(self._features)]
        return np.hstack(parts)

    def _terms(self, width: float) -> Weights:
        """Draw what each option is worth, `(sum of options,)`, those of a choice next to each other.

        By Matheron's rule: a draw from the prior, moved by what it misses of the rows, all relative to the
        best one.
        """
        relative = self._encoded(self._rows)
        relative = relative - relative[0]
        scores = self._scores - self._scores[0]
        noise = self._noise**2 + FAR * scores**2
        drawn = self._mean + width * AMPLITUDE * self._rng.standard_normal(len(self._mean))
        missing = scores - relative @ drawn + width * np.sqrt(noise) * self._rng.standard_normal(len(scores))
        gram = AMPLITUDE**2 * relative @ relative.T + np.diag(noise)
        drawn = drawn + AMPLITUDE**2 * relative.T @ np.linalg.solve(gram, missing)
        pieces = np.split(drawn, self._firsts[1:])
        return np.concatenate([root @ piece for root, piece in zip(self._features, pieces, strict=True)])

    def _best_by(self, terms: Weights) -> Codes:
        """Return what gains most within reach and budget, step by step by gain for each share."""
        space, best = self._constraints.space, self._rows[:1]
        ceiling = np.minimum(best + self._reach, space.counts - 1)
        row = space.canonical(np.maximum(best - self._reach, 0))
        if not self._constraints.feasible(row)[0]:
            row = best.copy()
        while True:
            able = np.flatnonzero((row < ceiling) & space.active(row))
            larger = np.repeat(row, len(able), axis=0)
            larger[np.arange(len(able)), able] += 1
            larger = space.canonical(larger)
            larger = larger[self._constraints.feasible(larger)]
            if not len(larger):
                return row
            gains = terms[self._firsts + larger].sum(axis=1) - terms[self._firsts + row].sum()
            costs = np.maximum(self._shares(larger) - self._shares(row), LEAST_SHARE)
            chosen = int((gains / costs).argmax())
            if gains[chosen] <= 0:
                return row
            row = larger[[chosen]]

    def _shares(self, codes: Codes) -> Values:
        """Return the sum over limits of the share that is used, `(n,)`."""
        total = np.zeros(len(codes))
        for metric, limit in self._constraints.limits.items():
            total += self._constraints.costs[metric].of(codes) / limit
        return total


def _square_root(count: int) -> NDArray[np.float64]:
    """Return the root of the covariance of the options of a choice, one row each, `(options, options)`."""
    options = np.arange(count, dtype=np.float64)
    distance = options[:, None] - options
    centred = options - options.mean()
    covariance = np.exp(-0.5 * (distance / LENGTH) ** 2) + np.outer(centred, centred) / max(1.0, count)
    return np.linalg.cholesky(covariance + 1e-6 * np.eye(count)).astype(np.float64)
