"""`autocompress shrink` from the command line to a network that loads without autocompress."""

import inspect
import json
import runpy
from pathlib import Path

import pytest
import torch
from narrow_runs import write_model
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.commands.shrink import _alignment, _hint, account, shrink_recipe
from autocompress.errors import ConversionError, InfeasibleBudgetError, RecipeError, SpaceError
from autocompress.plugins import load_strategy
from autocompress.prune.network import source_of
from autocompress.run import Run

QUICK = [
    "profile.networks=8",
    "profile.min_rounds=6",
    "profile.max_rounds=6",
    "profile.knots=3",
    "data.limit=300",
    "search.calibration_images=64",
    "random_networks=1",
    "threads=1",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, ["shrink", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_model_is_narrowed_finetuned_exported_and_loads_by_its_own_factory(
    model: Path, tmp_path: Path
) -> None:
    changes = [part for change in QUICK for part in ("--set", change)]
    folder = tmp_path / "run"
    weights = tmp_path / "weights.safetensors"
    before = weights.read_bytes()
    said = run(
        [f"{model}:make", "--weights", str(weights), "--budget", "flops=60%", "--epochs", "1"]
        + ["--run", str(folder), *changes]
    )
    assert "2 groups of channels can be narrowed, 20 units in all" in said
    assert "conv1: 8, together with conv2" in said
    assert "fc keeps 10 channels: it is an output of the model" in said
    assert weights.read_bytes() == before
    (exported,) = folder.glob("networks/*/exported")
    manifest = json.loads((exported / "manifest.json").read_text())
    assert set(manifest["parity"]) == {"onnx", "torch_export", "safetensors"}
    network: nn.Module = runpy.run_path(str(exported / "loader.py"))["load"](exported)
    assert type(network).__name__ == "Small"
    kept = network.conv1.out_channels
    assert kept < 8
    assert network.conv2.weight.shape == (kept, kept, 3, 3)
    assert network.conv3.in_channels == kept
    assert network.fc.in_features == network.conv3.out_channels
    opened = Run(folder)

    def macs(tied: int, last: int) -> int:
        return 9 * tied * 64 + 9 * tied * tied * 64 + tied * last * 64 + 10 * last

    assert macs(kept, network.fc.in_features) <= 0.6 * macs(8, 12)
    # The loader takes a model at hand as well.
    original = runpy.run_path(str(model))["make"]()
    again = runpy.run_path(str(exported / "loader.py"))["load"](exported, original)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), network(x))
    # Nothing is trained before the search: the weights came with the model.
    assert opened.recipe.train.epochs == 0


def test_a_dry_run_says_what_can_be_narrowed_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = run([f"{model}:make", "--run", str(folder), "--dry-run", "--ignore", "conv2"])
    assert "1 groups of channels can be narrowed, 12 units in all" in said
    assert "conv2 keeps 8 channels: it is on the list of those to ignore" in said
    assert not folder.exists()


def recipe(model: str, **changes: object) -> object:
    given = {
        "weights": None,
        "data": "digits",
        "target": "onnxruntime-cpu",
        "budget": None,
        "tolerance": None,
        "minimise": "latency",
        "align": 1,
        "strategy": "peel",
        "importance": "l2",
        "ignore": [],
        "epochs": 1,
        "changes": None,
        **changes,
    }
    return shrink_recipe(model, **given)  # type: ignore[arg-type]


def test_budgets_may_use_the_words_of_the_field() -> None:
    made = recipe("a.py:b", budget="latency=60%, flops=1M,params=50%")
    assert made.search.budget == {"latency_ms": "60%", "macs": "1M", "params": "50%"}  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"--budget takes metric=limit, such as latency=60%.*got '60%'"):
        recipe("a.py:b", budget="60%")
    with pytest.raises(RecipeError, match=r"--budget takes metric=limit.*got ''"):
        recipe("a.py:b", budget="")
    with pytest.raises(RecipeError, match=r"--budget limits macs twice, to 50% and 1M"):
        recipe("a.py:b", budget="flops=50%,macs=1M")


