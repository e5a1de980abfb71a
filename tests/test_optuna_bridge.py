"""Strategies as samplers of Optuna, by themselves and under Ray Tune's searcher (without starting Ray)."""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.engine import search
from autocompress.errors import EvaluationError, RecipeError, StrategyError
from autocompress.optuna_bridge import StrategySampler, distributions, suggest
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.strategy import Strategy
from autocompress.testing.toys import every_network, toy_constraints, toy_score, toy_space
from autocompress.trial import Batch, Outcome
from strategies.evolution import AgingEvolution, ElitistEvolution
from strategies.random_search import RandomSearch

STRATEGIES: list[tuple[Callable[..., Strategy], dict[str, Any]]] = [
    (RandomSearch, {}),
    (AgingEvolution, {"population": 8, "sample_size": 3}),
    (ElitistEvolution, {"population": 6}),
]
ALL = pytest.mark.parametrize(("strategy", "options"), STRATEGIES, ids=lambda x: getattr(x, "__name__", ""))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep Optuna's report of every trial out of the output."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    yield
    optuna.logging.set_verbosity(before)


@dataclass
class Evaluate:
    """Paid; notes what it evaluates; fails for about a sixth of the networks."""

    space: SearchSpace
    fails: bool = True
    rows: list[tuple[int, ...]] = field(default_factory=list)
    paid: bool = True

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        self.rows.append(tuple(codes[0].tolist()))
        if self.fails and codes.sum() % 6 == 1:
            raise EvaluationError("this network fails")
        return {"accuracy": toy_score(self.space, codes)}

    def trial(self, trial: optuna.Trial) -> float:
        codes = self.space.encode([suggest(trial, self.space)])
        return float(self(codes)["accuracy"][0])


@dataclass
class Spy:
    """Asks given rows, and notes what it is told: row, outcome and value. Made again, it starts again."""

    first: Sequence[Sequence[int]]
    told: list[tuple[tuple[int, ...], Outcome, float]] = field(default_factory=list)
    asked: int = 0

    def __call__(self, constraints: Constraints, *, seed: int, objective: str) -> "Spy":
        self.asked = 0
        self.told.clear()
        return self

    def ask(self, n: int) -> Codes:
        rows = np.array(self.first[self.asked : self.asked + n], dtype=np.int64)
        self.asked += len(rows)
        return rows.reshape(-1, len(self.first[0]))

    def tell(self, batch: Batch) -> None:
        for row, outcome, value in zip(
            batch.codes.tolist(), batch.outcomes, batch.metrics["accuracy"], strict=True
        ):
            self.told.append((tuple(row), Outcome(outcome), float(value)))


def by_engine(strategy: Strategy, constraints: Constraints, n: int) -> list[tuple[int, ...]]:
    evaluate = Evaluate(constraints.space)
    search(strategy, constraints, evaluate, evaluations=n)
    return evaluate.rows


