"""A grid of widths: exact at knots, piecewise linear along steps between them, silent outside."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from autocompress.errors import TableError
from autocompress.latency.strict import Node
from autocompress.latency.widths import (
    EVEN,
    WidthGrid,
    at_widths,
    axes_of,
    family_of,
    grid_of_rows,
    make_grid,
    ms_of,
    read_grid,
    rounded_up,
    rounded_widths,
    widths_of,
)
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec, SqueezeExcite


class OwnConv(Conv2d):
    pass


DENSE = Conv2d(8, 8, 14, 14, kernel=3, activation="relu")
DEPTHWISE = Conv2d(8, 8, 14, 14, kernel=5, groups=8, stride=2)
ONE_OF_EACH = (
    DENSE,
    DEPTHWISE,
    Linear(8, 8),
    SqueezeExcite(8, 14, 14, 8),
    GlobalAvgPool(8, 14, 14),
    MaxPool(8, 14, 14),
    Add(8, 14, 14),
)
WITHOUT_WIDTHS = (Conv2d(8, 8, 14, 14, groups=4), Conv2d(8, 16, 14, 14, groups=8), OwnConv(8, 8, 14, 14))

widths = st.integers(2, 200)
width_sets = st.lists(widths, min_size=1, max_size=8, unique=True).map(sorted)
steps_of_devices = st.fixed_dictionaries(dict.fromkeys(EVEN, st.sampled_from([1, 2, 5, 8, 16, 32])))


def every(op: OpSpec, *choices: Sequence[int]) -> list[OpSpec]:
    """An operation at all combinations of widths."""
    return [at_widths(op, chosen) for chosen in itertools.product(*choices)]


def rows_of(grid: WidthGrid, ops: Sequence[OpSpec], law: Callable[..., float]) -> dict[str, float]:
    """What a device of this law takes at the knots: a function of the widths."""
    return {key: law(*widths_of(op)) for key, op in grid.operations(ops).items()}


# Axes and families --------------------------------------------------------------------------------------


def test_dense_operations_have_two_widths_depthwise_and_elementwise_ones_one() -> None:
    assert widths_of(Conv2d(3, 5, 7, 7)) == (3, 5)
    assert widths_of(Conv2d(6, 6, 7, 7, groups=6)) == (6,)
    assert widths_of(Linear(3, 5)) == (3, 5)
    assert widths_of(SqueezeExcite(3, 7, 7, 5)) == (3, 5)
    for op in (GlobalAvgPool(3, 7, 7), MaxPool(3, 7, 7), Add(3, 7, 7)):
        assert widths_of(op) == (3,)


@pytest.mark.parametrize("op", WITHOUT_WIDTHS)
def test_grouped_convolutions_and_a_users_own_operations_have_no_widths(op: OpSpec) -> None:
    assert axes_of(op) == ()
    assert family_of(op) == op.key
    assert make_grid([op]).knots == {}
    assert make_grid([op]).price(op, {op.key: 1.0}) is None


@given(st.sampled_from(ONE_OF_EACH), st.data())
def test_other_widths_change_nothing_but_the_widths(op: OpSpec, data: st.DataObject) -> None:
    chosen = data.draw(st.tuples(*[widths] * len(axes_of(op))))
    changed = at_widths(op, chosen)
    assert widths_of(changed) == chosen
    assert family_of(changed) == family_of(op)
    assert at_widths(changed, widths_of(op)) == op
    assert changed.in_shape[1:] == op.in_shape[1:]
    assert changed.out_shape[1:] == op.out_shape[1:]


@given(widths)
def test_a_depthwise_convolution_stays_depthwise(width: int) -> None:
    changed = at_widths(DEPTHWISE, [width])
    assert isinstance(changed, Conv2d)
    assert changed.depthwise


def test_families_differ_in_all_but_widths() -> None:
    others = [
        DENSE,
        replace(DENSE, kernel=5),
        replace(DENSE, stride=2),
        replace(DENSE, height=7),
        replace(DENSE, width=7),
        replace(DENSE, activation="none"),
        replace(DENSE, bias=True),
        replace(DENSE, norm=False),
        replace(DENSE, groups=8),
        *ONE_OF_EACH[1:],
        *WITHOUT_WIDTHS,
    ]
    assert len({family_of(op) for op in others}) == len(others)
    assert family_of(Conv2d(8, 16, 4, 4)) == "Conv2d(in_channels=*,out_channels=*,height=4,width=4)"


# Knots --------------------------------------------------------------------------------------------------


@given(st.sampled_from(ONE_OF_EACH), st.data(), steps_of_devices, st.integers(2, 9))
def test_knots_are_few_on_steps_and_reach_from_the_narrowest_step_to_the_widest_width(
    op: OpSpec, data: st.DataObject, steps: dict[str, int], count: int
) -> None:
    choices = data.draw(st.tuples(*[width_sets] * len(axes_of(op))))
    grid = make_grid(every(op, *choices), knots=count, steps=steps)  # type: ignore[arg-type]
    axes = grid.knots[family_of(op)]
    assert len(grid.knots) == 1
    for (axis, _), chosen, knots in zip(axes_of(op), choices, axes, strict=True):
        assert list(knots) == sorted(set(knots))
        assert len(knots) <= count
        assert knots[0] == min(rounded_up(chosen[0], steps[axis]), chosen[-1])
        assert knots[-1] == min(rounded_up(chosen[-1], steps[axis]), chosen[-1]) == chosen[-1]
        assert all(knot % steps[axis] == 0 or knot == chosen[-1] for knot in knots)
        if len({math.ceil(width / steps[axis]) for width in chosen}) <= count:
            assert {math.ceil(knot / steps[axis]) for knot in knots} == {
                math.ceil(width / steps[axis]) for width in chosen
            }
    found = grid.operations(every(op, *choices))
    assert {widths_of(knot) for knot in found.values()} == set(itertools.product(*axes))
    assert len(found) == grid.size
    assert all(key == knot.key for key, knot in found.items())


def test_knots_are_spread_evenly_in_the_logarithm() -> None:
    ops = every(DEPTHWISE, [2**power for power in range(1, 10)])
    assert make_grid(ops, knots=3).knots[family_of(DEPTHWISE)] == ((2, 32, 512),)


def test_a_family_is_measured_over_all_its_layers() -> None:
    """One narrow and one wide layer of the same shape share their rows."""
    grid = make_grid([Linear(8, 64), Linear(16, 32), Add(3, 1, 1)])
    assert grid.knots[family_of(Linear(1, 1))] == ((8, 16), (32, 64))
    assert grid.size == 5


@pytest.mark.parametrize("knots", [1, 0, -1])
def test_one_knot_is_no_grid(knots: int) -> None:
    with pytest.raises(TableError, match=f"needs at least 2 knots an axis, got {knots}"):
        make_grid([DENSE], knots=knots)


# Prices -------------------------------------------------------------------------------------------------


@given(st.sampled_from(ONE_OF_EACH), st.data(), steps_of_devices, st.integers(2, 5))
def test_at_a_knot_the_price_is_its_row(
    op: OpSpec, data: st.DataObject, steps: dict[str, int], count: int
) -> None:
    choices = data.draw(st.tuples(*[width_sets] * len(axes_of(op))))
    ops = every(op, *choices)
    grid = make_grid(ops, knots=count, steps=steps)  # type: ignore[arg-type]
    rows = {key: math.sqrt(number + 2) for number, key in enumerate(grid.operations(ops))}
    for key, knot in grid.operations(ops).items():
        assert grid.price(knot, rows) == rows[key]


@given(width_sets, width_sets, st.tuples(*[st.floats(0.1, 10)] * 4), st.integers(2, 4), st.data())
def test_functions_linear_in_each_width_are_reproduced_everywhere(
    inputs: list[int],
    outputs: list[int],
    factors: tuple[float, float, float, float],
    count: int,
    data: st.DataObject,
) -> None:
    def law(cin: int, cout: int) -> float:
        a, b, c, d = factors
        return a + b * cin + c * cout + d * cin * cout

    ops = every(DENSE, inputs, outputs)
    grid = make_grid(ops, knots=count)
    rows = rows_of(grid, ops, law)
    cin = data.draw(st.integers(inputs[0], inputs[-1]))
    cout = data.draw(st.integers(outputs[0], outputs[-1]))
    assert grid.price(replace(DENSE, in_channels=cin, out_channels=cout), rows) == pytest.approx(
        law(cin, cout)
    )


def test_between_knots_the_price_is_the_straight_line() -> None:
    grid = WidthGrid(EVEN, {family_of(Add(1, 2, 2)): ((10, 20, 60),)})
    rows = {Add(10, 2, 2).key: 1.0, Add(20, 2, 2).key: 9.0, Add(60, 2, 2).key: 3.0}
    assert grid.price(Add(15, 2, 2), rows) == 5.0
    assert grid.price(Add(20, 2, 2), rows) == 9.0
    assert grid.price(Add(30, 2, 2), rows) == 7.5


heights = st.lists(st.floats(0.1, 10), min_size=14, max_size=14).map(sorted)


@given(st.sampled_from([8, 16, 32]), width_sets, width_sets, heights)
def test_a_staircase_is_reproduced_at_every_width_if_every_step_has_a_knot(
    step: int, inputs: list[int], outputs: list[int], levels: list[float]
) -> None:
    """However high the steps, and also where the widest width is in the middle of its step."""

    def law(cin: int, cout: int) -> float:
        return levels[math.ceil(cin / step) % 14] * (1 + levels[math.ceil(cout / step) % 14])

    # Ends of steps between the choices, so that every step is one of them.
    inputs = sorted({*inputs, *range(rounded_up(inputs[0], step), inputs[-1], step)})
    outputs = sorted({*outputs, *range(rounded_up(outputs[0], step), outputs[-1], step)})
    ops = every(DENSE, inputs, outputs)
    grid = make_grid(ops, knots=200, steps=dict.fromkeys(EVEN, step))
    rows = rows_of(grid, ops, law)
    for cin in range(inputs[0], inputs[-1] + 1, 7):
        for cout in range(outputs[0], outputs[-1] + 1, 5):
            op = replace(DENSE, in_channels=cin, out_channels=cout)
            assert grid.price(op, rows) == law(cin, cout)


@given(st.integers(2, 5), width_sets)
def test_even_steps_are_reproduced_by_few_knots(count: int, chosen: list[int]) -> None:
    """Also by the last two, of which the widest is in the middle of its step."""

    def law(width: int) -> float:
        return 3 + 2 * math.ceil(width / 16)

    ops = every(DEPTHWISE, chosen)
    grid = make_grid(ops, knots=count, steps=dict.fromkeys(EVEN, 16))
    rows = rows_of(grid, ops, law)
    for op in ops:
        assert grid.price(op, rows) == pytest.approx(law(*widths_of(op)))


@given(st.sampled_from([1, 8, 16]), width_sets, widths)
def test_nothing_is_extrapolated(step: int, chosen: list[int], width: int) -> None:
    ops = every(DEPTHWISE, chosen)
    grid = make_grid(ops, knots=3, steps=dict.fromkeys(EVEN, step))
    price = grid.price(at_widths(DEPTHWISE, [width]), rows_of(grid, ops, float))
    # Below the narrowest width, but on its step, the device takes as long.
    inside = math.ceil(chosen[0] / step) <= math.ceil(width / step) and width <= chosen[-1]
    assert (price is not None) == inside


def test_one_width_outside_is_enough() -> None:
    ops = every(DENSE, [8, 16], [8, 16])
    grid = make_grid(ops)
    rows = rows_of(grid, ops, lambda cin, cout: 1.0)
    assert grid.price(Conv2d(12, 12, 14, 14, kernel=3, activation="relu"), rows) == 1.0
    for cin, cout in ((7, 12), (17, 12), (12, 7), (12, 17)):
        assert grid.price(replace(DENSE, in_channels=cin, out_channels=cout), rows) is None
    assert grid.price(replace(DENSE, kernel=1), rows) is None


def test_a_step_that_ends_above_the_widest_is_priced_as_the_widest() -> None:
    grid = WidthGrid(dict.fromkeys(EVEN, 16), {family_of(Add(1, 2, 2)): ((32, 50),)})
    rows = {Add(32, 2, 2).key: 2.0, Add(50, 2, 2).key: 4.0}
    assert [grid.price(Add(width, 2, 2), rows) for width in (49, 50, 51, 64)] == [4.0, 4.0, None, None]
    # 48 ends a step of its own, half way from the second to the fourth.
    assert grid.price(Add(40, 2, 2), rows) == 3.0


# Rounding -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 64), st.none() | st.integers(0, 100))
def test_rounded_widths_are_wider_on_the_same_step_and_never_above_the_most(
    asked: list[int], step: int, more: int | None
) -> None:
    most = max(asked, default=1) + (more or 0)
    found = rounded_widths(asked, step, most=None if more is None else most)
    assert list(found) == sorted(set(found))
    assert {math.ceil(width / step) for width in found} == {math.ceil(width / step) for width in asked}
    for width in asked:
        rounded = next(wider for wider in found if math.ceil(wider / step) == math.ceil(width / step))
        assert width <= rounded <= most
        assert rounded % step == 0 or rounded == most
    assert rounded_widths(found, step, most=most) == found


def test_rounded_widths_by_hand() -> None:
    assert rounded_widths([24, 40, 72], 32) == (32, 64, 72)
    assert rounded_widths([24, 40, 72], 32, most=96) == (32, 64, 96)
    assert rounded_widths([24, 30, 24], 16, most=200) == (32,)
    assert rounded_widths([], 16) == ()


def test_rounding_to_no_step_or_below_a_width_is_refused() -> None:
    with pytest.raises(TableError, match="step must be at least 1, got 0"):
        rounded_widths([24], 0)
    with pytest.raises(TableError, match=r"most must be at least the widest of the widths \(72\), got 64"):
        rounded_widths([24, 72], 16, most=64)


@example(10**17 + 1, 10)
@given(st.integers(1, 10**30), st.integers(1, 10**30))
def test_the_end_of_a_step_is_exact_for_any_integers(width: int, step: int) -> None:
    end = rounded_up(width, step)
    assert end % step == 0
    assert end - step < width <= end


# Grids of rows ------------------------------------------------------------------------------------------


def test_rows_of_every_combination_form_a_grid_and_incomplete_ones_none() -> None:
    whole = every(DENSE, [8, 16], [8, 16, 24])
    gap = every(replace(DENSE, kernel=5), [8, 16], [8, 16])[:3]
    line = every(DEPTHWISE, [8, 24])
    others = [*WITHOUT_WIDTHS, Linear(5, 7)]
    rows = {op.key: 1.0 for op in (*whole, *gap, *line, *others)}
    rows[f"{Add(8, 2, 2).key} > {Add(8, 2, 2).key}"] = 1.0
    rows["anything else"] = 1.0
    grid = grid_of_rows(rows)
    assert grid.knots == {
        family_of(DENSE): ((8, 16), (8, 16, 24)),
        family_of(DEPTHWISE): ((8, 24),),
        family_of(Linear(5, 7)): ((5,), (7,)),
    }
    assert grid.steps == dict.fromkeys(EVEN, 1)
    assert grid_of_rows({}).knots == {}


def test_a_row_is_measured_or_interpolated_or_unknown() -> None:
    rows = {Add(8, 2, 2).key: 1.0, Add(16, 2, 2).key: 3.0, "user(1)": 5.0}
    grid = grid_of_rows(rows)
    assert ms_of(Add(12, 2, 2).key, rows, grid) == 2.0
    assert ms_of(Add(12, 2, 2).key, {**rows, Add(12, 2, 2).key: 7.0}, grid) == 7.0
    assert ms_of("user(1)", rows, grid) == 5.0
    assert ms_of("user(1)", rows, None) == 5.0
    for unknown in (Add(20, 2, 2).key, "user(2)", f"{Add(8, 2, 2).key} > {Add(8, 2, 2).key}"):
        assert ms_of(unknown, rows, grid) is None
    assert ms_of(Add(12, 2, 2).key, rows, None) is None


# Files --------------------------------------------------------------------------------------------------


def as_read(grid: WidthGrid) -> Node:
    return Node(json.loads(json.dumps(asdict(grid))), "width_grid")


@given(st.data(), steps_of_devices)
def test_a_grid_is_read_as_it_was_written(data: st.DataObject, steps: dict[str, int]) -> None:
    ops = []
    for op in data.draw(st.lists(st.sampled_from(ONE_OF_EACH), unique=True)):
        ops += every(op, *data.draw(st.tuples(*[width_sets] * len(axes_of(op)))))
    grid = make_grid(ops, steps=steps)  # type: ignore[arg-type]
    assert read_grid(as_read(grid)) == grid


@pytest.mark.parametrize(
    ("steps", "axes", "match"),
    [
        ({"in": 1, "out": 1}, [[8]], "width_grid.steps.channels is missing"),
        ({"in": 1, "out": 1, "channels": 1, "depth": 1}, [[8]], "width_grid.steps.depth is not known"),
        ({"in": 0, "out": 1, "channels": 1}, [[8]], r"steps\.in must be an integer >= 1, got 0"),
        ({"in": 1.0, "out": 1, "channels": 1}, [[8]], r"steps\.in must be an integer >= 1, got 1\.0"),
        (EVEN, [], r"knots\.family must be lists of widths, ascending, without repetition, got \[\]"),
        (EVEN, [[8], []], r"knots\.family must be lists of widths, ascending"),
        (EVEN, [[8, 8]], r"knots\.family must be lists of widths, ascending, without repetition"),
        (EVEN, [[16, 8]], r"knots\.family must be lists of widths, ascending"),
        (EVEN, [8], r"knots\.family\[0\] must be a list, got 8"),
        (EVEN, {}, r"knots\.family must be a list, got {}"),
        (EVEN, [["8"]], r"knots\.family\[0\]\[0\] must be an integer >= 1, got '8'"),
        (EVEN, [[0, 8]], r"knots\.family\[0\]\[0\] must be an integer >= 1, got 0"),
        (EVEN, [[True, 8]], r"knots\.family\[0\]\[0\] must be an integer >= 1, got True"),
    ],
)
def test_a_damaged_grid_is_refused(steps: object, axes: object, match: str) -> None:
    with pytest.raises(TableError, match=match):
        read_grid(Node({"steps": steps, "knots": {"family": axes}}, "width_grid"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists), st.sampled_from("sk"))
def test_any_json_is_a_grid_or_refused(value: object, where: str) -> None:
    node: dict[str, object] = {"steps": dict(EVEN), "knots": {}}
    node["steps" if where == "s" else "knots"] = value
    assume(value != {})
    with pytest.raises(TableError):
        read_grid(Node(node, "width_grid"))
