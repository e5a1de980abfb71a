"""The search loop on toy spaces, whose networks, costs and scores are known in closed form."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from autocompress import engine
from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.engine import MAX_FAILURES, MAX_IDLE_ASKS, search
from autocompress.errors import AutocompressError, EvaluationError, StorageError, StrategyError
from autocompress.evaluator import evaluated
from autocompress.history import read_history
from autocompress.result import SearchResult
from autocompress.space import Codes, SearchSpace
from autocompress.strategy import Strategy
from autocompress.testing.toys import every_network, toy_constraints, toy_score, toy_space
from autocompress.trial import Batch, Outcome, Trial
from strategies.evolution import AgingEvolution, ElitistEvolution
from strategies.random_search import RandomSearch

Strategies = Callable[..., Strategy]


class Evaluated:
    """Scores as `toy_score` does, and remembers every row it was asked for."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        paid: bool = True,
        failing: Callable[[Codes], bool] = lambda row: False,
        nan: Callable[[Codes], bool] = lambda row: False,
        interrupted_after: int | None = None,
    ) -> None:
        self.space, self.paid, self.failing, self.nan = space, paid, failing, nan
        self.interrupted_after = interrupted_after
        self.rows: list[bytes] = []

    def __call__(self, codes: Codes) -> dict[str, Values]:
        if self.paid:
            assert codes.shape[0] == 1, "paid evaluators get one row a call"
        if self.interrupted_after is not None and len(self.rows) >= self.interrupted_after:
            raise KeyboardInterrupt
        self.rows += [row.tobytes() for row in codes]
        if any(self.failing(row) for row in codes):
            raise EvaluationError("out of luck")
        scores = toy_score(self.space, codes)
        scores[[self.nan(row) for row in codes]] = np.nan
        return {"accuracy": scores, "other": scores / 2}


class Scripted:
    """Asks lists of rows that were given, in pieces if need be; remembers what it was told."""

    def __init__(self, *asks: Codes) -> None:
        self.asks = list(asks)
        self.told: list[Batch] = []

    def ask(self, n: int) -> Codes:
        if not self.asks:
            return np.zeros((0, 1), dtype=np.int64)
        rows = self.asks[0][:n]
        self.asks[0] = self.asks[0][n:]
        if not len(self.asks[0]):
            del self.asks[0]
        return rows

    def tell(self, batch: Batch) -> None:
        self.told.append(batch)

    @property
    def outcomes(self) -> list[int]:
        return [int(outcome) for batch in self.told for outcome in batch.outcomes]

    @property
    def scores(self) -> list[float]:
        return [float(score) for batch in self.told for score in batch.metrics["accuracy"]]


class Stuck:
    """Asks the same rows for ever."""

    def __init__(self, rows: Codes) -> None:
        self.rows, self.asks = rows, 0

    def ask(self, n: int) -> Codes:
        self.asks += 1
        return self.rows[:n]

    def tell(self, batch: Batch) -> None:
        pass


def macs(space: SearchSpace, row: Codes) -> int:
    """Multiply-accumulates of a toy network: 4x4 channels, k x k taps, at every pixel of every block."""
    settings = dict(space.decode(row[None])[0].settings)
    kernels = [int(str(settings[f"block{i}.kernel"])) for i in range(1, int(str(settings["depth"])) + 1)]
    return sum(16 * kernel**2 for kernel in kernels) * int(str(settings["resolution"])) ** 2


HALF_OF_TWO_BLOCKS = 0.5 * 2 * 16 * 25 * 144
"""Half the MACs of the largest toy network of two blocks: kernels 5 at 12x12 pixels."""


def plain(trials: Sequence[Trial]) -> list[Any]:
    return [
        (t.number, t.architecture.key, dict(t.costs), dict(t.metrics), t.outcome, t.error) for t in trials
    ]


# One search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paid", [True, False])
def test_infeasible_proposals_are_told_and_never_evaluated(paid: bool) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    rows = every_network(constraints.space)
    fits = [macs(constraints.space, row) <= HALF_OF_TWO_BLOCKS for row in rows]
    assert 0 < sum(fits) < len(rows)
    strategy, evaluator = Scripted(rows), Evaluated(constraints.space, paid=paid)
    result = search(strategy, constraints, evaluator, evaluations=1000)
    assert evaluator.rows == [row.tobytes() for row, fit in zip(rows, fits, strict=True) if fit]
    assert np.array_equal(np.vstack([batch.codes for batch in strategy.told]), rows)
    assert strategy.outcomes == [Outcome.MEASURED if fit else Outcome.INFEASIBLE for fit in fits]
    wanted = np.where(fits, toy_score(constraints.space, rows), np.nan)
    np.testing.assert_array_equal(strategy.scores, wanted)
    assert result.asked == 24
    assert (len(result.trials), result.scored) == ((sum(fits), 0) if paid else (0, sum(fits)))


