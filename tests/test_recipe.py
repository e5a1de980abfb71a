"""Recipes: every mistake is an error with the path of its key, the value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from autocompress.cli import DEMO
from autocompress.errors import RecipeError
from autocompress.recipe import load_recipe, parse_recipe, with_absolute_paths

FULL: dict[str, Any] = {
    "data": {"source": "folder", "folder": "/data/flowers", "validation": 500, "limit": 2000, "seed": 1},
    "task": {"loss": "my:loss", "metric": "top5", "distillation": "my:distil"},
    "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny", "depths": [2, 3]}},
    "target": {"name": "pytorch-cpu", "threads": 2, "batch": 4},
    "profile": {
        "table": "/tables/t.json",
        "networks": 20,
        "tolerance": 0.05,
        "min_rounds": 5,
        "max_rounds": 10,
    },
    "train": {
        "epochs": 3,
        "schedule": "progressive",
        "phases": [{"epochs": 2, "elastic": ["kernel"], "networks": 2}],
        "optimizer": "adamw",
        "learning_rate": 0.001,
        "precision": "bf16",
    },
    "search": {"budget": {"latency_ms": "60%", "flops": "3M"}, "strategy": "random", "evaluations": 40},
    "finetune": {"epochs": 1, "temperature": 2.0, "alpha": 0.5},
    "export": {"formats": ["onnx"]},
    "random_networks": 2,
    "threads": 1,
}


def refused(payload: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(payload, "recipe r.yaml")
    message = str(caught.value)
    assert message.startswith("recipe r.yaml ")
    return message


def nested(path: str, value: Any) -> dict[str, Any]:
    result: Any = value
    for key in reversed(path.split(".")):
        result = {key: result}
    return dict(result)


# What is accepted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [{}, None, FULL, DEMO])
def test_a_recipe_may_say_much_or_nothing(payload: Any) -> None:
    recipe = parse_recipe(payload)
    for section, values in (payload or {}).items():
        found = getattr(recipe, section)
        if isinstance(values, dict):
            written = found.model_dump(mode="json", exclude_unset=True)
            assert written == values
        else:
            assert found == values


def test_the_default_budget_is_sixty_percent_of_the_largest_latency() -> None:
    assert parse_recipe({}).search.budget == {"latency_ms": "60%"}


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe({}).train.epochs = 3  # type: ignore[misc]


def test_finetuning_has_defaults_of_its_own() -> None:
    recipe = parse_recipe({"train": {"epochs": 99}})
    assert (recipe.finetune.epochs, recipe.finetune.learning_rate) == (10, 0.02)
    assert (recipe.train.epochs, recipe.train.learning_rate) == (99, 0.1)


@pytest.mark.parametrize("text", ["3e-5", "3.0e-5", "0.00003", "'0.00003'"])
def test_every_way_to_write_a_small_number_is_read(text: str) -> None:
    """YAML takes 3e-5, without a point, for text."""
    recipe = parse_recipe(yaml.safe_load(f"train: {{weight_decay: {text}}}"))
    assert recipe.train.weight_decay == 3e-5


def test_an_amount_of_validation_is_a_share_or_a_number_of_images() -> None:
    for value in (0.5, 0.001, 1, 1.0, 500):
        assert parse_recipe({"data": {"validation": value}}).data.validation == value


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("trian", "data, export, finetune, passes, profile, quantize, random_networks, search"),
        ("data.sorce", "folder, limit, seed, source, validation"),
        ("task.los", "distillation, loss, metric"),
        ("space.argument", "arguments, name"),
        ("target.thread", "batch, name, threads"),
        (
            "profile.rounds",
            "granularity, knots, max_rounds, measured, min_rounds, networks, seed, table, tolerance, widths",
        ),
        ("train.epoch", "batch_size, cutout, epochs, gradient_clip"),
        ("search.generations", "address, asking, budget, calibration_images, confidence, evaluations"),
        ("finetune.schedule", "alpha, auxiliary, batch_size"),
        ("export.format", "formats"),
    ],
)
def test_an_unknown_key_is_refused_with_those_that_are_known(path: str, allowed: str) -> None:
    assert f"\n  {path}: unknown key; allowed here: {allowed}" in refused(nested(path, 1))


def test_an_unknown_key_inside_a_list_is_found() -> None:
    payload = {"train": {"schedule": "progressive", "phases": [{"epochs": 1}, {"epochs": 1, "epoch": 2}]}}
    assert "train.phases.1.epoch: unknown key; allowed here: elastic, epochs, networks" in refused(payload)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data", 3),
        ("data.source", 3),
        ("data.folder", 3),
        ("data.limit", 0),
        ("data.limit", 10.5),
        ("data.validation", 0),
        ("data.validation", -0.1),
        ("data.validation", 1.5),
        ("data.validation", "some"),
        ("data.seed", -1),
        ("data.seed", "one"),
        ("task.loss", None),
        ("space.arguments", [1]),
        ("target.threads", 0),
        ("target.batch", "1"),
        ("profile.networks", 7),
        ("profile.tolerance", 0),
        ("profile.tolerance", 1),
        ("profile.max_rounds", 0),
        ("profile.seed", -1),
        ("train", None),
        ("finetune.epochs", 0),
        ("train.epochs", "3"),
        ("train.epochs", 1.5),
        ("train.epochs", True),
        ("train.optimizer", "lion"),
        ("train.schedule", "sandwhich"),
        ("train.learning_rate", 0),
        ("train.learning_rate", "fast"),
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.learning_rate", True),
        ("train.momentum", 1.1),
        ("train.weight_decay", -1),
        ("train.warmup_epochs", -1),
        ("train.label_smoothing", 1),
        ("train.shift", -1),
        ("train.cutout", 0.5),
        ("train.precision", "fp16"),
        ("train.memory_format", "nhwc"),
        ("train.seed", -3),
        ("train.random_networks", -1),
        ("search.budget", "60%"),
        ("search.budget", ["60%"]),
        ("search.evaluations", 0),
        ("search.warm_start", "forest"),
        ("search.reward", "distil"),
        ("search.reward_epochs", 0),
        ("search.calibration_images", 0),
        ("search.seed", -1),
        ("search.options", 3),
        ("finetune.temperature", 0),
        ("finetune.alpha", 1.01),
        ("finetune.alpha", -0.01),
        ("finetune.cutout", -1),
        ("finetune.drop_path", 1),
        ("finetune.drop_path", -0.1),
        ("finetune.auxiliary", -0.1),
        ("export.formats", "onnx"),
        ("random_networks", 0),
        ("threads", 0),
        ("threads", "all"),
    ],
)
def test_a_wrong_value_is_refused_with_the_path_of_its_key_and_the_value(path: str, value: Any) -> None:
    message = refused(nested(path, value))
    assert f"\n  {path}: " in message
    assert message.endswith(f"got {value!r}")


def test_a_wrong_format_is_named_by_its_position() -> None:
    message = refused({"export": {"formats": ["onnx", "tflite"]}})
    assert (
        "export.formats.1: Input should be 'onnx', 'torch_export' or 'safetensors', got 'tflite'" in message
    )


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("train: {epochs: yes}", "train.epochs"),
        ("finetune: {alpha: on}", "finetune.alpha"),
        ("data: {limit: no}", "data.limit"),
        ("threads: true", "threads"),
        ("space: {name: off}", "space.name"),
    ],
)
def test_what_yaml_reads_as_a_truth_value_is_no_number_or_name(text: str, path: str) -> None:
    message = refused(yaml.safe_load(text))
    assert f"{path}: Value error, must not be true or false, which is also how YAML reads yes" in message


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (
            {"latency": "60%"},
            "a budget limits latency_ms, macs, params, size_bytes, bops, peak_activation_bytes, energy_mj or",
        ),
        ({"latency_ms": "60M"}, "latency_ms takes no unit, 'ms', 'us', 's' or '%', got 'M' in '60M'"),
        ({"macs": "3ms"}, "macs takes no unit"),
        ({"size_bytes": "4Mib"}, "got 'Mib' in '4Mib'"),
        ({"macs": "a lot"}, "macs must be a number such as 300, '60%' or '300M', got 'a lot'"),
        ({"macs": 0}, "macs must be positive and finite, got 0"),
        ({"macs": -3}, "macs must be positive"),
        ({"macs": True}, "macs must be a number or text, got True"),
        ({"macs": None}, "macs must be a number or text, got None"),
        ({}, "a budget needs at least one limit"),
        ({"macs": 3, "flops": 4}, "a budget limits each metric once"),
    ],
)
def test_a_wrong_budget_is_refused_with_what_is_allowed(budget: dict[str, Any], reason: str) -> None:
    message = refused({"search": {"budget": budget}})
    assert "\n  search.budget: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (
            {"profile": {"min_rounds": 20, "max_rounds": 10}},
            r"profile: .*min_rounds \(20\) must not exceed max_rounds \(10\)",
        ),
        ({"profile": {"max_rounds": 3}}, r"profile: .*min_rounds \(24\) must not exceed max_rounds \(3\)"),
        ({"train": {"schedule": "progressive"}}, "train: .*phases belong to schedule 'progressive'"),
        ({"train": {"phases": [{"epochs": 1}]}}, "train: .*phases belong to schedule 'progressive'"),
        (
            {"search": {"reward_epochs": 2}},
            r"search: .*reward_epochs \(2\) belongs to reward 'distilled'; a slice is not trained",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(payload: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_recipe(payload)


def test_every_mistake_is_told_at_once() -> None:
    message = refused({"trian": {}, "train": {"epochs": -1}, "search": {"budget": {"macs": "x"}}})
    lines = message.splitlines()
    assert lines[0] == "recipe r.yaml is not valid:"
    assert sorted(line.strip().split(":")[0] for line in lines[1:]) == [
        "search.budget",
        "train.epochs",
        "trian",
    ]


@pytest.mark.parametrize("payload", [[], "text", 3, [{"train": {}}]])
def test_a_recipe_that_is_no_mapping_is_refused(payload: Any) -> None:
    assert "must be a mapping of data, task, space, target" in refused(payload)


# Files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [{}, FULL, DEMO])
def test_a_recipe_reads_back_as_it_was_written(tmp_path: Path, payload: dict[str, Any]) -> None:
    recipe = parse_recipe(payload)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "content", [b"train: {epochs: 3", b"a: b: c", b"\t- x", b"\xff\xfe\x00", b"!!python/object:os.system {}"]
)
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe .*r.yaml cannot be read"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read: .*(No such file|Is a directory)"):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize("text", ["", " \n", "# nothing\n", "null"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    """It would be every default: more often a mistake than meant."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r.yaml is empty; write one key at least"):
        load_recipe(tmp_path / "r.yaml")


def test_relative_paths_of_a_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text("data: {source: folder, folder: ../flowers}\nprofile: {table: t.json}\n")
    recipe = load_recipe(path)
    assert recipe.data.folder == tmp_path / "flowers"
    assert recipe.profile.table == tmp_path / "recipes" / "t.json"
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipes/r.yaml")) == recipe


def test_absolute_paths_and_homes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = parse_recipe({"data": {"folder": "~/flowers"}, "profile": {"table": "/tables/t.json"}})
    absolute = with_absolute_paths(recipe, tmp_path)
    assert absolute.data.folder == tmp_path / "home" / "flowers"
    assert absolute.profile.table == Path("/tables/t.json")
