"""Run directories: which recipe they hold, who may work on them, and what stands in them."""

import json
import multiprocessing
import os
import re
import sys
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import no_data, small_payload, small_recipe

from autocompress.errors import AutocompressError, PluginError, RecipeError, StorageError
from autocompress.recipe import load_recipe, parse_recipe
from autocompress.run import Run, environment, make_space
from autocompress.space import SearchSpace
from autocompress.testing.toys import toy_space

# Recipes ---------------------------------------------------------------------------------------------------


def test_a_new_run_writes_its_whole_recipe_and_its_environment(tmp_path: Path) -> None:
    recipe = small_recipe()
    run = Run(tmp_path / "runs" / "a", recipe)
    assert run.recipe == recipe
    written = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert written == recipe.model_dump(mode="json")
    assert written["finetune"]["temperature"] == 4.0  # also what the recipe left to its default
    assert set(json.loads((run.folder / "environment.json").read_text())) == set(environment())


def test_a_run_is_continued_with_its_own_recipe_or_with_none(tmp_path: Path) -> None:
    recipe = small_recipe()
    Run(tmp_path, recipe)
    before = (tmp_path / "recipe.yaml").stat().st_mtime_ns
    assert Run(tmp_path).recipe == recipe
    assert Run(tmp_path, small_recipe()).recipe == recipe
    assert (tmp_path / "recipe.yaml").stat().st_mtime_ns == before


def test_a_folder_without_a_run_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent holds no run \(no recipe.yaml\); start one"):
        Run(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_before_any_stage_has_begun_everything_can_be_changed(tmp_path: Path) -> None:
    Run(tmp_path, small_recipe(data={"source": "nope"}))
    assert Run(tmp_path, small_recipe()).recipe == small_recipe()
    assert load_recipe(tmp_path / "recipe.yaml") == small_recipe()


def test_a_typo_in_a_name_is_refused_and_starts_no_run(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="nope"):
        Run(tmp_path / "run", small_recipe(space={"name": "nope"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": {"metric": "pixel_accuracy"}}, 'task.metric is "accuracy" there, "pixel_accuracy" here'),
        ({"data": {"folder": "/elsewhere"}}, 'data.folder is null there, "/elsewhere" here'),
    ],
)
def test_another_problem_is_refused_and_what_differs_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    Run(tmp_path, small_recipe())
    (tmp_path / "latency_samples.jsonl").touch()
    before = (tmp_path / "recipe.yaml").read_bytes()
    message = (
        f"{tmp_path} holds a run of another problem: {named}; take another directory, or continue that run "
        f"with `autocompress resume {tmp_path}`"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        Run(tmp_path, small_recipe(**changes))
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_other_settings_of_a_stage_put_aside_what_it_made_and_find_it_again(tmp_path: Path) -> None:
    """A latency budget that proves impossible after an hour of profiling must not cost that hour."""
    Run(tmp_path, small_recipe())
    for name in ("latency_table.json", "supernet.pt", "result.json"):
        (tmp_path / name).write_text("first")
    changed = small_recipe(train={"epochs": 9})
    run = Run(tmp_path, changed)
    assert run.recipe == Run(tmp_path).recipe == changed
    assert [*run.aside] == ["train", "search"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and "first" in path.read_text()] == [
        "latency_table.json"
    ]
    assert Run(tmp_path, small_recipe()).aside == {}
    assert {(tmp_path / name).read_text() for name in ("supernet.pt", "result.json")} == {"first"}


def test_finetuned_networks_have_a_folder_for_each_setting_of_finetuning(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    (arch,) = run.space.decode(run.space.largest())
    first = run.network_folder(arch)
    first.mkdir(parents=True)
    for changes in (
        {"finetune": {"distill": "kd+at"}},
        {"quantize": {"steps": 3}},
        {"finetune": {"epochs": 9}},
        {"train": {"epochs": 9}},
    ):
        assert Run(tmp_path, small_recipe(**changes)).network_folder(arch) != first
        assert Run(tmp_path, small_recipe()).network_folder(arch) == first
    exported = Run(tmp_path, small_recipe(export={"formats": ["onnx"]}))
    assert exported.network_folder(arch) == first


def test_a_recipe_is_not_changed_under_a_process_that_works_on_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    before = (tmp_path / "recipe.yaml").read_bytes()
    with run.locked(), pytest.raises(StorageError, match="another process is working on"):
        Run(tmp_path, small_recipe(search={"seed": 5}))
    assert (tmp_path / "recipe.yaml").read_bytes() == before
    with run.locked():
        Run(tmp_path, small_recipe())  # nothing to write


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for recipe in (None, small_recipe()):
        with pytest.raises(RecipeError, match=r"a run needs a directory, but .*file is a file"):
            Run(tmp_path / "file", recipe)


def test_arguments_in_tuples_and_in_lists_are_one_recipe(tmp_path: Path) -> None:
    def recipe(depths: Any) -> Any:
        return parse_recipe({"space": {"arguments": {"depths": depths}}})

    Run(tmp_path, recipe((2, 3)))
    assert Run(tmp_path, recipe((2, 3))).recipe == recipe((2, 3))
    assert Run(tmp_path, recipe([2, 3])).recipe == recipe([2, 3])
    assert Run(tmp_path).recipe == recipe([2, 3])


def test_relative_paths_stay_what_they_were_wherever_the_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe({"data": {"source": "folder", "folder": "flowers"}, "profile": {"table": "t.json"}})
    run = Run(Path("runs/a"), recipe)
    assert run.recipe.data.folder == tmp_path / "flowers"
    Run(Path("runs/a"), recipe)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Run(tmp_path / "runs" / "a").recipe
    assert again == run.recipe
    assert again.profile.table == tmp_path / "t.json"


def test_a_recipe_that_somebody_broke_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, small_recipe())
    (tmp_path / "recipe.yaml").write_text("train: {epoch: 3}")
    with pytest.raises(RecipeError, match=r"train.epoch: unknown key"):
        Run(tmp_path)


# Spaces ----------------------------------------------------------------------------------------------------


def test_a_space_is_made_for_the_channels_and_classes_of_the_data() -> None:
    payload = small_payload()
    for name in ("in_channels", "classes"):
        del payload["space"]["arguments"][name]
    recipe = parse_recipe(payload)

    class Data:
        in_shape = (5, 32, 32)
        classes = 7

    space = make_space(recipe, lambda: Data())  # type: ignore[arg-type, return-value]
    blocks = space.operations(space.largest())
    assert blocks[0][1][0].in_shape[0] == 5
    assert blocks[-1][1][-1].out_shape[0] == 7


def test_a_recipe_that_says_channels_and_classes_needs_no_data_for_its_space() -> None:
    space = make_space(small_recipe(), no_data)
    assert space.size == 2**10


def broken_space(size: int) -> SearchSpace:
    raise TypeError("size must be a number")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "mobilenet_v3",
            {"widht": 1.0},
            "space.arguments.widht: mobilenet_v3 takes preset, width, .*, not 'widht'",
        ),
        ("autocompress.testing.toys:toy_space", {"block": 3}, "space.arguments.block: .* takes blocks"),
        (
            "test_run_spaces:broken_space",
            {"size": "x"},
            "space.arguments: .* refuses .*: size must be a number",
        ),
    ],
)
def test_arguments_that_a_space_does_not_take_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], message: str
) -> None:
    module = types.ModuleType("test_run_spaces")
    module.broken_space = broken_space  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "test_run_spaces", module)
    recipe = parse_recipe({"space": {"name": name, "arguments": arguments}})
    with pytest.raises(RecipeError, match=message):
        make_space(recipe, no_data)


