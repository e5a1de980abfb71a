"""`autocompress table ...`, and `profile` without a recipe: what they print, write and refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import small_payload, small_space
from typer.testing import CliRunner, Result

from autocompress import cli
from autocompress.errors import AutocompressError, PluginError, RecipeError, TableError
from autocompress.latency.plan import distinct_blocks
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import load_target

ARGUMENTS = small_payload()["space"]["arguments"]
FEW_ROUNDS = ("profile.networks=8", "profile.min_rounds=2", "profile.max_rounds=2")


def call(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, AutocompressError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def changes(*more: str) -> list[str]:
    said = [f"space.arguments.{key}={json.dumps(value)}" for key, value in ARGUMENTS.items()]
    return [word for change in (*said, *FEW_ROUNDS, *more) for word in ("--set", change)]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was profiled by options only."""
    run = tmp_path_factory.mktemp("table") / "run"
    call("profile", "--space", "mobilenet_v3", "--target", "onnxruntime-cpu", *changes(), "--run", run)
    return run


def test_a_table_is_measured_without_a_recipe(profiled: Path) -> None:
    table = LatencyTable.load(profiled / "latency_table.json")
    table.check_target(load_target())
    assert (table.cost(small_space()).of(small_space().smallest()) > 0).all()
    assert yaml.safe_load((profiled / "recipe.yaml").read_text())["space"]["name"] == "mobilenet_v3"


def test_show_says_what_a_table_holds_and_how_far_it_can_be_trusted(profiled: Path) -> None:
    table = LatencyTable.load(profiled / "latency_table.json")
    said = call("table", "show", profiled / "latency_table.json").stdout
    assert f"latency table: {len(table.rows)} rows" in said
    assert "target: onnxruntime-cpu: onnxruntime, cpu, float32, 1 threads, batch 1" in said
    assert table.error_report is not None
    for form in table.error_report.forms:
        assert f"priced by {table.granularity}, {form}: bias" in said


def test_show_names_rows_of_unknown_operations_and_tables_without_rows(
    profiled: Path, tmp_path: Path
) -> None:
    content = json.loads((profiled / "latency_table.json").read_text())
    rows = content["rows"]
    odd = {**content, "rows": {"warp(a=1)": next(iter(rows.values()))}, "error_report": None}
    odd["correction"] = {**content["correction"], "form": "raw", "scale": 1.0}
    odd["correction"] |= {"per_row_ms": 0.0, "constant_ms": 0.0, "per_element_ms": 0.0}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(odd))
    assert (
        "1 rows are not of operations that autocompress knows, such as 'warp(a=1)'"
        in call("table", "show", path).stdout
    )
    path.write_text(json.dumps({**odd, "rows": {}}))
    assert "no rows, it prices nothing" in call("table", "show", path).stdout


def test_a_table_gets_the_rows_it_lacks(profiled: Path, tmp_path: Path) -> None:
    """The wider space has every block of the small one; only its others are measured."""
    old = LatencyTable.load(profiled / "latency_table.json")
    wider = json.dumps([2, 3, 6])
    call(
        "profile", "--space", "mobilenet_v3", *changes(f"space.arguments.expands={wider}"),
        "--table", profiled / "latency_table.json", "--run", tmp_path / "run",
    )  # fmt: skip
    new = LatencyTable.load(tmp_path / "run" / "latency_table.json")
    assert all(new.rows[key] == row for key, row in old.rows.items())
    assert len(new.rows) > len(old.rows)


def test_check_measures_networks_and_writes_json_and_plot(profiled: Path) -> None:
    said = call("table", "check", "--run", profiled, "--networks", "6").stdout
    assert "predictions: 6 networks, bias" in said
    assert said.count("worst: ") == 5
    assert len(json.loads((profiled / "latency_check.json").read_text())["networks"]) == 6
    assert (profiled / "latency_check.svg").exists()