@pytest.mark.parametrize(
    ("strategy", "options", "said"),
    [
        (AgingEvolution, {"pop": 3}, "options of strategy AgingEvolution are population, .*, got pop"),
        (AgingEvolution, {"population": 8, "seed": 3}, "are population, .*, got seed"),
        (RandomSearch, {"a": 1, "b": 2}, "options of strategy RandomSearch are at_least, got a, b"),
        (Spy([[0] * 13]), {"pop": 3}, "options of strategy Spy are none, got pop"),
    ],
)
def test_an_option_that_the_strategy_does_not_take_is_refused(
    strategy: Callable[..., Strategy], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        made(strategy, options)


def test_a_strategy_of_any_options_gets_them_all() -> None:
    def any_options(constraints: Constraints, **options: Any) -> Strategy:
        assert options == {"seed": 3, "objective": "accuracy", "pop": 3}
        return RandomSearch(constraints, seed=0)

    made(any_options, {"pop": 3})


def made(strategy: Callable[..., Strategy], options: dict[str, Any], seed: int = 3) -> StrategySampler:
    return StrategySampler(toy_constraints(), strategy, seed=seed, options=options)


# The sequence ------------------------------------------------------------------------------------------


@ALL
def test_a_study_evaluates_the_same_sequence_as_the_engine(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints()
    expected = by_engine(strategy(constraints, seed=3, **options), constraints, 60)
    evaluate = Evaluate(constraints.space)
    study = optuna.create_study(direction="maximize", sampler=made(strategy, options))
    study.optimize(evaluate.trial, n_trials=60, catch=EvaluationError)
    assert evaluate.rows == expected
    assert len(set(expected)) == 60
    states = [trial.state for trial in study.trials]
    assert 2 <= states.count(TrialState.FAIL) <= 30


@ALL
def test_a_study_that_minimises_tells_the_negative_value(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints()
    expected = by_engine(strategy(constraints, seed=3, **options), constraints, 60)
    evaluate = Evaluate(constraints.space)
    study = optuna.create_study(direction="minimize", sampler=made(strategy, options))
    study.optimize(lambda trial: -evaluate.trial(trial), n_trials=60, catch=EvaluationError)
    assert evaluate.rows == expected


@ALL
def test_a_new_process_goes_on_with_a_study_as_if_it_had_never_stopped(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints()
    expected = by_engine(strategy(constraints, seed=3, **options), constraints, 60)
    evaluate, storage = Evaluate(constraints.space), optuna.storages.InMemoryStorage()
    optuna.create_study(study_name="x", storage=storage, direction="maximize")
    for _ in range(3):
        # What another process would have: the storage, a new sampler, and a killed trial that runs for ever.
        study = optuna.load_study(study_name="x", storage=storage, sampler=made(strategy, options))
        study.optimize(evaluate.trial, n_trials=20, catch=EvaluationError)
        suggest(study.ask(), constraints.space)
    assert evaluate.rows == expected


@ALL
def test_a_sampler_pickled_with_its_study_goes_on_identically(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    space = toy_space()
    study = optuna.create_study(direction="maximize", sampler=made(strategy, options))
    study.optimize(Evaluate(space).trial, n_trials=15, catch=EvaluationError)
    twin = pickle.loads(pickle.dumps(study))
    first, second = Evaluate(space), Evaluate(space)
    study.optimize(first.trial, n_trials=25, catch=EvaluationError)
    twin.optimize(second.trial, n_trials=25, catch=EvaluationError)
    assert first.rows == second.rows


# Parameters --------------------------------------------------------------------------------------------


def mixed_space() -> SearchSpace:
    choices = (
        Choice("one", (7,)),
        Choice("mixed", (1, 2.5, "1"), ordinal=False),
        Choice("gate", ("off", "on")),
        Choice("deep", (0.5, 2, 4), active_when=(("gate", ("on",)), ("mixed", (2.5, "1")))),
        Choice("deeper", (1, 2), active_when=(("deep", (2, 4)),)),
    )
    return SearchSpace("mixed", choices, ())


def test_parameters_are_categories_of_the_options_also_of_a_single_one() -> None:
    assert distributions(mixed_space())["one"] == CategoricalDistribution((7,))
    assert distributions(mixed_space())["mixed"].choices == (1, 2.5, "1")


def test_a_trial_has_the_options_with_their_types_and_no_choice_without_effect(tmp_path: Path) -> None:
    space = mixed_space()
    everything = every_network(space)
    assert len(everything) == space.size == 3 + 1 + 2 * 5
    sampler = StrategySampler(Constraints(space, {}, {}), RandomSearch, seed=0)
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    study = optuna.create_study(sampler=sampler, storage=optuna.storages.JournalStorage(journal))
    study.optimize(lambda trial: float(len(suggest(trial, space).settings)), n_trials=20)
    assert len(study.trials) == len(everything)
    found = {space.architecture(trial.params) for trial in study.trials}
    assert found == set(space.decode(everything))
    for trial in study.trials:
        # Equal alone would take 1 for 1.0.
        types = {(name, type(value)) for name, value in trial.params.items()}
        assert types == {(name, type(value)) for name, value in space.architecture(trial.params).settings}


def test_all_parameters_at_once_are_those_of_the_canonical_row() -> None:
    constraints = toy_constraints()
    space = constraints.space
    study = optuna.create_study(sampler=made(RandomSearch, {}))
    for row in RandomSearch(constraints, seed=3).ask(20):
        trial = study.ask(dict(distributions(space)))
        codes = [choice.code(trial.params[choice.name]) for choice in space.choices]
        assert codes == row.tolist()
        study.tell(trial, 0.0)


def test_suggest_reads_a_fixed_trial() -> None:
    space = toy_space(3)
    fixed = {"resolution": 12, "depth": 2, "block1.kernel": 3, "block2.kernel": 5, "block3.kernel": 5}
    network = suggest(optuna.trial.FixedTrial(fixed), space)
    assert dict(network.settings) == {name: fixed[name] for name in fixed if name != "block3.kernel"}


def test_parameters_of_ones_own_are_drawn_from_the_seed_and_change_no_network() -> None:
    space = toy_space()

    def run(seed: int, *, first: bool) -> tuple[list[tuple[int, ...]], list[float]]:
        evaluate, rates = Evaluate(space, fails=False), []

        def objective(trial: optuna.Trial) -> float:
            if first:
                rates.append(trial.suggest_float("rate", 0.1, 0.9))
            value = evaluate.trial(trial)
            if not first:
                rates.append(trial.suggest_float("rate", 0.1, 0.9))
            return value

        study = optuna.create_study(direction="maximize", sampler=made(AgingEvolution, {}, seed))
        study.optimize(objective, n_trials=20)
        return evaluate.rows, rates

    rows, rates = run(1, first=True)
    assert run(1, first=False) == (rows, rates)
    assert len(set(rates)) == 20
    assert 0.1 <= min(rates) < 0.3 < 0.7 < max(rates) <= 0.9
    others, other_rates = run(2, first=True)
    assert others != rows
    assert other_rates != rates


# Several at a time --------------------------------------------------------------------------------------


@ALL
def test_threads_never_evaluate_a_network_twice_or_over_the_budget(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints()
    evaluate = Evaluate(constraints.space)
    together = Barrier(4)

    def objective(trial: optuna.Trial) -> float:
        network = suggest(trial, constraints.space)
        together.wait(timeout=30)  # all four run at the same time
        return float(evaluate(constraints.space.encode([network]))["accuracy"][0])

    study = optuna.create_study(direction="maximize", sampler=made(strategy, options))
    study.optimize(objective, n_trials=80, n_jobs=4, catch=EvaluationError)
    rows = np.array(evaluate.rows)
    assert len(np.unique(rows, axis=0)) == len(rows) == 80
    assert constraints.feasible(rows).all()


def test_generations_learn_from_trials_that_end_in_any_order() -> None:
    constraints = toy_constraints()
    space = constraints.space
    study = optuna.create_study(direction="maximize", sampler=made(ElitistEvolution, {"population": 6}))
    rng, running, rows = np.random.default_rng(0), [], []
    for _ in range(150):
        trial = study.ask()
        row = space.encode([suggest(trial, space)])
        rows.append(row[0])
        running.append((trial, float(toy_score(space, row)[0])))
        if len(running) == 4:
            study.tell(*running.pop(int(rng.integers(4))))
    assert len(np.unique(np.array(rows), axis=0)) == 150
    scores = toy_score(space, np.array(rows))
    # Random networks score 0.553 +- 0.189, the mean of a hundred 0.553 +- 0.019: P(> 0.61) = 0.0013.
    assert scores[-100:].mean() > 0.61


def test_each_network_that_was_asked_for_is_told_once_with_its_value() -> None:
    constraints = toy_constraints()
    space = constraints.space
    spy = Spy(every_network(space)[:7].tolist())
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=0))
    trials = [study.ask() for _ in range(9)]
    rows = [tuple(space.encode([suggest(trial, space)])[0].tolist()) for trial in trials]
    assert rows[:7] == [tuple(row) for row in spy.first]
    trials[2].report(0.9, step=0)
    for index in (3, 8, 0, 1, 7, 2, 6, 5, 4):
        state = {1: TrialState.FAIL, 2: TrialState.PRUNED}.get(index)
        study.tell(trials[index], None if state else 0.1 * index, state=state)
    values = {rows[index]: 0.1 * index for index in range(7)}
    assert [row for row, _, _ in spy.told] == [rows[index] for index in (3, 0, 1, 2, 6, 5, 4)]
    for row, outcome, value in spy.told:
        failed = row in (rows[1], rows[2])
        assert outcome == (Outcome.FAILED if failed else Outcome.MEASURED)
        assert np.isnan(value) if failed else value == values[row]


def test_while_the_strategy_waits_every_trial_has_another_feasible_network() -> None:
    constraints = toy_constraints(blocks=2)
    space = constraints.space
    networks = every_network(space)
    feasible = networks[constraints.feasible(networks)].tolist()
    study = optuna.create_study(sampler=StrategySampler(constraints, Spy(feasible[:3]), seed=0))
    rows = [space.encode([suggest(study.ask(), space)])[0].tolist() for _ in feasible]
    assert rows[:3] == feasible[:3]
    assert sorted(rows) == sorted(feasible)


def test_a_strategy_that_asks_for_what_runs_already_is_told_when_that_ends() -> None:
    constraints = toy_constraints()
    space = constraints.space
    spy = Spy([[0] * 8])
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=0))
    first, random = study.ask(), study.ask()
    rows = [space.encode([suggest(trial, space)])[0].tolist() for trial in (first, random)]
    spy.first = [*rows, [0, 1] + [0] * 6]
    spy.asked = 1
    assert space.encode([suggest(study.ask(), space)]).tolist() == [[0, 1] + [0] * 6]
    study.tell(random, 0.3)
    assert spy.told == [(tuple(rows[1]), Outcome.MEASURED, 0.3)]


# What a study has already -------------------------------------------------------------------------------


def test_trials_of_another_sampler_are_told_before_the_first_ask_and_never_repeated() -> None:
    constraints = toy_constraints("macs=30%")
    space = constraints.space
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    before = Evaluate(space)
    study.optimize(before.trial, n_trials=25, catch=EvaluationError)
    networks = every_network(space)
    new = [row for row in networks[constraints.feasible(networks)].tolist() if tuple(row) not in before.rows]
    known = next(row for row in before.rows if constraints.feasible(np.array([row]))[0])
    spy = Spy([new[0], known, *new[1:3]])
    study.sampler = StrategySampler(constraints, spy, seed=0)
    after = Evaluate(space, fails=False)
    study.optimize(after.trial, n_trials=3)
    assert after.rows == [tuple(row) for row in new[:3]]
    expected = []
    for row in dict.fromkeys(before.rows):
        outcome = Outcome.FAILED if sum(row) % 6 == 1 else Outcome.MEASURED
        expected.append((row, outcome if constraints.feasible(np.array([row]))[0] else Outcome.INFEASIBLE))
    assert {outcome for _, outcome in expected} == set(Outcome)
    told = [(row, outcome) for row, outcome, _ in spy.told]
    assert told[: len(expected)] == expected
    assert [row for row, _ in told[len(expected) :]] == [after.rows[0], known, *after.rows[1:]]


def test_what_a_strategy_asked_in_a_replay_that_failed_is_not_told_to_the_next() -> None:
    space = toy_space()
    first, second = Spy([[0] * 8]), Spy([[0, 1] + [0] * 6])
    strategies = iter([first, second])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: float(len(suggest(trial, space).settings)), n_trials=1)
    study.sampler = StrategySampler(toy_constraints(), lambda *_, **__: next(strategies), seed=0)
    study.enqueue_trial({"resolution": 8, "depth": 1, "block1.kernel": 1})
    evaluate = Evaluate(space, fails=False)
    study.optimize(evaluate.trial, n_trials=2)
    assert evaluate.rows == [(0,) * 8, (0, 1) + (0,) * 6]
    assert [row for row, _, _ in second.told[1:]] == [evaluate.rows[1]]


def test_a_network_of_which_some_parameters_were_fixed_is_asked_for_again() -> None:
    constraints = toy_constraints()
    space = constraints.space
    rows = [[0] * 8, [0, 1] + [0] * 6, [0, 2] + [0] * 6]
    spy = Spy(rows)
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=0))
    study.enqueue_trial({"resolution": 12})
    evaluate = Evaluate(space, fails=False)
    study.optimize(evaluate.trial, n_trials=3)
    assert evaluate.rows == [(1, *rows[0][1:]), tuple(rows[0]), tuple(rows[1])]
    assert [row for row, _, _ in spy.told] == evaluate.rows[1:]


