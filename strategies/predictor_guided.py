"""Predictor-guided search: rounds of evaluating, fitting a predictor, and searching the predictor.

Source: BRP-NAS (Dudziak et al., NeurIPS 2020: a predictor refitted in rounds, which looks at every network
of a small space) and LINAS (Cummings et al., 2022: the predictor is searched by evolution). There the
predicted best are evaluated; a single round of that finds the predictor's errors rather than good networks.
Here the predictor is a Gaussian process, whose spread says where it may be wrong, and is refitted after
every few evaluations.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.proposals import (
    Asked,
    check_count,
    check_share,
    every_feasible,
    fresh_sample,
    random_generator,
)
from autocompress.space import Codes
from autocompress.trial import Batch, Outcome
from strategies.breeding import Generation, objective_values
from strategies.evolution import ElitistEvolution

if TYPE_CHECKING:
    from autocompress.evaluation.ensemble import ProcessEnsemble

MIN_ROWS = 5
"""Fewest measured rows, not all of one value, that a predictor is fitted to."""
MAX_ROWS = 1000
"""A fit uses at most so many rows: the best half, and of the others as many in even steps."""
POPULATION = 200
"""Of the evolution that searches the predictor."""
# Candidates whose spread is computed, and of those the ones among which a round is chosen jointly.
LIKELY, SHORTLIST = 2000, 300
OPTIMISM = 2.0
# With more rows told, one more changes less, and a fit costs more: a round is at least this share of them.
ROUND_SHARE = 0.05


@final
class PredictorGuided:
    """Rounds: refit an ensemble, then ask for the most promising and the most uncertain networks.

    Values count by their ranks (as normal scores), so that a few broken networks do not blur the differences
    between good ones. Promising is the greatest expected improvement; uncertain the greatest spread among
    candidates that could be the best. Each choice of a round takes into account what is learned from those
    before it.

    A round can be asked in pieces of any size; the next one is made when all of it was told. On one core it
    takes 0.2 s after 100 evaluations and 1.6 s after 500, where a round is larger: 0.04 to 0.07 s each.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        initial: int = 20,
        round_size: int = 5,
        explore: float = 0.2,
        exhaustive: int = 50_000,
        candidates: int = 4_000,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits; the costs are features of the predictor.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            initial: Random networks that are asked first.
            round_size: Networks a round; more once over a hundred were told.
            explore: Share of a round that goes to the most uncertain and to random networks, half each: a
                predictor can be sure and wrong where it saw few networks.
            exhaustive: A feasible space of at most so many networks is looked at whole in every round, a
                larger one by evolution.
            candidates: Networks that evolution looks at in a round.

        Raises:
            RecipeError: An option is out of its range.
            InfeasibleBudgetError: Nothing fits.
        """
        constraints.check_feasible()
        self._constraints = constraints
        self._objective = objective
        self._initial = check_count("initial", initial)
        self._round_size = check_count("round_size", round_size)
        self._explore = check_share("explore", explore)
        self._exhaustive = check_count("exhaustive", exhaustive)
        self._candidates_a_round = check_count("candidates", candidates)
        self._rng = random_generator(seed)
        self._asked = Asked(constraints.space)
        none: Codes = np.zeros((0, len(constraints.space.choices)), dtype=np.int64)
        self._codes, self._values, self._failed = none, np.zeros(0), none
        self._generation: Generation | None = None
        self._everything: Codes | None = None
        self._rounds = 0

    def ask(self, n: int) -> Codes:
        """Propose up to `n` architectures of the present round; none until the last one was told."""
        if self._generation is None:
            self._everything = every_feasible(self._constraints, at_most=self._exhaustive)
            rows = fresh_sample(self._constraints, self._initial, self._rng, self._asked)
            self._generation = Generation(rows)
        elif self._generation.over:
            # Matrices this small gain nothing from threads, and sums must not depend on how many there are.
            with threadpool_limits(1):
                self._generation = Generation(self._next_round())
        return self._generation.ask(n)

    def tell(self, batch: Batch) -> None:
        """Remember the rows and what was measured."""
        if self._generation is not None:
            self._generation.tell(len(batch))
        self._asked.fresh(batch.codes)
        values = objective_values(batch, self._objective)
        known = ~np.isnan(values)
        self._codes = np.vstack([self._codes, batch.codes[known]])
        self._values = np.concatenate([self._values, values[known]])
        self._failed = np.vstack([self._failed, batch.codes[~known]])

    @property
    def notes(self) -> Mapping[str, Any]:
        """What a search reports of the predictor: how well it orders rows told from the others.

        The rank correlation (Kendall's tau-b) is that of leave-one-out predictions with the values; its
        interval is a 95 % bootstrap interval.
        """
        if not self._learnable:
            return {"predictor": "none: too few or equal scores"}
        from autocompress.evaluation.predictor import kendall_tau

        with threadpool_limits(1):
            process, targets = self._fit()
            tau, (low, high) = kendall_tau(process.leave_one_out(), targets, np.random.default_rng(0))
        looked = "evolution" if self._everything is None else f"all {len(self._everything)} networks that fit"
        return {
            "predictor": {
                "kind": "ensemble",
                "kendall_tau": tau,
                "kendall_tau_interval": [low, high],
                "rows": len(targets),
                "judged": "leave-one-out",
                "rounds": self._rounds,
                "searched": looked,
            }
        }

    @property
    def _learnable(self) -> bool:
        return len(self._values) >= MIN_ROWS and bool(np.ptp(self._values) > 0)

    def _next_round(self) -> Codes:
        """Return the rows of the next round; none if nothing is left."""
        size = max(self._round_size, int(ROUND_SHARE * len(self._values)))
        rows = self._codes[:0]
        if self._learnable:
            self._rounds += 1
            exploring = round(self._explore * size)
            # Half of them, in turns where that is no whole number.
            random = (exploring + self._rounds % 2) // 2
            rows = self._asked.fresh(self._promising(size - random, uncertain=exploring - random))
        if len(rows) < size:
            rest = fresh_sample(self._constraints, size - len(rows), self._rng, self._asked)
            rows = np.vstack([rows, rest])
        return rows

    def _promising(self, size: int, *, uncertain: int) -> Codes:
        process, targets = self._fit()
        candidates = self._candidates(process)
        best = np.argsort(-self._optimistic(process, candidates), kind="stable")[:SHORTLIST]
        candidates = candidates[best]
        means, covariances = process.joint(candidates)
        picks = choose(
            means,
            covariances,
            size,
            best=float(targets.max()),
            noise=process.noise,
            uncertain=uncertain,
        )
        return candidates[picks]

    def _fit(self) -> "tuple[ProcessEnsemble, Values]":
        """Fit the predictor; return it with the normal scores of the values that it was fitted to."""
        from scipy.special import ndtri
        from scipy.stats import rankdata

        from autocompress.evaluation.ensemble import ProcessEnsemble

        codes, values = self._learned()
        targets = ndtri((rankdata(values) - 0.5) / len(values))
        costs = list(self._constraints.costs.values())
        return ProcessEnsemble(self._constraints.space, costs).fit(codes, targets), targets

    def _learned(self) -> tuple[Codes, Values]:
        """Return what a predictor is fitted to: all rows, or the best of many and some of the others."""
        codes, values = self._codes, self._values
        if len(values) <= MAX_ROWS:
            return codes, values
        half = MAX_ROWS // 2
        order = np.argsort(-values, kind="stable")
        others = np.sort(order[half:])
        even = others[np.linspace(0, len(others) - 1, half).astype(np.int64)]
        kept = np.concatenate([order[:half], even])
        return codes[kept], values[kept]

    def _candidates(self, process: "ProcessEnsemble") -> Codes:
        """Return networks that were not asked: all that fit, or what evolution finds."""
        if self._everything is None:
            return self._evolved(process)
        # A copy: only what is chosen counts as asked.
        left = copy.deepcopy(self._asked).fresh(self._everything)
        if len(left) > LIKELY:
            left = left[np.argsort(-process.predict(left), kind="stable")[:LIKELY]]
        return left

    def _evolved(self, process: "ProcessEnsemble") -> Codes:
        """Return what evolution finds where it maximises the optimistic prediction; nothing that was told."""
        population = min(POPULATION, self._candidates_a_round)
        search = ElitistEvolution(
            self._constraints,
            seed=int(self._rng.integers(2**32)),
            objective="score",
            population=population,
        )
        optimistic = self._optimistic(process, self._codes)
        search.tell(_batch(self._codes, optimistic))
        search.tell(_batch(self._failed, np.full(len(self._failed), np.nan)))
        found = [self._codes[:0]]
        for _ in range(self._candidates_a_round // population):
            rows = search.ask(population)
            if not len(rows):
                break
            search.tell(_batch(rows, self._optimistic(process, rows)))
            found.append(rows)
        return np.vstack(found)

    def _optimistic(self, process: "ProcessEnsemble", codes: Codes) -> Values:
        means, spreads = process.with_spread(codes)
        return means + OPTIMISM * spreads


def choose(
    means: Values, covariances: NDArray[np.float64], size: int, *, best: float, noise: float, uncertain: int
) -> NDArray[np.int64]:
    """Choose candidates one after the other, each as if those before it were known to be as expected.

    Args:
        means: Expected values, `(n,)`.
        covariances: Of the values, `(n, n)`.
        size: How many; all if there are not more.
        best: The value to beat.
        noise: Variance of what is measured around the value.
        uncertain: The last so many of the choices are those of greatest variance; the others of greatest
            expected improvement (Jones et al., Efficient Global Optimization, 1998, equation 15).

    Returns:
        Positions, in the order of choice.
    """
    from scipy.stats import norm

    covariances = covariances.copy()
    free = np.ones(len(means), dtype=np.bool_)
    picks: list[int] = []
    for left in range(min(size, len(means)), 0, -1):
        variances = np.maximum(np.diag(covariances), 0.0)
        if left <= uncertain:
            scores = variances
        else:
            spreads = np.sqrt(variances + noise)
            gain = (means - best) / spreads
            scores = spreads * (gain * norm.cdf(gain) + norm.pdf(gain))
        pick = int(np.where(free, scores, -np.inf).argmax())
        picks.append(pick)
        free[pick] = False
        column = covariances[:, pick]
        covariances -= np.outer(column, column) / (variances[pick] + noise)
    return np.array(picks, dtype=np.int64)


def _batch(codes: Codes, scores: Values) -> Batch:
    outcomes = np.where(np.isfinite(scores), Outcome.MEASURED, Outcome.FAILED).astype(np.int8)
    return Batch(codes, {}, {"score": scores}, outcomes)
