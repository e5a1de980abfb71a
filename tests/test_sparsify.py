"""`autocompress sparsify` from the command line: files, resuming after SIGKILL, and then `shrink`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_runs import MODEL, write_model
from safetensors.torch import load_file, save_file
from sparsify.works import small
from torch import nn
from typer.testing import CliRunner

from autocompress.budget import Budget
from autocompress.cli import app
from autocompress.commands.sparsify import sparsify_recipe
from autocompress.cost import operation_cost
from autocompress.errors import ConversionError, RecipeError, StorageError
from autocompress.prune.load import load_model
from autocompress.prune.network import source_of
from autocompress.run import Shown
from autocompress.sparse.recipe import SparsifyRecipe
from autocompress.sparse.run import sparsify_folder
from search_spaces.channels import channels
from strategies.importance import Importance

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["data.limit=240", "train.batch_size=32", "train.precision=fp32", "train.memory_format=contiguous"]
CHANGES = [part for change in QUICK for part in ("--set", change)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def call(model: Path, out: Path, *options: Any) -> str:
    weights = model.with_name("weights.safetensors")
    arguments = [f"{model}:make", "--weights", weights, "--out", out, "--epochs", 2, *CHANGES, *options]
    result = CliRunner().invoke(app, ["sparsify", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_weights_under_the_models_own_names_and_a_report_are_written(model: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", tmp_path / "weights.safetensors"
    before = weights.read_bytes(), model.read_bytes()
    said = call(model, out, "--method", "soft", "--set", "options.rate=0.5")
    assert (weights.read_bytes(), model.read_bytes()) == before
    assert "conv1: 4 of 8 units are zero" in said
    assert said.splitlines()[-1] == f"written to {out / 'weights.safetensors'}"
    assert load_file(out / "weights.safetensors").keys() == load_file(weights).keys()
    load_model(f"{model}:make", {}, out / "weights.safetensors")
    report = json.loads((out / "sparsify.json").read_text())
    assert (report["method"], report["settings"]["options"]) == ("soft", {"rate": 0.5})
    assert report["validation"]["before"]["count"] == report["validation"]["after"]["count"] == 48
    assert [group["zero"] for group in report["groups"]] == [4, 6]
    assert f"{report['validation']['after']['mean']:.4f} after" in said


def test_the_same_call_again_does_nothing_and_another_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = call(model, out, "--method", "soft")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert call(model, out, "--method", "soft") == said
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    other = r'holds another sparse training: there "rate": 0\.3; here "rate": 0\.4; choose'
    with pytest.raises(RecipeError, match=other):
        call(model, out, "--method", "soft", "--set", "options.rate=0.4")
    with pytest.raises(RecipeError, match=r"holds another sparse training: .*choose another --out"):
        call(model, out)
    save_file(load_file(out / "weights.safetensors"), tmp_path / "weights.safetensors")
    with pytest.raises(RecipeError, match='holds another sparse training: there "weights": "'):
        call(model, out, "--method", "soft")
    (out / "settings.json").write_text("[]")
    with pytest.raises(StorageError, match=r"settings .*settings.json are damaged"):
        call(model, out, "--method", "soft")
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="--out needs a directory"):
        call(model, tmp_path / "file")


def recipe_of(model: Path) -> SparsifyRecipe:
    return sparsify_recipe(
        f"{model}:make",
        weights=model.with_name("weights.safetensors"),
        data="digits",
        method="play-and-prune",
        epochs=3,
        tolerance=50.0,
        ignore=[],
        changes=[*QUICK, "threads=1", "options.alpha=30"],
    )


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from test_sparsify import recipe_of
from autocompress.run import Shown
from autocompress.sparse.run import sparsify_folder
from autocompress.training import loop

@contextmanager
def stage(title):
    def progress(done, total, note=""):
        if done == 8:  # inside the second of three epochs of six steps
            os.kill(os.getpid(), signal.SIGKILL)
    yield progress

loop.CHECKPOINT_SECONDS = -1.0  # a checkpoint after each step
sparsify_folder(Path(sys.argv[2]), recipe_of(Path(sys.argv[1])), Shown(stage=stage))
"""


