"""A tuning in its run directory: what was tried stays what was tried, whatever comes after it."""

import json
import runpy
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
    _export,
    _random,
    begin,
    markdown,
    network_of,
    run_policies,
    space_of,
)
from autocompress.policy.trial import Job, attempt, policy_of, try_policy
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
    with pytest.raises(BudgetError, match="1 of 1 cannot be, mostly: RuntimeError: no such kernel"):
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