@pytest.mark.parametrize("paid", [True, False])
def test_a_space_without_costs_is_searched_too(tmp_path: Path, paid: bool) -> None:
    constraints = Constraints(toy_space(2), {}, {})
    result = search(
        RandomSearch(constraints, seed=0), constraints, Evaluated(constraints.space, paid=paid),
        evaluations=5, history=tmp_path / "history.bin",
    )  # fmt: skip
    assert len(result.trials) + result.scored == 5


def test_what_is_told_carries_every_cost_also_of_infeasible_rows() -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    rows = every_network(constraints.space)
    strategy = Scripted(rows)
    search(strategy, constraints, Evaluated(constraints.space), evaluations=1000)
    told = np.concatenate([batch.costs["macs"] for batch in strategy.told])
    np.testing.assert_array_equal(told, [macs(constraints.space, row) for row in rows])
    assert {frozenset(batch.costs) for batch in strategy.told} == {frozenset(constraints.costs)}


def test_a_network_asked_again_is_told_again_from_memory_and_not_paid_for_again() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    strategy = Scripted(rows[[3, 3, 4]], rows[[4, 3]], rows[[5]])
    evaluator = Evaluated(constraints.space)
    result = search(strategy, constraints, evaluator, evaluations=1000)
    assert evaluator.rows == [rows[i].tobytes() for i in (3, 4, 5)]
    np.testing.assert_array_equal(strategy.scores, toy_score(constraints.space, rows[[3, 3, 4, 4, 3, 5]]))
    assert (result.asked, len(result.trials)) == (6, 3)


class Workers(Evaluated):
    """Evaluates three networks at a time, the latest of them first."""

    workers = 3

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.submitted: list[Codes] = []
        self.found: dict[bytes, Mapping[str, float] | Exception] = {}
        self.most = self.ever = 0

    def submit(self, row: Codes) -> None:
        self.submitted.append(row)
        self.ever += 1
        self.most = max(self.most, len(self.submitted))

    def result(self) -> Mapping[str, float] | Exception:
        for row in reversed(self.submitted):
            if row.tobytes() not in self.found:
                self.found[row.tobytes()] = evaluated(self, row)
        return self.found[self.submitted.pop(0).tobytes()]

    def cancel(self) -> None:
        self.submitted.clear()


@pytest.mark.parametrize(("asynchronous", "most"), [(False, 3), (True, 6)])
def test_an_evaluator_with_workers_gets_as_many_networks_as_it_has_and_changes_no_trial(
    asynchronous: bool, most: int
) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    rows = every_network(constraints.space)
    order = np.concatenate([np.arange(len(rows)), [0, 1]])
    alone, together = Scripted(rows[order]), Scripted(rows[order])
    expected = search(alone, constraints, Evaluated(constraints.space, failing=is_odd), evaluations=1000)
    workers = Workers(constraints.space, failing=is_odd)
    result = search(together, constraints, workers, evaluations=1000, asynchronous=asynchronous)
    assert plain(result.trials) == plain(expected.trials)
    assert together.outcomes == alone.outcomes
    assert workers.most == most
    assert len(set(workers.rows)) == len(workers.rows)


def test_a_search_of_which_every_evaluation_failed_is_an_error(tmp_path: Path) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    evaluator = Evaluated(constraints.space, failing=lambda row: True)
    with pytest.raises(EvaluationError, match=r"not one of 4 evaluations gave a score, .*: out of luck"):
        search(Scripted(rows[:4]), constraints, evaluator, evaluations=4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_workers_evaluate_no_network_twice_and_no_more_than_are_wanted(asynchronous: bool) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    workers = Workers(constraints.space)
    strategy = Scripted(rows[[3, 3, 4]], rows[[5, 3, 6, 7, 8, 9, 10]])
    result = search(strategy, constraints, workers, evaluations=5, asynchronous=asynchronous)
    assert len(result.trials) == len(workers.rows) == len(set(workers.rows)) == workers.ever == 5
    assert [t.metrics["accuracy"] for t in result.trials] == toy_score(constraints.space, rows[3:8]).tolist()


def test_a_failed_evaluation_is_a_trial_told_as_failed_and_not_tried_again() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    bad, worse = rows[1].tobytes(), rows[2].tobytes()
    evaluator = Evaluated(
        constraints.space, failing=lambda row: row.tobytes() == bad, nan=lambda row: row.tobytes() == worse
    )
    strategy = Scripted(rows[:4], rows[:4])
    result = search(strategy, constraints, evaluator, evaluations=8)
    assert evaluator.rows == [row.tobytes() for row in rows[:4]]
    assert strategy.outcomes == [0, Outcome.FAILED, Outcome.FAILED, 0] * 2
    assert np.isnan(strategy.scores).tolist() == [False, True, True, False] * 2
    assert [trial.outcome for trial in result.trials] == [0, Outcome.FAILED, Outcome.FAILED, 0]
    assert [trial.error for trial in result.trials] == ["", "out of luck", "accuracy is nan", ""]
    assert [dict(trial.metrics) for trial in result.trials[1:3]] == [{}, {}]
    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]