def test_a_run_that_was_killed_goes_on_and_ends_as_it_would_have(model: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    command = [sys.executable, "-c", KILLED, str(model), str(killed)]
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    assert (killed / "checkpoint.pt").exists()
    assert not (killed / "weights.safetensors").exists()
    for folder in (killed, whole):
        sparsify_folder(folder, recipe_of(model), Shown())
    for name in ("weights.safetensors", "sparsify.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((whole / "sparsify.json").read_text())["zeros"] > 0


def test_shrink_then_removes_exactly_the_units_that_are_zero(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(model, out, "--method", "soft", "--set", "options.rate=0.4")
    weights = str(out / "weights.safetensors")
    space = channels(
        f"{model}:make", image=(1, 32, 32), classes=10, weights=weights, importance="l1", steps=1000
    )
    limits = Budget.parse("macs=100%").resolve(space, [operation_cost(space, "macs")])
    (found,) = space.decode(Importance(limits, seed=0, method="nonzero").ask(1))
    widths = tuple(int(found[choice.name]) for choice in space.choices)
    assert widths == (8 - 3, 12 - 4)
    source = source_of(space)
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    whole: nn.Module = load_model(f"{model}:make", {}, weights).eval()
    with torch.no_grad():
        torch.testing.assert_close(source.narrowed(widths)(x), whole(x), atol=1e-5, rtol=0)


def test_without_weights_a_network_is_trained_from_a_seed(model: Path, tmp_path: Path) -> None:
    arguments = [f"{model}:make", "--epochs", "1", *CHANGES]
    for out in ("one", "two"):
        result = CliRunner().invoke(app, ["sparsify", *arguments, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
    one, two = ((tmp_path / out / "weights.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--method", "lasso"], RecipeError, "there is no method 'lasso'; did you mean 's"),
        (
            ["--method", "play-and-prune", "--tolerance", "100"],
            RecipeError,
            "tolerance: .*less than 100",
        ),
        (["--tolerance", "1"], RecipeError, "method 'slimming' takes strength, not 'tolerance'"),
        (["--set", "train.rate=1"], RecipeError, "train.rate: unknown key; allowed here: .*learning_rate"),
        (["--set", "depth=1"], RecipeError, "depth: unknown key; allowed here: arguments, data, ignore"),
        (["--set", "train.epochs=0"], RecipeError, "train.epochs: .*greater than or equal to 1, got 0"),
        (["--ignore", "tail"], ConversionError, "ignore has 'tail', which is no layer"),
        (["--data", "digit"], Exception, "data must be one of digits"),
    ],
)
def test_wrong_options_are_refused(
    model: Path, tmp_path: Path, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(model, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "sparsify.json").exists()


def test_weights_that_do_not_fit_or_are_not_finite_or_absent_are_refused(model: Path, tmp_path: Path) -> None:
    state = load_file(tmp_path / "weights.safetensors")
    state["conv2.weight"][0] = torch.nan
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ConversionError, match=r"conv2.weight of Small holds nan or infinity"):
        call(model, tmp_path / "out")
    half = model.with_name(f"half_{model.name}")
    half.write_text(MODEL.replace("return Small(classes, in_channels)", "return Small().bfloat16()"))
    with pytest.raises(ConversionError, match=r"is of torch\.bfloat16, the image of torch\.float32"):
        CliRunner().invoke(app, ["sparsify", f"{half}:make"], catch_exceptions=False)
    save_file(small().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ConversionError, match=r"does not hold the weights of .*:make"):
        call(model, tmp_path / "out")
    result = CliRunner().invoke(app, ["sparsify", f"{model}:make", "--method", "play-and-prune"])
    assert isinstance(result.exception, RecipeError)
    assert "compares with trained weights: give them by --weights" in str(result.exception)


def test_paths_are_absolute_in_the_settings() -> None:
    recipe = sparsify_recipe(
        "a.py:b",
        weights=Path("w.safetensors"),
        data="cifar10=photos",
        method="slimming",
        epochs=3,
        tolerance=None,
        ignore=[],
        changes=["options.strength=1e-3"],
    )
    here = Path.cwd()
    assert (recipe.model, recipe.weights) == (f"{here / 'a.py'}:b", here / "w.safetensors")
    assert recipe.data.folder == here / "photos"
    assert (recipe.train.epochs, recipe.options) == (3, {"strength": "1e-3"})
