"""The command line on a small run: what it prints, writes and refuses, and how it ends."""

import contextlib
import io
import json
import math
import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from small_runs import RECIPE, small_payload, small_recipe, small_space, with_table
from typer.testing import CliRunner

from autocompress import cli, stages
from autocompress.commands import console
from autocompress.errors import AutocompressError, InfeasibleBudgetError, RecipeError
from autocompress.run import Run

# What opening a run or printing a report writes again, always alike.
REWRITTEN = {".lock", "environment.json", "report.md"}


def call(*arguments: str | Path) -> Result:
    """Run a command, which must succeed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def written(path: Path, payload: dict[str, Any] = RECIPE) -> Path:
    path.write_text(yaml.safe_dump(payload))
    return path


def ages(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in REWRITTEN)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole run, really measured, by `autocompress run`; and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = written(folder / "small.yaml", small_payload(export={"formats": ["onnx", "safetensors"]}))
    with pytest.MonkeyPatch.context() as patch:
        # On a busy machine a stage may take long enough for a line of progress.
        patch.setattr("autocompress.commands.console.SECONDS_A_LINE", math.inf)
        return folder / "run", call("run", recipe, "--run", folder / "run")


@pytest.fixture
def searched(tmp_path: Path, finished: tuple[Path, Result]) -> Path:
    """A copy of that run."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


# A whole run -----------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_comparison_and_says_where_the_files_are(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    lines = result.stdout.splitlines()
    names = ["largest", "uniform-scaled", "random 1", "random 2", "random, mean of 2 (standard deviation)"]
    names += ["searched", "uniform-scaled, finetuned", "searched, finetuned"]
    table = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [cells[0] for cells in rows] == names
    for cells in rows:
        assert len(cells) == 9
        if "mean" not in cells[0]:
            assert all(float(cell) > 0 for cell in cells[2:])
            assert f"\u2502 {cells[0]} " in result.stdout
            assert cells[1] in result.stdout
    (exported,) = (line for line in lines if line.startswith("Exported files: "))
    files = {path.name for path in Path(exported.removeprefix("Exported files: ")).iterdir()}
    assert {"network.onnx", "network.safetensors", "loader.py", "manifest.json"} <= files
    for said in ("latency table: ", "supernet: validation", "search: best", "finetuned ", "exported to "):
        assert any(line.startswith(said) for line in lines), said
    assert any("The exported network.onnx, measured in the same run: median" in line for line in lines)
    assert table[0].startswith("| network | test accuracy (95 % interval) | MACs (M) | parameters (k) | size")


def test_progress_is_silent_when_nobody_watches(finished: tuple[Path, Result]) -> None:
    assert finished[1].stderr == ""


def test_the_run_directory_holds_everything(finished: tuple[Path, Result]) -> None:
    assert {
        "recipe.yaml",
        "environment.json",
        "latency_table.json",
        "supernet.pt",
        "training.json",
        "trials.log",
        "result.json",
        "report.md",
    } <= {path.name for path in finished[0].iterdir()}


def test_the_latency_table_was_measured_and_checked(finished: tuple[Path, Result]) -> None:
    table = json.loads((finished[0] / "latency_table.json").read_text())
    # Two rounds; a sample that was taken while the machine was much slower than usual is discarded.
    assert all(1 <= row["count"] <= 2 and row["median_ms"] > 0 for row in table["rows"].values())
    assert len(table["error_report"]["networks"]) == 8


def test_a_finished_run_is_shown_again_and_nothing_is_done_again(finished: tuple[Path, Result]) -> None:
    folder, first = finished
    before = ages(folder)
    again = call("resume", folder)
    assert ages(folder) == before
    assert again.stdout.splitlines() == first.stdout.splitlines()[-len(again.stdout.splitlines()) :]
    same = call("run", folder.parent / "small.yaml", "--run", folder)
    assert same.stdout == again.stdout
    assert ages(folder) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["profile"], "latency table: 95 rows"),
        (["train"], "written to "),
        (["search"], "Pareto front of accuracy and macs, "),
        (["finetune"], "validation accuracy "),
        (["export"], "exported to "),
    ],
)
def test_every_stage_has_a_command_that_does_nothing_where_its_result_is_there(
    finished: tuple[Path, Result], command: list[str], said: str
) -> None:
    folder = finished[0]
    before = ages(folder)
    assert said in call(*command, "--run", folder).stdout
    assert ages(folder) == before


