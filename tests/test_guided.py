"""Guided search on toy spaces: what is paid for, which finalists, and that it ends and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import AutocompressError, EvaluationError, StorageError
from autocompress.evaluation.predictor import FittedPredictor
from autocompress.guided import guided_search
from autocompress.result import SearchResult
from autocompress.space import Codes, SearchSpace
from autocompress.testing.toys import every_network, toy_constraints, toy_score
from strategies.evolution import AgingEvolution
from strategies.random_search import RandomSearch


class Paid:
    """Scores as `toy_score` does, and remembers every row it was asked for."""

    paid = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        interrupted_after: int | None = None,
        score: Callable[[SearchSpace, Codes], Values] = toy_score,
    ) -> None:
        self.space, self.score, self.interrupted_after = space, score, interrupted_after
        self.rows: list[bytes] = []

    def __call__(self, codes: Codes) -> dict[str, Values]:
        if len(self.rows) == self.interrupted_after:
            raise KeyboardInterrupt
        self.rows += [row.tobytes() for row in codes]
        return {"accuracy": self.score(self.space, codes)}


def guided(
    constraints: Constraints,
    evaluator: Paid,
    *,
    evaluations: int = 30,
    finalists: int = 8,
    candidates: int = 300,
    predictor: Literal["ridge", "mlp"] = "ridge",
    seed: int = 4,
    strategy: Callable[..., Any] = AgingEvolution,
    **more: Any,
) -> SearchResult:
    options = {"population": 20} if strategy is AgingEvolution else {}
    return guided_search(
        strategy,
        constraints,
        evaluator,
        evaluations=evaluations,
        finalists=finalists,
        candidates=candidates,
        predictor=predictor,
        objective="accuracy",
        seed=seed,
        **{"options": options, **more},
    )


def rows_of(space: SearchSpace, result: SearchResult) -> list[bytes]:
    return [row.tobytes() for row in space.encode([trial.architecture for trial in result.trials])]


# What is paid for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluations", "finalists"), [(30, 8), (12, 2), (40, 30), (11, 1), (6, 2), (2, 1)])
def test_exactly_so_many_networks_are_paid_for_each_once_and_all_fit(
    evaluations: int, finalists: int
) -> None:
    constraints = toy_constraints()
    evaluator = Paid(constraints.space)
    result = guided(constraints, evaluator, evaluations=evaluations, finalists=finalists)
    assert len(evaluator.rows) == len(set(evaluator.rows)) == evaluations
    assert rows_of(constraints.space, result) == evaluator.rows
    assert [trial.number for trial in result.trials] == list(range(evaluations))
    rows = constraints.space.encode([trial.architecture for trial in result.trials])
    assert constraints.feasible(rows).all()


def test_the_finalists_are_those_the_predictor_likes_best_of_what_was_not_paid_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every network is a candidate, and the predictor prefers what the evaluation does not."""
    constraints = toy_constraints("macs=70%", blocks=3)

    def reverse(self: FittedPredictor, codes: Codes) -> dict[str, Values]:
        return {self.metric: -toy_score(self.space, codes)}

    monkeypatch.setattr(FittedPredictor, "__call__", reverse)
    evaluator = Paid(constraints.space)
    result = guided(constraints, evaluator, evaluations=25, finalists=10, strategy=RandomSearch)
    rows = every_network(constraints.space)
    rows = rows[constraints.feasible(rows)]
    assert result.scored == len(rows)
    sample, finals = evaluator.rows[:15], evaluator.rows[15:]
    left = [row for row in rows if row.tobytes() not in sample]
    worst = np.sort(toy_score(constraints.space, np.array(left)))[:10]
    chosen = np.array([np.frombuffer(row, dtype=np.int64) for row in finals])
    np.testing.assert_array_equal(toy_score(constraints.space, chosen), worst)