def test_a_network_that_another_trial_evaluated_meanwhile_is_not_asked_for_again() -> None:
    constraints = toy_constraints()
    space = constraints.space
    rows = [[0] * 8, [0, 1] + [0] * 6]
    spy = Spy(rows)
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=0))
    study.enqueue_trial({"resolution": 12})
    study.enqueue_trial({"resolution": 8, "depth": 1, "block1.kernel": 1})
    partly, wholly = study.ask(), study.ask()
    assert space.encode([suggest(partly, space)]).tolist() == [[1] + [0] * 7]
    assert space.encode([suggest(wholly, space)]).tolist() == [rows[0]]
    study.tell(partly, 0.1)
    study.tell(wholly, 0.2)
    assert spy.told == [(tuple(rows[0]), Outcome.MEASURED, 0.2)]
    assert space.encode([suggest(study.ask(), space)]).tolist() == [rows[1]]


def test_a_trial_that_fails_before_it_suggests_everything_fails_with_the_network_it_was_given() -> None:
    rows = [[0] * 8, [0, 1] + [0] * 6, [0, 2] + [0] * 6]
    spy = Spy(rows)
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(toy_constraints(), spy, seed=0))

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 0:
            raise ValueError  # before it was given any
        if trial.number == 1:
            trial.suggest_categorical("resolution", (8, 12))
            raise ValueError
        return evaluate.trial(trial)

    evaluate = Evaluate(toy_space(), fails=False)
    study.optimize(objective, n_trials=4, catch=ValueError)
    assert evaluate.rows == [tuple(row) for row in rows[1:]]
    outcomes = [Outcome.FAILED, Outcome.MEASURED, Outcome.MEASURED]
    assert [told[:2] for told in spy.told] == list(zip(map(tuple, rows), outcomes, strict=True))


