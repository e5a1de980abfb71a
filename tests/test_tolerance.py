"""The smallest cost within a tolerance: by bisection, over whole runs."""

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow_runs import narrow_payload, with_narrow_table, write_model
from safetensors.torch import load_file
from test_stages import assert_equal_runs, killed_runs
from typer.testing import CliRunner

from autocompress import stages, tolerance
from autocompress.cli import app
from autocompress.elastic.supernet import resize
from autocompress.errors import RecipeError, ToleranceError
from autocompress.recipe import parse_recipe
from autocompress.run import Run, Shown
from autocompress.tolerance import CLOSE, PROBES, TOLERANCE, Probe, bisect
from autocompress.training.evaluate import evaluate

SILENT = Shown()
share = st.floats(0.01, 1.0)


@given(low=share, high=share, threshold=share, used=st.floats(0.5, 1.0))
def test_bisection_ends_beside_the_threshold(low: float, high: float, threshold: float, used: float) -> None:
    """Where all budgets above a threshold hold, the found one is at most `CLOSE` above it, or above low."""

    def probe(tried: float) -> Probe:
        assert low < tried < high
        cost = max(low, used * tried)
        return Probe(tried, cost, 0.5, holds=cost >= threshold)

    tried = bisect(probe, low, high, 200)
    found = min((one.cost for one in tried if one.holds and one.cost is not None), default=high)
    if low < high:
        assert found >= min(threshold, high)
    if used == 1.0 and low <= threshold <= high:
        assert found - threshold <= CLOSE + 1e-9


@given(low=share, high=share, count=st.integers(1, 20), answers=st.randoms(use_true_random=False))
def test_bisection_ends(low: float, high: float, count: int, answers: Any) -> None:
    """Whatever is answered, with no more budgets than allowed, and with one more bit for each."""
    tried = bisect(lambda s: Probe(s, s, 0.0, holds=answers.random() < 0.5), low, high, count)
    bits = math.ceil(math.log2(max((high - low) / CLOSE, 1)))
    # Budgets are whole percents, which may cost a step.
    assert len(tried) <= min(count, max(0, bits + 1))


def test_a_budget_that_nothing_fits_is_too_small() -> None:
    tried = bisect(lambda s: Probe(s, None, None, holds=False), 0.0, 1.0, 3)
    assert [one.share for one in tried] == [0.5, 0.75, 0.88]


# Runs -------------------------------------------------------------------------------------------------------


def payload(model: Path, drop: float = 0.05, **changes: Any) -> dict[str, Any]:
    made = narrow_payload(model, **changes)
    made["tolerance"] = {"drop": drop, "metric": "macs", "probes": 3}
    made["search"] |= {"strategy": "random", "options": {}, "evaluations": 2, "budget": {"macs": "90%"}}
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def opened(folder: Path, made: dict[str, Any]) -> Run:
    return Run(with_narrow_table(folder, made), parse_recipe(made))


def test_the_smallest_budget_that_holds_is_chosen_and_reported(model: Path, tmp_path: Path) -> None:
    run = opened(tmp_path / "run", payload(model))
    chosen = tolerance.smallest(run, SILENT)
    content = json.loads(run.path(TOLERANCE).read_text())
    probes = [Probe(**one) for one in content["probes"]]
    assert 1 <= len(probes) <= 3
    for probe in probes:
        result = stages.search(Run(run.path(PROBES) / f"{100 * probe.share:.6g}"), SILENT)
        assert probe.cost is not None
        assert probe.score is not None
        # Budgets are hard, and no looser than the one that stands beside the tolerance.
        assert result.best().costs["macs"] <= probe.share * content["whole"]
        assert probe.share <= 0.9
        assert probe.holds == (probe.score >= content["reference"] - content["drop"])
    best = min((p for p in probes if p.holds), key=lambda p: p.cost or 1)
    assert chosen.folder == run.path(PROBES) / f"{100 * best.share:.6g}"
    text = tolerance.table(run)
    assert text.count("\n|") == 2 + len(probes)
    # The other commands say where the networks are.
    with pytest.raises(RecipeError, match=r"its searches, networks and reports are in .*probes"):
        stages.search(run, SILENT)
    # Again: everything is there, nothing is evaluated anew.
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.*") if path.name != TOLERANCE}
    assert tolerance.smallest(Run(run.folder), SILENT).folder == chosen.folder
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_the_command_reports_the_chosen_budget(model: Path, tmp_path: Path) -> None:
    made = payload(model, random_networks=1)
    run = opened(tmp_path / "run", made)
    said = CliRunner().invoke(app, ["resume", str(run.folder)], catch_exceptions=False).output
    assert "the smallest within the tolerance is in" in said
    report = run.path("report.md").read_text()
    assert "## Budgets that were tried" in report
    assert "searched, finetuned" in report


