"""The final comparison of a small run, on a clock and a memory that are made up."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_recipe, table_by_hand, with_table
from torch import nn

from autocompress import stages
from autocompress.budget import Constraints
from autocompress.errors import StorageError
from autocompress.latency import check
from autocompress.latency.correction import Checks, assess
from autocompress.latency.measure import Measurement
from autocompress.latency.plan import check_networks, network_name
from autocompress.latency.target import load_target
from autocompress.report import comparison
from autocompress.report.show import markdown
from autocompress.run import Run, Shown
from autocompress.space import Codes

SILENT = Shown()


def measured_by_hand(runs: Mapping[str, Any], **more: Any) -> dict[str, Measurement]:
    return {name: Measurement(1.0 + i, 1.0 + i, 1.0 + i, 0.1, 2.0 + i, 7) for i, name in enumerate(runs)}


def some_candidates(limits: Constraints) -> Codes:
    """Uniform scaling has one network in this space; five make a choice."""
    return np.unique(limits.sample(5, np.random.default_rng(0)), axis=0)


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "measure_networks", measured_by_hand)
        patch.setattr(comparison, "peak_memory_bytes", lambda path, target: path.stat().st_size)
        patch.setattr(comparison, "uniform_candidates", some_candidates)
        yield


class Noted:
    """The test part of the data, which notes what was there whenever it is read."""

    def __init__(self, part: Any, folder: Path) -> None:
        self.part, self.folder = part, folder
        self.reads: list[set[str]] = []

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        if index == 0:
            self.reads.append({path.name for path in self.folder.rglob("*")})
        return self.part[index]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Noted]:
    folder = with_table(tmp_path_factory.mktemp("compared") / "run")
    recipe = small_recipe(search={"budget": {"latency_ms": "90%"}}, random_networks=3)
    run = Run(folder, recipe)
    test = Noted(run.data.test, folder)
    part = run.data.test
    run.__dict__["data"] = replace(run.data, test=test)  # type: ignore[arg-type]
    content = comparison.report(run, SILENT)
    run.__dict__["data"] = replace(run.data, test=part)
    return run, content, test


Compared = tuple[Run, dict[str, Any], Noted]


def folder_of(run: Run, key: str) -> Path:
    """Of a network that was finetuned once."""
    (folder,) = run.folder.glob(f"networks/{key}-*")
    return folder


def rows(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in content["rows"]}


def test_the_promised_networks_are_compared(compared: Compared) -> None:
    _, content, _ = compared
    assert [row["name"] for row in content["rows"]] == [
        "largest",
        "uniform-scaled",
        "random 1",
        "random 2",
        "random 3",
        "searched",
        "uniform-scaled, finetuned",
        "searched, finetuned",
    ]


@pytest.mark.slow
def test_what_gradients_found_is_compared_with_networks_that_were_trained_like_it(tmp_path: Path) -> None:
    recipe = small_recipe(
        search={"strategy": "darts", "options": {}, "budget": {"latency_ms": "90%"}},
        train={"batch_size": 20},
        random_networks=2,
    )
    run = Run(with_table(tmp_path / "run"), recipe)
    content = comparison.report(run, SILENT)
    assert [row["name"] for row in content["rows"]] == [
        "uniform-scaled, finetuned",
        "random 1, finetuned",
        "random 2, finetuned",
        "searched, finetuned",
    ]
    assert all(row["costs"]["latency_ms"] <= content["limits"]["latency_ms"] for row in content["rows"])
    text = markdown(content)
    assert "all networks were trained anew in the same way" in text
    assert "random, mean of 2 (standard deviation)" in text


def test_every_network_but_the_largest_is_within_the_budget(compared: Compared) -> None:
    run, content, _ = compared
    found = rows(content)
    largest = found.pop("largest")
    limit = content["limits"]["latency_ms"]
    assert limit == pytest.approx(0.9 * largest["costs"]["latency_ms"])
    assert largest["key"] == run.space.decode(run.space.largest())[0].key
    assert all(row["costs"]["latency_ms"] <= limit for row in found.values())
    assert all(found[f"random {i}"]["costs"]["latency_ms"] >= 0.9 * limit for i in (1, 2, 3))
    assert len({found[f"random {i}"]["key"] for i in (1, 2, 3)}) > 1


def test_costs_are_those_of_the_table_and_of_the_operations(compared: Compared) -> None:
    """By hand: 0.05 ms a block and a microsecond for a thousand MACs, 4 bytes a parameter."""
    for row in compared[1]["rows"]:
        costs = row["costs"]
        # Stem, first block, two blocks in each of five stages, head.
        assert costs["latency_ms"] == pytest.approx(13 * 0.05 + costs["macs"] / 1e6)
        assert costs["size_bytes"] == pytest.approx(4 * costs["params"], rel=0.05)


def test_the_searched_network_is_the_one_the_search_found_best(compared: Compared) -> None:
    run, content, _ = compared
    best = stages.search(run, SILENT).best()
    found = rows(content)
    for name in ("searched", "searched, finetuned"):
        assert found[name]["key"] == best.architecture.key
        assert found[name]["costs"] == pytest.approx(best.costs)
    assert found["searched"]["validation"] == best.metrics["accuracy"]


def test_finetuned_rows_are_of_the_finetuned_weights(compared: Compared) -> None:
    run, content, _ = compared
    found = rows(content)
    for name in ("uniform-scaled", "searched"):
        finetuned = found[f"{name}, finetuned"]
        assert finetuned["key"] == found[name]["key"]
        report = folder_of(run, finetuned["key"]) / "finetune.json"
        assert finetuned["validation"] == pytest.approx(json.loads(report.read_text())["mean"])


def test_the_uniform_network_is_the_best_on_validation_of_those_that_fit(compared: Compared) -> None:
    run, content, _ = compared
    limits = stages.constraints(run, SILENT)
    score = stages.evaluator(run, stages.train(run, SILENT))
    values = score(some_candidates(limits))["accuracy"]
    assert rows(content)["uniform-scaled"]["validation"] == values.max() > values.min()


def accuracy_on(part: Any, network: nn.Module) -> float:
    """Second implementation, image by image."""
    right = 0
    with torch.no_grad():
        for index in range(len(part)):
            image, label = part[index]
            smaller = nn.functional.interpolate(
                image[None], (24, 24), mode="bilinear", antialias=True, align_corners=False
            )
            right += int(network(smaller).argmax() == label)
    return right / len(part)


def test_test_accuracy_is_that_of_the_whole_test_part_with_wilsons_interval(compared: Compared) -> None:
    run, content, noted = compared
    row = rows(content)["searched, finetuned"]
    n = row["test_images"]
    assert n == len(noted)
    p = accuracy_on(noted.part, stages.finetune(run, SILENT)[0])
    assert row["test"] == pytest.approx(p)
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert row["test_interval"] == pytest.approx([centre - half, centre + half])


def test_the_test_part_is_read_once_a_row_and_after_every_decision(compared: Compared) -> None:
    run, content, noted = compared
    again = Noted(noted.part, run.folder)
    run.__dict__["data"] = replace(run.data, test=again)  # type: ignore[arg-type]
    assert comparison.report(run, SILENT) == json.loads(json.dumps(content))
    assert again.reads == []
    assert len(noted.reads) == len(content["rows"]) == 8
    for seen in noted.reads:
        assert {"result.json", "manifest.json", "finetune.json"} <= seen
        assert "report-" not in seen


def test_equal_networks_are_measured_once_and_share_what_was_measured(compared: Compared) -> None:
    run, content, _ = compared
    by_key: dict[str, set[tuple[float, float, int]]] = {}
    for row in content["rows"]:
        found = row["latency_ms"], row["latency_p95_ms"], row["peak_memory_bytes"]
        by_key.setdefault(row["key"], set()).add(found)
    assert all(len(found) == 1 for found in by_key.values())
    assert len({found for values in by_key.values() for found in values}) == len(by_key)
    assert content["exported"] is None  # no ONNX among the formats of this run
    assert content["exported_folder"] == str(folder_of(run, rows(content)["searched"]["key"]) / "exported")


def test_a_change_of_the_machines_speed_since_the_profile_is_measured(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every network of the error report took twice as many ms as it has blocks, and now 1.5 times that."""
    run, _, _ = compared
    table = stages.profile(run, SILENT)
    codes = check_networks(run.space, run.recipe.profile.networks, seed=run.recipe.profile.seed)
    nets = [run.space.operations(row) for row in codes]
    then_ms = np.array([2.0 * len(net) for net in nets])
    names = tuple(network_name(net) for net in nets)
    checks = Checks(then_ms, np.array([float(len(net)) for net in nets]), then_ms, 0.05, names)
    _, report = assess(checks, [[ms] * 8 for ms in then_ms])
    monkeypatch.setattr(comparison, "profile", lambda run, shown: replace(table, error_report=report))
    checked = comparison._checked(run, SILENT)
    assert len(checked) == 8
    assert all(blocks in nets for blocks, _ in checked.values())

    def now(runs: Mapping[str, Any], **more: Any) -> dict[str, Measurement]:
        return {n: Measurement(1.5 * checked[n][1] if n in checked else 7.0, 0, 9, 0, 9, 9) for n in runs}

    monkeypatch.setattr(check, "measure_networks", now)
    arch = stages.search(run, SILENT).best().architecture
    files = {"exported": run.folder / "absent.onnx"}
    measured, drift = comparison._measure(run, [arch], files, checked)
    assert (list(measured), drift) == ([arch.key], pytest.approx(1.5))