def test_any_function_can_be_the_space() -> None:
    recipe = parse_recipe(
        {"space": {"name": "autocompress.testing.toys:toy_space", "arguments": {"blocks": 3}}}
    )
    assert make_space(recipe, no_data).fingerprint == toy_space(3).fingerprint


def test_a_space_that_is_not_there_is_refused() -> None:
    with pytest.raises(PluginError, match="no search space 'mobilenet'"):
        make_space(parse_recipe({"space": {"name": "mobilenet"}}), no_data)


# Locks -----------------------------------------------------------------------------------------------------


def _hold(folder: Path, pipe: Connection) -> None:
    with Run(folder).locked():
        pipe.send("locked")
        pipe.recv()


def test_only_one_process_works_on_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, there))
    other.start()
    try:
        assert here.recv() == "locked"
        with pytest.raises(StorageError, match=f"another process is working on {tmp_path}"), run.locked():
            pass
        other.kill()  # as a run that dies does
        other.join()
        with run.locked():
            pass
    finally:
        other.kill()
        other.join()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    with pytest.raises(PermissionError, match="of the stage"), run.locked():
        raise PermissionError("of the stage")
    with run.locked():
        pass


def test_a_lock_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*\.lock: Is a directory"), run.locked():
        pass


# Files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found: .*x.json"), ("{", r"x.json cannot be read"), ("\x00", "cannot be")],
)
def test_a_file_of_the_run_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    run = Run(tmp_path, small_recipe())
    if content is not None:
        run.path("x.json").write_text(content)
    with pytest.raises(StorageError, match=message):
        run.read("x.json")


def test_the_environment_says_what_a_reader_must_know() -> None:
    found = environment()
    assert found["cores"] == os.cpu_count()
    assert {"torch", "onnxruntime", "optuna", "numpy"} <= set(found["versions"])


@pytest.mark.parametrize(
    ("task", "named"),
    [({"metric": "acuracy"}, "acuracy"), ({"loss": "no_such_module:loss"}, "no_such_module")],
)
def test_a_task_that_is_not_there_is_refused(tmp_path: Path, task: dict[str, str], named: str) -> None:
    with pytest.raises(AutocompressError, match=named):
        _ = Run(tmp_path, small_recipe(task=task)).task


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "digit"}, "data must be one of"),
        ({"source": "fashion_mnist"}, "give the folder"),
        ({"limit": 9999}, "limit must be in"),
        ({"limit": 20, "validation": 19}, "left to train on"),
        ({"source": "no_such_module:data"}, "no_such_module"),
    ],
)
def test_data_that_are_not_there_are_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(AutocompressError, match=message):
        _ = Run(tmp_path, small_recipe(data=data)).data


def test_the_recipe_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    """What a run writes can be given to another run, also from another folder."""
    run = Run(tmp_path / "a", small_recipe())
    other = Run(tmp_path / "b", load_recipe(run.folder / "recipe.yaml"))
    assert (tmp_path / "b" / "recipe.yaml").read_bytes() == (tmp_path / "a" / "recipe.yaml").read_bytes()
    assert other.recipe == run.recipe


def test_an_emptied_recipe_is_refused(tmp_path: Path) -> None:
    """YAML reads it as nothing, which would be every default."""
    Run(tmp_path, small_recipe())
    for text in (" \n", "null", "# all gone"):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"recipe.yaml is empty"):
            Run(tmp_path)


def test_a_run_that_is_worked_on_has_no_leftovers_of_a_kill(tmp_path: Path) -> None:
    run = Run(tmp_path, small_recipe())
    network = tmp_path / "networks" / "k"
    network.mkdir(parents=True)
    for folder in (tmp_path, network):
        (folder / ".supernet.pt.abc.tmp").touch()
    with run.locked():
        assert not list(tmp_path.rglob("*.tmp"))
