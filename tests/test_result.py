"""Questions to a finished search, against slow answers and by hand."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import BudgetError, StorageError
from autocompress.result import SearchResult, load_result, pareto_front
from autocompress.space import SearchSpace
from autocompress.testing.toys import every_network, toy_space
from autocompress.trial import Outcome, Trial

SPACE = toy_space(2)
NETWORKS = SPACE.decode(every_network(SPACE))


def result(rows: Sequence[tuple[float, float, float]], **more: Any) -> SearchResult:
    """One measured trial for each `(accuracy, latency_ms, macs)`."""
    trials = [
        Trial(i, NETWORKS[i], {"latency_ms": ms, "macs": macs}, {"accuracy": score}, Outcome.MEASURED)
        for i, (score, ms, macs) in enumerate(rows)
    ]
    return SearchResult(
        **{
            "space": SPACE.describe(),
            "objective": "accuracy",
            "limits": {"latency_ms": 2.0},
            "trials": trials,
            **more,
        }
    )


FOUR = [(0.9, 3.0, 10.0), (0.8, 2.0, 30.0), (0.8, 1.5, 40.0), (0.5, 1.0, 5.0)]
FAILED = Trial(4, NETWORKS[4], {"latency_ms": 0.1, "macs": 1.0}, {}, Outcome.FAILED, "nan")

# Few different values, so that equal ones and equal points occur.
points = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), min_size=1, max_size=12)


def numbers(trials: Sequence[Trial]) -> list[int]:
    return [trial.number for trial in trials]


# Pareto front ----------------------------------------------------------------------------------------------


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


@given(points)
def test_the_front_is_what_nothing_dominates(values: list[tuple[float, float, float]]) -> None:
    expected = [not any(dominates(other, point) for other in values) for point in values]
    assert pareto_front(np.array(values)).tolist() == expected


@given(points)
def test_the_front_of_trials_is_by_score_and_costs_in_order_of_the_first_cost(
    values: list[tuple[float, float, float]],
) -> None:
    for metrics in (("latency_ms",), ("macs",), ("latency_ms", "macs")):
        columns = [0] + [1 + ("latency_ms", "macs").index(metric) for metric in metrics]
        better = [tuple(v[c] if c == 0 else -v[c] for c in columns) for v in values]
        expected = {
            i for i, point in enumerate(better) if not any(dominates(other, point) for other in better)
        }
        front = result(values).pareto(metrics)
        assert set(numbers(front)) == expected
        costs = [trial.costs[metrics[0]] for trial in front]
        assert costs == sorted(costs)


def test_failed_trials_are_never_on_the_front() -> None:
    found = result(FOUR)
    assert numbers(SearchResult(found.space, "accuracy", {}, [*found.trials, FAILED]).pareto()) == [3, 2, 0]


def test_the_front_of_no_trials_is_empty() -> None:
    assert result([]).pareto() == []


def test_a_front_over_a_cost_that_was_not_priced_is_refused() -> None:
    with pytest.raises(BudgetError, match="did not price params; it priced latency_ms, macs"):
        result(FOUR).pareto(["params"])


# Best and cheapest -----------------------------------------------------------------------------------------


@given(points, st.integers(0, 4), st.integers(0, 4))
def test_the_best_has_the_highest_score_within_all_limits(
    values: list[tuple[float, float, float]], ms: int, macs: int
) -> None:
    limits = {"latency_ms": float(ms), "macs": float(macs)}
    fitting = [i for i, value in enumerate(values) if value[1] <= ms and value[2] <= macs]
    found = result(values)
    if not fitting:
        with pytest.raises(BudgetError, match="no evaluated network fits latency_ms <= "):
            found.best(limits)
        return
    best = found.best(limits).number
    assert best in fitting
    # Score, then latency, then who was first.
    order = [(values[i][0], -values[i][1], -i) for i in fitting]
    assert (values[best][0], -values[best][1], -best) == max(order)


def test_the_best_is_within_the_budget_of_the_search_unless_another_is_given() -> None:
    found = result(FOUR)
    assert found.best().number == 2
    assert found.best({}).number == 0
    assert found.best({"macs": 10.0}).number == 0
    assert found.best({"macs": 9.9}).number == 3


def test_a_limit_that_nothing_fits_names_the_least_that_was_seen() -> None:
    with pytest.raises(
        BudgetError,
        match=r"fits latency_ms <= 0.5, macs <= 7; the smallest seen are latency_ms 1, macs 5; to find",
    ):
        result(FOUR).best({"latency_ms": 0.5, "macs": 7})


def test_a_limit_on_a_cost_that_was_not_priced_is_refused() -> None:
    with pytest.raises(BudgetError, match="did not price params, size_bytes; it priced latency_ms, macs"):
        result(FOUR).best({"params": 1.0, "latency_ms": 1.0, "size_bytes": 1.0})


@pytest.mark.parametrize("trials", [[], [FAILED]])
def test_a_search_without_a_measured_trial_has_no_best(trials: list[Trial]) -> None:
    with pytest.raises(BudgetError, match="no measured trial"):
        result([], trials=trials).best()


@given(points, st.integers(0, 5), st.sampled_from(["latency_ms", "macs"]))
def test_the_cheapest_costs_least_of_those_near_the_best_score(
    values: list[tuple[float, float, float]], tolerance: int, metric: str
) -> None:
    column = {"latency_ms": 1, "macs": 2}[metric]
    best = max(value[0] for value in values)
    good = [value for value in values if value[0] >= best - tolerance]
    least = min(value[column] for value in good)
    trial = result(values).cheapest(metric, tolerance)
    assert trial.costs[metric] == least
    assert trial.metrics["accuracy"] == max(value[0] for value in good if value[column] == least)


def test_the_cheapest_is_not_bound_by_the_budget_of_the_search() -> None:
    found = result(FOUR)
    assert [found.cheapest("latency_ms", t).number for t in (0.0, 0.0999, 0.2, 0.5)] == [0, 0, 2, 3]


@pytest.mark.parametrize(
    ("metric", "tolerance", "message"),
    [
        ("params", 0.1, "did not price params; it priced latency_ms, macs"),
        ("macs", -0.1, "tolerance must be 0 or more, got -0.1"),
    ],
)
def test_a_wrong_cost_or_tolerance_is_refused(metric: str, tolerance: float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        result(FOUR).cheapest(metric, tolerance)


# Tables and files ------------------------------------------------------------------------------------------


def test_a_frame_has_a_row_a_trial_with_its_costs_metrics_and_choices() -> None:
    found = result(FOUR[:2])
    frame = SearchResult(found.space, "accuracy", {}, [*found.trials, FAILED]).to_frame()
    fixed = ["number", "key", "outcome", "latency_ms", "macs", "accuracy"]
    assert list(frame.columns[: len(fixed)]) == fixed
    assert set(frame.columns[len(fixed) :]) <= {choice.name for choice in SPACE.choices}
    assert frame["outcome"].tolist() == ["measured", "measured", "failed"]
    assert frame["key"].tolist() == [NETWORKS[i].key for i in (0, 1, 4)]
    assert frame["accuracy"].isna().tolist() == [False, False, True]
    for (_, row), arch in zip(frame.iterrows(), [NETWORKS[0], NETWORKS[1], NETWORKS[4]], strict=True):
        assert {name: row[name] for name, _ in arch.settings} == dict(arch.settings)


def test_a_result_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = result(FOUR, scored=7, asked=99, notes={"predictor": {"kendall_tau": 0.5}})
    saved = SearchResult(**{**vars(saved), "trials": [*saved.trials, FAILED]})
    saved.save(tmp_path / "result.json")
    read = load_result(tmp_path / "result.json", SPACE)
    assert list(read.trials) == list(saved.trials)
    assert {k: v for k, v in vars(read).items() if k != "trials"} == {
        k: v for k, v in vars(saved).items() if k != "trials"
    }


def test_a_file_of_a_result_says_what_it_is(tmp_path: Path) -> None:
    result(FOUR).save(tmp_path / "result.json")
    payload = json.loads((tmp_path / "result.json").read_text())
    assert (payload["schema"], payload["version"]) == ("autocompress.result", 1)
    assert payload["trials"][0]["architecture"]["choices"] == dict(NETWORKS[0].settings)


def test_a_result_of_another_space_is_refused(tmp_path: Path) -> None:
    result(FOUR).save(tmp_path / "result.json")
    for other in (toy_space(3), SearchSpace("toy", SPACE.choices, SPACE.blocks[:1])):
        with pytest.raises(StorageError, match=r"result.json is of another space"):
            load_result(tmp_path / "result.json", other)


def without(payload: Mapping[str, Any], *path: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(payload))
    part = copy
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return dict(copy)


def changed(payload: Mapping[str, Any], *path: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(payload))
    part = copy
    for key in path[:-2]:
        part = part[key]
    part[path[-2]] = path[-1]
    return dict(copy)


GOOD = result(FOUR).to_json()


@pytest.mark.parametrize(
    "payload",
    [
        *(without(GOOD, key) for key in GOOD),
        *(without(GOOD, "trials", 2, key) for key in GOOD["trials"][2]),
        changed(GOOD, "trials", 1, "outcome", "GUESSED"),
        changed(GOOD, "trials", 1, "architecture", "choices", "depth", 99),
        changed(GOOD, "trials", 1, "architecture", "choices", {}),
        changed(GOOD, "trials", 3),
        changed(GOOD, "trials", [3]),
        changed(GOOD, "space", "toy"),
    ],
    ids=itertools.count(),
)
def test_a_damaged_result_is_refused(tmp_path: Path, payload: dict[str, Any]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(payload))
    with pytest.raises(StorageError, match=r"search result .*result.json is damaged"):
        load_result(tmp_path / "result.json", SPACE)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (changed(GOOD, "schema", "autocompress.other"), "is no search result of version 1"),
        (changed(GOOD, "version", 2), "is no search result of version 1"),
        ([], "is damaged"),
        (None, "is damaged"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, payload: Any, message: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps(payload))
    with pytest.raises(StorageError, match=message):
        load_result(tmp_path / "result.json", SPACE)


@pytest.mark.parametrize("text", ["", "{", '{"schema": ', "\xff"])
def test_a_result_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(StorageError, match=r"search result .* cannot be read"):
        load_result(tmp_path / "result.json", SPACE)


def test_an_absent_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"search result not found: .*result.json"):
        load_result(tmp_path / "result.json", SPACE)