# Ends and errors ----------------------------------------------------------------------------------------


@ALL
def test_a_study_ends_when_every_feasible_network_was_evaluated(
    strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints(blocks=2)
    feasible = int(constraints.feasible(every_network(constraints.space)).sum())
    study = optuna.create_study(
        direction="maximize", sampler=StrategySampler(constraints, strategy, seed=1, options=options)
    )
    evaluate = Evaluate(constraints.space)
    study.optimize(evaluate.trial, n_trials=10 * feasible, catch=EvaluationError)
    assert len(evaluate.rows) == len(set(evaluate.rows)) == feasible


def test_asked_for_more_than_there_is_it_warns_and_repeats() -> None:
    constraints = toy_constraints(blocks=2)
    space = constraints.space
    study = optuna.create_study(sampler=StrategySampler(constraints, Spy([[0, 0, 0, 0]]), seed=1))
    study.tell(study.ask(dict(distributions(space))), 0.0)
    trial = study.ask()
    with pytest.warns(UserWarning, match="the strategy has nothing more to ask"):
        row = space.encode([suggest(trial, space)])
    assert constraints.feasible(row)[0]
    assert row.any()


def test_what_a_strategy_asks_over_the_budget_is_told_as_infeasible_and_not_evaluated() -> None:
    constraints = toy_constraints()
    largest = constraints.space.largest()[0].tolist()
    spy = Spy([largest, [0] * len(largest)])
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=1))
    evaluate = Evaluate(constraints.space)
    study.optimize(evaluate.trial, n_trials=1)
    assert evaluate.rows == [tuple([0] * len(largest))]
    assert [(row, outcome) for row, outcome, _ in spy.told] == [
        (tuple(largest), Outcome.INFEASIBLE),
        (tuple([0] * len(largest)), Outcome.MEASURED),
    ]


