"""The stages of a run on 200 digits: what each leaves, bad input, damage, and kills at every moment."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import RECIPE, small_payload, small_recipe, small_space, table_by_hand, with_table
from torch import nn

from autocompress import stages
from autocompress.atomic import write_json
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.describe import describe_costs
from autocompress.errors import (
    AutocompressError,
    BudgetError,
    CheckpointError,
    DistillationError,
    ExportError,
    InfeasibleBudgetError,
    MissingRowError,
    PluginError,
    RecipeError,
    SpaceError,
    StorageError,
    TableError,
)
from autocompress.latency.correction import CheckedNetwork, ErrorReport, Figures
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import load_target
from autocompress.network import DropPath, build_network
from autocompress.peak_memory import peak_activation_bytes
from autocompress.progress import Progress
from autocompress.recipe import parse_recipe
from autocompress.result import load_result
from autocompress.run import Run, Shown
from autocompress.stages.finetuning import settings_of
from autocompress.trial import Outcome

SILENT = Shown()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all stages but the comparison; tests copy it before they change it."""
    folder = with_table(tmp_path_factory.mktemp("stages") / "run")
    run = Run(folder, small_recipe())
    stages.export(run, SILENT)
    return folder


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Run:
    """A copy of that run, opened."""
    shutil.copytree(exported, tmp_path / "run")
    return Run(tmp_path / "run")


def no_stage() -> Shown:
    """Fail the test when a stage starts."""

    @contextmanager
    def stage(found: str) -> Iterator[Progress]:
        raise AssertionError(f"stage {found!r} started")
        yield

    return Shown(stage=stage)


