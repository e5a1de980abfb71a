"""A policy tried: what it costs, what fits, what is trained, and that a trial goes on where it stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from autocompress.errors import PolicyError, RecipeError
from autocompress.policy.passes import apply, structure_of
from autocompress.policy.recipe import PolicyRecipe, load_policy_recipe
from autocompress.policy.trial import (
    Job,
    costs_of,
    key_of,
    limits_of,
    original_costs,
    policy_of,
    try_policy,
)
from autocompress.prune.load import load_model
from search_spaces.policy import policy

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = """
from torch import nn

def make(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes))
"""
PASSES: list[dict[str, Any]] = [
    {"prune": {"ratio": [0.0, 0.4], "criterion": ["l2", "taylor"]}},
    {"quantize": {"bits": [32, 8]}},
    {"distill": {"losses": ["kd", "none"], "epochs": 2, "learning_rate": 0.02}},
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe beside its model and weights; paths in it are relative."""
    model = f"tuned_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{model}.py").write_text(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(
            load_model(f"{tmp_path / model}.py:make", {}).state_dict(), tmp_path / "weights.safetensors"
        )
    payload = {
        "model": f"{model}.py:make",
        "weights": "weights.safetensors",
        "data": {"source": "digits", "limit": 200, "validation": 0.2},
        "passes": PASSES,
        "finetune": {"batch_size": 40},
        "tune": {"budget": {"macs": "80%"}, "runs": 5},
    }
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(payload))
    return path


def job_of(recipe: Path, name: str = "run", **tune: Any) -> Job:
    found = load_policy_recipe(recipe)
    folder = recipe.parent / name
    folder.mkdir()
    return Job(found.model_copy(update={"tune": found.tune.model_copy(update=tune)}), folder)


# The space -------------------------------------------------------------------------------------------------