def test_the_reference_is_the_model_as_it_was_brought(model: Path, tmp_path: Path) -> None:
    """With its own running statistics, which a slice of a supernet does not have."""
    run = opened(tmp_path / "run", payload(model))
    network = runpy.run_path(str(model))["make"]().eval()
    network.load_state_dict(load_file(model.with_name("weights.safetensors")))
    largest = run.space.decode(run.space.largest())[0]
    teacher = stages.extract_recalibrated(run, run.space.supernet(), largest)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(teacher(images), network(images))
    by_hand = evaluate(lambda x: network(resize(x, (8, 8))), run.data.validation, run.task.score).mean
    assert stages.reference_score(run, SILENT) == by_hand


def test_where_nothing_holds_the_nearest_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "run", payload(model, drop=1e-9))
    monkeypatch.setattr(stages, "reference_score", lambda *_: 0.9)
    monkeypatch.setattr(
        tolerance, "_tried", lambda run, shown, share, *_: Probe(share, share, 0.8 * share, holds=False)
    )
    text = (
        r"none of 3 budgets loses at most 1e-09: the best, macs <= 0.\d+ of the whole, loses 0.\d+; finetune"
    )
    with pytest.raises(ToleranceError, match=text):
        tolerance.smallest(run, SILENT)
    assert len(json.loads(run.path(TOLERANCE).read_text())["probes"]) == 3


def test_strategies_by_gradients_need_weights(model: Path, tmp_path: Path) -> None:
    made = payload(model, train={"epochs": 1})
    del made["space"]["arguments"]["weights"]
    made["search"] |= {"strategy": "dmcp"}
    with pytest.raises(ToleranceError, match="bring weights"):
        tolerance.smallest(opened(tmp_path / "run", made), SILENT)


def test_a_run_without_a_tolerance_has_none(model: Path, tmp_path: Path) -> None:
    made = payload(model)
    del made["tolerance"]
    with pytest.raises(ToleranceError, match="has no tolerance"):
        tolerance.smallest(opened(tmp_path / "run", made), SILENT)


@pytest.mark.slow
def test_a_killed_search_for_the_smallest_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    made = payload(model)
    with_narrow_table(tmp_path / "whole", made)
    with_narrow_table(tmp_path / "killed", made)
    moments = [
        "search by random:1",
        "finetune with distillation:2",
        f"{TOLERANCE}>",
    ]
    killed_runs(tmp_path, ("whole", "smallest", []), ("killed", "smallest", moments), recipe=made)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert len(json.loads((tmp_path / "killed" / TOLERANCE).read_text())["probes"]) > 0


@pytest.mark.slow
def test_a_narrowing_killed_in_any_stage_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    """SIGKILL in training of slices, in the search and in finetuning of a user's own network."""
    made = narrow_payload(model, train={"epochs": 2})
    with_narrow_table(tmp_path / "whole", made)
    with_narrow_table(tmp_path / "killed", made)
    moments = ["train the supernet:2", "search by evolution:3", "finetune with distillation:3"]
    killed_runs(tmp_path, ("whole", "export", []), ("killed", "export", moments), recipe=made)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_dmcp_killed_in_its_training_ends_as_one_that_was_not(model: Path, tmp_path: Path) -> None:
    made = narrow_payload(model, train={"epochs": 2})
    made["search"] |= {"strategy": "dmcp", "options": {}}
    with_narrow_table(tmp_path / "whole", made)
    with_narrow_table(tmp_path / "killed", made)
    moments = [
        "train the supernet and dmcp:2",
        "finetune with distillation:1",
    ]
    killed_runs(tmp_path, ("whole", "export", []), ("killed", "export", moments), recipe=made)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