def test_scores_that_are_not_finite_are_told_as_failed_where_evaluation_is_not_paid_for() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    strategy = Scripted(rows[:3], rows[3:6])
    bad = rows[1].tobytes()
    evaluator = Evaluated(constraints.space, paid=False, nan=lambda row: row.tobytes() == bad)
    told: list[str] = []
    result = search(
        strategy, constraints, evaluator, evaluations=6, progress=lambda d, t, note="": told.append(note)
    )
    assert strategy.outcomes == [0, Outcome.FAILED, 0, 0, 0, 0]
    assert result.candidates is not None
    assert bad not in {row.tobytes() for row in result.candidates.codes}
    assert len(result.candidates) == 5
    assert not any("nan" in note for note in told)


def test_a_predictor_that_fails_tells_its_rows_as_failed_and_the_search_goes_on() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    strategy, bad = Scripted(rows[:2], rows[2:4]), rows[0].tobytes()
    evaluator = Evaluated(constraints.space, paid=False, failing=lambda row: row.tobytes() == bad)
    search(strategy, constraints, evaluator, evaluations=4)
    assert strategy.outcomes == [Outcome.FAILED, Outcome.FAILED, 0, 0]


class Broken:
    """Raises what evaluators of users raise, every third time or always."""

    paid = True

    def __init__(self, space: SearchSpace, error: Exception, *, always: bool) -> None:
        self.space, self.error, self.always, self.calls = space, error, always, 0

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        self.calls += 1
        if self.always or self.calls % 3 == 0:
            raise self.error
        return {"accuracy": toy_score(self.space, codes)}


def test_any_error_of_an_evaluator_costs_only_its_network() -> None:
    constraints = toy_constraints("macs=100%", blocks=3)
    broken = Broken(constraints.space, RuntimeError("out of memory"), always=False)
    result = search(RandomSearch(constraints, seed=0), constraints, broken, evaluations=30)
    assert [trial.outcome for trial in result.trials] == [0, 0, Outcome.FAILED] * 10
    assert result.trials[2].error == "RuntimeError: out of memory"


def test_an_evaluator_that_fails_from_the_first_on_ends_the_search() -> None:
    constraints = toy_constraints("macs=100%", blocks=3)
    broken = Broken(constraints.space, ZeroDivisionError("by zero"), always=True)
    wanted = f"the first {MAX_FAILURES} evaluations all failed, .* ZeroDivisionError: by zero; the eval"
    with pytest.raises(EvaluationError, match=wanted):
        search(RandomSearch(constraints, seed=0), constraints, broken, evaluations=100)
    assert broken.calls == MAX_FAILURES


def test_an_error_of_ours_that_is_no_evaluation_error_ends_the_search() -> None:
    constraints = toy_constraints("macs=100%", blocks=3)
    broken = Broken(constraints.space, StorageError("the weights are gone"), always=True)
    with pytest.raises(StorageError, match="the weights are gone"):
        search(RandomSearch(constraints, seed=0), constraints, broken, evaluations=100)


# Faults of a strategy --------------------------------------------------------------------------------------


class Faulty:
    """Does what it is given when asked, then when told."""

    def __init__(self, asked: Callable[[int], Any], told: Callable[[Batch], Any]) -> None:
        self.ask, self.tell = asked, told


def fail(argument: Any) -> Any:
    raise KeyError("mine")


def hang(argument: Any) -> Any:
    while True:
        time.sleep(0.01)


def hang_whatever_is_raised(argument: Any) -> Any:
    while True:
        with suppress(Exception):
            time.sleep(0.01)


def lose_the_first_interrupt(argument: Any) -> Any:
    try:
        time.sleep(5)
    except BaseException:  # noqa: BLE001
        hang(argument)


SHAPE = r"must propose an integer array of shape \(m, 4\), m <= 1"


