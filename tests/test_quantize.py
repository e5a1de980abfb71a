"""`autocompress quantize` from the command line to integers that ONNX Runtime runs."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from narrow_runs import write_model
from small_runs import small_payload, table_by_hand
from test_stages import assert_equal_runs, killed_runs
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.commands.quantize import quantize_recipe
from autocompress.errors import (
    BudgetError,
    InfeasibleBudgetError,
    PluginError,
    QuantizationError,
    RecipeError,
    TableError,
)
from autocompress.recipe import parse_recipe
from autocompress.run import Run, load_recipe_data, make_space

QUICK = [
    "profile.networks=8",
    "profile.min_rounds=6",
    "profile.max_rounds=6",
    "data.limit=300",
    "search.calibration_images=64",
    "random_networks=1",
    "threads=1",
]
BITFUSION = Path(__file__).parents[2] / "shared" / "data" / "tables" / "bitfusion_conv_latency_energy.csv.gz"
LOW_BIT = ["--target", "arm-cpu-low-bit"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def run(model: Path, arguments: list[str], folder: Path | None = None, *, trained: bool = True) -> str:
    weights = ["--weights", str(model.with_name("weights.safetensors"))] if trained else []
    given = [f"{model}:make", *weights, "--calibration", "64", "--epochs", "1", *arguments]
    changes = [part for change in QUICK for part in ("--set", change)]
    where = ["--run", str(folder)] if folder else []
    result = CliRunner().invoke(app, ["quantize", *given, *where, *changes])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def policy(folder: Path) -> list[dict[str, Any]]:
    (manifest,) = folder.glob("networks/*/exported/manifest.json")
    found: list[dict[str, Any]] = json.loads(manifest.read_text())["extra"]["bits"]
    return found


def test_a_model_is_measured_searched_finetuned_and_exported_as_integers(model: Path, tmp_path: Path) -> None:
    folder, weights = tmp_path / "run", model.with_name("weights.safetensors")
    before = weights.read_bytes()
    said = run(model, ["--budget", "size=60%"], folder)
    assert "4 layers can be quantized, at bits of weights/inputs 8/8, 32/32" in said
    assert "2 batch norms are folded" in said
    assert weights.read_bytes() == before
    (exported,) = folder.glob("networks/*/exported")
    manifest = json.loads((exported / "manifest.json").read_text())
    assert set(manifest["parity"]) == {"onnx", "torch_export"}
    assert manifest["parity"]["onnx"]["agreement"] >= 0.995
    assert "safetensors" in manifest["left_out"]
    stored = {entry["weight_bits"]: entry["weights_stored"] for entry in policy(folder)}
    assert stored[8] == "int8 in -127..127"
    nodes = [node.op_type for node in onnx.load(exported / "network.onnx").graph.node]
    quantized = sum(entry["weight_bits"] == 8 for entry in policy(folder))
    assert nodes.count("QuantizeLinear") >= quantized > 0
    costs = manifest["extra"]["predicted_costs"]
    opened = Run(folder)
    (cost,) = [c for c in _untimed(opened) if c.metric == "size_bytes"]
    assert costs["size_bytes"] <= 0.6 * float(cost.of(opened.space.largest())[0])
    assert list(folder.glob("networks/*/policy.svg"))
    (path,) = folder.glob("networks/*/report-*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["as you brought it"]["costs"] == pytest.approx(rows["largest"]["costs"])
    report = (folder / "report.md").read_text()
    assert "bits of weights, inputs (mean)" in report
    assert "as you brought it" in report
    assert "searched, finetuned" in report


def _untimed(opened: Run) -> list[Any]:
    from autocompress.stages import target, untimed_costs

    return list(untimed_costs(opened.space, target(opened)))


@pytest.mark.parametrize(
    "strategy",
    [
        "exact",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("hawq", "greedy", "haq", "evolution")),
    ],
)
def test_every_strategy_keeps_a_budget_of_a_device_that_is_not_here(
    model: Path, tmp_path: Path, strategy: str
) -> None:
    folder = tmp_path / "run"
    run(
        model,
        [*LOW_BIT, "--strategy", strategy, "--widths", "2,4,8", "--budget", "size=70%"]
        + ["--set", "search.evaluations=40"],
        folder,
    )
    bits = {(entry["weight_bits"], entry["input_bits"]) for entry in policy(folder)}
    assert bits <= {(2, 2), (4, 4), (8, 8)}
    opened = Run(folder)
    (cost,) = [c for c in _untimed(opened) if c.metric == "size_bytes"]
    (path,) = folder.glob("networks/*/report-*.json")
    report = json.loads(path.read_text())
    limit = 0.7 * float(cost.of(opened.space.largest())[0])
    assert report["limits"]["size_bytes"] == pytest.approx(limit)
    named = [row for row in report["rows"] if row["name"].startswith(("searched", "uniform", "random"))]
    assert all(row["costs"]["size_bytes"] <= limit for row in named)
    assert any(row["name"].startswith("uniform") for row in named)
    (brought,) = [row for row in report["rows"] if row["name"] == "as you brought it"]
    assert brought["costs"]["size_bytes"] == 4 * brought["costs"]["params"]
    assert "latency_ms" not in brought["costs"]


@pytest.mark.slow
def test_the_table_of_an_accelerator_prices_a_users_network(model: Path, tmp_path: Path) -> None:
    if not BITFUSION.exists():
        pytest.skip(f"needs {BITFUSION}, which is no part of the distribution")
    folder = tmp_path / "run"
    said = run(
        model,
        ["--target", "bitfusion", "--table", str(BITFUSION), "--budget", "latency=92%", "--widths", "2,4,8"],
        folder,
    )
    assert "rows are estimates by a model fitted to the published ones" in said
    assert "bits of each layer, over latency_ms" in said
    (path,) = folder.glob("networks/*/report-*.json")
    report = json.loads(path.read_text())
    (found,) = [row for row in report["rows"] if row["name"] == "searched, finetuned"]
    assert found["costs"]["latency_ms"] <= report["limits"]["latency_ms"]
    assert found["latency_ms"] is None


@pytest.mark.parametrize("rounding", [pytest.param("adaround", marks=pytest.mark.slow), "brecq"])
def test_rounding_is_learned_before_finetuning(model: Path, tmp_path: Path, rounding: str) -> None:
    folder = tmp_path / "run"
    said = run(
        model,
        [*LOW_BIT, "--rounding", rounding, "--widths", "4", "--budget", "size=100%"]
        + [
            "--set",
            "quantize.steps=20",
            "--set",
            "quantize.images=32",
            "--set",
            "quantize.biases=corrected",
        ],
        folder,
    )
    assert f"{rounding}: squared error of" in said
    assert "biases of 4 layers corrected" in said
    assert list(folder.glob("networks/*/rounded.safetensors"))


def test_a_dry_run_says_what_can_be_quantized_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    said = run(model, ["--dry-run"], tmp_path / "run")
    assert "4 layers can be quantized" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--widths", "3"], QuantizationError, "cannot run widths 3; it runs 8/8, 32/32"),
        (["--widths", "a"], RecipeError, "--widths takes bits such as 4,8"),
        (["--target", "pytorch-cpu"], QuantizationError, "states no way to quantize"),
        (["--target", "nothing"], PluginError, "no target 'nothing'"),
        (["--budget", "size=1%"], InfeasibleBudgetError, "the reachable minimum is size_bytes"),
        ([*LOW_BIT, "--budget", "latency=50%"], BudgetError, "nothing is known of the latency of target"),
        (["--widths", ""], RecipeError, "--widths takes bits such as 4,8"),
        (["--target", "tensorrt", "--table", "none.json"], RecipeError, "there is no file none.json"),
        (["--calibration", "0"], QuantizationError, "at least 1 image, got 0"),
        (["--rounding", "up"], RecipeError, "quantize.rounding"),
        (["--gradient", "up"], QuantizationError, "gradient must be one of"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    model: Path, tmp_path: Path, arguments: list[str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run(model, arguments, tmp_path / "run")
    assert not list(tmp_path.glob("run/networks"))


def test_random_weights_are_refused_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"random weights.*--weights"):
        run(model, [], tmp_path / "run", trained=False)
    assert not (tmp_path / "run" / "latency_table.json").exists()


def test_what_is_no_table_is_refused_by_a_dry_run(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({}, file)
    with pytest.raises(TableError, match=r"weights\.pt"):
        run(model, ["--target", "tensorrt", "--table", str(file), "--dry-run"])


@pytest.mark.slow
def test_a_budget_that_a_given_table_cannot_meet_is_refused_by_a_dry_run(model: Path) -> None:
    if not BITFUSION.exists():
        pytest.skip(f"needs {BITFUSION}, which is no part of the distribution")
    with pytest.raises(InfeasibleBudgetError, match="the reachable minimum is latency_ms"):
        run(
            model, ["--target", "bitfusion", "--table", str(BITFUSION), "--budget", "latency=1%", "--dry-run"]
        )


def test_fewer_images_than_asked_for_are_said(model: Path) -> None:
    said = run(model, ["--calibration", "100000", "--dry-run"])
    assert "training images: there are no 100000" in said


def test_a_strategy_of_another_name_is_no_strategy(model: Path) -> None:
    with pytest.raises(PluginError, match=r"no strategy .*; quantize also has exact, hawq"):
        run(model, ["--strategy", "best"])


def test_the_recipe_of_a_call_is_complete(model: Path) -> None:
    given: dict[str, Any] = {
        "weights": model.with_name("weights.safetensors"),
        "data": "digits",
        "target": "onnxruntime-cpu",
        "table": None,
        "budget": None,
        "widths": None,
        "calibration": 64,
        "gradient": "pact",
        "rounding": "nearest",
        "epochs": 2,
        "changes": None,
    }
    recipe = quantize_recipe(f"{model}:make", strategy="exact", **given)
    assert recipe.search.strategy == "sensitivity"
    assert recipe.search.budget == {"latency_ms": "50%"}
    assert recipe.space.arguments["gradient"] == "pact"
    hawq = quantize_recipe(f"{model}:make", strategy="hawq", **given)
    assert (hawq.search.strategy, hawq.search.options) == ("importance", {"method": "exact"})
    assert hawq.space.arguments["worth"] == "hawq"
    elsewhere = quantize_recipe(
        f"{model}:make", strategy="exact", **{**given, "table": model, "target": "tensorrt"}
    )
    assert elsewhere.profile.measured == "elsewhere"
    nowhere = quantize_recipe(f"{model}:make", strategy="exact", **{**given, "target": "arm-cpu-low-bit"})
    assert nowhere.profile.measured == "nowhere"
    assert nowhere.search.budget == {"size_bytes": "50%"}
    # Half of the size is out of reach where bits go from 8 to 16, or 4 to 8, and biases have 32.
    for target in ("hisilicon-nnie", "nvidia-int4"):
        wide = quantize_recipe(f"{model}:make", strategy="exact", **{**given, "target": target})
        assert wide.search.budget == {"size_bytes": "75%"}
    # A device of one width leaves nothing to save.
    single = quantize_recipe(f"{model}:make", strategy="exact", **{**given, "target": "tensorrt"})
    assert single.search.budget == {"size_bytes": "100%"}


def payload(model: Path, **changes: Any) -> dict[str, Any]:
    made = small_payload(**changes)
    made["space"] = {
        "name": "bits",
        "arguments": {
            "model": f"{model}:make",
            "weights": str(model.with_name("weights.safetensors")),
            "image": [1, 8, 8],
            "classes": 10,
            "calibration_images": 32,
        },
    }
    made["train"]["epochs"] = 0
    made["export"] = {"formats": ["onnx"]}
    return made


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    recipe = payload(
        model,
        search={"strategy": "evolution", "budget": {"size_bytes": "80%"}},
        quantize={"rounding": "adaround", "steps": 10, "images": 16},
    )
    parsed = parse_recipe(recipe)
    data = load_recipe_data(parsed)
    table = table_by_hand(make_space(parsed, lambda: data))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        table.save(tmp_path / name / "latency_table.json")
    moments = ["search by evolution:2", "rounded.safetensors<", "finetune with distillation:1", "exported<"]
    killed_runs(tmp_path, ("whole", "export", []), ("killed", "export", moments), recipe=recipe)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
