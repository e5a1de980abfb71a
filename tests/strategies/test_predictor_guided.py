from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

import strategies.predictor_guided
from autocompress.budget import Constraints
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError
from autocompress.proposals import every_feasible
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.strategy import Strategy
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import every_network, toy_batch, toy_constraints
from autocompress.trial import Batch, Outcome
from strategies.predictor_guided import PredictorGuided, choose
from strategies.random_search import RandomSearch


class TestPredictorGuided(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return PredictorGuided(constraints, seed=seed, initial=8)


class TestPredictorSearchedByEvolution(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return PredictorGuided(constraints, seed=seed, initial=8, exhaustive=1, candidates=60)


def score(codes: Codes) -> np.ndarray:
    """Genes that add up, and pairs of neighbours that do not; the optimum is no corner of the space."""
    weights = np.linspace(1.0, 2.0, codes.shape[1])
    return np.sin(codes) @ weights + 1.5 * (codes[:, 1:] == codes[:, :-1]).sum(axis=1)


def flat_space(choices: int) -> Constraints:
    options = tuple(range(5))
    space = SearchSpace("flat", tuple(Choice(f"g{i}", options) for i in range(choices)), (), {})
    return Constraints(space, {}, {})


def told(codes: Codes, values: np.ndarray) -> Batch:
    outcomes = np.where(np.isfinite(values), Outcome.MEASURED, Outcome.FAILED).astype(np.int8)
    return Batch(codes, {}, {"accuracy": values}, outcomes)


def run(strategy: Strategy, evaluations: int, n: int = 5) -> tuple[Codes, np.ndarray]:
    rows, values = [], []
    while sum(map(len, rows)) < evaluations:
        rows.append(strategy.ask(min(n, evaluations - sum(map(len, rows)))))
        values.append(score(rows[-1]))
        strategy.tell(told(rows[-1], values[-1]))
    return np.vstack(rows), np.concatenate(values)


# Finding good networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choices", "evaluations"), [(5, 60), (40, 80)])
def test_it_beats_random_search_in_a_small_and_in_a_large_space(choices: int, evaluations: int) -> None:
    constraints = flat_space(choices)
    for seed in range(3):
        guided = run(PredictorGuided(constraints, seed=seed), evaluations)[1].max()
        # Even against ten times as many: P(best of 60 beats best of 600) = 1/11 each, 0.0008 all three times.
        drawn = run(RandomSearch(constraints, seed=seed), 10 * evaluations, n=100)[1].max()
        assert guided > drawn


def test_it_finds_the_best_network_of_a_small_space() -> None:
    constraints = flat_space(5)
    best = score(every_network(constraints.space)).max()
    # Random search finds it with probability 70 / 3125 = 0.02.
    assert all(
        run(PredictorGuided(constraints, seed=seed), 70)[1].max() == pytest.approx(best) for seed in range(2)
    )


@pytest.mark.parametrize("exhaustive", [1, 5000])
def test_only_the_order_of_values_counts(exhaustive: int) -> None:
    sequences = []
    for scale in (lambda x: x, lambda x: np.exp(x / 3) - 100):
        strategy = PredictorGuided(flat_space(5), seed=1, initial=10, exhaustive=exhaustive, candidates=100)
        rows = []
        for _ in range(4):
            rows.append(strategy.ask(5))
            strategy.tell(told(rows[-1], scale(score(rows[-1]))))
        sequences.append(np.vstack(rows))
    np.testing.assert_array_equal(*sequences)


@pytest.mark.parametrize("exhaustive", [1, 5000])
def test_rows_that_were_told_are_learned_from_and_never_asked(exhaustive: int) -> None:
    constraints = flat_space(5)
    every = every_network(constraints.space)
    order = np.argsort(-score(every))
    known = every[order[np.r_[0:10, 1000:1020]]]
    strategy = PredictorGuided(constraints, seed=2, initial=1, exhaustive=exhaustive, candidates=400)
    strategy.tell(told(known, score(known)))
    rows, values = run(strategy, 21)
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in known}
    # One random row, then at once networks near the best ones: all above the median of the space.
    assert np.median(values[1:]) > np.quantile(score(every), 0.9)


def test_failed_rows_are_not_asked_again_and_nothing_is_learned_of_them() -> None:
    constraints = flat_space(5)
    strategy = PredictorGuided(constraints, seed=3, initial=10)
    rng = np.random.default_rng(0)
    asked = []
    for _ in range(20):
        rows = strategy.ask(5)
        asked.append(rows)
        strategy.tell(told(rows, np.where(rng.random(len(rows)) < 0.3, np.nan, score(rows))))
    rows = np.vstack(asked)
    assert len(np.unique(rows, axis=0)) == len(rows) == 100
    assert score(rows[50:]).mean() > score(rows[:10]).mean() + 2 * score(rows[:10]).std()


# Rounds ----------------------------------------------------------------------------------------------------


def test_a_round_waits_until_all_of_the_one_before_was_told() -> None:
    strategy = PredictorGuided(flat_space(5), seed=4, initial=7, round_size=3)
    first = strategy.ask(5)
    assert len(first) == 5
    strategy.tell(told(first, score(first)))
    rest = strategy.ask(100)
    assert len(rest) == 2
    assert len(strategy.ask(1)) == 0
    strategy.tell(told(rest, score(rest)))
    assert len(strategy.ask(100)) == 3


def test_rounds_grow_with_what_was_told() -> None:
    strategy = PredictorGuided(flat_space(5), seed=5, initial=1)
    rows = np.unique(flat_space(5).sample(400, np.random.default_rng(0)), axis=0)[:239]
    strategy.tell(told(rows, score(rows)))
    first = strategy.ask(1)
    strategy.tell(told(first, score(first)))
    assert len(strategy.ask(100)) == 12  # a twentieth of 240


def test_a_fit_uses_the_best_rows_and_some_of_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.predictor_guided, "MAX_ROWS", 20)
    strategy = PredictorGuided(flat_space(5), seed=6)
    rows = np.unique(flat_space(5).sample(200, np.random.default_rng(0)), axis=0)[:100]
    values = score(rows) + np.arange(100) * 1e-9  # no ties
    strategy.tell(told(rows, values))
    codes, kept = strategy._learned()
    assert len(codes) == len(kept) == 20
    assert set(np.sort(values)[-10:]) <= set(kept)
    others = np.flatnonzero(np.isin(values, kept) & (values < np.sort(values)[-10]))
    assert len(others) == 10
    assert others.min() < 15
    assert others.max() > 85