def test_without_an_error_report_there_is_nothing_to_compare_the_machine_with(compared: Compared) -> None:
    run, content, _ = compared
    assert comparison._checked(run, SILENT) == {}
    assert content["drift"] is None


def test_the_comparison_is_kept_and_not_made_again(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, content, _ = compared

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(check, "measure_networks", refuse)
    assert comparison.report(Run(run.folder), SILENT) == json.loads(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_damaged_comparison_is_refused(compared: Compared, text: str) -> None:
    run, content, _ = compared
    (path,) = folder_of(run, rows(content)["searched"]["key"]).glob("report-*.json")
    kept = path.read_bytes()
    path.write_text(text)
    try:
        with pytest.raises(StorageError, match=r"report-.*.json cannot be read"):
            comparison.report(run, SILENT)
    finally:
        path.write_bytes(kept)


def test_where_no_uniform_network_fits_the_others_are_compared(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, content, _ = compared
    (path,) = folder_of(run, rows(content)["searched"]["key"]).glob("report-*.json")
    kept = path.read_bytes()
    path.unlink()
    none = np.zeros((0, len(run.space.choices)), dtype=np.int64)
    monkeypatch.setattr(comparison, "uniform_candidates", lambda constraints: none)
    try:
        again = comparison.report(run, SILENT)
    finally:
        path.write_bytes(kept)
    assert set(rows(content)) - set(rows(again)) == {"uniform-scaled", "uniform-scaled, finetuned"}
    assert again["uniform"] == "uniform-scaled: no such network fits the budget"


def test_networks_of_another_runtime_have_no_memory_of_a_session(tmp_path: Path) -> None:
    recipe = small_recipe(target={"name": "pytorch-cpu"}, random_networks=1, search={"evaluations": 2})
    run = Run(tmp_path / "run", recipe)
    table_by_hand(run.space, load_target("pytorch-cpu")).save(run.path(stages.TABLE))
    content = comparison.report(run, SILENT)
    assert {row["peak_memory_bytes"] for row in content["rows"]} == {None}
    assert content["target"]["runtime"] == "pytorch"


def test_a_budget_that_random_networks_cannot_use_up_is_said(tmp_path: Path) -> None:
    recipe = small_recipe(search={"budget": {"macs": "200%"}, "evaluations": 2}, random_networks=1)
    content = comparison.report(Run(with_table(tmp_path / "run"), recipe), SILENT)
    assert content["random"].endswith("uses at least 90% of it, where there are enough such")


def test_the_mean_and_spread_of_random_networks_are_by_hand() -> None:
    some = [{"name": f"random {i}", "test": value} for i, value in enumerate((0.5, 0.7, 0.9))]
    some += [{"name": "searched", "test": 1.0}]
    assert comparison.random_summary(some) == (pytest.approx(0.7), pytest.approx(0.2))
    assert comparison.random_summary(some[:1]) == (0.5, 0.0)
