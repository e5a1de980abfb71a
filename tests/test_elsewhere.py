"""A search under the latencies of another device: its table is taken as it is, nothing is measured here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_payload, small_recipe, small_space, table_by_hand

from autocompress import forecast, stages
from autocompress.errors import MissingRowError, RecipeError, TableError
from autocompress.latency import check
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target
from autocompress.recipe import parse_recipe
from autocompress.report import comparison
from autocompress.report.comparison import report
from autocompress.report.show import markdown
from autocompress.run import Run, Shown

PHONE = Target("phone", "", 4, 1, device="other")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = replace(table_by_hand(small_space(), PHONE), provenance={"device": {"model": "a phone"}})
    table.save(tmp_path / "phone.json")
    return tmp_path / "phone.json"


def opened(folder: Path, path: Path, **more: Any) -> Run:
    profile = {"table": str(path), "measured": "elsewhere"}
    return Run(folder, small_recipe(profile=profile, search={"budget": {"latency_ms": "90%"}}, **more))


def test_a_whole_run_holds_the_budget_of_the_other_device_and_measures_nothing(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("measured here")

    monkeypatch.setattr(check, "measure_networks", refuse)
    monkeypatch.setattr(comparison, "peak_memory_bytes", refuse)
    said: list[str] = []
    run = opened(tmp_path / "run", path)
    content = report(run, Shown(say=said.append))
    table = LatencyTable.load(path)
    cost = table.cost(small_space())
    limit = 0.9 * float(cost.of(small_space().largest())[0])
    assert content["limits"]["latency_ms"] == pytest.approx(limit)
    for row in content["rows"]:
        assert row["latency_ms"] is None
        assert row["peak_memory_bytes"] is None
        if row["name"] != "largest":
            assert row["costs"]["latency_ms"] <= limit * (1 + 1e-9)
    assert any("of another device: nothing is measured here" in line for line in said)
    assert "where nothing was measured: run the exported network.onnx there" in markdown(content)
    # Resumed, the copy in the run is what counts.
    path.unlink()
    assert report(Run(run.folder, None), Shown()) == json.loads(json.dumps(content))


def test_without_saying_so_the_table_of_another_device_is_refused(tmp_path: Path, path: Path) -> None:
    run = Run(tmp_path / "run", small_recipe(profile={"table": str(path)}))
    with pytest.raises(TableError, match="is not for 'onnxruntime-cpu' on this machine"):
        stages.profile(run, Shown())


def test_a_row_that_is_missing_is_an_error_before_anything_takes_long(tmp_path: Path, path: Path) -> None:
    table = LatencyTable.load(path)
    first = next(iter(table.rows))
    replace(table, rows={key: row for key, row in table.rows.items() if key != first}).save(path)
    with pytest.raises(MissingRowError, match="no row for 1 block"):
        stages.profile(opened(tmp_path / "run", path), Shown())


def test_elsewhere_needs_a_table() -> None:
    with pytest.raises(RecipeError, match="elsewhere needs table"):
        parse_recipe(small_payload(profile={"measured": "elsewhere"}))


def test_the_forecast_has_no_time_for_a_profile(path: Path) -> None:
    profile = {"table": str(path), "measured": "elsewhere"}
    lines = forecast.forecast(small_recipe(profile=profile))
    assert any("profile" in line and "0 min 00 s" in line for line in lines)