def test_steps_of_a_table_are_its_own_and_widths_are_rounded_to_them(tmp_path: Path) -> None:
    """A made-up device that computes 8 channels at once."""
    rows = [
        f'"Conv2d(in_channels=64,out_channels={width},height=8,width=8)",{1 + (width + 7) // 8}'
        for width in range(8, 73, 2)
    ]
    source = tmp_path / "device.csv"
    source.write_text("\n".join(["key,median_ms", *rows, ""]))
    call("table", "import", source, "--format", "csv", "--device", "toy", "--output", tmp_path / "t.json")
    said = call("table", "steps", tmp_path / "t.json", "--round", "10,24,60,63").stdout
    assert "out channels in steps of 8" in said
    assert "rounded to steps of 8, never wider than 63: 16,24,63" in said


def test_a_table_without_lines_of_widths_says_what_to_do(profiled: Path) -> None:
    with pytest.raises(RecipeError, match="no operation at 8 widths or more"):
        call("table", "steps", profiled / "latency_table.json")


@pytest.mark.parametrize("widths", ["a,b", "0,8"])
def test_wrong_widths_are_refused(tmp_path: Path, widths: str) -> None:
    test_steps_of_a_table_are_its_own_and_widths_are_rounded_to_them(tmp_path)
    with pytest.raises(RecipeError, match="--round takes channel counts"):
        call("table", "steps", tmp_path / "t.json", "--round", widths)


def test_an_imported_table_prices_a_space_and_is_refused_for_this_machine(tmp_path: Path) -> None:
    blocks = distinct_blocks(small_space())
    source = tmp_path / "device.csv"
    source.write_text(
        "".join(["key,median_us\n", *(f'"{key}",{1000 * (2 + i)}\n' for i, key in enumerate(blocks))])
    )
    said = call(
        "table", "import", source, "--format", "csv", "--device", "Samsung Note10", "--threads", "4",
        "--output", tmp_path / "phone.json",
    ).stdout  # fmt: skip
    assert f"latency table: {len(blocks)} rows, not checked against whole networks" in said
    table = LatencyTable.load(tmp_path / "phone.json")
    assert (table.target.threads, table.provenance["device"]) == (4, {"name": "Samsung Note10"})
    prices = dict(zip(blocks, range(2, 2 + len(blocks)), strict=True))
    row = small_space().largest()
    expected = sum(prices[" > ".join(op.key for op in ops)] for _, ops in small_space().operations(row))
    np.testing.assert_allclose(table.cost(small_space()).of(row), expected)
    with pytest.raises(TableError, match="device is"):
        table.check_target(load_target())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["import", "x.csv", "--output", "o.json", "--format", "csv"], RecipeError, "--device says what"),
        (
            ["import", "x.jsonl", "--output", "o.json"],
            RecipeError,
            "--bundle device.zip belongs to --format bundle",
        ),
        (["show", "x.json"], TableError, "not found"),
        (["steps", "--target", "tensorrt"], PluginError, "only states capabilities"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call("table", *arguments)


def test_a_bundle_is_written_run_and_imported(profiled: Path, tmp_path: Path) -> None:
    """What a colleague does with two commands, on this machine."""
    import subprocess
    import sys

    bundle = tmp_path / "device.zip"
    rounds = ("profile.min_rounds=6", "profile.max_rounds=6")
    said = call("profile", "--space", "mobilenet_v3", *changes(*rounds), "--bundle", bundle).stdout
    assert "autocompress table import" in said
    done = subprocess.run(
        [sys.executable, "-I", str(bundle), "--output", str(tmp_path / "samples.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    call(
        "table", "import", tmp_path / "samples.jsonl", "--bundle", bundle, "--output", tmp_path / "table.json"
    )
    table = LatencyTable.load(tmp_path / "table.json")
    assert table.rows.keys() == LatencyTable.load(profiled / "latency_table.json").rows.keys()
    assert table.error_report is not None
