"""Files of stages follow the settings they were made with: put aside, taken back, whole after any kill."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_recipe

from autocompress.errors import StorageError
from autocompress.kept import FILES, KEPT, STAGES, settle, settled
from autocompress.run import Run, digests

ONE = {"profile": "p1", "train": "t1", "search": "s1"}
SEARCHED = {**ONE, "search": "s2"}
OTHER = {"profile": "p2", "train": "t2", "search": "s3"}


def make(folder: Path, its: dict[str, str]) -> None:
    """Do all stages: each file says which settings made it."""
    for stage, names in FILES.items():
        for name in names:
            if not (folder / name).exists():
                (folder / name).write_text(its[stage])


def shown(folder: Path) -> dict[str, str]:
    found = {name: folder / name for names in FILES.values() for name in names}
    return {name: path.read_text() for name, path in found.items() if path.exists()}


def made_by(its: dict[str, str]) -> dict[str, str]:
    return {name: its[stage] for stage, names in FILES.items() for name in names}


def test_only_what_stands_on_changed_settings_is_put_aside(tmp_path: Path) -> None:
    assert settle(tmp_path, ONE) == {}
    make(tmp_path, ONE)
    assert settle(tmp_path, SEARCHED) == {"search": tmp_path / KEPT / "search-s1"}
    assert set(shown(tmp_path)) == {*FILES["profile"], *FILES["train"]}
    assert set(settle(tmp_path, OTHER)) == {"profile", "train"}
    assert shown(tmp_path) == {}


def test_settings_that_come_back_find_what_they_made(tmp_path: Path) -> None:
    for its in (ONE, SEARCHED, OTHER):
        settle(tmp_path, its)
        make(tmp_path, its)
    for its in (ONE, OTHER, SEARCHED, ONE):
        settle(tmp_path, its)
        assert shown(tmp_path) == made_by(its)
        assert settled(tmp_path, its)


class KilledError(Exception):
    """In place of SIGKILL."""


def test_a_kill_at_any_step_loses_and_mixes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    steps = 0

    def replaced(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replaced)
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        left = 10**6
        for its in (OTHER, ONE):
            settle(folder, its)
            make(folder, its)
        left = at
        try:
            settle(folder, OTHER)
        except KilledError:
            left = 10**6
            assert not settled(folder, OTHER)
            # It goes on, or back.
            for its in (OTHER, ONE) if at % 2 else (ONE, OTHER):
                settle(folder, its)
                assert shown(folder) == made_by(its)
        else:
            steps = at
            break
    assert steps > 2 * sum(map(len, FILES.values()))


def test_a_damaged_list_is_an_error(tmp_path: Path) -> None:
    settle(tmp_path, ONE)
    (tmp_path / STAGES).write_text(json.dumps({"here": {"train": "t1"}}))
    with pytest.raises(StorageError, match=r"stages.json is damaged; remove it if"):
        settle(tmp_path, ONE)


DISTILLED: dict[str, Any] = {"reward": "distilled"}
GRADIENTS: dict[str, Any] = {"strategy": "darts", "options": {}}


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {"finetune": {"epochs": 9}, "export": {"formats": ["onnx"]}, "random_networks": 7}, set()),
        ({}, {"quantize": {"steps": 3}}, set()),
        ({}, {"search": {"budget": {"macs": "80%"}}}, {"search"}),
        ({}, {"train": {"epochs": 9}}, {"train", "search"}),
        ({}, {"threads": 2}, {"train", "search"}),
        ({}, {"profile": {"networks": 9}}, {"profile", "search"}),
        ({}, {"target": {"batch": 8}}, {"profile", "search"}),
        ({"search": DISTILLED}, {"search": DISTILLED, "finetune": {"epochs": 9}}, set()),
        ({"search": DISTILLED}, {"search": DISTILLED, "finetune": {"distill": "kd+at"}}, {"search"}),
        ({"search": GRADIENTS}, {"search": {**GRADIENTS, "seed": 3}}, {"train", "search"}),
        ({"search": GRADIENTS}, {"search": GRADIENTS, "profile": {"networks": 9}}, {*FILES}),
    ],
)
def test_a_stage_depends_on_its_settings_and_on_the_stages_before_it(
    before: dict[str, Any], after: dict[str, Any], changed: set[str]
) -> None:
    first, second = digests(small_recipe(**before)), digests(small_recipe(**after))
    assert {stage for stage in FILES if first[stage] != second[stage]} == changed


def test_a_recipe_that_was_edited_by_hand_counts_as_well(tmp_path: Path) -> None:
    Run(tmp_path, small_recipe())
    (tmp_path / "result.json").write_text("made with seed 0")
    path = tmp_path / "recipe.yaml"
    written = path.read_text()
    path.write_text(written.replace("evaluations: 6", "evaluations: 7"))
    run = Run(tmp_path)
    assert run.recipe.search.evaluations == 7
    assert [*run.aside] == ["search"]
    assert not (tmp_path / "result.json").exists()
    path.write_text(written)
    assert Run(tmp_path).aside == {}
    assert (tmp_path / "result.json").read_text() == "made with seed 0"
