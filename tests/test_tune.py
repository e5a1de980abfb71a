"""`autocompress tune`: from a recipe to a compared and exported network; kills, other recipes, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from policy.test_trial import recipe
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.errors import RecipeError

__all__ = ["recipe"]


def call(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_dry_run_says_what_may_be_chosen_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    said = call("tune", recipe, "--run", tmp_path / "run", "--dry-run")
    assert "12 policies:" in said
    assert "0.prune.ratio: 0.0, 0.4" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_policies_are_tuned_compared_and_the_best_is_exported(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--trials", "4", "--set", "tune.strategy=random", "--set", "tune.random_policies=1")
    said = call("tune", recipe, "--run", folder, *options)
    assert "as you brought it" in said
    report = json.loads((folder / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == ["as you brought it", "tuned", "random 1"]
    for row in report["rows"][1:]:
        assert all(row["costs"][metric] <= limit for metric, limit in report["limits"].items())
    tuned = report["rows"][1]
    result = json.loads((folder / "result.json").read_text())
    scores = [t["metrics"]["accuracy"] for t in result["trials"] if t["metrics"]]
    assert tuned["validation"]["mean"] == pytest.approx(max(scores))
    manifest = json.loads((folder / "best" / "manifest.json").read_text())
    assert manifest["extra"]["policy"] == tuned["policy"]
    assert manifest["parity"].keys() == {"onnx", "torch_export"}
    # The same command reads what is there.
    ages = {path: path.stat().st_mtime_ns for path in folder.rglob("report.json")}
    call("tune", recipe, "--run", folder, *options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("report.json")} == ages
    with pytest.raises(RecipeError, match="holds a tuning by another recipe: tune differ"):
        call("tune", recipe, "--run", folder, *options, "--budget", "macs=70%")


@pytest.mark.slow
def test_a_tuning_that_was_killed_goes_on_and_tries_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = Path(sys.executable).with_name("autocompress")
    command = [str(program), "tune", str(recipe), "--run", str(folder)]
    command += ["--trials", "4", "--set", "tune.strategy=random", "--set", "tune.random_policies=1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("trials/*/report.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/report.json")}
    assert before
    time.sleep(10)  # what Ray had started sees that its driver is gone
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    assert (folder / "best" / "manifest.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_no_recipe_is_refused_at_once(recipe: Path, tmp_path: Path) -> None:
    payload = yaml.safe_load(recipe.read_text())
    del payload["passes"]
    recipe.write_text(yaml.safe_dump(payload))
    with pytest.raises(RecipeError, match="passes: Field required"):
        call("tune", recipe, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()