def test_the_front_is_shown_by_cost_with_keys_that_can_be_found(finished: tuple[Path, Result]) -> None:
    folder = finished[0]
    lines = call("search", "--run", folder).stdout.splitlines()
    shown = [line.split() for line in lines if line.startswith("  ")]
    assert lines[0].endswith(f"{len(shown)} networks:")
    scores = [float(words[0]) for words in shown]
    assert scores == sorted(scores)
    keys = {trial.architecture.key for trial in stages.search(Run(folder), console.on_screen()).trials}
    assert {words[-1] for words in shown} <= keys


def test_a_stage_can_be_begun_with_its_own_command(tmp_path: Path) -> None:
    folder = with_table(tmp_path / "run")
    recipe = written(tmp_path / "small.yaml")
    result = call("train", recipe, "--run", folder, "--set", "train.epochs=1", "--set", "search.seed=5")
    assert result.stdout.splitlines()[-1] == f"written to {folder / 'supernet.pt'}"
    run = Run(folder)
    assert (run.recipe.train.epochs, run.recipe.search.seed) == (1, 5)
    assert not (folder / "result.json").exists()


# Selecting -------------------------------------------------------------------------------------------------


def test_the_best_network_within_a_budget_is_selected(searched: Path) -> None:
    trials = json.loads((searched / "result.json").read_text())["trials"]
    limit = sorted(trial["costs"]["params"] for trial in trials)[3]
    said = call("select", "--run", searched, "--budget", f"params={limit},macs=100%").stdout
    best = max(t["metrics"]["accuracy"] for t in trials if t["costs"]["params"] <= limit)
    chosen = json.loads((searched / "selected.json").read_text())["architecture"]
    (trial,) = (t for t in trials if t["architecture"] == chosen)
    assert trial["costs"]["params"] <= limit
    assert trial["metrics"]["accuracy"] == best
    assert said.startswith("selected ")
    assert f": {best:.4f}, {trial['costs']['latency_ms']:.3f} ms (predicted)" in said


def test_the_cheapest_network_near_the_best_is_selected_and_then_finetuned(searched: Path) -> None:
    trials = json.loads((searched / "result.json").read_text())["trials"]
    said = call("select", "--run", searched, "--cheapest", "macs", "--within", "1").stdout
    chosen = json.loads((searched / "selected.json").read_text())["architecture"]
    (trial,) = (t for t in trials if t["architecture"] == chosen)
    assert trial["costs"]["macs"] == min(t["costs"]["macs"] for t in trials)
    key = said.split()[1].rstrip(":")
    assert (
        call("finetune", "--run", searched).stdout.splitlines()[-1].startswith(f"{key}: validation accuracy")
    )
    exported = call("export", "--run", searched).stdout.splitlines()[-1]
    (folder,) = searched.glob(f"networks/{key}-*/exported")
    assert exported == f"exported to {folder}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "macs=1M", "--cheapest", "macs"], "select takes --budget or --cheapest, not both"),
        (["--budget", "energy=3"], "a budget limits latency_ms, macs"),
        (["--budget", "macs"], "a budget reads metric=limit"),
        (["--budget", "macs=3ms"], "macs takes no unit"),
        (["--budget", "macs=10"], "nearest feasible budget is macs <="),
        (["--cheapest", "energy"], "the search did not price energy; it priced "),
        (["--cheapest", "macs", "--within", "-1"], "tolerance must be 0 or more"),
        (["--cheapest", "macs", "--within", "nan"], "tolerance must be 0 or more"),
    ],
)
def test_a_wrong_selection_is_refused(searched: Path, options: list[str], message: str) -> None:
    with pytest.raises(AutocompressError, match=message):
        call("select", "--run", searched, *options)
    assert not (searched / "selected.json").exists()


