"""Dominated hypervolume against closed forms, inclusion and exclusion, and darts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.cost import Values
from autocompress.errors import AutocompressError, BudgetError
from autocompress.hypervolume import HypervolumeTracker, hypervolume, hypervolume_curve
from autocompress.result import SearchResult, pareto_front
from autocompress.testing.toys import every_network, toy_space
from autocompress.trial import Outcome, Trial


@st.composite
def clouds(draw: st.DrawFn, max_points: int = 6, max_dimensions: int = 4) -> Values:
    """Points of few small integers: many ties, some points on or below the reference 0; sums are exact."""
    dimensions = draw(st.integers(1, max_dimensions))
    row = st.lists(st.integers(-1, 4), min_size=dimensions, max_size=dimensions)
    rows = draw(st.lists(row, max_size=max_points))
    return np.array(rows, dtype=np.float64).reshape(len(rows), dimensions)


def by_inclusion_and_exclusion(points: Values) -> float:
    """Sizes of the boxes, less what pairs share, plus what triples share, and so on."""
    boxes = np.maximum(points, 0.0)
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for chosen in itertools.combinations(boxes, size):
            total -= (-1) ** size * float(np.prod(np.min(chosen, axis=0)))
    return total


@given(clouds())
def test_it_is_what_inclusion_and_exclusion_give(points: Values) -> None:
    assert hypervolume(points, np.zeros(points.shape[1])) == by_inclusion_and_exclusion(points)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5])
def test_one_point_covers_a_box_and_arms_of_a_cross_add_up(dimensions: int) -> None:
    reference = np.arange(dimensions) - 7.0
    assert hypervolume([reference + 2], reference) == 2.0**dimensions
    # The unit cube, and on each side a bar that reaches to 3: they share the cube only.
    cross = reference + 1 + 2 * np.eye(dimensions)
    assert hypervolume(cross, reference) == 1 + 2 * dimensions


def test_a_staircase_is_a_sum_of_columns() -> None:
    # Columns of width 1 and heights 9, 8, ..., 1.
    steps = np.array([(i, 10 - i) for i in range(1, 10)])
    assert hypervolume(steps, (0, 0)) == 45
    assert hypervolume(steps, (0, 1)) == 36
    assert hypervolume(steps, (5, 0)) == 1 + 2 + 3 + 4


def test_the_corner_of_a_cube_cut_off_by_a_plane_has_the_volume_of_its_cells() -> None:
    # All (i, j, k) from 1 on with i + j + k = n: n-1 choose 3 unit cells below them, plus the outer ones.
    n = 12
    points = [(i, j, n - i - j) for i in range(1, n - 1) for j in range(1, n - i)]
    cells = sum(1 for cell in itertools.product(range(1, n), repeat=3) if sum(cell) <= n)
    assert hypervolume(points, (0, 0, 0)) == cells == 220


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_as_many_darts_hit_as_the_volume_says(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    points, darts = rng.random((12, dimensions)), rng.random((40_000, dimensions))
    hit = (darts[:, None] <= points).all(axis=2).any(axis=1)
    # Five standard deviations of a share of 40,000.
    assert hypervolume(points, np.zeros(dimensions)) == pytest.approx(hit.mean(), abs=5 * 0.5 / 200)
    assert 0.05 < hit.mean() < 0.95


@given(clouds())
def test_neither_order_nor_repetition_nor_dominated_points_count(points: Values) -> None:
    rng = np.random.default_rng(len(points))
    origin = np.zeros(points.shape[1])
    shuffled = np.vstack([points, points, points - 1.0])[rng.permutation(3 * len(points))]
    value = hypervolume(points, origin)
    assert hypervolume(shuffled, origin) == value
    assert hypervolume(points[:, ::-1], origin) == value


@given(clouds())
def test_it_moves_with_the_reference_and_scales_with_the_units(points: Values) -> None:
    origin, scale = np.zeros(points.shape[1]), np.arange(points.shape[1]) + 2.0
    moved = origin + 16.0
    assert hypervolume(points + moved, moved) == hypervolume(points, origin)
    assert hypervolume(points * scale, origin) == hypervolume(points, origin) * scale.prod()


@given(clouds(max_points=10))
def test_the_tracker_knows_the_volume_of_every_beginning(points: Values) -> None:
    origin = np.zeros(points.shape[1])
    tracker = HypervolumeTracker(origin)
    previous = 0.0
    for count, point in enumerate(points, start=1):
        value = tracker.add(point)
        assert value == tracker.value == hypervolume(points[:count], origin)
        assert value >= previous
        previous = value


def test_the_tracker_agrees_on_numbers_that_are_not_round() -> None:
    points = np.random.default_rng(0).normal(size=(300, 3))
    tracker = HypervolumeTracker((-1, -1, -1))
    values = [tracker.add(point) for point in points]
    assert (np.diff(values) >= 0).all()
    assert values[-1] == pytest.approx(hypervolume(points, (-1, -1, -1)), rel=1e-12)
    # Only the front is kept, or a search of thousands would take hours.
    assert len(tracker._front) == pareto_front(points[(points > -1).all(axis=1)]).sum()


def test_without_a_point_beyond_the_reference_there_is_no_volume() -> None:
    assert hypervolume(np.zeros((0, 3)), (0, 0, 0)) == 0
    assert hypervolume([(5, 0), (0, 5), (-1, 9)], (0, 0)) == 0
    assert HypervolumeTracker((0, 0)).add((5, 0)) == 0


def searched(rows: list[tuple[float, float] | None]) -> SearchResult:
    """One trial for each `(accuracy, macs)`, failed where there is none."""
    space = toy_space(2)
    networks = space.decode(every_network(space))
    trials = []
    for number, row in enumerate(rows):
        metrics = {} if row is None else {"accuracy": row[0]}
        macs = 1.0 if row is None else row[1]
        outcome = Outcome.FAILED if row is None else Outcome.MEASURED
        trials.append(Trial(number, networks[number], {"macs": macs, "params": 3.0}, metrics, outcome))
    return SearchResult(space.describe(), "accuracy", {}, trials)


def test_the_curve_of_a_search_rises_with_accuracy_and_falls_with_cost() -> None:
    result = searched([(0.5, 60.0), None, (0.25, 20.0), (0.25, 30.0), (0.75, 120.0), (0.5, 20.0)])
    curve = hypervolume_curve(result, {"accuracy": 0.0, "macs": 100.0})
    np.testing.assert_array_equal(curve, [20, 20, 30, 30, 30, 40])
    # The order of the names is of no importance, and more costs make more dimensions.
    twisted = hypervolume_curve(result, {"params": 5.0, "macs": 100.0, "accuracy": 0.0})
    np.testing.assert_array_equal(twisted, 2 * curve)
    np.testing.assert_array_equal(hypervolume_curve(result, {"accuracy": 0.25})[-2:], [0.5, 0.5])


def test_a_reference_names_the_objective_and_priced_costs() -> None:
    result = searched([(0.5, 60.0)])
    with pytest.raises(BudgetError, match=r"must name the objective 'accuracy', got \['macs'\]"):
        hypervolume_curve(result, {"macs": 100.0})
    with pytest.raises(BudgetError, match="did not price latency_ms; it priced macs, params"):
        hypervolume_curve(result, {"accuracy": 0.0, "latency_ms": 1.0})


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [
        ([(1.0, 2.0)], (0, 0, 0), r"points must have shape \(n, 3\), got \(1, 2\)"),
        ([1.0, 2.0], (0, 0), r"points must have shape \(n, 2\), got \(2,\)"),
        ([(1.0, np.nan)], (0, 0), r"points must be finite numbers, got \[\[1\.0, nan\]\]"),
        ([(1.0, 2.0)], (0, -np.inf), r"reference must be finite numbers, got \[0\.0, -inf\]"),
        ([(1.0,)], 0.0, r"reference must have shape \(d,\), d >= 1, got \(\)"),
        (np.zeros((1, 0)), (), r"reference must have shape \(d,\), d >= 1, got \(0,\)"),
    ],
)
def test_wrong_shapes_and_numbers_are_refused(points: object, reference: object, message: str) -> None:
    with pytest.raises(AutocompressError, match=message):
        hypervolume(points, reference)  # type: ignore[arg-type]


def test_the_tracker_refuses_points_of_another_shape() -> None:
    with pytest.raises(AutocompressError, match=r"point must have shape \(2,\), got \(3,\)"):
        HypervolumeTracker((0, 0)).add((1, 2, 3))
    with pytest.raises(AutocompressError, match="point must be finite numbers"):
        HypervolumeTracker((0, 0)).add((1, np.inf))
