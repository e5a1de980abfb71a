"""Profiling measures each distinct block once, recovers known prices, and goes on after a kill."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from autocompress.cost import operation_cost
from autocompress.errors import NegativeLatencyError, StorageError, TableError
from autocompress.latency.correction import Correction
from autocompress.latency.plan import check_networks, distinct_blocks
from autocompress.latency.profile import SAMPLES_FILE, TABLE_FILE, profile
from autocompress.latency.runtime import Blocks, Run
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.ops import Ops, block_key
from autocompress.space import Block, Codes, SearchSpace
from search_spaces.mobilenet_v3 import mobilenet_v3
from search_spaces.nas_bench_201 import nas_bench_201
from search_spaces.nas_bench_201_ops import Cell

TARGET = load_target()
CELLS = nas_bench_201(channels=1, cells=1, resolution=4)


def price_ms(ops: Ops) -> float:
    """What the fake clock of conftest.py takes for a block within a network."""
    return 1 + sum(op.macs for op in ops) / 1e4


def all_codes(space: SearchSpace) -> np.ndarray:
    return np.unique(space.sample(500, np.random.default_rng(0)), axis=0)


def without_date(table: LatencyTable) -> dict[str, Any]:
    payload = table.to_json()
    del payload["provenance"]["measured"]
    return payload


def run(space: SearchSpace, folder: Path, clock: Any, **settings: Any) -> LatencyTable:
    defaults = {"networks": 10, "min_rounds": 6, "max_rounds": 9, "granularity": "block"}
    return profile(
        space, TARGET, folder=folder, timer=clock.timer, prepare=clock.prepare, **{**defaults, **settings}
    )


def test_distinct_blocks_are_those_any_network_runs(space: SearchSpace) -> None:
    expected = {block_key(ops) for row in all_codes(space) for _, ops in space.operations(row)}
    assert distinct_blocks(space).keys() == expected
    assert len(expected) == 6


def test_known_prices_are_recovered_and_networks_priced_exactly(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    table = run(space, tmp_path, clock)
    for key, ops in distinct_blocks(space).items():
        assert table.rows[key].median_ms == pytest.approx(0.5 + price_ms(ops))
        assert table.price(ops) == pytest.approx(price_ms(ops))
    codes = all_codes(space)
    expected = [0.5 + sum(price_ms(ops) for _, ops in space.operations(row)) for row in codes]
    np.testing.assert_allclose(table.cost(space).of(codes), expected, rtol=1e-6)
    assert table.error_report is not None
    assert table.error_report.chosen == "affine_per_row"
    assert table.error_report.forms["affine_per_row"].mape_percent == pytest.approx(0, abs=1e-6)
    # The sum has 0.5 ms for each of 3 or 4 blocks, the network once.
    assert table.error_report.forms["raw"].bias_percent > 5


def test_no_more_is_timed_than_blocks_networks_and_the_reference(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    run(space, tmp_path, clock)
    assert len(set(clock.timed)) == 6 + 10
    assert len(clock.timed) == 6 * (6 + 10 + 1)


def test_the_table_is_written_beside_its_samples(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    table = run(space, tmp_path / "new" / "folder", clock)
    assert LatencyTable.load(tmp_path / "new" / "folder" / TABLE_FILE) == table
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {TABLE_FILE, SAMPLES_FILE}
    assert table.provenance["space"] == {"name": "toy", "fingerprint": space.fingerprint}


@pytest.mark.parametrize("stop_after", [1, 17, 40, 101])
def test_a_profile_that_was_stopped_ends_as_if_it_had_not_been(
    space: SearchSpace, tmp_path: Path, clock: Any, stop_after: int
) -> None:
    expected = run(space, tmp_path / "whole", clock)
    total = len(clock.timed)
    stopped = type(clock)(stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(space, tmp_path / "killed", stopped)
    assert not (tmp_path / "killed" / TABLE_FILE).exists()
    resumed = type(clock)()
    assert without_date(run(space, tmp_path / "killed", resumed)) == without_date(expected)
    # Of the unfinished round all is lost, of finished ones nothing.
    assert len(resumed.timed) == total - stop_after // 17 * 17


def test_a_finished_profile_measures_nothing_again(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    first = run(space, tmp_path, clock)
    (tmp_path / TABLE_FILE).unlink()
    again = type(clock)()
    assert run(space, tmp_path, again) == first
    assert not again.timed


def test_rows_of_a_given_table_are_taken_over(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    table = run(space, tmp_path / "whole", clock)
    missing = next(key for key in table.rows if "kernel=5" in key)
    rest = replace(table, rows={key: row for key, row in table.rows.items() if key != missing})
    again = type(clock)()
    completed = run(space, tmp_path / "rest", again, table=rest)
    assert completed.rows == table.rows
    alone = {timed for timed in again.timed if " | " not in timed}
    # The other is the reference, the block of most MACs.
    assert missing in alone
    assert len(alone) == 2


def test_a_given_table_of_another_target_is_refused(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    table = run(space, tmp_path, clock)
    with pytest.raises(TableError, match="threads is 1, not 2"):
        profile(space, load_target(threads=2), folder=tmp_path, table=table)


def test_samples_of_another_target_are_refused(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    run(space, tmp_path, clock)
    with pytest.raises(TableError, match="has samples of target"):
        profile(space, load_target(batch=2), folder=tmp_path, prepare=clock.prepare, timer=clock.timer)


def test_samples_of_another_space_of_the_same_name_are_not_taken(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    run(space, tmp_path, clock)
    head = space.blocks[-1]
    twice = Block("head", (), lambda: (*head.operations()[:1], *head.operations()))
    other = SearchSpace("toy", space.choices, (*space.blocks[:-1], twice))
    again = type(clock)()
    run(other, tmp_path, again)
    # The head is new, and with it every network.
    assert len({timed for timed in again.timed if " | " in timed}) == 10


def test_without_networks_there_is_no_correction_and_no_report(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    table = run(space, tmp_path, clock, networks=0)
    assert table.error_report is None
    assert table.correction.form == "raw"
    assert LatencyTable.load(tmp_path / TABLE_FILE) == table


@pytest.mark.parametrize("networks", [1, -1])
def test_a_correction_needs_two_networks(space: SearchSpace, tmp_path: Path, networks: int) -> None:
    with pytest.raises(TableError, match=f"networks must be 0 or at least 2, got {networks}"):
        profile(space, TARGET, folder=tmp_path, networks=networks)


def test_a_folder_that_cannot_be_written_is_a_storage_error(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run(space, tmp_path / "file", clock)


def test_check_networks_reach_from_the_smallest_to_the_largest_without_great_gaps() -> None:
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    codes = check_networks(space, 40)
    macs = operation_cost(space, "macs").of(codes)
    assert len(np.unique(codes, axis=0)) == 40
    assert (codes[0] == space.smallest()).all()
    assert (codes[-1] == space.largest()).all()
    gaps = np.diff(macs)
    assert (gaps >= 0).all()
    assert gaps.max() <= 2 * (macs[-1] - macs[0]) / 39
    np.testing.assert_array_equal(codes, check_networks(space, 40))
    space.validate(codes)


def test_check_networks_of_a_small_space_are_all_of_it(space: SearchSpace) -> None:
    codes = check_networks(space, 40)
    np.testing.assert_array_equal(np.unique(codes, axis=0), all_codes(space))
    assert len(check_networks(space, 2)) == 2
    assert check_networks(space, 0).shape == (0, 4)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "pytorch-cpu"])
def test_a_real_profile_has_positive_times_and_a_report(
    space: SearchSpace, tmp_path: Path, name: str
) -> None:
    target = load_target(name)
    table = profile(space, target, folder=tmp_path, networks=6, min_rounds=6, max_rounds=6)
    for row in table.rows.values():
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        # Samples of a stretch in which the machine was disturbed do not count.
        assert 1 <= row.count <= 6
    assert table.error_report is not None
    assert len(table.error_report.networks) == 6
    assert table.cost(space).maximum > 0
    table.check_target(target)


def test_blocks_are_built_for_the_target_asked_for(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    seen: set[Target] = set()

    def prepare(blocks: Any, target: Target) -> Run:
        seen.add(target)
        return clock.prepare(blocks, target)

    target = load_target(threads=2, batch=4)
    profile(space, target, folder=tmp_path, prepare=prepare, timer=clock.timer, networks=2, min_rounds=6)
    assert seen == {target}


def test_a_table_of_this_space_without_a_gap_is_taken_as_it_is_and_nothing_is_measured(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    """Two runs with one table then predict alike."""
    table = run(space, tmp_path / "one", clock)

    def refuse(runs: Run) -> float:
        raise AssertionError("measured again")

    again = profile(space, TARGET, folder=tmp_path / "two", networks=12, timer=refuse, table=table)
    assert again.to_json() == table.to_json()
    assert LatencyTable.load(tmp_path / "two" / TABLE_FILE).to_json() == table.to_json()


def test_a_table_of_another_space_keeps_its_rows_and_is_corrected_anew(
    space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    table = run(space, tmp_path / "one", clock)
    other = replace(table, provenance={**table.provenance, "space": {"name": "x", "fingerprint": "y"}})
    found = run(space, tmp_path / "two", clock, table=other, networks=8)
    assert found.rows == table.rows
    assert found.error_report is not None
    assert len(found.error_report.networks) == 8


def ops_cost_less_together(blocks: Any) -> float:
    """A runtime that fuses: later operations of a block cost 0.3 or 0.8 of what they cost alone."""
    return sum(
        (0.1 + op.macs / 1e4) * (1 if index == 0 else 0.3 if op.macs // 4096 % 2 else 0.8)
        for _, ops in blocks
        for index, op in enumerate(ops)
    )


def ops_cost_the_same_together(blocks: Any) -> float:
    """A runtime that does not fuse, and that changes layouts at the border of a lone block."""
    return sum(0.1 + op.macs / 1e4 for _, ops in blocks for op in ops) + 0.3 * (
        len(blocks) == 1 and len(blocks[0][1]) > 1 and hash_of(blocks[0][1]) % 3
    )


def hash_of(ops: Ops) -> int:
    return ops[1].macs // 4096


@pytest.mark.parametrize(
    ("law", "better"), [(ops_cost_less_together, "block"), (ops_cost_the_same_together, "op")]
)
def test_the_granularity_that_predicts_networks_better_is_reported_and_used(
    space: SearchSpace, tmp_path: Path, law: Any, better: str
) -> None:
    table = profile(
        space,
        TARGET,
        folder=tmp_path,
        networks=14,
        min_rounds=6,
        max_rounds=6,
        prepare=lambda blocks, target: lambda: blocks,
        timer=lambda run: law(run()),
    )
    report = table.error_report
    assert report is not None
    assert table.granularity == report.granularity == better
    assert report.figures.mape_percent == pytest.approx(0, abs=1e-6)
    assert min(figures.mape_percent for figures in report.other_forms.values()) > 0.05
    codes = all_codes(space)
    expected = [law(space.operations(row)) for row in codes]
    np.testing.assert_allclose(table.cost(space).of(codes), expected, rtol=1e-6)
    assert LatencyTable.load(tmp_path / TABLE_FILE) == table


def test_operations_alone_can_be_asked_for(space: SearchSpace, tmp_path: Path, clock: Any) -> None:
    table = run(space, tmp_path, clock, granularity="op")
    assert table.granularity == "op"
    assert not any(" > " in key for key in table.rows)
    with pytest.raises(TableError, match="granularity must be one of auto, block, op, got 'layer'"):
        run(space, tmp_path, clock, granularity="layer")


def test_check_networks_run_all_that_they_are_priced_for() -> None:
    """Runtimes leave out what no output depends on: such networks tell nothing about prices."""
    codes = check_networks(CELLS, 40)
    assert len(codes) == 40
    cells = [op for row in codes for _, ops in CELLS.operations(row) for op in ops if isinstance(op, Cell)]
    assert all(cell.runs_all for cell in cells)
    macs = operation_cost(CELLS, "macs").of(codes)
    # The least that runs is a cell of identities, the most one of 3x3 convolutions.
    assert macs[0] == operation_cost(CELLS, "macs").of(CELLS.smallest())[0]
    assert (codes[-1] == CELLS.largest()).all()
    nothing = nas_bench_201(operations=["none"], resolution=4)
    assert check_networks(nothing, 5).shape == (0, 6)


def test_no_network_is_predicted_to_take_less_than_no_time(tmp_path: Path) -> None:
    """Whole networks take the sum of their rows less 5.5 ms: more than the fixed rows of a network take."""
    operations = ("none", "nor_conv_1x1", "nor_conv_3x3")
    space = nas_bench_201(channels=1, cells=1, resolution=4, operations=operations)

    def prepare(blocks: Blocks, target: Target) -> Run:
        return lambda: sum(price_ms(ops) for _, ops in blocks)

    def prepare_network(codes: Codes) -> Run:
        return lambda: sum(price_ms(ops) for _, ops in space.priced_operations(codes)) - 5.5

    table = profile(
        space,
        TARGET,
        folder=tmp_path,
        timer=lambda run: float(cast(float, run())),
        prepare=prepare,
        prepare_network=prepare_network,
        networks=30,
        granularity="block",
        min_rounds=6,
        max_rounds=6,
    )
    report = table.error_report
    assert report is not None
    # The right form for the networks that were measured, and useless for one that has the fixed rows alone.
    assert report.forms["affine"].mape_percent == pytest.approx(0, abs=1e-6)
    assert report.chosen != "affine"
    assert table.cost(space).minimum >= 0
    wrong = replace(table, correction=Correction("affine", 1.0, 0.0, -5.5))
    with pytest.raises(NegativeLatencyError, match=r"predicts -1\.\d+ ms for the smallest network"):
        wrong.cost(space)