def test_a_budget_within_a_tolerance_needs_its_metric(searched: Path) -> None:
    with pytest.raises(RecipeError, match="--within belongs to --cheapest METRIC"):
        call("select", "--run", searched, "--within", "0.1")


def test_flops_are_macs_when_the_cheapest_is_selected(searched: Path) -> None:
    said = call("select", "--run", searched, "--cheapest", "flops", "--within", "1").stdout
    assert said == call("select", "--run", searched, "--cheapest", "macs", "--within", "1").stdout


# Searching again ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_supernet_is_searched_again_under_another_budget_and_nothing_else_is_done_again(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    first = json.loads((folder / "result.json").read_text())
    kept = {name: (folder / name).stat().st_mtime_ns for name in ("supernet.pt", "latency_table.json")}
    said = call("search", "--run", folder, "--set", "search.budget={params: 70%}").stdout
    (place,) = (folder / "kept").iterdir()
    assert said.startswith(f"settings of search changed: what it made before is kept in {place}\n")
    assert json.loads((place / "result.json").read_text()) == first
    second = json.loads((folder / "result.json").read_text())
    assert list(second["limits"]) == ["params"]
    assert all(t["costs"]["params"] <= second["limits"]["params"] for t in second["trials"])
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert Run(folder).recipe.search.budget == {"params": "70%"}
    assert "Budget: params 70%" in call("resume", folder).stdout


