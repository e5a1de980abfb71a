import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.engine import search
from autocompress.errors import CostError, DataError, EvaluationError, SpaceError
from autocompress.evaluation.tabular import TabularEvaluator, assumed_training_seconds, table_cost
from autocompress.space import Choice, SearchSpace
from autocompress.testing.toys import every_network, toy_score, toy_space
from autocompress.trial import Outcome
from strategies.random_search import RandomSearch

SPACE = toy_space(3)
CODES = every_network(SPACE)
SCORES = toy_score(SPACE, CODES)
PLAIN = SearchSpace("plain", (Choice("a", (1, 2, 3)), Choice("b", (1, 2)), Choice("c", (5, 6, 7))), ())
ROWS = np.array(list(itertools.product(range(3), range(2), range(3))), dtype=np.int64)


def evaluator(*, paid: bool = True, rows: slice = slice(None)) -> TabularEvaluator:
    columns = {"accuracy": SCORES[rows], "other": -SCORES[rows]}
    return TabularEvaluator(SPACE, CODES[rows], columns, paid=paid)


# Looking up -------------------------------------------------------------------------------------------


def test_every_network_gets_its_own_entries_in_any_order_and_again() -> None:
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(CODES)), 2))
    found = evaluator()(CODES[order])
    assert set(found) == {"accuracy", "other"}
    np.testing.assert_array_equal(found["accuracy"], SCORES[order])
    np.testing.assert_array_equal(found["other"], -SCORES[order])


def test_rows_of_the_table_need_not_be_canonical_and_stay_as_they_are() -> None:
    row = SPACE.smallest()
    genotype = row.copy()
    genotype[0, -1] = 2  # the kernel of a block that depth 1 leaves out
    table = TabularEvaluator(SPACE, genotype, {"accuracy": np.array([0.5])})
    assert table(row)["accuracy"].tolist() == [0.5]
    assert genotype[0, -1] == 2


def test_what_the_table_lacks_is_nan_beside_others_and_an_error_alone() -> None:
    some = evaluator(rows=slice(0, 10))
    found = some(CODES[[3, 20, 9]])["accuracy"]
    np.testing.assert_array_equal(found, [SCORES[3], np.nan, SCORES[9]])
    with pytest.raises(EvaluationError, match=r"table of 10 architectures has no row of .*\"space\":\"toy\""):
        some(CODES[20:21])
    with pytest.raises(EvaluationError, match="nor of the 2 others"):
        some(CODES[20:23])
    assert some(CODES[:0])["accuracy"].shape == (0,)


def test_a_missing_entry_of_a_column_is_nan() -> None:
    values = SCORES.copy()
    values[4] = np.nan
    found = TabularEvaluator(SPACE, CODES, {"accuracy": values})(CODES[3:6])["accuracy"]
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])


@pytest.mark.parametrize("paid", [True, False])
def test_a_search_finds_the_optimum_of_the_table_and_counts_what_is_missing_as_failed(paid: bool) -> None:
    constraints = Constraints(SPACE, {"macs": operation_cost(SPACE, "macs")}, {})
    table = evaluator(paid=paid, rows=slice(5, None))
    result = search(RandomSearch(constraints, seed=0), constraints, table, evaluations=len(CODES))
    if paid:
        assert result.best({}).metrics["accuracy"] == table.optimum("accuracy")[1]
        assert sum(trial.outcome == Outcome.FAILED for trial in result.trials) == 5
        assert all(trial.metrics.keys() == {"accuracy", "other"} for trial in result.measured)
    else:
        assert result.scored == len(CODES)
        assert result.candidates is not None
        assert len(result.candidates) == len(CODES) - 5
        assert result.candidates.metrics["accuracy"][0] == table.optimum("accuracy")[1]


def test_it_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(evaluator(paid=False)))
    assert not again.paid
    np.testing.assert_array_equal(again(CODES)["accuracy"], SCORES)


def test_the_optimum_is_that_of_enumeration_under_a_budget_and_without_one() -> None:
    constraints = Budget.parse("macs=40%").resolve(SPACE, [operation_cost(SPACE, "macs")])
    fits = constraints.feasible(CODES)
    assert 0 < fits.sum() < len(CODES)
    assert evaluator().optimum("accuracy", constraints)[1] == SCORES[fits].max() < SCORES.max()
    codes, value = evaluator().optimum("accuracy")
    assert codes.shape == (1, len(SPACE.choices))
    assert value == SCORES.max() == toy_score(SPACE, codes)[0]
    assert evaluator().optimum("other")[1] == -SCORES.min()