def test_a_strategy_that_repeats_itself_for_ever_does_not_hang() -> None:
    constraints = toy_constraints()
    spy = Spy([[0] * len(constraints.space.choices)] * 1000)
    study = optuna.create_study(direction="maximize", sampler=StrategySampler(constraints, spy, seed=1))
    evaluate = Evaluate(constraints.space)
    study.optimize(evaluate.trial, n_trials=5)
    assert len(evaluate.rows) == 1
    assert spy.asked < 100


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_told_as_failed(value: float) -> None:
    spy = Spy([[0] * 8, [0] * 7 + [1]])
    sampler = StrategySampler(toy_constraints(), spy, seed=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value if suggest(trial, toy_space()) else 0.0, n_trials=1)
    assert [outcome for _, outcome, _ in spy.told] == [Outcome.FAILED]


def test_a_sampler_serves_one_study_of_one_objective() -> None:
    sampler = made(RandomSearch, {})
    space = toy_space()
    suggest(optuna.create_study(sampler=sampler, study_name="first").ask(), space)
    with pytest.raises(
        StrategyError, match="serves one study, this one 'first'; make another one for 'second'"
    ):
        suggest(optuna.create_study(sampler=sampler, study_name="second").ask(), space)
    two = optuna.create_study(sampler=made(RandomSearch, {}), directions=["maximize", "minimize"])
    with pytest.raises(StrategyError, match="studies of one objective, got 2; limit the others by a budget"):
        suggest(two.ask(), space)


