"""A tuning in its run directory: what was tried stays what was tried, whatever comes after it."""

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from policy.test_trial import job_of, recipe
from safetensors.torch import load_file, save_file

from autocompress.errors import BudgetError, RecipeError
from autocompress.policy.recipe import load_policy_recipe
from autocompress.policy.run import (
    Session,
    _export,
    _first_that_holds,
    _random,
    begin,
    markdown,
    network_of,
    run_policies,
    space_of,
)
from autocompress.policy.trial import Job, attempt, key_of, policy_of, try_policy
from autocompress.run import Shown

__all__ = ["recipe"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_random_policies_are_no_trials_of_a_tuning_that_was_stopped_after_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(recipe, random_policies=2)

    def tune(job: Job, *_: object) -> None:
        try_policy(job, policy_of(job.recipe, {"0.prune.ratio": 0.4}))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.policy.run.tune", tune)
    with monkeypatch.context() as patch:
        patch.setattr("autocompress.policy.run.compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_policies(job, Shown())
    before = (job.folder / "result.json").read_bytes()
    assert len(list(job.folder.glob("trials/*/report.json"))) > 1
    report = run_policies(job, Shown())
    assert (job.folder / "result.json").read_bytes() == before
    # The only policy that was tried is one pass, and the best.
    assert [row["name"] for row in report["rows"]][:3] == ["as you brought it", "tuned", "best single pass"]
    assert "The tuned policy is the best single pass." in markdown(report)


def test_where_nothing_fits_the_smallest_costs_and_the_way_out_are_said(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(recipe, budget={"macs": "1%"})

    def tune(job: Job, *_: object) -> None:
        attempt(job, policy_of(job.recipe, {"0.prune.ratio": 0.4}))

    monkeypatch.setattr("autocompress.policy.run.tune", tune)
    with pytest.raises(
        BudgetError, match=r"no policy .* fits macs [\d.]+; the smallest seen are macs \d+; allow"
    ):
        run_policies(job, Shown())


def test_why_policies_cannot_be_is_said_where_none_can(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(recipe, budget={"macs": "90%"})

    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    def tune(job: Job, *_: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("autocompress.policy.trial.costs_of", broken)
            assert "no such kernel" in attempt(job, policy_of(job.recipe, {"0.prune.ratio": 0.4}))["error"]

    monkeypatch.setattr("autocompress.policy.run.tune", tune)
    with pytest.raises(BudgetError, match=r"fits macs [\d.]+. 1 of 1 cannot be, mostly: RuntimeError: no"):
        run_policies(job, Shown())


def test_a_random_policy_that_cannot_be_is_no_baseline_and_stops_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("autocompress.policy.trial.costs_of", broken)
    job = job_of(recipe)
    assert _random(job, space_of(job.recipe), lambda *_: None) == []


def test_another_recipe_other_weights_and_other_data_are_refused(recipe: Path, tmp_path: Path) -> None:
    found, folder = load_policy_recipe(recipe), tmp_path / "begun"
    begin(folder, found)
    # What a recipe of an earlier version has not, has its default.
    payload = yaml.safe_load((folder / "recipe.yaml").read_text())
    del payload["tune"]["warm_start"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(payload))
    begin(folder, found)
    changed = found.model_copy(update={"threads": 2})
    with pytest.raises(RecipeError, match="by another recipe: threads differ; take another directory"):
        begin(folder, changed)
    assert found.weights is not None
    content = load_file(found.weights)
    save_file({name: tensor + 1 for name, tensor in content.items()}, found.weights)
    with pytest.raises(RecipeError, match="holds a tuning with other weights, at the same paths"):
        begin(folder, found)


def test_the_best_policy_that_still_holds_the_latency_when_measured_again_is_taken(recipe: Path) -> None:
    job = job_of(recipe, budget={"latency_ms": "60%"})
    job.folder.joinpath("original.json").write_text(json.dumps({"latency_ms": 2.0}))
    best, second, third = ([("prune", {"ratio": ratio})] for ratio in (0.1, 0.2, 0.3))

    def session(*shares: float) -> Session:
        keys = [key_of(policy) for policy in ([], best, second, third)]
        return Session({k: FakeMeasurement(3.0 * s) for k, s in zip(keys, (1.0, *shares), strict=True)})

    ranked = [best, second, third]
    assert _first_that_holds(job, session(0.6, 0.5, 0.4), ranked) == best
    assert _first_that_holds(job, session(0.62, 0.5, 0.4), ranked) == second
    assert _first_that_holds(job, session(0.7, 0.8, 0.9), ranked) == best  # none does: the page says so
    job = job_of(recipe, "other", budget={"macs": "60%"})
    job.folder.joinpath("original.json").write_text(json.dumps({"latency_ms": 2.0, "macs": 9.0}))
    assert _first_that_holds(job, session(7.0, 0.8, 0.9), ranked) == best


def test_a_page_says_what_should_not_be_overlooked() -> None:
    def row(name: str, latency: float, validation: float, ratio: float) -> dict[str, Any]:
        costs = {"latency_ms": latency, "macs": 1e6, "params": 1e3, "size_bytes": 1e3}
        found = {"mean": validation, "low": 0.1, "high": 0.9, "count": 10}
        times = {"median": latency, "low": latency, "high": latency}
        policy = [["prune", {"ratio": ratio}]]
        return {
            "name": name, "policy": policy, "costs": costs, "latency_ms": times,
            "validation": found, "test": found,
        }  # fmt: skip

    first = row("as you brought it", 2.0, 0.9, 0.0)
    single, random = row("best single pass", 1.0, 0.8, 0.5), row("random 1", 1.0, 0.8, 0.6)
    report = {"metric": "accuracy", "limits": {"latency_ms": 1.0}}
    good = markdown({**report, "rows": [first, row("tuned", 1.0, 0.8, 0.5), single]})
    assert "**" not in good
    assert "| 50.0 |" in good
    assert "The tuned policy is the best single pass." in good
    assert "0.8000 (0.1000 to 0.9000)" in good
    poor = markdown({**report, "rows": [first, row("tuned", 2.1, 0.7, 0.5), random]})
    assert "**The random 1 is better on validation than the tuned policy: take more trials.**" in poor
    assert "No pass alone was tried that fits the budget." in poor
    assert "**The tuned network is no faster than the one you brought.**" in poor
    assert "takes 105.0 % of the original's latency, above the budget of 50.0 %" in poor


@dataclass
class FakeMeasurement:
    median_ms: float


def exported(job: Job, **settings: Any) -> tuple[Path, dict[str, Any], torch.nn.Module]:
    """Try and export one policy; return the folder, the manifest and the network."""
    chosen = {"0.prune.ratio": 0.4, "0.prune.criterion": "l2", "2.distill.losses": "kd"}
    arch = space_of(job.recipe).architecture(chosen | settings)
    policy = policy_of(job.recipe, dict(arch.settings))
    found = try_policy(job, policy)
    _export(job, arch, policy, {"rows": [{}, {"costs": found["costs"]}]})
    folder = job.folder / "best"
    return folder, json.loads((folder / "manifest.json").read_text()), network_of(job, policy)


def test_a_pruned_network_is_exported_for_its_own_factory_too(recipe: Path) -> None:
    folder, manifest, network = exported(job_of(recipe), **{"1.quantize.bits": 32})
    assert manifest["parity"].keys() == {"onnx", "torch_export", "safetensors"}
    assert manifest["left_out"] == {}
    loaded = runpy.run_path(str(folder / "loader.py"))["load"](folder)
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    assert loaded[0].out_channels + loaded[3].out_channels < 16 + 24


def test_layers_that_no_factory_makes_leave_the_loader_out_and_say_why(recipe: Path) -> None:
    folder, manifest, _ = exported(job_of(recipe), **{"1.quantize.bits": 8})
    assert manifest["parity"].keys() == {"onnx", "torch_export"}
    assert "of no factory: network.pt2 has them" in manifest["left_out"]["safetensors"]
    assert not (folder / "network.safetensors").exists()