@pytest.mark.parametrize(
    ("ask", "tell", "said"),
    [
        (fail, None, "strategy Faulty failed to ask: KeyError: 'mine'"),
        (None, fail, "strategy Faulty failed to tell: KeyError: 'mine'"),
        (hang, None, "strategy Faulty took more than 1 s to ask"),
        (None, hang, "strategy Faulty took more than 1 s to tell"),
        (hang_whatever_is_raised, None, "strategy Faulty took more than 1 s to ask"),
        (lose_the_first_interrupt, None, "strategy Faulty took more than 1 s to ask"),
        (lambda n: np.full((n, 4), 9), None, "proposed what is not in space 'toy': row 0, position 0"),
        (
            lambda n: np.zeros((n, 3), dtype=np.int64),
            None,
            r"not in space 'toy': .* \(n, 4\), got \(1, 3\)",
        ),
        (lambda n: np.zeros((n, 4)), None, "not in space 'toy': codes must be integers, got float64"),
        (lambda n: np.zeros((n + 1, 4), dtype=np.int64), None, "proposed 2 networks where 1 were asked"),
        (lambda n: None, None, f"Faulty {SHAPE}, got NoneType"),
        (lambda n: [[0, 0, 0, 0]], None, f"Faulty {SHAPE}, got list"),
        (lambda n: [], None, f"Faulty {SHAPE}, got list"),
        (lambda n: np.zeros(4, dtype=np.int64), None, rf"Faulty {SHAPE}, got shape \(4,\)"),
        (lambda n: np.array(0), None, rf"Faulty {SHAPE}, got shape \(\)"),
    ],
)
def test_a_fault_of_a_strategy_is_an_error_with_its_name_and_no_trial_is_lost(
    tmp_path: Path, ask: Callable[..., Any] | None, tell: Callable[..., Any] | None, said: str
) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    random = RandomSearch(constraints, seed=0)
    asked = 0

    def after_three(n: int) -> Codes:
        nonlocal asked
        asked += 1
        return random.ask(n) if ask is None or asked <= 3 else ask(n)

    def told(batch: Batch) -> None:
        if tell is not None and asked == 3:
            tell(batch)

    more: dict[str, Any] = {"evaluations": 9, "storage": tmp_path / "trials.log"}
    first, again = Evaluated(constraints.space), Evaluated(constraints.space)
    with pytest.raises(StrategyError, match=said):
        search(Faulty(after_three, told), constraints, first, ask_timeout_s=1.0, **more)
    result = search(RandomSearch(constraints, seed=0), constraints, again, **more)
    assert (len(result.trials), len(again.rows)) == (9, 6)


@pytest.mark.parametrize("paid", [True, False])
def test_a_strategy_that_proposes_nothing_that_fits_is_an_error_that_says_so(paid: bool) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    strategy = Stuck(every_network(constraints.space)[-1:])
    wanted = (
        f"strategy Stuck proposes nothing that fits: all {MAX_IDLE_ASKS} proposals were refused as "
        rf"infeasible \(macs <= {HALF_OF_TWO_BLOCKS:g}\), none was evaluated"
    )
    with pytest.raises(StrategyError, match=wanted):
        search(strategy, constraints, Evaluated(constraints.space, paid=paid), evaluations=10)


# What an evaluator returns ---------------------------------------------------------------------------------


class Given:
    """Returns what a function says."""

    def __init__(self, paid: bool, function: Callable[[Codes], Any]) -> None:
        self.paid, self.function = paid, function

    def __call__(self, codes: Codes) -> Any:
        return self.function(codes)


RETURNED = r"evaluator Given must return each metric by its name, as an array of shape \(n,\)"


@pytest.mark.parametrize("paid", [True, False])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda codes: {"accuracy": np.ones(len(codes) + 1)}, r"returned 'accuracy' of shape \((2|7),\)"),
        (lambda codes: {"accuracy": np.ones(0)}, r"returned 'accuracy' of shape \(0,\)"),
        (lambda codes: {"accuracy": 0.5}, r"returned 'accuracy' of shape \(\)"),
        (lambda codes: {"accuracy": None}, r"returned 'accuracy' of shape \(\)"),
        (lambda codes: np.ones(len(codes)), "got ndarray"),
        (lambda codes: None, "got NoneType"),
    ],
)
def test_an_evaluator_that_returns_no_value_a_network_is_refused(
    paid: bool, function: Callable[[Codes], Any], said: str
) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    with pytest.raises(AutocompressError, match=f"{RETURNED}.*{said}"):
        search(RandomSearch(constraints, seed=0), constraints, Given(paid, function), evaluations=6)