def test_the_optimum_ignores_missing_entries_and_says_when_there_is_none() -> None:
    values = SCORES.copy()
    values[values.argmax()] = np.nan
    table = TabularEvaluator(SPACE, CODES, {"accuracy": values})
    assert table.optimum("accuracy")[1] == np.nanmax(values)
    with pytest.raises(DataError, match="no column 'top1'; it has accuracy"):
        table.optimum("top1")
    nothing = TabularEvaluator(SPACE, CODES, {"accuracy": np.full(len(CODES), np.nan)})
    with pytest.raises(DataError, match="no architecture of the table that fits has a value of 'accuracy'"):
        nothing.optimum("accuracy")


def test_tables_that_are_no_tables_are_refused() -> None:
    with pytest.raises(DataError, match="at least one column"):
        TabularEvaluator(SPACE, CODES, {})
    with pytest.raises(
        DataError, match=r"'accuracy' must have shape \(78,\), one a row of codes, got \(77,\)"
    ):
        TabularEvaluator(SPACE, CODES, {"accuracy": SCORES[1:]})
    with pytest.raises(DataError, match="got inf in row 2"):
        TabularEvaluator(SPACE, CODES[:3], {"accuracy": np.array([1.0, 2.0, np.inf])})
    with pytest.raises(DataError, match="rows 1 and 3 of the table are the same network"):
        TabularEvaluator(SPACE, CODES[[0, 1, 2, 1]], {"accuracy": np.zeros(4)})
    with pytest.raises(SpaceError, match="row 0, position 0"):
        TabularEvaluator(SPACE, CODES[:1] + 5, {"accuracy": np.zeros(1)})


# Costs ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000))
def test_a_cost_from_a_table_prices_and_bounds_as_enumeration_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order, values = rng.permutation(len(ROWS)), rng.exponential(size=len(ROWS))
    cost = table_cost(PLAIN, ROWS[order], values, "latency_ms")
    np.testing.assert_array_equal(cost.of(ROWS[order]), values)
    assert cost.minimum == values.min()
    assert cost.maximum == values.max()
    assert len(cost.factors) == 1
    for width in range(4):
        for prefix in np.unique(ROWS[:, :width], axis=0):
            completions = (ROWS[order][:, :width] == prefix).all(axis=1)
            assert cost.lower_bound(prefix[None, :])[0] == values[completions].min()
    uniform = [np.full(count, 1 / count) for count in PLAIN.counts]
    assert cost.expected(uniform) == pytest.approx(values.mean())


def test_a_cost_needs_every_network_once() -> None:
    values = np.arange(18.0)
    with pytest.raises(CostError, match="each of the 18 networks of space 'plain', got 17 rows of 17"):
        table_cost(PLAIN, ROWS[1:], values[1:], "latency_ms")
    twice = ROWS.copy()
    twice[0] = twice[1]
    with pytest.raises(CostError, match="got 18 rows of 17 networks"):
        table_cost(PLAIN, twice, values, "latency_ms")
    with pytest.raises(CostError, match="got 19 rows of 18 networks"):
        table_cost(PLAIN, np.vstack([ROWS, ROWS[:1]]), np.arange(19.0), "latency_ms")
    with pytest.raises(
        CostError, match=r"latency_ms must have shape \(18,\), one a row of codes, got \(17,\)"
    ):
        table_cost(PLAIN, ROWS, values[1:], "latency_ms")
    with pytest.raises(CostError, match="latency_ms must be finite, got nan in row 4"):
        table_cost(PLAIN, ROWS, np.where(values == 4, np.nan, values), "latency_ms")


def test_a_cost_refuses_spaces_whose_table_would_have_holes_or_be_too_large() -> None:
    with pytest.raises(CostError, match="choices without effect"):
        table_cost(SPACE, CODES, SCORES, "latency_ms")
    large = SearchSpace("large", tuple(Choice(f"c{i}", tuple(range(10))) for i in range(7)), ())
    with pytest.raises(CostError, match=r"1e\+07 rows; a dense table of latency_ms has at most 1000000"):
        table_cost(large, large.smallest(), np.zeros(1), "latency_ms")


# Simulated time ---------------------------------------------------------------------------------------


def test_assumed_seconds_are_three_forward_passes_of_every_image() -> None:
    # 2 MMACs, 1,000 images, 5 epochs, 10^9 a second: 3 * 2e6 * 5e3 / 1e9 = 30 s.
    seconds = assumed_training_seconds(np.array([2e6, 0.0]), images=1000, epochs=5, macs_per_second=1e9)
    np.testing.assert_allclose(seconds, [30.0, 0.0])


@pytest.mark.parametrize("name", ["images", "epochs", "macs_per_second"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_assumptions_must_be_positive(name: str, value: float) -> None:
    arguments = {"images": 1, "epochs": 1, "macs_per_second": 1.0} | {name: value}
    with pytest.raises(CostError, match=f"{name} must be positive and finite, got {value}"):
        assumed_training_seconds(np.ones(1), **arguments)  # type: ignore[arg-type]