def test_seed_and_options_are_checked_when_the_sampler_is_made() -> None:
    with pytest.raises(RecipeError, match="seed must be an integer >= 0, got -1"):
        made(RandomSearch, {}, seed=-1)
    with pytest.raises(RecipeError, match="population must be an integer >= 1, got 0"):
        made(AgingEvolution, {"population": 0})


# Ray Tune -----------------------------------------------------------------------------------------------


def tune(search: Any, space: SearchSpace, n: int, start: int = 0) -> list[tuple[int, ...]]:
    """What Ray Tune does with a searcher, one trial at a time."""
    rows = []
    for index in range(start, start + n):
        config = search.suggest(f"trial{index}")
        row = space.encode([space.architecture(config)])
        rows.append(tuple(row[0].tolist()))
        if row.sum() % 6 == 1:
            search.on_trial_complete(f"trial{index}", error=True)
        else:
            accuracy = float(toy_score(space, row)[0])
            search.on_trial_result(f"trial{index}", {"accuracy": accuracy, "training_iteration": 1})
            search.on_trial_complete(f"trial{index}", {"accuracy": accuracy, "training_iteration": 1})
    return rows


def optuna_search(by: str, sampler: StrategySampler) -> Any:
    with warnings.catch_warnings():
        # What Ray's own dependencies deprecate is not the subject.
        warnings.simplefilter("ignore")
        from ray.tune.search.optuna import OptunaSearch

    space = toy_space()
    if by == "distributions":
        return OptunaSearch(dict(distributions(space)), sampler=sampler, metric="accuracy", mode="max")

    def define(trial: optuna.Trial) -> None:
        suggest(trial, space)

    return OptunaSearch(define, sampler=sampler, metric="accuracy", mode="max")


@ALL
@pytest.mark.parametrize("by", ["distributions", "define-by-run"])
def test_the_searcher_of_ray_tune_evaluates_the_same_sequence_as_the_engine(
    by: str, strategy: Callable[..., Strategy], options: dict[str, Any]
) -> None:
    constraints = toy_constraints()
    expected = by_engine(strategy(constraints, seed=3, **options), constraints, 40)
    searcher = optuna_search(by, made(strategy, options))
    assert tune(searcher, constraints.space, 40) == expected


def test_the_searcher_of_ray_tune_goes_on_after_it_was_saved_and_restored(tmp_path: Path) -> None:
    constraints = toy_constraints()
    options: dict[str, Any] = {"population": 8, "sample_size": 3}
    expected = by_engine(AgingEvolution(constraints, seed=3, **options), constraints, 40)
    searcher = optuna_search("distributions", made(AgingEvolution, options))
    rows = tune(searcher, constraints.space, 25)
    searcher.save(str(tmp_path / "searcher.pkl"))
    tune(searcher, constraints.space, 5, start=25)  # lost with the driver
    restored = optuna_search("distributions", made(AgingEvolution, options))
    restored.restore(str(tmp_path / "searcher.pkl"))
    assert rows + tune(restored, constraints.space, 15, start=25) == expected