def test_settings_of_a_search_have_options_of_their_own_and_come_back(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    first = (folder / "result.json").read_bytes()
    options = ("--strategy", "random", "--budget", "params=80%,macs=95%", "--evaluations", "5")
    call("search", "--run", folder, *options, "--set", "search.options={}")
    search = Run(folder).recipe.search
    assert (search.strategy, search.evaluations, search.workers) == ("random", 5, 1)
    assert search.budget == {"params": "80%", "macs": "95%"}
    assert len(json.loads((folder / "result.json").read_text())["trials"]) == 5
    with pytest.raises(RecipeError, match=r"search.workers: .*greater than or equal to 1, got 0"):
        call("search", "--run", folder, "--workers", "0")
    # What cannot work leaves the recipe and the search as they are.
    before = ages(folder)
    with pytest.raises(RecipeError, match=r"search.workers .* must be at most the cores of this process"):
        call("search", "--run", folder, "--workers", "9999")
    assert ages(folder) == before
    call("search", finished[0] / "recipe.yaml", "--run", folder)
    assert (folder / "result.json").read_bytes() == first


def test_a_command_that_fails_leaves_the_run_with_its_former_settings(searched: Path) -> None:
    """Otherwise the next command would fail for something that it was not asked."""
    before = ages(searched)
    teachers = "finetune.teachers=[{model: nowhere.py:make}]"
    with pytest.raises(AutocompressError, match=r"nowhere\.py"):
        call("finetune", "--run", searched, "--set", teachers)
    assert {p for p, age in ages(searched).items() if before.get(p) != age} <= {"recipe.yaml", "stages.json"}
    assert Run(searched).recipe.finetune.teachers == ()
    call("finetune", "--run", searched)


def test_an_address_that_is_none_is_refused_before_anything_is_put_aside(searched: Path) -> None:
    before = ages(searched)
    with pytest.raises(RecipeError, match=r"search\.address"):
        call("search", "--run", searched, "--workers", "2", "--set", "search.address=foo")
    assert ages(searched) == before


def test_other_formats_are_exported_though_the_comparison_is_there(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    call("run", folder / "recipe.yaml", "--run", folder, "--set", "export.formats=[onnx]")
    names = {path.name for path in folder.glob("networks/*/exported/*")}
    assert "network.onnx" in names
    assert "network.safetensors" not in names


def test_options_of_another_strategy_are_left_out_and_that_is_said(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    assert Run(folder).recipe.search.options == {"population": 4}
    said = call("search", "--run", folder, "--strategy", "random", "--evaluations", "4").stdout
    assert said.startswith("options of evolution are left out: {'population': 4}\n")
    assert Run(folder).recipe.search.options == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("search.budget.macs=1000", InfeasibleBudgetError),
        ("search.options.population=0", RecipeError),
        ("search.strategy=nobody", AutocompressError),
    ],
)
def test_a_wrong_setting_does_not_cost_the_search_that_is_there(
    searched: Path, change: str, error: type[Exception]
) -> None:
    before = ages(searched)
    with pytest.raises(error):
        call("search", "--run", searched, "--set", change)
    assert ages(searched) == before


@pytest.mark.slow
def test_a_selected_network_is_reported_as_such_and_later_reports_say_so(searched: Path) -> None:
    call("select", "--run", searched, "--cheapest", "macs", "--within", "1")
    said = call("resume", searched).stdout
    assert "Selected: least macs of those within 1 of the best accuracy on validation, in the search" in said
    assert "read after 1 earlier reports of this run" in said
    assert "selected, finetuned" in said
    assert "searched, finetuned" not in said
    call("select", "--run", searched)  # the search's own best again
    assert not (searched / "selected.json").exists()
    assert "searched, finetuned" in call("resume", searched).stdout


@pytest.mark.slow
def test_finetuning_with_other_losses_repeats_no_other_stage_and_loses_nothing(searched: Path) -> None:
    (first,) = searched.glob("networks/*")
    kept = ages(searched)
    said = call("finetune", "--run", searched, "--distill", "none").stdout
    assert "finetuned" in said
    (second,) = set(searched.glob("networks/*")) - {first}
    now = ages(searched)
    changed = {path for path in now if now[path] != kept.get(path)}
    assert {str(path) for path in changed} <= {"recipe.yaml"} | {
        str(p) for p in changed if second.name in str(p)
    }
    # Back again, nothing is trained.
    assert len(call("finetune", "--run", searched, "--distill", "kd").stdout.splitlines()) == 1
    assert Run(searched).recipe.finetune.distill[0].loss == "kd"


def test_an_export_in_other_formats_replaces_the_last_one(searched: Path) -> None:
    recipe = yaml.safe_load((searched / "recipe.yaml").read_text())
    recipe["export"]["formats"] = ["safetensors"]
    (searched / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    call("export", "--run", searched)
    (folder,) = searched.glob("networks/*/exported")
    assert not (folder / "network.onnx").exists()
    assert (folder / "network.safetensors").exists()


@pytest.mark.parametrize("command", ["export", "profile"])
def test_a_command_says_what_it_made_once(searched: Path, command: str) -> None:
    for path in searched.glob("networks/*/exported/*"):
        path.unlink()
    lines = call(command, "--run", searched).stdout.splitlines()
    assert len(set(lines)) == len(lines)


# Counting --------------------------------------------------------------------------------------------------


def test_a_network_of_the_user_is_counted_with_thop_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "from torch import nn\ndef conv(): return nn.Sequential(nn.Conv2d(8, 16, 3, bias=False))\n"
        "def tokens(): return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))\n"
    )
    lines = call("count", f"{tmp_path / 'model.py'}:conv", "--input", "1x8x18x18").stdout.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "0.295 M MACs 0",
        "0.295 M MACs in all, for inputs of 1x8x18x18",
        "0.001 M parameters",
        "0.295 M MACs by thop",
    ]
    said = call("count", f"{tmp_path / 'model.py'}:tokens", "--input", "500x20", "--dtype", "int64").stdout
    assert "0.320 M MACs  in all" in said
    with pytest.raises(RecipeError, match="--dtype must be a PyTorch dtype"):
        call("count", f"{tmp_path / 'model.py'}:conv", "--input", "1x8x18x18", "--dtype", "number")


# Recipes and --set -----------------------------------------------------------------------------------------