def test_a_policy_has_a_choice_for_each_list_and_none_for_what_is_fixed() -> None:
    space = policy(PASSES)
    names = [choice.name for choice in space.choices]
    assert names == ["0.prune.ratio", "0.prune.criterion", "1.quantize.bits", "2.distill.losses"]
    # Of what is not pruned the criterion has no effect.
    assert space.size == (1 + 2) * 2 * 2


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ([{"prun": {"ratio": [0, 0.5]}}], "a pass is one of prune"),
        ([{"prune": {"rate": [0, 0.5]}}], "has the settings criterion, ratio, multiple, not rate"),
        ([{"prune": {"ratio": 0.5}}], "nothing may be chosen"),
        ([{"factorize": {"ratio": [0.5, 0.7]}}], "'factorize' is turned off by its method, 'none': give it"),
        ([{"distill": {"epochs": 2}}, {"prune": {"ratio": [0, 0.5]}}], "'prune' stands behind 'distill'"),
    ],
)
def test_what_is_no_policy_is_refused(passes: Any, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        policy(passes)


def test_a_network_of_the_space_is_a_list_of_passes(recipe: Path) -> None:
    parsed = load_policy_recipe(recipe)
    space = policy(parsed.passes)
    (arch,) = space.decode(space.smallest())
    found = policy_of(parsed, dict(arch.settings))
    assert [name for name, _ in found] == ["prune", "quantize", "distill"]
    assert found[0][1]["ratio"] == 0.0
    assert found[2][1] == {"losses": "kd", "epochs": 2, "learning_rate": 0.02}


def test_settings_of_a_pass_that_is_off_make_no_other_policy() -> None:
    off = [("prune", {"ratio": 0.0, "criterion": name}) for name in ("l2", "taylor")]
    on = [("prune", {"ratio": 0.4, "criterion": name}) for name in ("l2", "taylor")]
    assert key_of(off[:1]) == key_of(off[1:]) == key_of([("distill", {"epochs": 0})]) == key_of([])
    assert len({key_of(on[:1]), key_of(on[1:]), key_of([])}) == 3


# Trials ----------------------------------------------------------------------------------------------------


def test_percent_are_of_the_network_as_it_was_brought(recipe: Path) -> None:
    job = job_of(recipe, budget={"macs": "80%", "size_bytes": 5000})
    whole = original_costs(job)
    assert limits_of(job) == {"macs": pytest.approx(0.8 * whole["macs"]), "size_bytes": 5000}
    assert costs_of(job, [("prune", {"ratio": 0.0})])["macs"] == whole["macs"]


def test_what_does_not_fit_is_not_trained(recipe: Path) -> None:
    job = job_of(recipe)
    told: list[int] = []
    kept = policy_of(job.recipe, {"0.prune.ratio": 0.0})
    found = try_policy(job, kept, lambda epoch, _: told.append(epoch))
    assert (found["fits"], told) == (False, [])
    assert "score" not in found


def test_what_fits_is_trained_once_and_its_weights_are_kept(recipe: Path) -> None:
    job = job_of(recipe)
    chosen = policy_of(job.recipe, {"0.prune.ratio": 0.4})
    told: list[int] = []
    found = try_policy(job, chosen, lambda epoch, _: told.append(epoch))
    assert found["fits"]
    assert told == [1, 2]
    assert 0 < found["score"] <= 1
    assert found["costs"]["macs"] <= limits_of(job)["macs"]
    (weights,) = job.folder.glob("trials/*/network.safetensors")
    assert weights.exists()
    assert try_policy(job, chosen, lambda epoch, _: told.append(epoch)) == found
    assert told == [1, 2]


def test_policies_that_differ_in_training_only_are_measured_once(recipe: Path) -> None:
    job = job_of(recipe)
    for losses in ("kd", "none"):
        costs_of(job, policy_of(job.recipe, {"0.prune.ratio": 0.4, "2.distill.losses": losses}))
    assert len(list(job.folder.glob("structures/*/costs.json"))) == 1


def test_what_another_worker_measured_meanwhile_is_not_measured_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(recipe)
    chosen = policy_of(job.recipe, {"0.prune.ratio": 0.4})
    first = costs_of(job, chosen)
    path = job.folder / "structures" / key_of(structure_of(chosen)) / "costs.json"
    content = path.read_bytes()
    path.unlink()

    def slowly(*arguments: Any) -> Any:
        path.write_bytes(content)  # the other worker ends while this one still builds the network
        return apply(*arguments)

    monkeypatch.setattr("autocompress.policy.trial.apply", slowly)
    monkeypatch.setattr("autocompress.policy.trial._costs", lambda *_: pytest.fail("measured again"))
    assert costs_of(job, chosen) == first


def test_8_bits_are_smaller_in_the_file_that_is_measured(recipe: Path) -> None:
    job = job_of(recipe)
    floats, bits = (
        costs_of(job, policy_of(job.recipe, {"0.prune.ratio": 0.0, "1.quantize.bits": bits}))
        for bits in (32, 8)
    )
    assert bits["size_bytes"] < floats["size_bytes"]
    assert bits["params"] == floats["params"] - 2 * (16 + 24) + 16 + 24  # norms are folded into biases


def test_a_trial_that_was_stopped_ends_as_one_that_was_not(recipe: Path) -> None:
    ends = []
    for name, stopped in (("whole", False), ("stopped", True)):
        job = job_of(recipe, name)
        chosen = policy_of(job.recipe, {"0.prune.ratio": 0.4, "1.quantize.bits": 8})

        def stop(epoch: int, _: float) -> None:
            raise KeyboardInterrupt

        if stopped:
            with pytest.raises(KeyboardInterrupt):
                try_policy(job, chosen, stop)
            assert not list(job.folder.glob("trials/*/report.json"))
        found = try_policy(job, chosen)
        (weights,) = job.folder.glob("trials/*/network.safetensors")
        ends.append((found["score"], load_file(weights)))
    (score, one), (again, other) = ends
    assert score == again
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# Recipes ---------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe(recipe: Path) -> None:
    found = load_policy_recipe(recipe)
    assert found.weights == recipe.parent / "weights.safetensors"
    assert found.model.startswith(str(recipe.parent))
    payload = yaml.safe_load(recipe.read_text()) | {"target": {"name": "device.json"}}
    recipe.write_text(yaml.safe_dump(payload))
    assert load_policy_recipe(recipe).target.name == str(recipe.parent / "device.json")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"passes": []}, "passes: Tuple should have at least 1 item"),
        ({"passes": [{"prune": {}, "distill": {}}]}, r"each pass is one name .* got \['distill', 'prune'\]"),
        ({"finetune": {"epochs": 3}}, "finetune.epochs belongs to the pass distill"),
        ({"tune": {"budget": "energy_mj=50%"}}, "limits what is measured, latency_ms, macs"),
        ({"tune": {"trails": 3}}, "tune.trails: unknown key; allowed here: address, budget"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Path, changes: dict[str, Any], text: str) -> None:
    payload = yaml.safe_load(recipe.read_text()) | changes
    recipe.write_text(yaml.safe_dump(payload))
    with pytest.raises(RecipeError, match=text):
        load_policy_recipe(recipe)


def test_a_recipe_says_all_it_does() -> None:
    made = PolicyRecipe(model="package:make", passes=({"prune": {"ratio": [0.0, 0.5]}},))
    assert PolicyRecipe(**made.model_dump()) == made
    assert made.tune.budget == {"latency_ms": "60%"}