def test_an_evaluator_that_does_not_say_whether_it_is_paid_is_refused() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)

    def scored(codes: Codes) -> dict[str, Values]:
        return {"accuracy": toy_score(constraints.space, codes)}

    wanted = "evaluator scored has no attribute `paid`: .*; a function is given one by `scored.paid = True`"
    with pytest.raises(AutocompressError, match=wanted):
        search(RandomSearch(constraints, seed=0), constraints, scored, evaluations=5)  # type: ignore[arg-type]
    scored.paid = True  # type: ignore[attr-defined]
    result = search(RandomSearch(constraints, seed=0), constraints, scored, evaluations=5)  # type: ignore[arg-type]
    assert len(result.measured) == 5


def test_a_free_evaluator_that_scores_nothing_is_an_error_that_says_so() -> None:
    constraints = toy_constraints("macs=100%", blocks=3)
    wanted = "not one of 30 evaluations gave a finite accuracy; the evaluator is broken"
    with pytest.raises(EvaluationError, match=wanted):
        search(
            RandomSearch(constraints, seed=0),
            constraints,
            Evaluated(constraints.space, paid=False, nan=lambda row: True),
            evaluations=30,
        )
    wanted = "not one of 7 evaluations gave a finite accuracy; the last of them failed with: out of luck;"
    with pytest.raises(EvaluationError, match=wanted):
        search(
            RandomSearch(constraints, seed=0),
            constraints,
            Evaluated(constraints.space, paid=False, failing=lambda row: True),
            evaluations=7,
        )


# One search, further ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("paid", [True, False])
def test_an_evaluator_without_the_objective_is_refused(paid: bool) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    evaluator = Evaluated(constraints.space, paid=paid)
    with pytest.raises(AutocompressError, match="maximises 'top5', but the evaluator gives accuracy, other"):
        search(RandomSearch(constraints, seed=0), constraints, evaluator, evaluations=3, objective="top5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"evaluations": 0}, "evaluations must be an integer >= 1, got 0"),
        ({"evaluations": -1}, "evaluations must be an integer >= 1, got -1"),
        ({"evaluations": 1.5}, "evaluations must be an integer >= 1, got 1.5"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"ask_timeout_s": 0}, "ask_timeout_s must be positive and finite, got 0"),
        ({"ask_timeout_s": math.inf}, "ask_timeout_s must be positive and finite, got inf"),
        ({"identity": {"x": object()}}, "identity must hold plain values .*, got {'x': <object object"),
        ({"storage": "trials.log"}, r"for a file: pathlib.Path\('trials.log'\)"),
    ],
)
def test_an_argument_that_is_no_number_path_or_plain_value_is_refused(
    arguments: dict[str, Any], said: str
) -> None:
    constraints = toy_constraints(blocks=2)
    evaluator = Evaluated(constraints.space)
    with pytest.raises(AutocompressError, match=said):
        search(RandomSearch(constraints, seed=0), constraints, evaluator, **{"evaluations": 5, **arguments})
    assert evaluator.rows == []


@pytest.mark.parametrize("paid", [True, False])
def test_no_more_is_evaluated_than_was_asked_for(paid: bool) -> None:
    constraints = toy_constraints("macs=100%")
    for evaluations in (1, 7, 150):
        evaluator = Evaluated(constraints.space, paid=paid)
        strategy = AgingEvolution(constraints, seed=1, population=8)
        result = search(strategy, constraints, evaluator, evaluations=evaluations)
        assert len(set(evaluator.rows)) == len(evaluator.rows) == evaluations
        assert len(result.trials) + result.scored == evaluations


@pytest.mark.parametrize("paid", [True, False])
def test_a_search_ends_when_its_strategy_repeats_itself(paid: bool) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    strategy = Stuck(every_network(constraints.space)[:1])
    result = search(strategy, constraints, Evaluated(constraints.space, paid=paid), evaluations=10)
    if paid:
        assert (len(result.trials), strategy.asks) == (1, MAX_IDLE_ASKS + 1)
    else:  # what costs nothing may be asked again, and counts
        assert (result.scored, strategy.asks) == (10, 10)


@pytest.mark.parametrize("strategy", [RandomSearch, AgingEvolution, ElitistEvolution])
def test_a_search_ends_with_the_feasible_networks_of_its_space(strategy: Strategies) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    rows = every_network(constraints.space)
    fitting = {row.tobytes() for row in rows if macs(constraints.space, row) <= HALF_OF_TWO_BLOCKS}
    evaluator = Evaluated(constraints.space)
    search(strategy(constraints, seed=0), constraints, evaluator, evaluations=1000)
    assert set(evaluator.rows) == fitting
    assert len(evaluator.rows) == len(fitting)