def ages(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# What stages leave -----------------------------------------------------------------------------------------


def test_a_search_pays_for_its_evaluations_within_the_budget(run: Run) -> None:
    result = stages.search(run, SILENT)
    macs = [trial.costs["macs"] for trial in result.trials]
    largest = float(stages.costs(run, SILENT)[0].of(run.space.largest())[0])
    assert len(result.trials) == run.recipe.search.evaluations == 6
    assert max(macs) <= 0.9 * largest * (1 + 1e-9)
    assert {frozenset(trial.costs) for trial in result.trials} == {
        frozenset(
            {"macs", "params", "size_bytes", "bops", "peak_activation_bytes", "energy_mj", "latency_ms"}
        )
    }
    assert result.notes is not None
    assert result.notes["data"] == run.data.fingerprint


def test_regularisers_without_a_place_and_options_of_no_loss_are_refused_before_training(
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match="drops paths of cells"):
        stages.check(Run(tmp_path / "run", small_recipe(finetune={"drop_path": 0.2})))
    with pytest.raises(RecipeError, match=r"start must be below end, got 0.9 and 0.1: it would"):
        small_recipe(finetune={"distill": [{"loss": "at", "start": 0.9, "end": 0.1}]})
    distill = [{"loss": "at", "options": {"powr": 2}}]
    with pytest.raises(DistillationError, match="'at' has the options power, got powr"):
        stages.check(Run(tmp_path / "other", small_recipe(finetune={"distill": distill})))


def test_a_cell_without_paths_is_finetuned_without_dropping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of its space have some, or the recipe would be refused."""
    run = Run(tmp_path / "run", small_recipe(finetune={"drop_path": 0.2}))
    monkeypatch.setattr("autocompress.stages.finetuning.chosen_formats", lambda run: {})
    kept = [settings_of(run, network) for network in (nn.Sequential(DropPath()), nn.Sequential())]
    assert [chosen.drop_path for chosen in kept] == [0.2, 0.0]


def test_predicted_latencies_are_those_of_the_table(run: Run) -> None:
    """By hand: 0.05 ms a block and a microsecond for a thousand MACs."""
    for trial in stages.search(run, SILENT).trials:
        blocks = run.space.operations(run.space.encode([trial.architecture]))
        macs = sum(op.macs for _, ops in blocks for op in ops)
        assert trial.costs["latency_ms"] == pytest.approx(0.05 * len(blocks) + macs / 1e6)
        assert trial.costs["macs"] == macs


def test_a_budget_of_activations_is_of_the_batch_and_number_format_of_the_target(run: Run) -> None:
    blocks = run.space.operations(run.space.largest())
    largest = peak_activation_bytes(blocks)
    limits = stages.resolve(run, SILENT, Budget.parse("peak_activation_bytes=80%,macs=90%")).limits
    assert limits["peak_activation_bytes"] == pytest.approx(0.8 * largest)
    where = replace(load_target(batch=3), number_format="int8")
    peak = {cost.metric: cost for cost in stages.untimed_costs(run.space, where)}["peak_activation_bytes"]
    assert peak.of(run.space.largest()).tolist() == [3 * largest / 4]


def test_a_line_of_costs_names_the_peak_of_activations_where_a_result_has_it() -> None:
    found = {"latency_ms": 1.5, "macs": 2e6, "params": 3e3, "size_bytes": 12e3}
    line = "1.500 ms (predicted), 2.00 M MACs, 3 k parameters, 0.01 MB"
    assert describe_costs(found) == line
    found["peak_activation_bytes"] = 6e4
    assert describe_costs(found) == f"{line}, activations of at most 60 kB"


def test_stages_that_are_done_start_nothing_and_write_nothing(run: Run) -> None:
    before = ages(run.folder)
    shown = no_stage()
    stages.profile(run, shown)
    stages.train(run, shown)
    stages.search(run, shown)
    stages.finetune(run, shown)
    stages.export(run, shown)
    assert ages(run.folder) == before


def test_what_was_finetuned_reads_back_as_it_was(run: Run) -> None:
    network, scored = stages.finetune(run, SILENT)
    arch = stages.selected(run, SILENT)
    stored = load_file(run.network_folder(arch) / "finetuned.safetensors")
    state = network.state_dict()
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    assert not network.training
    assert scored.count == len(run.data.validation) == 40  # type: ignore[arg-type]
    assert scored.mean == pytest.approx(accuracy(run, network))


def accuracy(run: Run, network: torch.nn.Module) -> float:
    """Second implementation, image by image; all networks of this space take 24 pixels."""
    right = 0
    with torch.no_grad():
        for image, label in run.data.validation:  # type: ignore[attr-defined]
            smaller = torch.nn.functional.interpolate(
                image[None], (24, 24), mode="bilinear", antialias=True, align_corners=False
            )
            right += int(network(smaller).argmax() == label)
    return right / 40


def test_the_exported_network_says_what_it_is_and_what_it_costs(run: Run) -> None:
    folder = stages.export(run, SILENT)
    arch = stages.selected(run, SILENT)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.parent == run.network_folder(arch)
    assert arch.key == manifest["architecture_key"]
    assert manifest["preprocessing"]["resize"] == [24, 24]
    assert manifest["preprocessing"]["mean"] == list(run.data.mean)
    trial = stages.search(run, SILENT).best()
    assert manifest["extra"]["predicted_costs"] == pytest.approx(trial.costs)
    assert manifest["extra"]["validation"]["mean"] == stages.finetune(run, SILENT)[1].mean


class Unread:
    """Stands for the test part; nothing may be read of it."""

    def __len__(self) -> int:
        raise AssertionError("the test part was read")

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the test part was read")


def test_no_stage_reads_the_test_part(tmp_path: Path) -> None:
    run = Run(with_table(tmp_path / "run"), small_recipe())
    run.__dict__["data"] = replace(run.data, test=Unread())  # type: ignore[arg-type]
    stages.export(run, SILENT)
    with pytest.raises(AssertionError, match="the test part was read"):
        run.data.test[0]


@pytest.mark.slow
def test_what_the_predictor_was_worth_is_kept_and_said(tmp_path: Path, exported: Path) -> None:
    folder = copy_of(exported, tmp_path, without=("result.json", "trials.log"))
    search = {"strategy": "predictor", "options": {"initial": 5, "round_size": 3}, "evaluations": 14}
    payload = small_recipe().model_dump(mode="json")
    payload["search"].update(search)
    rewrite_recipe(folder, payload)
    said: list[str] = []
    run = Run(folder)
    result = stages.search(run, Shown(say=said.append))
    assert len(result.trials) == 14
    assert result.notes is not None
    assert result.notes["predictor"]["rows"] == 14
    assert any("predictor, leave-one-out Kendall tau" in line for line in said)


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("synflow", "naswot")),
        *("none", "uniform", "params", "macs"),
    ],
)
def test_a_search_starts_from_what_the_recipe_says(tmp_path: Path, kind: str) -> None:
    run = Run(with_table(tmp_path / "run"), small_recipe(search={"warm_start": kind}))
    limits = stages.constraints(run, SILENT)
    rows = stages.warm_start(run, limits)
    uniform = uniform_candidates(limits)
    assert limits.feasible(rows).all()
    assert len(np.unique(rows, axis=0)) == len(rows)
    if kind == "none":
        assert len(rows) == 0
        return
    np.testing.assert_array_equal(rows[: len(uniform)], uniform)
    assert (len(rows) > len(uniform)) == (kind != "uniform")
    if kind in ("params", "macs"):  # what a proxy adds is what it likes best, in its order
        cost = limits.costs[kind].of(rows[len(uniform) :])
        assert (np.diff(cost) <= 0).all()


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe ask for two workers, wherever tests run."""
    for module in ("limits", "searching"):
        monkeypatch.setattr(f"autocompress.stages.{module}.cores", lambda: 2)


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_a_search_by_two_workers_finds_what_one_process_finds(exported: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        folder = copy_of(exported, tmp_path / str(workers), without=("trials.log", "result.json"))
        payload = yaml.safe_load((folder / "recipe.yaml").read_text())
        payload["search"] |= {"strategy": "random", "options": {}, "evaluations": 8, "workers": workers}
        rewrite_recipe(folder, payload)
        result = stages.search(Run(folder), SILENT)
        found.append([(t.number, t.architecture, t.outcome, t.metrics, t.costs) for t in result.trials])
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_more_workers_than_cores_are_refused_before_any_work(tmp_path: Path) -> None:
    run = Run(with_table(tmp_path / "run"), small_recipe(search={"workers": 1000}))
    with pytest.raises(RecipeError, match=r"search.workers .* must be at most the cores .*, got 1000"):
        stages.search(run, SILENT)
    assert not run.path(stages.CHECKPOINT).exists()


def copy_of(run: Path, tmp_path: Path, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    for name in without:
        (tmp_path / "copy" / name).unlink()
    return tmp_path / "copy"


def rewrite_recipe(folder: Path, payload: dict[str, Any]) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(payload))


# Search to distill -----------------------------------------------------------------------------------------


def distilled(exported: Path, tmp_path: Path, **sections: dict[str, Any]) -> Path:
    """A trained run that is not searched yet, whose reward is distilled accuracy."""
    folder = copy_of(exported, tmp_path, without=("trials.log", "result.json"))
    search = {"reward": "distilled", "reward_epochs": 2} | sections.pop("search", {})
    rewrite_recipe(folder, small_recipe(search=search, **sections).model_dump(mode="json"))
    return folder


def metrics_of(run: Run) -> dict[str, Mapping[str, float]]:
    return {trial.architecture.key: trial.metrics for trial in stages.search(run, SILENT).trials}


def test_scores_of_a_search_to_distill_are_those_of_finetuning(exported: Path, tmp_path: Path) -> None:
    """The whole finetuning of the recipe, as long as that of the reward: only the choice of epoch differs."""
    run = Run(distilled(exported, tmp_path))
    said: list[str] = []
    result = stages.search(run, Shown(say=said.append))
    best = result.best()
    found = f"{best.metrics['accuracy']:.4f} (after 2 epochs of distillation) of 6 evaluated networks"
    assert any(f"best validation accuracy {found}" in line for line in said)
    network, last = stages.finetune(run, SILENT, best.architecture)[0], run.recipe.finetune.epochs
    report = json.loads((run.network_folder(best.architecture) / "finetune.json").read_text())
    if report["epoch"] == last:
        assert report["mean"] == best.metrics["accuracy"] == pytest.approx(accuracy(run, network))
    scores = torch.load(run.network_folder(best.architecture) / "finetune.pt", weights_only=True)
    assert scores["position"]["scores"][-1] == [last, "network", best.metrics["accuracy"]]


def test_distilled_scores_are_other_trials_than_slices_and_stay_when_resumed(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = distilled(exported, tmp_path, search={"evaluations": 3, "reward_epochs": 1})
    found = metrics_of(Run(folder))
    of_slices = metrics_of(Run(exported))
    both = found.keys() & of_slices.keys()
    assert both
    assert any(found[key] != of_slices[key] for key in both)
    Run(folder).path("result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "autocompress.evaluation.distilled.finetune",
            lambda *_, **__: pytest.fail("a stored trial was paid for again"),
        )
        assert metrics_of(Run(folder)) == found
    Run(folder).path("result.json").unlink()
    payload = yaml.safe_load((folder / "recipe.yaml").read_text())
    for section, changes in (
        ("search", {"reward": "slice"}),
        ("search", {"reward_epochs": 2}),
        ("finetune", {"alpha": 0.5}),
    ):
        rewrite_recipe(folder, payload | {section: payload[section] | changes})
        (folder / "stages.json").unlink(missing_ok=True)  # that would have put the trials aside
        with pytest.raises(StorageError, match="belong to another search: reward differ"):
            stages.search(Run(folder), SILENT)
    # How long the winner is finetuned is another matter.
    rewrite_recipe(folder, payload | {"finetune": payload["finetune"] | {"epochs": 3}})
    assert metrics_of(Run(folder)) == found


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"strategy": "darts", "options": {}}, "'darts' learns together with the supernet from its loss"),
        ({"strategy": "dmcp", "options": {}}, "'dmcp' learns together with the supernet from its loss"),
        (
            {"strategy": "sensitivity", "options": {"measure": "distance"}},
            "'sensitivity' cannot read 'distance'; leave it out of search.options",
        ),
    ],
)
def test_a_strategy_that_reads_no_distilled_scores_is_refused_before_any_work(
    tmp_path: Path, search: dict[str, Any], message: str
) -> None:
    run = Run(with_table(tmp_path / "run"), small_recipe(search={**search, "reward": "distilled"}))
    with pytest.raises(RecipeError, match=f"search.reward distilled .*{message}"):
        stages.search(run, SILENT)
    assert not run.path(stages.CHECKPOINT).exists()


