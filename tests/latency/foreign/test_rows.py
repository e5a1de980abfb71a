"""Rows by block key make a latency table that prices a space as their plain sum."""

from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.rows import ForeignRow, latency_table, one_after_the_other
from autocompress.latency.measure import summarize
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.ops import Linear, Ops, block_key
from autocompress.space import Block, Choice, Option, SearchSpace

PHONE = Target("phone", "", device="other")


def layer(width: Option) -> Ops:
    return (Linear(4, int(width)),)


SPACE = SearchSpace("toy", (Choice("width", (2, 4)),), (Block("layer", ("width",), layer),))


def test_a_space_costs_the_sum_of_its_rows_also_after_saving(tmp_path: Path) -> None:
    rows = {block_key(layer(2)): ForeignRow(0.5, 0.1, 30), block_key(layer(4)): ForeignRow(2.0)}
    table = latency_table(rows, PHONE, source="made up", device={"model": "phone"})
    table.save(tmp_path / "table.json")
    for known in (table, LatencyTable.load(tmp_path / "table.json")):
        assert known.cost(SPACE).of(np.array([[0], [1]])).tolist() == [0.5, 2.0]
        assert (known.provenance["rows_without_spread"], known.provenance["rows_without_count"]) == (1, 1)
    with pytest.raises(TableError, match="is not for 'onnxruntime-cpu' on this machine"):
        table.check_target(load_target())


def test_a_block_without_a_row_is_named_with_the_nearest() -> None:
    rows = {block_key(layer(2)): ForeignRow(0.5)}
    match = (
        r"no row for 1 block; the first is 'Linear\(in_features=4,out_features=4\)'; the nearest row is 'Lin"
    )
    with pytest.raises(MissingRowError, match=match):
        latency_table(rows, PHONE, source="made up", device={}).cost(SPACE)


def test_figures_that_a_row_lacks_are_those_of_a_normal_distribution() -> None:
    """Against our own summary of normal samples; the interval of a median of 4,001 has about 3 % noise."""
    samples = np.random.default_rng(0).normal(100, 2, size=4001).tolist()
    expected = summarize(samples)
    row = ForeignRow(expected.median_ms, expected.spread_ms, expected.count).measurement()
    assert row.p95_ms == pytest.approx(expected.p95_ms, abs=0.2)
    assert row.high_ms - row.low_ms == pytest.approx(expected.high_ms - expected.low_ms, rel=0.25)
    assert row.low_ms + row.high_ms == pytest.approx(2 * row.median_ms)
    assert ForeignRow(0.1, 100.0, 1).measurement().low_ms == 0


def test_a_row_of_a_time_alone_has_no_spread() -> None:
    row = ForeignRow(2.0).measurement()
    assert (row.low_ms, row.median_ms, row.high_ms, row.p95_ms) == (2.0, 2.0, 2.0, 2.0)
    assert (row.spread_ms, row.count) == (0.0, 1)


def test_independent_parts_add_their_variances() -> None:
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, 4.0, 5)]) == ForeignRow(3, 5.0, 5)
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, None, 5)]) == ForeignRow(3, None, 5)
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, 4.0)]) == ForeignRow(3, 5.0, None)