# What is looked at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["macs=100%", "macs=40%", "macs=50%,params=45%"])
def test_every_feasible_network_is_enumerated(budget: str) -> None:
    constraints = toy_constraints(budget, blocks=4)
    rows = every_network(constraints.space)
    expected = rows[constraints.feasible(rows)]
    np.testing.assert_array_equal(every_feasible(constraints, at_most=len(rows)), expected)
    assert every_feasible(constraints, at_most=len(expected) - 1) is None


def test_without_limits_every_network_is_feasible() -> None:
    constraints = toy_constraints(blocks=3)
    free = Constraints(constraints.space, constraints.costs, {})
    np.testing.assert_array_equal(every_feasible(free, at_most=1000), every_network(free.space))


@pytest.mark.parametrize(
    ("variances", "noise", "order"),
    [
        ([0.01, 1.0, 1e-6], 0.04, [1, 2, 0]),
        # What a value has by chance alone can also be an improvement: without it the second would come first.
        ([1e-6, 0.3, 1e-6], 0.5, [2, 0, 1]),
    ],
)
def test_a_choice_is_the_greatest_expected_improvement(
    variances: list[float], noise: float, order: list[int]
) -> None:
    means, best = np.array([0.9, 0.5, 1.1]), 1.0
    improvement = [
        quad(lambda x, m=m, s=s: (x - best) * norm.pdf(x, m, s), best, best + 20 * s)[0]
        for m, s in zip(means, np.sqrt(np.array(variances) + noise), strict=True)
    ]
    assert np.argsort(improvement)[::-1].tolist() == order
    # One at a time: a choice says nothing of candidates that are independent of it.
    picks = choose(means, np.diag(variances), 3, best=best, noise=noise, uncertain=0)
    assert picks.tolist() == order


def test_no_candidate_is_chosen_twice() -> None:
    picks = choose(np.array([9.0, 0.0, 0.0]), np.eye(3), 3, best=0.0, noise=5.0, uncertain=1)
    assert sorted(picks) == [0, 1, 2]


