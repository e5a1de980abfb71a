"""`autocompress tune`: from a recipe to a compared and exported network; kills, other recipes, bad input."""

import contextlib
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
from autocompress.errors import AutocompressError, RecipeError
from autocompress.machine import cores

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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("weights=nope.pt", "nope.pt"),
        ("data.source=digit", "digit"),
        ("tune.workers=1000", "1000 workers of 1 threads need 1000 cores"),
        ("tune.strategy=tpee", "tpee"),
        ("tune.options.foo=1", "foo"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_is_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, change: str, text: str, dry: bool
) -> None:
    with pytest.raises(AutocompressError, match=text):
        call("tune", recipe, "--run", tmp_path / "run", "--set", change, *(["--dry-run"] if dry else []))
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}


@pytest.mark.slow
def test_policies_are_tuned_compared_and_the_best_is_exported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("run")  # relative, as people type it
    options = ("--trials", "4", "--set", "tune.strategy=random", "--set", "tune.random_policies=1")
    said = call("tune", recipe, "--run", folder, *options)
    assert "as you brought it" in said
    report = json.loads((folder / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == ["as you brought it", "tuned", "best single pass", "random policy 1"]
    for row in report["rows"][1:]:
        assert all(row["costs"][metric] <= limit for metric, limit in report["limits"].items())
    tuned = report["rows"][1]
    result = json.loads((folder / "result.json").read_text())
    scores = [t["metrics"]["accuracy"] for t in result["trials"] if t["metrics"]]
    assert tuned["validation"]["mean"] == pytest.approx(max(scores))
    manifest = json.loads((folder / "best" / "manifest.json").read_text())
    assert manifest["extra"]["policy"] == tuned["policy"]
    assert manifest["parity"].keys() >= {"onnx", "torch_export"}
    assert {*manifest["parity"], *manifest["left_out"]} == {"onnx", "torch_export", "safetensors"}
    # The same command reads what is there.
    ages = {path: path.stat().st_mtime_ns for path in folder.rglob("report.json")}
    call("tune", recipe, "--run", folder, *options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("report.json")} == ages
    with pytest.raises(RecipeError, match="holds a tuning by another recipe: tune differ"):
        call("tune", recipe, "--run", folder, *options, "--budget", "macs=70%")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_tuning_that_was_stopped_goes_on_and_tries_nothing_twice(
    recipe: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    folder = tmp_path / "run"
    program = Path(sys.executable).with_name("autocompress")
    command = [str(program), "tune", str(recipe), "--run", str(folder)]
    command += ["--trials", "4", "--set", "tune.strategy=random", "--set", "tune.random_policies=1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("trials/*/report.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, sent)
    # Ctrl-C once is enough: Ray would take what was tried so far for all.
    assert process.wait(120) == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert not (folder / "result.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/report.json")}
    assert before
    time.sleep(10)  # what Ray had started sees that its driver is gone
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    assert (folder / "best" / "manifest.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    result = json.loads((folder / "result.json").read_text())
    assert sum(bool(trial["metrics"]) for trial in result["trials"]) == 4


def working(driver: int) -> dict[int, bytes]:
    """The processes in which the Ray of a driver runs trials, with the names that Ray gives them."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            names[pid] = (folder / "cmdline").read_bytes()
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, added = set(), {driver}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added}
        found |= added
    others = (b"ray::IDLE", b"Agent")  # spare workers; Ray's own of the machine
    return {
        pid: names[pid]
        for pid in sorted(found)
        if names.get(pid, b"").startswith(b"ray::") and not any(o in names[pid] for o in others)
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_loses_no_policy(recipe: Path, tmp_path: Path, workers: int) -> None:
    if workers > cores():
        pytest.skip(f"{workers} workers need as many cores")
    folder = tmp_path / "run"
    program = Path(sys.executable).with_name("autocompress")
    command = [str(program), "tune", str(recipe), "--run", str(folder), "--workers", str(workers)]
    # Without early stopping each policy has its report.
    for change in ("strategy=random", "trials=5", "random_policies=1", "grace_epochs=2"):
        command += ["--set", f"tune.{change}"]

    def begun() -> set[str]:
        return {path.name for path in folder.glob("trials/*")}

    def done() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/report.json")}

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while not (done() and begun() - {path.parent.name for path in done()}):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            before, victims = done(), working(process.pid)
            assert 1 <= len(victims) <= workers, victims
            os.kill(min(victims), signal.SIGKILL)
            assert process.wait(600) == 0
        finally:
            process.kill()
    assert {path: done()[path] for path in before} == before
    result = json.loads((folder / "result.json").read_text())
    # Two at a time there is a random policy where the strategy has to be told first: it may come again.
    finetuned = [trial for trial in result["trials"] if trial["metrics"]]
    assert len(finetuned) in ((5,) if workers == 1 else (4, 5))
    assert not any("error" in json.loads(path.read_text()) for path in done())
    assert len(begun()) == len(done())
    assert (folder / "best" / "manifest.json").exists()


def test_what_is_no_recipe_is_refused_at_once(recipe: Path, tmp_path: Path) -> None:
    payload = yaml.safe_load(recipe.read_text())
    del payload["passes"]
    recipe.write_text(yaml.safe_dump(payload))
    with pytest.raises(RecipeError, match="passes: Field required"):
        call("tune", recipe, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()