def test_the_sample_is_uniform_over_genes_and_not_chosen_by_score() -> None:
    """A third of 400 for each kernel; 95 to 172 with a probability above 0.999 (four standard deviations)."""
    constraints = toy_constraints("macs=100%")
    evaluator = Paid(constraints.space)
    guided(constraints, evaluator, evaluations=401, finalists=1, candidates=1)
    sample = np.array([np.frombuffer(row, dtype=np.int64) for row in evaluator.rows[:400]])
    kernels = np.bincount(sample[:, constraints.space.positions["block1.kernel"]], minlength=3)
    assert kernels.sum() == 400
    assert 95 <= kernels.min() <= kernels.max() <= 172


def test_given_networks_are_paid_for_first_and_are_part_of_the_sample() -> None:
    constraints = toy_constraints()
    first = np.unique(constraints.sample(100, np.random.default_rng(0)), axis=0)[:5]
    evaluator = Paid(constraints.space)
    result = guided(constraints, evaluator, first=first)
    assert evaluator.rows[:5] == [row.tobytes() for row in first]
    assert len(set(evaluator.rows)) == len(evaluator.rows) == 30
    assert result.notes is not None
    assert result.notes["predictor"]["rows"] == 22
    assert result.best().metrics["accuracy"] >= toy_score(constraints.space, first).max()


def test_more_given_networks_than_the_sample_holds_leave_room_for_the_finalists() -> None:
    constraints = toy_constraints()
    first = np.unique(constraints.sample(500, np.random.default_rng(0)), axis=0)[:40]
    evaluator = Paid(constraints.space)
    guided(constraints, evaluator, first=first)
    assert evaluator.rows[:22] == [row.tobytes() for row in first[:22]]
    assert len(set(evaluator.rows)) == len(evaluator.rows) == 30


def test_a_good_predictor_finds_better_networks_than_its_sample() -> None:
    constraints = toy_constraints()
    result = guided(constraints, Paid(constraints.space))
    scores = [trial.metrics["accuracy"] for trial in result.trials]
    assert min(scores[22:]) > np.median(scores[:22])
    assert max(scores[22:]) >= max(scores[:22])


def test_the_notes_tell_how_good_the_predictor_is() -> None:
    constraints = toy_constraints()
    shown: list[str] = []
    result = guided(constraints, Paid(constraints.space), show=shown.append, identity={"weights": "abc"})
    assert result.notes is not None
    predictor = result.notes["predictor"]
    low, high = predictor["kendall_tau_interval"]
    assert -1 <= low <= predictor["kendall_tau"] <= high <= 1
    assert (predictor["kind"], predictor["rows"]) == ("ridge", 22)
    assert result.notes["weights"] == "abc"
    assert len(shown) == 1
    assert "Kendall tau" in shown[0]


def test_the_network_of_the_once_for_all_paper_can_be_the_predictor() -> None:
    constraints = toy_constraints()
    evaluator = Paid(constraints.space)
    result = guided(constraints, evaluator, evaluations=14, finalists=3, candidates=50, predictor="mlp")
    assert result.notes is not None
    assert result.notes["predictor"]["kind"] == "mlp"
    assert len(evaluator.rows) == 14


@pytest.mark.parametrize("finalists", [0, -1, 12, 13])
def test_finalists_outside_of_the_evaluations_are_refused(finalists: int) -> None:
    constraints = toy_constraints()
    with pytest.raises(AutocompressError, match=rf"finalists must be in 1\.\.11 .*, got {finalists}"):
        guided(constraints, Paid(constraints.space), evaluations=12, finalists=finalists)


# Where there is nothing to predict -------------------------------------------------------------------------


def equal_scores(space: SearchSpace, codes: Codes) -> Values:
    return np.full(len(codes), 0.25)


def fail_mostly(space: SearchSpace, codes: Codes) -> Values:
    if codes.sum() % 4:
        raise EvaluationError("out of luck")
    return toy_score(space, codes)