def test_a_tolerance_takes_the_place_of_the_budget_or_stands_beside_one() -> None:
    made = recipe("a.py:b", tolerance=1.5, minimise="flops")
    assert made.tolerance.model_dump() == {"drop": 0.015, "metric": "macs", "probes": 6}  # type: ignore[attr-defined]
    assert made.search.budget == {"macs": "100%"}  # type: ignore[attr-defined]
    made = recipe("a.py:b", tolerance=1.5, budget="params=50%")
    assert made.tolerance.metric == "latency_ms"  # type: ignore[attr-defined]
    assert made.search.budget == {"params": "50%"}  # type: ignore[attr-defined]
    assert recipe("a.py:b").search.budget == {"latency_ms": "60%"}  # type: ignore[attr-defined]
    for wrong in (-1, 0, 100, float("nan")):
        with pytest.raises(
            RecipeError, match=rf"--tolerance takes points above 0 and below 100.*, got {wrong:g}"
        ):
            recipe("a.py:b", tolerance=wrong)
    with pytest.raises(RecipeError, match=r"--minimise takes one of latency, flops, .*, got 'speed'"):
        recipe("a.py:b", tolerance=1, minimise="speed")
    with pytest.raises(RecipeError, match=r"--minimise flops belongs to --tolerance"):
        recipe("a.py:b", budget="flops=50%", minimise="flops")


def test_an_agent_may_look_at_as_many_networks_as_it_plans_for() -> None:
    planned = inspect.signature(load_strategy("amc")).parameters["episodes"].default
    assert recipe("a.py:b", strategy="amc").search.evaluations == planned  # type: ignore[attr-defined]
    assert recipe("a.py:b", strategy="evolution").search.evaluations == 100  # type: ignore[attr-defined]


def test_a_limit_that_nothing_fits_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path
) -> None:
    for dry in (["--dry-run"], []):
        with pytest.raises(InfeasibleBudgetError, match="reachable minimum"):
            run([f"{model}:make", "--budget", "flops=1%", "--run", str(tmp_path / "run"), *dry])
    assert not (tmp_path / "run" / "latency_samples.jsonl").exists()


def test_an_alignment_that_leaves_nothing_to_choose_is_refused(model: Path) -> None:
    with pytest.raises(SpaceError, match=r"no group of Small has more than its full width with align 64"):
        run([f"{model}:make", "--align", "64", "--dry-run"])


def test_budgets_that_promise_no_speed_are_hinted_at() -> None:
    hint = "a network with fewer MACs need not be faster"
    for changes in ({"budget": "flops=50%"}, {"tolerance": 1.0, "minimise": "params"}):
        assert hint in _hint(recipe("a.py:b", **changes))[0]  # type: ignore[arg-type]
        assert not _hint(recipe("a.py:b", align=8, **changes))  # type: ignore[arg-type]
    for changes in ({"budget": "latency=50%"}, {"tolerance": 1.0}, {"budget": "flops=1M,latency=1ms"}):
        assert not _hint(recipe("a.py:b", **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "-8", "eight", "8.5"])
def test_an_alignment_is_a_number_or_the_target(model: Path, text: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"--align takes a number of channels >= 1, or target, got '{text}'"
    ):
        run([f"{model}:make", "--dry-run", "--align", text])


def test_the_target_says_the_alignment_once_a_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def steps(staircases: object) -> dict[str, int]:
        asked.append(staircases)
        return {"in": 2, "out": 4}

    monkeypatch.setattr("autocompress.latency.steps.probe_steps", lambda *_, **__: {})
    monkeypatch.setattr("autocompress.latency.steps.steps_of", steps)
    folder = tmp_path / "run"
    assert _alignment("target", "onnxruntime-cpu", folder, measured=True) == 4
    Run(folder, recipe(f"{model}:make", align=4))  # type: ignore[arg-type]
    assert _alignment("target", "onnxruntime-cpu", folder, measured=True) == 4
    assert len(asked) == 1


def test_a_strategy_by_gradients_trains_even_what_was_trained() -> None:
    assert recipe("a.py:b", weights=Path("w.pt"), strategy="dmcp").train.epochs > 0  # type: ignore[attr-defined]


def test_without_weights_the_network_is_trained_first() -> None:
    assert recipe("a.py:b").train.epochs > 0  # type: ignore[attr-defined]
    assert recipe("a.py:b", weights=Path("w.pt")).train.epochs == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:make", "there is no file .*missing.py"),
        ("{model}:absent", "has no 'absent' to call"),
        ("{model}:no_model", "must return a torch.nn.Module, got int"),
        ("nothing", "a model is file.py:factory or module:factory, got 'nothing'"),
        ("no.such.module:make", "no.such.module cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(model: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        run([name.format(model=model), "--dry-run"])


def test_weights_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match=r"does not hold the weights of .*:make"):
        run([f"{model}:make", "--weights", str(tmp_path / "other.safetensors"), "--dry-run"])


def test_only_a_space_of_channels_has_an_account(model: Path) -> None:
    from search_spaces.mobilenet_v3 import mobilenet_v3

    with pytest.raises(ConversionError, match="does not narrow a model"):
        account(mobilenet_v3(preset="tiny"))
    with pytest.raises(ConversionError, match="does not narrow a model"):
        source_of(mobilenet_v3(preset="tiny"))