def test_uncertain_choices_are_those_of_greatest_variance_given_the_ones_before() -> None:
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(12, 6))
    covariances = factor @ factor.T
    noise = 0.1
    picks = choose(np.zeros(12), covariances, 5, best=0.0, noise=noise, uncertain=5).tolist()
    for step in range(5):
        chosen = picks[:step]
        known = covariances[np.ix_(chosen, chosen)] + noise * np.eye(step)
        across = covariances[:, chosen]
        left = np.diag(covariances - across @ np.linalg.solve(known, across.T)).copy()
        left[chosen] = -np.inf
        assert picks[step] == left.argmax()


def test_of_two_networks_that_tell_the_same_only_one_is_chosen_at_first() -> None:
    covariances = np.array([[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 0.5]])
    picks = choose(np.array([0.5, 0.49, 0.0]), covariances, 3, best=1.0, noise=1e-4, uncertain=0)
    assert picks.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("explore", "rounds"),
    [
        # A round of five: how many the predictor chooses, and how many of those for their uncertainty. What
        # is missing to five is drawn at random.
        (0.0, [(5, 0), (5, 0)]),
        (0.2, [(4, 0), (5, 1)]),
        (0.6, [(3, 1), (4, 2)]),
        (1.0, [(2, 2), (3, 3)]),
    ],
)
def test_half_of_what_explores_is_uncertain_and_half_random(
    explore: float, rounds: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(means: np.ndarray, covariances: np.ndarray, size: int, **options: Any) -> np.ndarray:
        seen.append((size, options["uncertain"]))
        return choose(means, covariances, size, **options)

    monkeypatch.setattr(strategies.predictor_guided, "choose", spy)
    codes, _ = run(PredictorGuided(flat_space(4), seed=0, initial=10, round_size=5, explore=explore), 20)
    assert seen == rounds
    assert len(codes) == 20


# What it says ----------------------------------------------------------------------------------------------


def test_notes_say_how_well_the_predictor_orders_what_it_did_not_see() -> None:
    strategy = PredictorGuided(flat_space(5), seed=7, initial=60)
    assert strategy.notes == {"predictor": "none: too few or equal scores"}
    run(strategy, 75)
    predictor = strategy.notes["predictor"]
    assert predictor["rows"] == 75
    assert predictor["rounds"] == 3
    assert predictor["searched"] == "all 3125 networks that fit"
    low, high = predictor["kendall_tau_interval"]
    assert 0.6 < low < predictor["kendall_tau"] < high < 1


def test_notes_do_not_praise_a_predictor_of_noise() -> None:
    strategy = PredictorGuided(flat_space(5), seed=8, initial=80, exhaustive=1)
    rows = strategy.ask(80)
    strategy.tell(told(rows, np.random.default_rng(0).normal(size=80)))
    predictor = strategy.notes["predictor"]
    # sqrt(2 (2n + 5) / (9 n (n - 1))) = 0.076 for n = 80; leave-one-out is biased downwards a little.
    assert -0.4 < predictor["kendall_tau"] < 4 * 0.076
    assert predictor["searched"] == "evolution"


def test_equal_values_leave_the_search_random() -> None:
    strategy = PredictorGuided(flat_space(5), seed=9, initial=10)
    for _ in range(4):
        rows = strategy.ask(100)
        assert len(rows)
        strategy.tell(told(rows, np.full(len(rows), 0.1)))
    assert strategy.notes == {"predictor": "none: too few or equal scores"}


# Bad input -------------------------------------------------------------------------------------------------


def test_a_metric_that_the_evaluator_does_not_give_is_an_error() -> None:
    constraints = toy_constraints()
    strategy = PredictorGuided(constraints, seed=0, objective="f1")
    with pytest.raises(EvaluationError, match="maximises 'f1', but the evaluator gives accuracy"):
        strategy.tell(toy_batch(constraints, strategy.ask(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0}, "initial must be an integer >= 1, got 0"),
        ({"round_size": 2.5}, r"round_size must be an integer >= 1, got 2\.5"),
        ({"explore": 1.5}, r"explore must be in 0\.\.1, got 1\.5"),
        ({"exhaustive": -1}, "exhaustive must be an integer >= 1, got -1"),
        ({"candidates": 0}, "candidates must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PredictorGuided(toy_constraints(), **{"seed": 0, **options})  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_is_refused_when_the_search_is_made() -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        PredictorGuided(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)
