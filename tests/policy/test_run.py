"""A tuning in its run directory: what was tried stays what was tried, whatever comes after it."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.test_trial import job_of, recipe

from autocompress.policy.run import _export, markdown, network_of, run_policies, space_of
from autocompress.policy.trial import Job, policy_of, try_policy
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