def test_the_size_of_a_batch_changes_nothing_for_a_strategy_that_does_not_learn() -> None:
    constraints = toy_constraints()
    found = []
    for batch in (1, 7, 100):
        evaluator = Evaluated(constraints.space, paid=False)
        search(RandomSearch(constraints, seed=5), constraints, evaluator, evaluations=60, batch=batch)
        found.append(evaluator.rows)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("paid", [True, False])
def test_progress_counts_evaluations_and_shows_the_best_score_so_far(paid: bool) -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    told: list[tuple[int, int, str]] = []
    search(
        Scripted(*[rows[i : i + 1] for i in (5, 3, 20)]),
        constraints,
        Evaluated(constraints.space, paid=paid),
        evaluations=9,
        progress=lambda done, total, note="": told.append((done, total, note)),
    )
    scores = toy_score(constraints.space, rows[[5, 3, 20]])
    best = np.maximum.accumulate(scores)
    assert told == [(i + 1, 9, f"best accuracy {best[i]:.4f}") for i in range(3)]


def test_the_result_says_what_was_searched() -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    result = search(
        RandomSearch(constraints, seed=0),
        constraints,
        Evaluated(constraints.space),
        evaluations=4,
        identity={"seed": 0},
    )
    assert result.space == constraints.space.describe()
    assert result.limits["macs"] == pytest.approx(HALF_OF_TWO_BLOCKS)
    assert (result.objective, result.notes, result.candidates) == ("accuracy", {"seed": 0}, None)


# Stored and resumed ----------------------------------------------------------------------------------------


def stored_search(
    evaluator: Evaluated, constraints: Constraints, strategy: Strategies, storage: Path | str, **more: Any
) -> SearchResult:
    return search(
        strategy(constraints, seed=3),
        constraints,
        evaluator,
        **{"evaluations": 20, "storage": storage, "identity": {"weights": "abc"}, **more},
    )


def small_population(constraints: Constraints, *, seed: int) -> Strategy:
    return AgingEvolution(constraints, seed=seed, population=5)


def small_generations(constraints: Constraints, *, seed: int) -> Strategy:
    return ElitistEvolution(constraints, seed=seed, population=6)


ALL = [RandomSearch, small_population, small_generations]


def is_odd(row: Codes) -> bool:
    """Some networks fail, in every run alike."""
    return bool(row.sum() % 5 == 0)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("stops", [(0,), (1,), (5, 0, 3), (11, 8)])
def test_a_search_stopped_anywhere_goes_on_as_if_it_had_not_been(
    tmp_path: Path, strategy: Strategies, stops: tuple[int, ...]
) -> None:
    constraints = toy_constraints()
    whole = Evaluated(constraints.space, failing=is_odd)
    expected = search(
        strategy(constraints, seed=3), constraints, whole, evaluations=20, identity={"weights": "abc"}
    )
    assert 0 < len(expected.measured) < 20
    paid_for: list[bytes] = []
    for stop in stops:
        part = Evaluated(constraints.space, failing=is_odd, interrupted_after=stop)
        with pytest.raises(KeyboardInterrupt):
            stored_search(part, constraints, strategy, tmp_path / "trials.log")
        paid_for += part.rows
    last = Evaluated(constraints.space, failing=is_odd)
    result = stored_search(last, constraints, strategy, tmp_path / "trials.log")
    assert plain(result.trials) == plain(expected.trials)
    assert paid_for + last.rows == whole.rows  # nothing twice, nothing left out
    assert (result.asked, result.notes) == (expected.asked, expected.notes)


def test_a_finished_search_is_read_from_its_storage_without_one_evaluation(tmp_path: Path) -> None:
    constraints = toy_constraints()
    path = tmp_path / "new" / "folder" / "trials.log"
    first = stored_search(Evaluated(constraints.space), constraints, RandomSearch, path)
    again = Evaluated(constraints.space)
    second = stored_search(again, constraints, RandomSearch, path)
    assert again.rows == []
    assert plain(second.trials) == plain(first.trials)


def test_a_longer_search_goes_on_where_a_shorter_one_ended(tmp_path: Path) -> None:
    constraints = toy_constraints()
    path = tmp_path / "trials.log"
    stored_search(Evaluated(constraints.space), constraints, RandomSearch, path, evaluations=8)
    more = Evaluated(constraints.space)
    result = stored_search(more, constraints, RandomSearch, path, evaluations=20)
    assert (len(more.rows), len(result.trials)) == (12, 20)