@pytest.mark.slow
def test_a_strategy_that_would_compare_outputs_reads_distilled_scores(exported: Path, tmp_path: Path) -> None:
    search = {"strategy": "sensitivity", "options": {"points": 2}, "evaluations": 30, "reward_epochs": 1}
    result = stages.search(Run(distilled(exported, tmp_path, search=search)), SILENT)
    assert result.notes is not None
    assert [round_["measure"] for round_ in result.notes["sensitivity"]] == ["accuracy"]


def test_a_search_to_distill_without_losses_of_distillation_says_so(exported: Path, tmp_path: Path) -> None:
    search = {"evaluations": 2, "reward_epochs": 1}
    run = Run(distilled(exported, tmp_path, search=search, finetune={"distill": "none"}))
    said: list[str] = []
    notes = stages.search(run, Shown(say=said.append)).notes
    assert any("(after 1 epoch of finetuning) of 2 evaluated networks" in line for line in said)
    assert notes is not None
    assert notes["reward"]["teacher"] == ""


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_distilled_scores_of_two_workers_are_those_of_one_process(exported: Path, tmp_path: Path) -> None:
    """Memory of Ray is read-only: a worker that wrote to its weights or images would die."""
    search = {"strategy": "random", "options": {}, "evaluations": 4}
    found = [
        metrics_of(Run(distilled(exported, tmp_path / str(n), search={**search, "workers": n})))
        for n in (1, 2)
    ]
    assert len(found[0]) == 4
    assert found[0] == found[1]


