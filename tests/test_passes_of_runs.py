"""A whole pipeline as one recipe: what passes make of a finetuned network, cached by what it stands on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_recipe, table_by_hand

from autocompress import stages
from autocompress.errors import AutocompressError, PolicyError, RecipeError
from autocompress.quantize.layer import has_quantizers
from autocompress.report.comparison import report
from autocompress.report.show import markdown
from autocompress.run import Run, Shown

INTEGERS = [{"quantize": {"bits": 8}}, {"distill": {"epochs": 1}}]


def recipe(passes: list[dict[str, Any]], **changes: Any) -> Any:
    given = {"passes": passes, "export": {"formats": ["onnx"]}, "profile": {"measured": "nowhere"}}
    return small_recipe(**given | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network is finetuned, put into integers and exported."""
    path = tmp_path_factory.mktemp("passes")
    run = Run(path, recipe(INTEGERS))
    stages.export(run, Shown())
    return path


def ages(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_network_is_put_into_integers_after_finetuning_and_exported_so(folder: Path) -> None:
    run = Run(folder, recipe(INTEGERS))
    network, scored = stages.compress(run, Shown())
    assert has_quantizers(network)
    assert scored.count == 40
    (manifest,) = folder.glob("networks/*/passes-*/exported/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["onnx_operators"]["QuantizeLinear"] > 10
    assert content["extra"]["passes"] == [["quantize", {"bits": 8}], ["distill", {"epochs": 1}]]
    assert content["extra"]["validation"]["mean"] == scored.mean
    assert not list(folder.rglob("checkpoints"))


def test_what_passes_made_is_read_again_bit_for_bit(folder: Path) -> None:
    run = Run(folder, recipe(INTEGERS))
    before = ages(folder)
    network, scored = stages.compress(run, Shown())
    assert ages(folder) == before
    (weights,) = folder.glob("networks/*/passes-*/compressed.safetensors")
    kept = weights.read_bytes(), (weights.parent / "compressed.json").read_bytes()
    (weights.parent / "compressed.json").unlink()
    made, again = stages.compress(run, Shown())
    images = torch.randn(4, 1, *stages.resolution(run, stages.selected(run, Shown())))
    assert torch.equal(made(images), network(images))
    assert again == scored
    assert (weights.read_bytes(), (weights.parent / "compressed.json").read_bytes()) == kept


@pytest.mark.slow
def test_other_passes_repeat_nothing_before_them_and_former_ones_are_found(folder: Path) -> None:
    before = ages(folder)
    floats = Run(folder, recipe([]))
    stages.compress(floats, Shown())
    assert {p: a for p, a in ages(folder).items() if before.get(p) != a}.keys() == {"recipe.yaml"}
    other = Run(folder, recipe([{"quantize": {"bits": 8}}]))
    stages.export(other, Shown())
    changed = {path for path, age in ages(folder).items() if before.get(path) != age} - {"recipe.yaml"}
    assert changed
    assert all("/passes-" in path for path in changed)
    stages.export(Run(folder, recipe(INTEGERS)), Shown())
    assert {p for p, a in before.items() if ages(folder)[p] != a} <= {"recipe.yaml"}


@pytest.mark.slow
def test_the_report_counts_and_scores_what_passes_made(folder: Path) -> None:
    run = Run(folder, recipe(INTEGERS))
    content = report(run, Shown())
    rows = {row["name"]: row for row in content["rows"]}
    made = rows["searched, finetuned, quantize(bits 8) > distill(epochs 1)"]
    finetuned = rows["searched, finetuned"]
    assert "uniform-scaled, finetuned, quantize(bits 8) > distill(epochs 1)" in rows
    assert made["costs"]["macs"] == finetuned["costs"]["macs"]
    assert made["costs"]["size_bytes"] < finetuned["costs"]["size_bytes"]
    assert made["bits"] == (8.0, 8.0)
    assert "quantize(bits 8)" in markdown(content)


@pytest.mark.slow
def test_passes_are_measured_beside_the_network_without_them(folder: Path) -> None:
    """The measured latency of the row is that of the exported file."""
    run = Run(folder, recipe(INTEGERS))
    run.recipe = run.recipe.model_copy(
        update={"profile": run.recipe.profile.model_copy(update={"measured": "here"})}
    )
    table_by_hand(run.space).save(run.path(stages.TABLE))
    content = report(run, Shown())
    rows = {row["name"]: row for row in content["rows"]}
    made = rows["searched, finetuned, quantize(bits 8) > distill(epochs 1)"]
    assert np.isclose(made["latency_ms"], content["exported"]["median_ms"], rtol=0.5)
    assert made["latency_ms"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"passes": [{"quantise": {"bits": 8}}]}, PolicyError, "did you mean 'quantize'"),
        ({"passes": [{"quantize": {"bit": 8}}]}, PolicyError, "has the settings bits, ranges, not bit"),
        ({"passes": [{"quantize": {"bits": 5}}]}, AutocompressError, "5"),
        ({"passes": [{"quantize": {}, "distill": {}}]}, RecipeError, "each pass is one name"),
        ({"passes": [{"quantize": {"bits": [8, 4]}}]}, RecipeError, "bits has one value here; .* tune"),
        ({"passes": ["quantize"]}, RecipeError, "each pass is its name with its settings"),
        ({"passes": [{"prune": {"ratio": 1.5}}]}, PolicyError, r"ratio of pass 'prune' must be a share in"),
        ({"passes": [{"prune": {"ratio": "much"}}]}, PolicyError, r"must be a share in \[0, 1\), got 'much'"),
        ({"passes": [{"prune": {"criterion": "l7"}}]}, PolicyError, "criterion of pass 'prune' must be .*l2"),
        ({"passes": [{"quantize": {"bits": 3.5}}]}, PolicyError, "a whole number of bits, got 3.5"),
        ({"passes": [{"distill": {"losses": "kdd"}}]}, AutocompressError, "kdd"),
        ({"passes": [{"quantize": {}}, {"prune": {}}]}, PolicyError, "put it before"),
        ({"export": {"formats": ["safetensors"]}}, RecipeError, "export.formats has safetensors only"),
    ],
)
def test_passes_that_cannot_be_are_refused_before_any_training(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stages.search(Run(tmp_path, recipe(**{"passes": INTEGERS} | changes)), Shown())
    assert not (tmp_path / "supernet.pt").exists()