def test_a_database_stores_and_resumes_as_a_journal_does(tmp_path: Path) -> None:
    constraints = toy_constraints()
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    part = Evaluated(constraints.space, failing=is_odd, interrupted_after=6)
    with pytest.raises(KeyboardInterrupt):
        stored_search(part, constraints, small_population, url, evaluations=12)
    last = Evaluated(constraints.space, failing=is_odd)
    result = stored_search(last, constraints, small_population, url, evaluations=12)
    whole = Evaluated(constraints.space, failing=is_odd)
    expected = search(small_population(constraints, seed=3), constraints, whole, evaluations=12)
    assert plain(result.trials) == plain(expected.trials)
    assert part.rows + last.rows == whole.rows


def test_optuna_opens_the_trials_of_a_search(tmp_path: Path) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    path = tmp_path / "trials.log"
    rows = every_network(constraints.space)
    evaluator = Evaluated(constraints.space, failing=is_odd)
    result = search(Scripted(rows), constraints, evaluator, evaluations=1000, storage=path, study="mine")
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    study = optuna.load_study(study_name="mine", storage=optuna.storages.JournalStorage(backend))
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    states = {
        Outcome.MEASURED: optuna.trial.TrialState.COMPLETE,
        Outcome.FAILED: optuna.trial.TrialState.FAIL,
    }
    assert {trial.state for trial in study.trials} == set(states.values())
    assert len(study.trials) == len(result.trials)
    for stored, trial in zip(study.trials, result.trials, strict=True):
        assert stored.state == states[trial.outcome]
        assert stored.params == dict(trial.architecture.settings)
        assert stored.value == (trial.metrics["accuracy"] if trial.metrics else None)
        assert stored.user_attrs["costs"] == trial.costs
        assert stored.user_attrs["error"] == trial.error
    assert study.best_value == result.best().metrics["accuracy"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"identity": {"weights": "other"}}, "weights differ"),
        ({"identity": {}}, "weights differ"),
        ({"identity": {"weights": "abc", "seed": 1}}, "seed differ"),
        ({"objective": "other"}, "objective differ"),
    ],
)
def test_trials_of_another_search_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    constraints = toy_constraints()
    path = tmp_path / "trials.log"
    stored_search(Evaluated(constraints.space), constraints, RandomSearch, path)
    again = Evaluated(constraints.space)
    with pytest.raises(StorageError, match=f"belong to another search: {named}"):
        stored_search(again, constraints, RandomSearch, path, **change)
    assert again.rows == []
    stored_search(again, constraints, RandomSearch, path, study="another", **change)


def test_trials_of_another_budget_or_space_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trials.log"
    constraints = toy_constraints("macs=50%")
    stored_search(Evaluated(constraints.space), constraints, RandomSearch, path)
    for budget, blocks, named in (("macs=60%", 6, "limits"), ("macs=50%", 2, "limits, space")):
        other = toy_constraints(budget, blocks=blocks)
        with pytest.raises(StorageError, match=f"another search: {named} differ"):
            stored_search(Evaluated(other.space), other, RandomSearch, path)


KILLED = """
import os, signal, sys
from pathlib import Path
from autocompress.engine import search
from autocompress.testing.toys import toy_constraints, toy_score
from strategies.evolution import AgingEvolution

class Killed:
    paid = True
    calls = 0
    def __call__(self, codes):
        if self.calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        with open(sys.argv[1] + ".evaluated", "a") as file:
            file.write(codes.tobytes().hex() + "\\n")
        score = toy_score(constraints.space, codes)
        return {"accuracy": score, "other": score / 2}

constraints = toy_constraints()
search(AgingEvolution(constraints, seed=3, population=5), constraints, Killed(), evaluations=20,
       storage=Path(sys.argv[1]), identity={"weights": "abc"})
"""


def test_a_search_whose_process_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    constraints = toy_constraints()
    path = tmp_path / "trials.log"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), "7"], check=False)
    assert killed.returncode == -signal.SIGKILL
    paid_for = [bytes.fromhex(line) for line in (tmp_path / "trials.log.evaluated").read_text().split()]
    assert len(paid_for) == 7
    with path.open("ab") as file:  # what a kill inside a write leaves
        file.write(b'{"op_code":4,"study_id":0,"work')
    last = Evaluated(constraints.space)
    result = stored_search(last, constraints, small_population, path)
    whole = Evaluated(constraints.space)
    expected = search(small_population(constraints, seed=3), constraints, whole, evaluations=20)
    assert plain(result.trials) == plain(expected.trials)
    assert paid_for + last.rows == whole.rows