# Selecting -------------------------------------------------------------------------------------------------


def test_a_selected_network_is_what_later_stages_work_on(run: Run) -> None:
    result = stages.search(run, SILENT)
    limit = sorted(trial.costs["latency_ms"] for trial in result.trials)[2]
    trial = stages.select(run, SILENT, budget=Budget.of({"latency_ms": limit}), cheapest="", within=0.0)
    fitting = [t for t in result.trials if t.costs["latency_ms"] <= limit * (1 + 1e-9)]
    assert len(fitting) == 3
    assert trial.metrics["accuracy"] == max(t.metrics["accuracy"] for t in fitting)
    assert stages.selected(Run(run.folder), SILENT) == trial.architecture


def test_a_selection_goes_before_the_best_network_of_the_search(run: Run) -> None:
    result = stages.search(run, SILENT)
    best = result.best().architecture
    other = next(trial.architecture for trial in result.trials if trial.architecture != best)
    assert stages.selected(run, SILENT) == best
    content = {"architecture": json.loads(other.to_json()), "rule": "by hand"}
    write_json(run.path("selected.json"), content)
    assert stages.selected(run, SILENT) == other
    assert stages.selected(run, SILENT, best) == best


def test_the_cheapest_within_a_tolerance_can_be_selected(run: Run) -> None:
    result = stages.search(run, SILENT)
    trial = stages.select(run, SILENT, budget=None, cheapest="macs", within=1.0)
    assert trial.costs["macs"] == min(t.costs["macs"] for t in result.trials)
    assert stages.selected(run, SILENT) == trial.architecture
    again = stages.select(run, SILENT, budget=None, cheapest="", within=0.0)
    assert stages.selected(run, SILENT) == again.architecture == result.best().architecture


def test_a_network_that_was_never_searched_can_be_finetuned_by_its_architecture(run: Run) -> None:
    arch = run.space.decode(run.space.smallest())[0]
    _, scored = stages.finetune(run, SILENT, arch)
    assert (run.network_folder(arch) / "finetuned.safetensors").exists()
    assert 0 <= scored.mean <= 1


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"macs": 10}, InfeasibleBudgetError, "nearest feasible budget is macs <="),
        (
            {"energy": 3},
            BudgetError,
            "a budget limits latency_ms, macs, params, size_bytes, bops, peak_activation_bytes, energy_mj or",
        ),
    ],
)
def test_a_selection_that_is_not_there_is_refused(
    run: Run, limits: dict[str, float | str], error: type[Exception], message: str
) -> None:
    before = ages(run.folder)
    with pytest.raises(error, match=message):
        stages.select(run, SILENT, budget=Budget.of(limits), cheapest="", within=0.0)
    assert ages(run.folder) == before


# Refused before the hours of training ----------------------------------------------------------------------


def refused(folder: Path, error: type[AutocompressError], message: str, **changes: Any) -> str:
    with_table(folder)
    with pytest.raises(error, match=message) as caught:
        stages.search(Run(folder, small_recipe(**changes)), no_stage())
    assert not (folder / "supernet.pt").exists()
    return str(caught.value)


def test_an_impossible_budget_is_refused_with_the_nearest_feasible_one(tmp_path: Path) -> None:
    space = small_space()
    least = table_by_hand(space).cost(space).minimum
    message = r"no network .* fits latency_ms <= 0.1; .*nearest feasible budget is latency_ms <= (\d\.\d+)$"
    told = refused(tmp_path, InfeasibleBudgetError, message, search={"budget": {"latency_ms": 0.1}})
    nearest = float(told.rpartition(" ")[2])
    assert least <= nearest <= least * 1.0001