def test_another_problem_in_the_same_directory_is_refused(
    tmp_path: Path, finished: tuple[Path, Result]
) -> None:
    folder, _ = finished
    before = ages(folder)
    recipe = folder.parent / "small.yaml"
    with pytest.raises(
        RecipeError, match=r"another problem: data.limit is 200 there, 300 here; data.seed is 0 "
    ):
        call("run", recipe, "--run", folder, "--set", "data.limit=300", "--set", "data.seed=5")
    assert ages(folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.epoch=3"], "train.epoch: unknown key; allowed here: "),
        (["trian.epochs=3"], "trian: unknown key"),
        (["train.epochs"], "--set takes key.path=value, got 'train.epochs'"),
        (["train.epochs=many"], "train.epochs: .* got 'many'"),
        (["train.epochs={"], "--set train.epochs: '{' is no YAML"),
        (["threads.a=3"], "--set threads.a: threads holds a value, not keys"),
        (["search.budget={macs: 3ms}"], "search.budget: .*macs takes no unit"),
        (["search.warm_start=cold"], "search.warm_start: .* got 'cold'"),
    ],
)
def test_a_wrong_change_is_refused_with_its_path(tmp_path: Path, changes: list[str], message: str) -> None:
    options = [word for change in changes for word in ("--set", change)]
    with pytest.raises(RecipeError, match=message):
        call("run", written(tmp_path / "small.yaml"), "--run", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_changes_without_a_recipe_are_of_the_run_s_recipe(searched: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"another problem: data.limit is 200 there, 300 here"):
        call("train", "--run", searched, "--set", "data.limit=300")
    with pytest.raises(RecipeError, match="--set changes a recipe: name one, or a run that exists"):
        call("train", "--run", tmp_path / "absent", "--set", "train.epochs=3")
    assert not (tmp_path / "absent").exists()


def test_a_change_reaches_keys_that_the_recipe_does_not_have() -> None:
    payload = {"train": {"epochs": 3}}
    changed = console.with_changes(
        payload, ["search.options.population=7", "train.phases=[]", "export.formats=[onnx]"]
    )
    assert changed == {
        "train": {"epochs": 3, "phases": []},
        "search": {"options": {"population": 7}},
        "export": {"formats": ["onnx"]},
    }


def test_the_demo_takes_changes_too_and_its_own_recipe_stays(tmp_path: Path) -> None:
    before = json.dumps(cli.DEMO)
    with pytest.raises(RecipeError, match=r"the demo's recipe is not valid:\n  train.epoch: unknown key"):
        call("demo", "--run", tmp_path / "demo", "--set", "train.epoch=1")
    assert json.dumps(cli.DEMO) == before
    assert not (tmp_path / "demo").exists()


def test_an_impossible_budget_is_refused_before_training(tmp_path: Path) -> None:
    folder = with_table(tmp_path / "run")
    recipe = written(tmp_path / "small.yaml")
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget is latency_ms <= "):
        call("run", recipe, "--run", folder, "--set", "search.budget={latency_ms: 10%}")
    assert not (folder / "supernet.pt").exists()


def test_a_run_that_another_process_holds_is_refused(searched: Path) -> None:
    commands = [["resume", searched], *([name, "--run", searched] for name in ("profile", "train", "search"))]
    commands += [[name, "--run", searched] for name in ("select", "finetune", "export")]
    with Run(searched).locked():
        for command in commands:
            with pytest.raises(AutocompressError, match=f"another process is working on {searched}"):
                call(*command)


# Forecasts and lists ---------------------------------------------------------------------------------------


def test_a_forecast_tells_every_stage_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, Result]
) -> None:
    recipe = written(tmp_path / "small.yaml")
    monkeypatch.chdir(tmp_path)
    ran = call("run", recipe, "--dry-run").stdout
    trained = call("train", recipe, "--dry-run", "--run", tmp_path / "run").stdout
    for stage in ("profile", "train", "search", "finetune", "export", "in all", "memory"):
        assert stage in ran
        assert stage in trained
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "in all" in call("train", "--dry-run", "--run", folder).stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_forecast_of_a_gradient_search_times_its_mixture_and_tries_its_options(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    payload = small_payload(search={"strategy": "proxyless", "options": {}}, train={"batch_size": 20})
    recipe.write_text(yaml.safe_dump(payload))
    said = call("run", recipe, "--dry-run").stdout
    assert "train and search" in said
    assert "trained anew" in said
    assert "evaluations" not in said
    with pytest.raises(RecipeError, match="warmup must be"):
        call("run", recipe, "--dry-run", "--set", "search.options.warmup=2")
    with pytest.raises(RecipeError, match="warmup must be"):
        call("run", recipe, "--run", tmp_path / "run", "--set", "search.options.warmup=2")
    assert not (tmp_path / "run" / "latency_table.json").exists()


def test_a_forecast_knows_how_often_a_strategy_evaluates_that_ends_by_itself(tmp_path: Path) -> None:
    search = {"strategy": "sensitivity", "options": {}, "evaluations": 1_000_000}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_payload(search=search)))
    options = sum(len(choice.options) - 1 for choice in small_space().choices)
    # One an option that is not the largest, the largest, and what is found.
    assert f" {options + 2} evaluations of " in call("run", recipe, "--dry-run").stdout


