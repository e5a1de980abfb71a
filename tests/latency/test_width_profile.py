"""A profile of a grid of widths: few rows, exact on a device of steps, checked by rows that it never uses."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency import plan
from autocompress.latency.plan import distinct_blocks
from autocompress.latency.profile import TABLE_FILE, profile
from autocompress.latency.runtime import Blocks
from autocompress.latency.steps import probe_operations
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.latency.widths import EVEN, family_of, widths_of
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops, OpSpec
from autocompress.space import Block, Choice, Codes, Option, SearchSpace

TARGET = load_target()
EIGHTS = tuple(range(8, 65, 8))
PROBES = {op.key for op in probe_operations()}
Law = Callable[[OpSpec], float]


def stem(first: Option) -> Ops:
    return (Conv2d(3, int(first), 8, 8, kernel=3),)


def body(first: Option, second: Option) -> Ops:
    cin, cout = int(first), int(second)
    return (Conv2d(cin, cout, 8, 8), Conv2d(cout, cout, 8, 8, kernel=3, groups=cout))


def head(second: Option) -> Ops:
    return (GlobalAvgPool(int(second), 8, 8), Linear(int(second), 10))


def make_space(widths: tuple[int, ...] = EIGHTS, *more: Block) -> SearchSpace:
    return SearchSpace(
        "channels",
        (Choice("first", widths), Choice("second", widths)),
        (
            Block("stem", ("first",), stem),
            Block("body", ("first", "second"), body),
            Block("head", ("second",), head),
            *more,
        ),
    )


def all_codes(space: SearchSpace) -> Codes:
    return np.unique(space.sample(3000, np.random.default_rng(0)), axis=0)


def stairs(op: OpSpec) -> float:
    """Sixteen channels at once; a kernel costs by its size."""
    levels = math.prod(math.ceil(width / 16) for width in widths_of(op))
    return 0.25 + levels * getattr(op, "kernel", 1) / 8


def curved(op: OpSpec) -> float:
    """Steps too, but no function that few knots can follow."""
    return 0.25 + math.prod(math.ceil(width / 16) ** 2 for width in widths_of(op)) / 8


def bilinear(op: OpSpec) -> float:
    return 0.25 + math.prod(widths_of(op)) / 512 + sum(widths_of(op)) / 64


@dataclass
class Clock:
    """Each operation takes what the law says, and each run 0.5 ms more."""

    law: Law = stairs
    stop_after: float = math.inf
    timed: list[Any] = field(default_factory=list)

    def prepare(self, blocks: Blocks, target: Target) -> Callable[[], Blocks]:
        return lambda: blocks

    def timer(self, run: Callable[[], Any]) -> float:
        if len(self.timed) >= self.stop_after:
            raise KeyboardInterrupt
        blocks = run()
        self.timed.append(tuple(op.key for _, ops in blocks for op in ops))
        return 0.5 + sum(self.law(op) for _, ops in blocks for op in ops)

    @property
    def single(self) -> set[str]:
        """Keys of the operations that were timed alone."""
        return {keys[0] for keys in self.timed if len(keys) == 1}


def run(space: SearchSpace, folder: Path, clock: Clock, **settings: Any) -> LatencyTable:
    defaults = {"networks": 6, "min_rounds": 6, "max_rounds": 6, "widths": "grid"}
    return profile(
        space, TARGET, folder=folder, timer=clock.timer, prepare=clock.prepare, **{**defaults, **settings}
    )


def assert_prices(table: LatencyTable, space: SearchSpace, law: Law, constant_ms: float = 0.5) -> None:
    """Every architecture costs what its operations take, and the constant of a run once."""
    codes = all_codes(space)
    expected = [constant_ms + sum(law(op) for _, ops in space.operations(row) for op in ops) for row in codes]
    assert len(codes) == space.size
    np.testing.assert_allclose(table.cost(space).of(codes), expected, rtol=1e-6)


def operations_of(space: SearchSpace) -> dict[str, OpSpec]:
    return {op.key: op for ops in distinct_blocks(space).values() for op in ops}


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> LatencyTable:
    return run(make_space(), tmp_path_factory.mktemp("grid"), clock)


# What is measured, and what it is worth -----------------------------------------------------------------


def test_knots_probes_and_rows_held_out_are_measured_and_nothing_else(
    table: LatencyTable, clock: Clock
) -> None:
    assert table.grid is not None
    ops = operations_of(make_space())
    knots = table.grid.operations(ops.values())
    # By hand: 4 steps for each of stem, depthwise convolution, pool and head, 4 x 4 for the convolution.
    assert len(knots) == 4 * 4 + 4 * 4
    assert table.rows.keys() == knots.keys() | PROBES
    # What is off the knots, fewer than 100 operations, is all held out.
    assert clock.single == knots.keys() | PROBES | ops.keys()
    assert len({keys for keys in clock.timed if len(keys) > 1}) == 6


def test_the_steps_of_the_device_are_learned(table: LatencyTable) -> None:
    assert table.grid is not None
    assert table.grid.steps == dict.fromkeys(EVEN, 16)
    body = table.grid.knots[family_of(Conv2d(8, 8, 8, 8))]
    assert body == ((16, 32, 48, 64), (16, 32, 48, 64))


def test_all_networks_are_priced_exactly_and_the_constant_is_found(table: LatencyTable) -> None:
    assert_prices(table, make_space(), stairs)
    assert table.granularity == "op"
    assert table.error_report is not None
    assert table.error_report.figures.mape_percent == pytest.approx(0, abs=1e-4)


def test_a_law_that_is_linear_in_each_width_needs_two_knots(tmp_path: Path) -> None:
    found = run(make_space(), tmp_path, Clock(bilinear), knots=2)
    assert found.grid is not None
    assert found.grid.steps == dict.fromkeys(EVEN, 1)
    assert found.grid.size == 2 * 4 + 4
    assert_prices(found, make_space(), bilinear)


def test_the_report_counts_what_was_measured_and_what_it_prices(table: LatencyTable) -> None:
    report = table.width_report
    assert report is not None
    assert report.measured_rows == 32
    assert report.priced_rows == len(operations_of(make_space())) == 8 * 4 + 8 * 8
    assert report.families == 5
    assert report.held_out_rows == 96 - 32
    assert report.seconds_per_layer == report.seconds / 5 > 0
    # The grid represents these steps exactly.
    assert report.held_out.max_error_percent == pytest.approx(0, abs=1e-4)
    assert report.held_out.within_5_percent == 100


def test_the_report_shows_what_the_grid_cannot_represent(tmp_path: Path) -> None:
    report = run(make_space(), tmp_path, Clock(curved), knots=2).width_report
    assert report is not None
    # The squares of 2 and 3 steps lie below the line from 1 to 4.
    assert report.held_out.bias_percent > 5
    assert report.held_out.max_error_percent > report.held_out.mape_percent > 5


def test_no_more_rows_are_held_out_than_a_check_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "HELD_OUT_ROWS", 7)
    clock = Clock()
    found = run(make_space(), tmp_path, clock, networks=0)
    assert found.width_report is not None
    assert found.width_report.held_out_rows == 7
    assert len(clock.single - found.rows.keys()) == 7


def test_rows_held_out_never_take_part(tmp_path: Path, table: LatencyTable) -> None:
    """A device that takes twice as long exactly there gets the same prices, and the report says how wrong."""

    off = operations_of(make_space()).keys() - table.rows.keys()

    def lying(op: OpSpec) -> float:
        return 2 * stairs(op) + 0.5 if op.key in off else stairs(op)

    found = run(make_space(), tmp_path, Clock(lying), networks=0)
    assert found.rows == table.rows
    assert found.grid == table.grid
    assert found.width_report is not None
    assert found.width_report.held_out.bias_percent == pytest.approx(-50, abs=1e-3)


def test_a_space_of_knots_only_has_no_report(tmp_path: Path) -> None:
    space = make_space((16, 32, 48))
    found = run(space, tmp_path, Clock())
    assert found.width_report is None
    assert_prices(found, space, stairs)


def test_what_has_no_widths_is_measured_as_it_is(tmp_path: Path) -> None:
    grouped = Conv2d(8, 16, 8, 8, groups=4)
    space = make_space(EIGHTS, Block("more", (), lambda: (grouped,)))
    found = run(space, tmp_path, Clock())
    assert found.grid is not None
    assert family_of(grouped) not in found.grid.knots
    assert found.rows[grouped.key].median_ms == pytest.approx(0.5 + stairs(grouped))
    assert_prices(found, space, stairs)


def test_whole_networks_are_built_by_the_function_given(tmp_path: Path) -> None:
    space = make_space()
    built: list[tuple[int, ...]] = []

    def prepare_network(codes: np.ndarray) -> Callable[[], Any]:
        built.append(tuple(codes.tolist()))
        return lambda: [*space.operations(codes), ("twice", (Linear(16, 16),))]

    clock = Clock()
    found = run(space, tmp_path, clock, prepare_network=prepare_network)
    networks = {keys for keys in clock.timed if len(keys) > 1}
    assert {keys[-1] for keys in networks} == {Linear(16, 16).key}
    assert len(set(built)) == len(networks) == 6
    assert {tuple(row) for row in (space.smallest()[0].tolist(), space.largest()[0].tolist())} < set(built)
    # The correction is fitted to what was built: the constant has what the blocks do not say.
    assert_prices(found, space, stairs, constant_ms=0.5 + stairs(Linear(16, 16)))


# Resuming, and tables that are given --------------------------------------------------------------------


def of_another_space(table: LatencyTable) -> LatencyTable:
    """A table whose rows are taken over, but not its correction."""
    return replace(table, provenance={**table.provenance, "space": {"name": "x", "fingerprint": "y"}})


def without_time(table: LatencyTable) -> dict[str, Any]:
    payload = table.to_json()
    del payload["provenance"]["measured"]
    del payload["width_report"]["seconds"]
    return payload


@pytest.mark.parametrize("stop_after", [1, 200, 83 * 6, 83 * 6 + 250])
def test_a_profile_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path: Path, table: LatencyTable, clock: Clock, stop_after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make_space(), tmp_path, Clock(stop_after=stop_after))
    assert not (tmp_path / TABLE_FILE).exists()
    resumed = Clock()
    assert without_time(run(make_space(), tmp_path, resumed)) == without_time(table)
    in_round = 83 if stop_after < 83 * 6 else 96 + 6 + 1
    done = stop_after if stop_after < 83 * 6 else stop_after - 83 * 6
    # Of the unfinished round all is lost, of finished ones nothing.
    assert len(resumed.timed) == len(clock.timed) - stop_after + done % in_round


def test_a_table_is_read_as_it_was_written(tmp_path: Path, table: LatencyTable) -> None:
    table.save(tmp_path / "table.json")
    found = LatencyTable.load(tmp_path / "table.json")
    assert found == table
    assert_prices(found, make_space(), stairs)


def test_a_table_of_this_space_is_taken_as_it_is_and_nothing_is_measured(
    tmp_path: Path, table: LatencyTable
) -> None:
    clock = Clock(stop_after=0)
    assert run(make_space(), tmp_path, clock, table=table) == table
    assert LatencyTable.load(tmp_path / TABLE_FILE) == table


def test_interpolated_rows_are_not_enough_where_all_are_asked_for(
    tmp_path: Path, table: LatencyTable
) -> None:
    clock = Clock()
    found = run(make_space(), tmp_path, clock, table=table, widths="all", granularity="op")
    assert found.grid is None
    assert found.rows.keys() == table.rows.keys() | operations_of(make_space()).keys()
    # The largest operation is timed in every round, to see the drift.
    assert len(clock.single & table.rows.keys()) == 1


def test_knots_of_a_given_table_are_taken_over_and_rows_held_out_are_not(
    tmp_path: Path, table: LatencyTable
) -> None:
    everything = run(make_space(), tmp_path / "all", Clock(), widths="all", granularity="auto")
    clock = Clock()
    found = run(make_space(), tmp_path / "grid", clock, table=of_another_space(everything))
    assert found.grid == table.grid
    assert found.width_report is not None
    assert found.width_report.held_out_rows == 64
    assert not found.rows.keys() & (operations_of(make_space()).keys() - table.rows.keys())
    # Its rows of whole blocks do not change how networks are priced.
    assert found.granularity == "op"
    assert_prices(found, make_space(), stairs)


@pytest.mark.parametrize("networks", [0, 6])
def test_a_grid_is_always_priced_by_operation(tmp_path: Path, networks: int) -> None:
    """Also if blocks have one operation each, whose keys are those of blocks too, or are known as blocks."""
    space = SearchSpace("stems", (Choice("first", EIGHTS),), (Block("stem", ("first",), stem),))
    assert run(space, tmp_path / "one", Clock(), networks=networks).granularity == "op"
    blocks = run(make_space(), tmp_path / "blocks", Clock(), widths="all", granularity="block")
    found = run(make_space(), tmp_path / "two", Clock(), networks=networks, table=of_another_space(blocks))
    assert found.granularity == "op"
    assert found.cost(make_space()).maximum > 0


# Prices between rows ------------------------------------------------------------------------------------


def test_what_is_not_in_the_grid_is_missed_by_its_key(table: LatencyTable) -> None:
    known = Conv2d(24, 40, 8, 8)
    assert table.price((known,)) > 0
    for unknown in (
        replace(known, kernel=5),
        replace(known, height=4),
        replace(known, out_channels=65),
        Conv2d(40, 40, 8, 8, groups=4),
    ):
        with pytest.raises(MissingRowError) as caught:
            table.price((known, unknown))
        assert f"no row for 1 block; the first is {unknown.key!r}" in str(caught.value)
    other = Block("more", ("first",), lambda first: (known, Conv2d(int(first), 8, 8, 8, kernel=5)))
    with pytest.raises(MissingRowError, match=r"no row for 8 blocks; the first is .*in_channels=8.*kernel=5"):
        table.cost(make_space(EIGHTS, other))


def test_blocks_without_rows_are_marked_as_interpolated(table: LatencyTable) -> None:
    marks = {}
    for ops in distinct_blocks(make_space()).values():
        marks[ops] = table.interpolates(ops)
        assert marks[ops] == any(op.key not in table.rows for op in ops)
    assert marks[stem(48)] is False
    assert marks[stem(56)] is True
    # One of two operations is enough.
    assert marks[body(24, 48)] is True
    assert marks[body(16, 48)] is False


def test_an_ordinary_table_prices_between_its_rows_when_that_is_allowed(tmp_path: Path) -> None:
    measured = run(make_space((8, 24, 64)), tmp_path, Clock(bilinear), widths="all", granularity="op")
    wider = make_space((8, 16, 24, 40, 64))
    assert measured.grid is None
    with pytest.raises(MissingRowError):
        measured.cost(wider)
    allowed = measured.interpolated()
    assert_prices(allowed, wider, bilinear)
    assert allowed.rows == measured.rows
    assert allowed.interpolates(stem(16))
    assert not allowed.interpolates(stem(24))
    with pytest.raises(MissingRowError):
        allowed.cost(make_space((8, 24, 72)))
    allowed.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == allowed


def test_a_grid_stays_as_it_was_measured(table: LatencyTable) -> None:
    assert table.interpolated() is table


def test_blocks_are_not_interpolated(tmp_path: Path) -> None:
    measured = run(make_space((8, 64)), tmp_path, Clock(bilinear), widths="all", granularity="block")
    with pytest.raises(MissingRowError, match="no row for 1 block"):
        measured.interpolated().price(body(8, 24))


# What is refused ----------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = partial(run, make_space(), tmp_path, Clock())
    with pytest.raises(TableError, match="needs at least 2 knots an axis, got 1"):
        attempt(knots=1)
    with pytest.raises(TableError, match="networks must be 0 or at least 2, got 1"):
        attempt(networks=1)
    with pytest.raises(TableError, match="widths must be one of all, grid, got 'gird'"):
        attempt(widths="gird")
    monkeypatch.setattr(plan, "MAX_ROWS", 31)
    with pytest.raises(TableError, match=r"of 6 knots an axis has 32 rows in space 'channels'; at most 31"):
        attempt()


def test_an_absurd_grid_is_refused_before_it_is_enumerated() -> None:
    options = tuple(range(1, 3999))
    linear = Block("linear", ("width",), lambda width: (Linear(int(width), 4000 - int(width)),))
    space = SearchSpace("absurd", (Choice("width", options),), (linear,))
    started = time.process_time()
    with pytest.raises(TableError, match=r"has 15984004 rows in space 'absurd'; at most 20000 are measured"):
        plan.plan_widths(space, 0, 0, knots=4000, steps=EVEN)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("family", "axes", "match"),
    [
        ("Conv2d(in_channels=*)", [[8]], r"knots\..* must be of a family that has rows"),
        (Conv2d(8, 16, 8, 8, groups=4).key, [[8]], r"knots\..* must be of a family that has rows"),
        (family_of(Linear(8, 8)), [[16]], "must be of a family that has rows, one list an axis"),
        (family_of(Linear(8, 8)), [[16], [10], [1]], "must be of a family that has rows, one list an axis"),
        (
            family_of(Linear(8, 8)),
            [[*range(1, 5000)], [*range(1, 5000)]],
            r"no more combinations than there are rows \(115\)",
        ),
        (family_of(Linear(8, 8)), [[16, 17], [10]], r"a knot at 'Linear\(in_features=17.*no row"),
        (family_of(Linear(8, 8)), [[16, 10**17], [10]], r"a knot at 'Linear\(in_features=10000.*no row"),
    ],
)
def test_a_grid_that_the_rows_of_a_file_do_not_carry_is_refused_at_once(
    table: LatencyTable, tmp_path: Path, family: str, axes: Any, match: str
) -> None:
    payload = table.to_json()
    payload["width_grid"]["knots"] = {**payload["width_grid"]["knots"], family: axes}
    (tmp_path / "table.json").write_text(json.dumps(payload))
    started = time.process_time()
    with pytest.raises(TableError, match=match):
        LatencyTable.load(tmp_path / "table.json")
    assert time.process_time() - started < 1


def test_many_grids_of_moderate_size_are_refused_at_once(table: LatencyTable, tmp_path: Path) -> None:
    """Each has no more knots than the table has rows; all together would take minutes to enumerate."""
    payload = table.to_json()
    row = next(iter(payload["rows"].values()))
    families = [replace(Linear(8, 8), activation=name) for name in ("relu", "silu", "sigmoid")]
    families += [Conv2d(8, 8, 8, 8, kernel=kernel) for kernel in range(2, 400)]
    payload["rows"] |= {op.key: row for op in families}
    axes = [[*range(1, 23)], [*range(1, 23)]]
    payload["width_grid"]["knots"] = {family_of(op): axes for op in families}
    (tmp_path / "table.json").write_text(json.dumps(payload))
    with pytest.raises(TableError, match=r"no more combinations than there are rows \(516\)"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("measured_rows", -1, r"width_report\.measured_rows must be an integer >= 0, got -1"),
        ("families", 0, r"width_report\.families must be an integer >= 1, got 0"),
        ("seconds", "1", r"width_report\.seconds must be a finite number"),
        ("held_out_rows", 1.5, r"width_report\.held_out_rows must be an integer >= 1"),
        ("held_out", None, r"width_report\.held_out must be a JSON object"),
        ("surprise", 1, r"width_report\.surprise is not known"),
    ],
)
def test_a_damaged_report_is_refused(
    table: LatencyTable, tmp_path: Path, name: str, value: Any, match: str
) -> None:
    payload = table.to_json()
    payload["width_report"][name] = value
    (tmp_path / "table.json").write_text(json.dumps(payload))
    with pytest.raises(TableError, match=match):
        LatencyTable.load(tmp_path / "table.json")