# Faults of the disk ----------------------------------------------------------------------------------------


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail in its middle, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 3000, 9000])
def test_a_full_disk_stops_a_search_that_goes_on_when_there_is_room(tmp_path: Path, room: int) -> None:
    constraints = toy_constraints()
    path = tmp_path / "trials.log"
    part = Evaluated(constraints.space)
    with files_no_longer_than(room), pytest.raises(StorageError, match=r"trials.log: File too large"):
        stored_search(part, constraints, small_population, path)
    assert path.stat().st_size == room  # the write failed in its middle
    last = Evaluated(constraints.space)
    result = stored_search(last, constraints, small_population, path)
    whole = Evaluated(constraints.space)
    expected = search(small_population(constraints, seed=3), constraints, whole, evaluations=20)
    assert plain(result.trials) == plain(expected.trials)
    # Only the evaluation whose outcome could not be written is paid for again.
    assert set(part.rows) & set(last.rows) == set(part.rows[-1:])


def test_a_full_disk_stops_the_stream_of_candidates(tmp_path: Path) -> None:
    constraints = toy_constraints()
    path = tmp_path / "history.bin"
    free = Evaluated(constraints.space, paid=False)
    with files_no_longer_than(2000), pytest.raises(StorageError, match=r"history.bin: File too large"):
        search(RandomSearch(constraints, seed=1), constraints, free, evaluations=200, batch=10, history=path)


@pytest.mark.parametrize("place", ["a_file/trials.log", "a_folder"])
def test_a_storage_that_cannot_be_written_is_refused_before_any_evaluation(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "a_file").write_text("in the way")
    (tmp_path / "a_folder").mkdir()
    constraints = toy_constraints()
    evaluator = Evaluated(constraints.space)
    with pytest.raises(StorageError, match=f"cannot open .*{place}: "):
        stored_search(evaluator, constraints, RandomSearch, tmp_path / place)
    assert evaluator.rows == []


@pytest.mark.parametrize("strategy", ALL)
def test_a_journal_overwritten_in_mid_search_loses_no_trial(tmp_path: Path, strategy: Strategies) -> None:
    constraints = toy_constraints()
    path = tmp_path / "trials.log"
    part, last, whole = (Evaluated(constraints.space) for _ in range(3))

    def overwrite(done: int, total: int, note: str = "") -> None:
        if done == 8:
            path.write_text("garbage\nand more\n")

    with pytest.warns(UserWarning, match="damaged during this search"):
        stored_search(part, constraints, strategy, path, evaluations=12, progress=overwrite)
    result = stored_search(last, constraints, strategy, path)
    expected = search(strategy(constraints, seed=3), constraints, whole, evaluations=20)
    assert plain(result.trials) == plain(expected.trials)
    assert part.rows + last.rows == whole.rows


# Candidates that are not paid for --------------------------------------------------------------------------


def test_scored_candidates_are_streamed_and_the_best_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "KEPT_CANDIDATES", 12)
    constraints = toy_constraints()
    path = tmp_path / "history.bin"
    for _ in range(2):  # the stream is of the last search
        free = Evaluated(constraints.space, paid=False)
        strategy = RandomSearch(constraints, seed=2)
        result = search(strategy, constraints, free, evaluations=160, batch=25, history=path)
    streamed = read_history(path, constraints.space)
    codes, scores = streamed.codes, streamed.metrics["score"]
    assert [row.tobytes() for row in codes] == free.rows
    np.testing.assert_array_equal(scores, toy_score(constraints.space, codes))
    assert result.candidates is not None
    best = np.argsort(-scores, kind="stable")[:12]
    np.testing.assert_array_equal(result.candidates.codes, codes[best])
    np.testing.assert_array_equal(result.candidates.metrics["accuracy"], scores[best])
    np.testing.assert_array_equal(result.candidates.costs["macs"], constraints.costs["macs"].of(codes[best]))
    assert (result.trials, result.scored, result.asked) == ([], 160, 160)


def test_a_candidate_is_kept_once_however_often_it_is_asked() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    rows = every_network(constraints.space)
    free = Evaluated(constraints.space, paid=False)
    result = search(Scripted(rows[[3, 3, 4]], rows[[4, 3]], rows[[5]]), constraints, free, evaluations=1000)
    assert (result.asked, result.scored) == (6, 6)
    assert result.candidates is not None
    assert {row.tobytes() for row in result.candidates.codes} == {rows[i].tobytes() for i in (3, 4, 5)}
    assert len(result.candidates) == 3


def test_what_a_kill_leaves_of_the_last_record_is_not_read(tmp_path: Path) -> None:
    constraints = toy_constraints()
    path = tmp_path / "history.bin"
    free = Evaluated(constraints.space, paid=False)
    search(RandomSearch(constraints, seed=2), constraints, free, evaluations=50, history=path)
    os.truncate(path, path.stat().st_size - 1)
    codes = read_history(path, constraints.space).codes
    assert [row.tobytes() for row in codes] == free.rows[:49]