def checked_table(ratio: float, networks: int = 40) -> LatencyTable:
    """The table by hand, on whose networks measurements were so many times the predictions."""
    checked = tuple(CheckedNetwork("", 13, 1.0, ratio, 1.0) for _ in range(networks))
    figures = {"raw": Figures(0.0, 2.5, 2.5, 100.0, 100.0, 1.0, 1.0)}
    report = ErrorReport(checked, figures, "raw", 0.0, (), None, 0)  # type: ignore[arg-type]
    return replace(table_by_hand(small_space()), error_report=report)


def test_a_confidence_tightens_the_latency_budget_by_the_errors_of_the_table(tmp_path: Path) -> None:
    checked_table(1.04).save(tmp_path / stages.TABLE)
    plain = stages.constraints(Run(tmp_path, small_recipe(search={"budget": {"latency_ms": "90%"}})), SILENT)
    recipe = small_recipe(search={"budget": {"latency_ms": "90%", "macs": "95%"}, "confidence": 0.95})
    run = Run(tmp_path, recipe)
    limits = stages.constraints(run, SILENT)
    assert limits.limits["latency_ms"] == pytest.approx(plain.limits["latency_ms"] / 1.04)
    result = stages.search(run, SILENT)
    assert result.limits == limits.limits
    assert all(trial.costs["latency_ms"] * 1.04 <= plain.limits["latency_ms"] for trial in result.trials)
    least = limits.costs["latency_ms"].minimum
    with pytest.raises(InfeasibleBudgetError, match=r"divided by 1.04 for search.confidence 0.95") as caught:
        stages.resolve(run, SILENT, Budget.of({"latency_ms": 1.02 * least}))
    assert caught.value.nearest["latency_ms"] == pytest.approx(1.04 * least)


def test_a_confidence_without_enough_checked_networks_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(search={"budget": {"latency_ms": "90%"}, "confidence": 0.95})
    checked_table(1.04, networks=10).save(tmp_path / "few" / stages.TABLE)
    with pytest.raises(TableError, match="needs at least 19 measured networks, the error report has 10"):
        stages.constraints(Run(tmp_path / "few", recipe), SILENT)
    with_table(tmp_path / "none")
    macs = Run(with_table(tmp_path / "macs"), small_recipe(search={"confidence": 0.95}))
    assert "latency_ms" not in stages.constraints(macs, SILENT).limits
    with pytest.raises(TableError, match="needs a table that was checked on whole networks"):
        stages.constraints(Run(tmp_path / "none", recipe), SILENT)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"search": {"options": {"populaton": 3}}},
            RecipeError,
            "search.options.populaton: strategy 'evolution' takes population, sample_size, mutation_",
        ),
        (
            {"search": {"options": {"constraints": 3}}},
            RecipeError,
            "search.options.constraints: strategy 'evolution' takes population",
        ),
        (
            {"search": {"options": {"population": 0}}},
            RecipeError,
            "population must be an integer >= 1, got 0",
        ),
        ({"search": {"strategy": "evolutoin"}}, PluginError, "did you mean 'evolution'"),
        ({"space": {"name": "mobilnet_v3"}}, PluginError, "did you mean 'mobilenet_v3'"),
        (
            {"space": {"arguments": {"depth": [2]}}},
            RecipeError,
            "space.arguments.depth: mobilenet_v3 takes preset",
        ),
        ({"space": {"arguments": {"depths": [3, 2]}}}, SpaceError, "depths must be ascending"),
        ({"target": {"name": "gpu"}}, PluginError, "no target 'gpu'; there are onnxruntime-cpu, "),
    ],
)
def test_names_and_options_that_are_not_there_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[AutocompressError], message: str
) -> None:
    refused(tmp_path, error, message, **changes)


def test_a_table_of_another_target_is_refused(tmp_path: Path) -> None:
    message = "the latency table of 'onnxruntime-cpu' is not for 'pytorch-cpu' on this machine: runtime is"
    refused(tmp_path, TableError, message, target={"name": "pytorch-cpu"})
    with pytest.raises(TableError, match="threads is 1, not 2"):
        stages.profile(Run(with_table(tmp_path / "b"), small_recipe(target={"threads": 2})), SILENT)


def test_a_given_table_of_another_target_is_refused(tmp_path: Path) -> None:
    table_by_hand(small_space(), load_target(batch=8)).save(tmp_path / "table.json")
    recipe = small_recipe(profile={"table": str(tmp_path / "table.json")})
    with pytest.raises(TableError, match="batch is 8, not 1"):
        stages.profile(Run(tmp_path / "run", recipe), SILENT)


def test_a_table_without_a_block_of_the_space_is_refused(tmp_path: Path) -> None:
    table = table_by_hand(small_space())
    rows = dict(list(table.rows.items())[1:])
    run = Run(tmp_path, small_recipe())
    LatencyTable(table.target, rows, table.correction, None, table.provenance).save(tmp_path / stages.TABLE)
    with pytest.raises(MissingRowError, match="has no row for 1 block; the first is"):
        stages.search(run, no_stage())


