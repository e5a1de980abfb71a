"""Tables are read strictly, price as their formula says, and refuse what they do not know."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.errors import MissingRowError, StorageError, TableError
from autocompress.latency.correction import Checks, Correction, assess
from autocompress.latency.measure import Measurement
from autocompress.latency.plan import distinct_blocks
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import describe_device, load_target
from autocompress.ops import block_key
from autocompress.space import SearchSpace


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    """Row number k has a median of 2^k ms."""
    rows = {
        key: Measurement(2.0**number, 1.9**number, 2.1**number, 0.1, 3.0**number, 20 + number)
        for number, key in enumerate(distinct_blocks(space))
    }
    sums = np.arange(10.0, 20.0)
    checks = Checks(sums, np.full(10, 4.0), 0.5 * sums + 1 + np.sin(sums), 1.0)
    _, report = assess(checks, [[1.0, 1.1]] * 10, drift_percent=2.5, unstable_rows=1)
    correction = Correction("affine_per_row", 0.5, -0.25, 1.0)
    provenance = {"device": describe_device(), "measured": "2026-01-01T00:00:00+00:00"}
    return LatencyTable(load_target(), rows, correction, report, provenance)


def test_a_table_is_read_as_it_was_written(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    bare = replace(table, error_report=None)
    bare.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == bare


def test_a_block_costs_scale_times_median_plus_the_term_of_a_block(
    table: LatencyTable, space: SearchSpace
) -> None:
    for number, ops in enumerate(distinct_blocks(space).values()):
        assert table.price(ops) == 0.5 * 2.0**number - 0.25


def test_a_network_costs_the_sum_of_its_blocks_and_the_constant(
    table: LatencyTable, space: SearchSpace
) -> None:
    codes = np.unique(space.sample(500, np.random.default_rng(0)), axis=0)
    assert len(codes) == space.size == 18
    cost = table.cost(space)
    assert cost.metric == "latency_ms"
    for row, value in zip(codes, cost.of(codes), strict=True):
        keys = [block_key(ops) for _, ops in space.operations(row)]
        expected = 0.5 * sum(table.rows[key].median_ms for key in keys) - 0.25 * len(keys) + 1.0
        assert value == pytest.approx(expected)


def test_missing_rows_are_counted_and_the_first_is_named_with_its_nearest(
    table: LatencyTable, space: SearchSpace
) -> None:
    keys = list(distinct_blocks(space))
    first = next(key for key in keys if "kernel=5" in key)
    missing = [first, next(key for key in keys if "Linear" in key)]
    partial = replace(table, rows={key: row for key, row in table.rows.items() if key not in missing})
    with pytest.raises(MissingRowError) as caught:
        partial.cost(space)
    message = str(caught.value)
    assert f"no row for {len(missing)} blocks" in message
    assert f"the first is {first!r}" in message
    # The bodies differ in the kernel only; stems and head are further.
    assert f"the nearest row is {first.replace('kernel=5', 'kernel=3')!r}" in message
    assert "autocompress profile" in message
    with pytest.raises(MissingRowError, match="no row for 1 block;"):
        partial.price(distinct_blocks(space)[first])


def test_an_empty_table_still_says_what_is_missing(table: LatencyTable, space: SearchSpace) -> None:
    with pytest.raises(MissingRowError, match=r"no row for 6 blocks.*nearest row is None"):
        replace(table, rows={}).cost(space)


def test_a_table_is_for_its_own_target(table: LatencyTable) -> None:
    table.check_target(load_target())


@pytest.mark.parametrize(
    ("name", "threads", "batch", "match"),
    [
        ("pytorch-cpu", 1, 1, "runtime is onnxruntime, not pytorch"),
        ("onnxruntime-cpu", 2, 1, "threads is 1, not 2"),
        ("onnxruntime-cpu", 1, 8, "batch is 1, not 8"),
    ],
)
def test_a_table_of_another_target_is_refused(
    table: LatencyTable, name: str, threads: int, batch: int, match: str
) -> None:
    with pytest.raises(TableError, match=match):
        table.check_target(load_target(name, threads=threads, batch=batch))


def test_a_table_of_another_machine_is_refused(table: LatencyTable) -> None:
    with pytest.raises(TableError, match=r"device is .*not .*Z80"):
        table.check_target(load_target(), device={"cpu": "Z80", "cores": 1, "architecture": "z80"})


Change = Callable[[dict[str, Any]], None]


def put(*path: Any) -> Change:
    """Return a change that sets the value at a path; the last argument is the value."""

    def change(payload: dict[str, Any]) -> None:
        *steps, name, value = path
        for step in steps:
            payload = payload[next(iter(payload)) if step == "*" else step]
        payload[name] = value

    return change


def drop(*path: str) -> Change:
    def change(payload: dict[str, Any]) -> None:
        *steps, name = path
        for step in steps:
            payload = payload[step]
        del payload[name]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("schema", "other"), "schema must be 'autocompress.latency_table', got 'other'"),
        (put("version", 1), "version must be 2, got 1"),
        (put("version", True), "version must be 2, got True"),
        (put("unit", "s"), "unit must be 'ms', got 's'"),
        (drop("unit"), "unit is missing"),
        (put("surprise", 1), "surprise is not known; allowed: schema"),
        (put("rows", []), r"rows must be a JSON object, got \[\]"),
        (put("rows", "*", "median_ms", -1.0), r"rows\.Conv2d.*\.median_ms must be at least 0, got -1"),
        (put("rows", "*", "median_ms", math.nan), r"a number must be finite, got NaN"),
        (put("rows", "*", "p95_ms", math.inf), r"a number must be finite, got Infinity"),
        (put("rows", "*", "spread_ms", "0.1"), r"spread_ms must be a finite number, got '0.1'"),
        (put("rows", "*", "count", 0), r"count must be an integer >= 1, got 0"),
        (put("rows", "*", "count", 1.5), r"count must be an integer >= 1, got 1.5"),
        (put("rows", "*", "mean_ms", 1.0), r"mean_ms is not known"),
        (put("target", "runtime", []), r"target.runtime must be a text"),
        (put("target", "threads", 0), "target.threads must be an integer >= 1"),
        (drop("target", "batch"), "target.batch is missing"),
        (drop("provenance", "device"), "provenance.device must be a JSON object"),
        (put("correction", "form", "cubic"), "correction.form must be 'raw' or 'scale'"),
        (put("correction", "scale", -0.1), "correction.scale must be at least 0"),
        (put("correction", "per_row_ms", -0.6), "correction must be such that no row gets a negative"),
        (put("correction", "constant_ms", None), "correction.constant_ms must be a finite number, got None"),
        (put("error_report", "method", "in sample"), "error_report.method must be 'leave-one-out'"),
        (put("error_report", "forms", "cubic", {}), "forms.cubic must be 'raw' or 'scale'"),
        (
            put("error_report", "forms", "raw", "mape_percent", -1),
            r"forms\.raw\.mape_percent must be at least",
        ),
        (put("error_report", "networks", 0, "rows", 0), r"networks\[0\]\.rows must be an integer >= 1"),
        (put("error_report", "learning_curve", 0, [5]), r"learning_curve\[0\] must be a pair"),
    ],
)
def test_a_damaged_table_is_refused_with_the_path_of_the_key(
    table: LatencyTable, tmp_path: Path, change: Change, match: str
) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    payload = json.loads(path.read_text())
    change(payload)
    path.write_text(json.dumps(payload))
    with pytest.raises(TableError, match=match):
        LatencyTable.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"table"', "\xff\xfe"])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=r"latency table .*table\.json"):
        LatencyTable.load(path)


def test_an_absent_table_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"latency table .*: not found"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_cut_at_any_byte_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    text = path.read_bytes()
    for end in range(0, len(text) - 2, 97):
        path.write_bytes(text[:end])
        with pytest.raises(TableError):
            LatencyTable.load(path)


def test_a_table_that_cannot_be_written_leaves_nothing(table: LatencyTable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot write"):
        table.save(tmp_path / "file" / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_key_that_stands_twice_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    text = path.read_text().replace('"unit": "ms",', '"unit": "ms", "unit": "ms",', 1)
    path.write_text(text)
    with pytest.raises(TableError, match="'unit' stands twice"):
        LatencyTable.load(path)


def test_a_file_of_two_gigabytes_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: it takes no space on the disk
    with pytest.raises(TableError, match="2147483648 bytes"):
        LatencyTable.load(path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_table_with_any_value_anywhere_is_a_table_or_an_error_of_ours(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, data: st.DataObject
) -> None:
    payload = json.loads(json.dumps(table.to_json()))
    place: Any = payload
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(ANYTHING)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(payload))
    try:
        found = LatencyTable.load(path)
        found.cost(space)
    except TableError:
        return
    assert isinstance(found, LatencyTable)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(TableError):
        LatencyTable.load(path)