def test_a_forecast_of_a_search_to_distill_counts_its_trainings(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_payload(search={"reward": "distilled"})))
    assert "6 evaluations of at most " in call("run", recipe, "--dry-run").stdout
    with pytest.raises(RecipeError, match=r"search.reward distilled is for strategies that evaluate"):
        call("run", recipe, "--dry-run", "--set", "search.strategy=darts", "--set", "search.options={}")


def test_a_forecast_refuses_what_the_run_would(tmp_path: Path) -> None:
    recipe = written(tmp_path / "small.yaml", small_payload(search={"budget": {"macs": 10}}))
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget is macs <="):
        call("run", recipe, "--dry-run")
    with pytest.raises(RecipeError, match=r"recipe .*recipe.yaml cannot be read"):
        call("train", "--dry-run", "--run", tmp_path / "absent")


@pytest.mark.parametrize(
    ("what", "lines"),
    [
        ("spaces", ["mobilenet_v3  search_spaces.mobilenet_v3:mobilenet_v3"]),
        (
            "strategies",
            [
                "elitist  strategies.evolution:ElitistEvolution",
                "evolution  strategies.evolution:AgingEvolution",
                "random  strategies.random_search:RandomSearch",
            ],
        ),
        (
            "targets",
            ["pytorch-cpu  pytorch, cpu, float32; integer bits: none; eager PyTorch, CPU, channels_last"],
        ),
    ],
)
def test_what_a_recipe_can_name_is_listed(what: str, lines: list[str]) -> None:
    assert set(lines) <= set(call("list", what).stdout.splitlines())


def test_other_lists_are_refused() -> None:
    with pytest.raises(RecipeError, match="list takes spaces, strategies or targets, got 'space'"):
        call("list", "space")


def test_every_command_is_described() -> None:
    text = call("--help").stdout
    for command in (
        "demo", "run", "resume", "profile", "train", "search", "select", "finetune", "export", "list",
    ):  # fmt: skip
        assert f" {command} " in text
        assert len(call(command, "--help").stdout.splitlines()) > 5


@pytest.mark.parametrize("arguments", [["trian"], ["run"], ["list"], ["select", "--budgets", "x"]])
def test_a_wrong_command_line_is_refused_with_the_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