# Damaged files ---------------------------------------------------------------------------------------------


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"\x00garbage" * 50)


def one_byte(path: Path) -> None:
    """Change one byte in the second half, where the content of files is."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 0xFF
    path.write_bytes(content)


Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", [halve, empty, garble, Path.unlink])
@pytest.mark.parametrize(
    ("name", "error", "stage"),
    [
        ("supernet.pt", CheckpointError, stages.train),
        ("result.json", StorageError, stages.search),
        ("latency_table.json", TableError, stages.profile),
        ("finetuned.safetensors", CheckpointError, stages.finetune),
        ("finetune.json", CheckpointError, stages.finetune),
        ("network.safetensors", ExportError, stages.export),
        ("manifest.json", ExportError, stages.export),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    run: Run, name: str, error: type[AutocompressError], stage: Any, damage: Damage
) -> None:
    (path,) = run.folder.rglob(name)
    damage(path)
    starts_again = {"result.json", "latency_table.json", "finetune.json", "manifest.json"}
    if damage is Path.unlink and name in starts_again:
        return  # an absent result is a stage that was not done
    with pytest.raises(error, match=f"{name}|{path.parent.name}"):
        stage(run, SILENT)


def test_one_changed_byte_of_an_exported_network_is_found(run: Run) -> None:
    (path,) = run.folder.rglob("network.safetensors")
    one_byte(path)
    with pytest.raises(ExportError, match=r"network.safetensors"):
        stages.export(run, SILENT)


def test_a_checkpoint_of_other_settings_is_refused(run: Run) -> None:
    payload = run.recipe.model_dump(mode="json")
    payload["train"]["learning_rate"] = 0.3
    rewrite_recipe(run.folder, payload)
    run.path("stages.json").unlink()  # that would have put the checkpoint aside
    with pytest.raises(CheckpointError, match=r"belongs to another run: its settings.learning_rate is 0.1"):
        stages.train(Run(run.folder), SILENT)


def test_a_checkpoint_of_another_space_is_refused(run: Run) -> None:
    payload = run.recipe.model_dump(mode="json")
    payload["space"]["arguments"]["expands"] = [3, 5]
    rewrite_recipe(run.folder, payload)
    with pytest.raises(CheckpointError, match=r"belongs to another run: its space.fingerprint is"):
        stages.train(Run(run.folder), SILENT)


def test_trials_of_other_weights_are_refused(run: Run) -> None:
    run.path("result.json").unlink()
    checkpoint = torch.load(run.path("supernet.pt"), weights_only=True)
    next(iter(checkpoint["model"].values())).add_(1.0)
    torch.save(checkpoint, run.path("supernet.pt"))
    with pytest.raises(StorageError, match="belong to another search: weights differ"):
        stages.search(run, SILENT)


@pytest.mark.parametrize("content", ["null", "3", '{"choices": 3}', "{"])
def test_a_damaged_account_of_training_is_refused_with_the_way_out(run: Run, content: str) -> None:
    run.path("training.json").write_text(content)
    with pytest.raises(StorageError, match=r"training.json.*remove it, and"):
        stages.train(run, SILENT)


@pytest.mark.parametrize("content", ["null", "3", "{}", "{"])
def test_a_damaged_result_is_refused_with_the_way_out(run: Run, content: str) -> None:
    run.path("result.json").write_text(content)
    with pytest.raises(StorageError, match=r"result.json.*remove it, and the search writes it again"):
        stages.search(run, SILENT)
    run.path("result.json").unlink()
    stages.search(run, SILENT)


@pytest.mark.parametrize("content", ["{", '{"architecture": {}, "rule": ""}', "{}", "3"])
def test_a_damaged_selection_is_refused(run: Run, content: str) -> None:
    run.path("selected.json").write_text(content)
    with pytest.raises(AutocompressError, match=r"selected.json|architecture"):
        stages.finetune(run, SILENT)


# Kills -----------------------------------------------------------------------------------------------------


def killed_runs(folder: Path, *jobs: tuple[str, str, list[str]], recipe: Mapping[str, Any] = RECIPE) -> None:
    """Run `killed_runs.py` on a recipe; folders are relative."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_runs.py"), "recipe.yaml", json.dumps(jobs)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=True,
        timeout=1200,
    )


# Times, random names and what differs with them; checkpoints are compared as tensors.
DIFFERS = {"trials.log", "environment.json", "events.txt", ".lock", "supernet.pt", "finetune.pt"}


def assert_equal_runs(first: Path, second: Path) -> None:
    """Every file is equal to the last byte, and there are no others but hidden ones that a kill left."""
    names, others = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    )
    assert names == {name for name in others if not Path(name).name.endswith(".tmp")}
    for name in names:
        if Path(name).name not in DIFFERS:
            assert content_of(first / name) == content_of(second / name), name
        elif name.endswith(".pt"):
            states = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
            for state in states:
                del state["random"]  # of the process; nothing in this run draws from it
                del state["position"]["seconds"]
            assert_equal(*states)