@pytest.mark.parametrize("score", [equal_scores, fail_mostly])
def test_without_scores_to_learn_from_the_finalists_are_random_too(
    score: Callable[[SearchSpace, Codes], Values],
) -> None:
    constraints = toy_constraints()
    evaluator = Paid(constraints.space, score=score)
    result = guided(constraints, evaluator)
    assert result.notes is not None
    assert result.notes["predictor"] == "none: too few or equal scores"
    assert len(set(evaluator.rows)) == len(evaluator.rows) == 30
    assert rows_of(constraints.space, result) == evaluator.rows


def test_a_sample_in_which_everything_fails_says_why() -> None:
    def fail(space: SearchSpace, codes: Codes) -> Values:
        raise EvaluationError("out of luck")

    constraints = toy_constraints()
    with pytest.raises(EvaluationError, match="evaluations all failed, the last one with: out of luck"):
        guided(constraints, Paid(constraints.space, score=fail))


@pytest.mark.parametrize("budget", ["macs=100%", "macs=50%", "macs=4%"])
@pytest.mark.parametrize(("evaluations", "finalists"), [(100, 20), (26, 2), (24, 3), (13, 5), (100, 99)])
def test_a_space_with_fewer_networks_than_evaluations_is_paid_for_once(
    budget: str, evaluations: int, finalists: int
) -> None:
    constraints = toy_constraints(budget, blocks=2)
    rows = every_network(constraints.space)
    fitting = {row.tobytes() for row in rows[constraints.feasible(rows)]}
    evaluator = Paid(constraints.space)
    guided(constraints, evaluator, evaluations=evaluations, finalists=finalists)
    assert set(evaluator.rows) <= fitting
    assert len(set(evaluator.rows)) == len(evaluator.rows) == min(evaluations, len(fitting))


# Deterministic and resumed ---------------------------------------------------------------------------------


def test_equal_seeds_give_equal_searches_and_others_do_not() -> None:
    constraints = toy_constraints()
    found = []
    for seed in (4, 4, 5):
        evaluator = Paid(constraints.space)
        guided(constraints, evaluator, seed=seed)
        found.append(evaluator.rows)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("stops", [(0,), (10,), (22,), (25, 2), (29,)])
def test_a_guided_search_stopped_anywhere_goes_on_as_if_it_had_not_been(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    constraints = toy_constraints()
    whole = Paid(constraints.space)
    expected = guided(constraints, whole, identity={"weights": "abc"})
    files = {"storage": tmp_path / "trials.log", "history": tmp_path / "history.bin"}
    paid_for: list[bytes] = []
    for stop in stops:
        part = Paid(constraints.space, interrupted_after=stop)
        with pytest.raises(KeyboardInterrupt):
            guided(constraints, part, identity={"weights": "abc"}, **files)
        paid_for += part.rows
    last = Paid(constraints.space)
    result = guided(constraints, last, identity={"weights": "abc"}, **files)
    assert paid_for + last.rows == whole.rows
    assert list(result.trials) == list(expected.trials)
    assert (result.scored, result.asked, result.notes) == (expected.scored, expected.asked, expected.notes)


def test_trials_of_other_weights_are_refused(tmp_path: Path) -> None:
    constraints = toy_constraints()
    guided(constraints, Paid(constraints.space), identity={"weights": "abc"}, storage=tmp_path / "trials.log")
    with pytest.raises(StorageError, match="weights differ"):
        guided(
            constraints, Paid(constraints.space), identity={"weights": "z"}, storage=tmp_path / "trials.log"
        )


def test_progress_counts_paid_evaluations_of_sample_and_finalists() -> None:
    constraints = toy_constraints()
    told: list[tuple[int, int]] = []
    guided(
        constraints, Paid(constraints.space), progress=lambda done, total, note="": told.append((done, total))
    )
    assert told == [(done, 30) for done in range(1, 31)]