# How a process ends ----------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `main` as a process would: exit status, what it printed, and what it printed of errors."""

    def run(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setenv(cli.RESTARTED, "1")
        monkeypatch.setattr(sys, "argv", ["autocompress", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "recipe absent.yaml cannot be read"),
        (["resume", "absent"], "absent holds no run (no recipe.yaml)"),
        (["finetune", "--run", "absent"], "absent holds no run"),
        (["list", "everything"], "list takes spaces, strategies or targets, got 'everything'"),
    ],
)
def test_an_error_is_one_message_and_status_1(ended: Any, arguments: list[str], message: str) -> None:
    status, out, error = ended(*arguments)
    assert status == 1
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_an_error_of_the_program_itself_keeps_its_traceback(
    ended: Any, monkeypatch: pytest.MonkeyPatch, searched: Path
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(stages, "export", broken)
    with pytest.raises(ZeroDivisionError):
        ended("export", "--run", searched)


def test_an_interrupted_run_says_how_to_go_on(
    ended: Any, monkeypatch: pytest.MonkeyPatch, searched: Path
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "export", interrupted)
    status, _, error = ended("export", "--run", searched)
    assert status == 130
    assert "stopped; continue with `autocompress resume RUN`" in error
    assert "Traceback" not in error
    with Run(searched).locked():
        pass


def test_a_command_that_succeeds_ends_with_status_0(ended: Any) -> None:
    status, out, error = ended("list", "targets")
    assert (status, error) == (0, "")
    assert "onnxruntime-cpu" in out


def test_modules_of_the_working_directory_can_be_named(ended: Any) -> None:
    ended("list", "targets")
    assert sys.path[0] == os.getcwd()


@pytest.mark.skipif(sys.platform != "linux", reason="the process starts again on Linux only")
def test_the_process_starts_again_with_settings_that_make_training_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(cli.RESTARTED, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(sys, "argv", ["autocompress", "list", "targets"])
    started: list[Any] = []

    def started_again(*arguments: Any) -> None:
        started.extend(arguments)
        raise SystemExit

    monkeypatch.setattr(os, "execve", started_again)
    with pytest.raises(SystemExit):
        cli.main()
    program, command, environment = started
    assert command == [program, "-m", "autocompress.cli", "list", "targets"]
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"  # what somebody set stays
    for name, value in cli.PROCESS_ENVIRONMENT.items():
        assert environment[name] == ("ACTIVE" if name == "OMP_WAIT_POLICY" else value)
    assert environment[cli.RESTARTED] == "1"


def test_the_program_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autocompress.cli"]
    good = subprocess.run([*command, "list", "targets"], capture_output=True, text=True, check=True)
    assert "pytorch-cpu" in good.stdout
    (tmp_path / "r.yaml").write_text("train: {epoch: 3}")
    bad = subprocess.run(
        [*command, "run", "r.yaml"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith(
        "error: recipe r.yaml is not valid:\n  train.epoch: unknown key; allowed here: "
    )
    assert "Traceback" not in bad.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


# Progress --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal() -> Iterator[int]:
    """A terminal in place of the standard error stream; gives the end that reads it."""
    leader, follower = pty.openpty()
    kept = sys.stderr
    sys.stderr = io.TextIOWrapper(io.FileIO(follower, "w"), write_through=True)
    try:
        yield leader
    finally:
        sys.stderr.close()
        sys.stderr = kept


def test_a_terminal_shows_title_count_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal() as leader:
        with console.stage("train the supernet") as progress:
            progress(3, 12, "loss 0.123")
        shown = ""
        while select.select([leader], [], [], 0.5)[0]:  # a read returns what is there, not all of it
            shown += os.read(leader, 100_000).decode()
    os.close(leader)
    for part in ("train the supernet", "3/12", "loss 0.123"):
        assert part in shown


def test_without_a_terminal_a_line_is_shown_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.stage("train the supernet") as progress:
        progress(3, 12, "loss 0.123")
    assert tuple(capsys.readouterr()) == ("", "")

    now = iter([0.0, 19.0, 25.0, 30.0, 46.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage("train the supernet") as progress:
        for done in range(1, 5):
            progress(done, 4, "loss 0.123" if done < 4 else "")
    said = "train the supernet: 2 of 4, 25 s, loss 0.123\ntrain the supernet: 4 of 4, 46 s\n"
    assert tuple(capsys.readouterr()) == ("", said)


def test_the_small_recipe_of_these_tests_is_the_one_that_was_run(finished: tuple[Path, Result]) -> None:
    expected = small_recipe(export={"formats": ["onnx", "safetensors"]})
    assert Run(finished[0]).recipe == expected