def content_of(path: Path) -> Any:
    """The bytes of a file; of the account of a training all but its seconds, which differ."""
    if path.name != "training.json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    assert content.pop("seconds") > 0
    return content


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(tmp_path: Path) -> None:
    with_table(tmp_path / "whole")
    with_table(tmp_path / "killed")
    moments = ["train the supernet:3", "search by evolution:4", "finetune with distillation:3", "exported<"]
    killed_runs(
        tmp_path,
        ("whole", "export", []),
        ("killed", "export", moments),
        ("profiled", "profile", ["profile onnxruntime-cpu"]),
    )
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    trials = (tmp_path / "killed" / "trials.log").read_text().splitlines()
    assert sum('"op_code":4' in line for line in trials) == 6  # none was evaluated twice
    # No sample that was taken before the kill is taken again.
    before = (tmp_path / "profiled" / "killed.jsonl").read_bytes()
    after = (tmp_path / "profiled" / "latency_samples.jsonl").read_bytes()
    assert after.startswith(before)
    assert rounds(before) == 1
    assert rounds(after) == RECIPE["profile"]["max_rounds"] == 2


@pytest.mark.slow
def test_a_differentiable_search_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = small_payload(search={"strategy": "darts", "options": {"learning_rate": 0.01}})
    recipe["train"]["batch_size"] = 20  # half of the images, two epochs: eight steps
    with_table(tmp_path / "whole")
    with_table(tmp_path / "killed")
    moments = [
        "train the supernet and darts:1",
        "train the supernet and darts:3",
        "search by darts:1",
    ]
    killed_runs(tmp_path, ("whole", "export", []), ("killed", "export", moments), recipe=recipe)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    result = load_result(tmp_path / "whole" / "result.json", small_space())
    (trial,) = result.trials
    assert trial.outcome is Outcome.MEASURED
    assert trial.costs["macs"] <= result.limits["macs"]
    assert result.notes is not None
    epochs = result.notes["relaxation"]["epochs"]
    assert [seen["epoch"] for seen in epochs] == [1, 2]
    assert all(seen["eigenvalue"] != 0 for seen in epochs)


CELLS: dict[str, Any] = {
    "space": {"name": "nas_bench_201", "arguments": {"channels": 4, "cells": 2, "resolution": 8}},
    "train": {"proxy": {"channels": 2, "cells": 1}, "batch_size": 20, "epochs": 3},
    "search": {
        "strategy": "p_darts",
        "options": {"grow": {"channels": [2, 2]}, "max_skips": 1},
        "budget": {"latency_ms": "70%"},
    },
    "finetune": {"drop_path": 0.1, "auxiliary": 0.4, "cutout": 2},
}


def cells_run(folder: Path, **changes: Any) -> Run:
    payload = small_payload(**CELLS)
    payload["space"] = CELLS["space"]
    for section, values in changes.items():
        payload[section].update(values)
    run = Run(folder, parse_recipe(payload))
    table_by_hand(run.space).save(run.path(stages.TABLE))
    return run


@pytest.mark.slow
def test_cells_are_searched_in_a_small_supernet_for_a_large_network(tmp_path: Path) -> None:
    run = cells_run(tmp_path)
    said: list[str] = []
    result = stages.search(run, Shown(say=said.append))
    trial = result.best()
    large = run.space.encode([trial.architecture])
    assert stages.train(run, SILENT).space.settings["channels"] == 2
    assert trial.costs["macs"] == operation_cost(run.space, "macs").of(large)
    assert trial.costs["latency_ms"] <= result.limits["latency_ms"]
    assert str(dict(trial.architecture.settings)).count("skip_connect") <= 1
    assert [line[:8] for line in said if line.startswith("epoch")] == ["epoch 1:", "epoch 2:", "epoch 3:"]
    assert {path.name for path in tmp_path.glob("supernet*")} == {
        "supernet-phase1.pt",
        "supernet-phase2.pt",
        "supernet.pt",
    }
    network, _ = stages.finetune(run, SILENT)
    built = build_network(run.space.operations(large))
    assert {n: t.shape for n, t in network.state_dict().items()} == {
        n: t.shape for n, t in built.state_dict().items()
    }


def test_a_proxy_is_for_gradients_and_differs_in_size_only(tmp_path: Path) -> None:
    run = cells_run(tmp_path / "a", search={"strategy": "random", "options": {}})
    with pytest.raises(RecipeError, match="belongs to strategies by gradients"):
        stages.train(run, SILENT)
    run = cells_run(tmp_path / "b", train={"proxy": {"operations": ["skip_connect", "nor_conv_3x3"]}})
    with pytest.raises(SpaceError, match="differ from it in size only"):
        stages.train(run, SILENT)
    run = cells_run(tmp_path / "c", train={"proxy": {"layers": 3}})
    with pytest.raises(RecipeError, match=r"train\.proxy\.layers: nas_bench_201 takes"):
        stages.train(run, SILENT)


def rounds(samples: bytes) -> int:
    return sum(b'"ms": {' in line for line in samples.splitlines())


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Before and after each file takes its name, and at each step, evaluation and round that is told."""
    with_table(tmp_path / "whole")
    killed_runs(tmp_path, ("whole", "export", []), ("profiled", "profile", []))
    events = (tmp_path / "whole" / "events.txt").read_text().splitlines()
    assert len(events) > 40
    profiled = len((tmp_path / "profiled" / "events.txt").read_text().splitlines())
    jobs = [(f"killed{i}", "export", [str(i)]) for i in range(len(events))]
    for name, _, _ in jobs:
        with_table(tmp_path / name)
    profiles = [(f"profiled{i}", "profile", [str(i)]) for i in range(profiled)]
    killed_runs(tmp_path, *jobs, *profiles)
    for name, _, _ in jobs:
        assert_equal_runs(tmp_path / "whole", tmp_path / name)
    for name, _, _ in profiles:
        samples = (tmp_path / name / "latency_samples.jsonl").read_bytes()
        assert rounds(samples) == RECIPE["profile"]["max_rounds"]


@pytest.mark.slow
def test_two_runs_in_one_process_are_equal(exported: Path, tmp_path: Path) -> None:
    """What the comparison of killed runs stands on."""
    run = Run(with_table(tmp_path / "again"), small_recipe())
    stages.finetune(run, SILENT)
    for name in ("result.json", "training.json"):
        assert content_of(run.path(name)) == content_of(exported / name)
    arch = stages.selected(run, SILENT)
    ours, theirs = (
        Run(folder).network_folder(arch) / "finetuned.safetensors" for folder in (run.folder, exported)
    )
    assert ours.read_bytes() == theirs.read_bytes()


# Disks -----------------------------------------------------------------------------------------------------


def test_a_run_whose_folder_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*\.lock: (Not a directory|File exists)"):
        Run(tmp_path / "file" / "run", small_recipe())


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (stages.train, ["training.json", "supernet.pt"]),
        (stages.search, ["result.json"]),
        (stages.finetune, ["finetuned.safetensors", "finetune.json", "finetune.pt"]),
    ],
)
def test_a_disk_that_is_full_stops_a_stage_which_goes_on_when_there_is_room(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, names: list[str]
) -> None:
    """No file of the stage can be flushed, and nothing is left of it."""
    folder = copy_of(exported, tmp_path)
    paths = [path for name in names for path in folder.rglob(name)]
    assert len(paths) == len(names)
    for path in paths:
        path.unlink()
    run = Run(folder)
    before = set(ages(folder))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot (write|open) .*: No space left on device"):
            stage(run, SILENT)
    assert set(ages(folder)) == before
    stage(run, SILENT)
    first = paths[0].relative_to(folder)
    assert content_of(folder / first) == content_of(exported / first)


# Numbers ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_training_with_a_clear_error(tmp_path: Path) -> None:
    run = Run(with_table(tmp_path), small_recipe(train={"learning_rate": 1e30, "optimizer": "sgd"}))
    with pytest.raises(
        AutocompressError, match=r"training collapsed: the (loss|gradient) is (nan|inf) at step"
    ):
        stages.train(run, SILENT)
    assert not run.path("training.json").exists()


def test_a_failed_evaluation_is_no_end_of_a_search(exported: Path, tmp_path: Path) -> None:
    folder = copy_of(exported, tmp_path, without=("result.json", "trials.log"))
    run = Run(folder)
    score = run.task.score
    calls = iter(range(100))
    tried = 2  # on a few images of both parts before anything else

    def sometimes(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return score(outputs, targets) * (np.nan if next(calls) == 2 + tried else 1.0)

    run.__dict__["task"] = replace(run.task, score=sometimes)
    result = stages.search(run, SILENT)
    outcomes = [trial.outcome for trial in result.trials]
    assert outcomes == [0, 0, Outcome.FAILED, 0, 0, 0]
    assert "40 of 40 held-out samples is not finite" in result.trials[2].error
    assert load_result(run.path("result.json"), run.space).trials == result.trials


def test_threads_that_were_chosen_once_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of floats depend on their number."""
    before = torch.get_num_threads()
    run = Run(tmp_path / "run", small_recipe(threads=None))
    chosen = iter((1, 2))
    monkeypatch.setattr("autocompress.stages.training.choose_threads", lambda step: next(chosen))
    try:
        for _ in range(2):
            stages.set_threads(Run(run.folder))
            assert torch.get_num_threads() == 1
            assert json.loads(run.path("threads.json").read_text()) == {"threads": 1}
    finally:
        torch.set_num_threads(before)
