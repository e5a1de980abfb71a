"""Trials in an Optuna journal after kills, damage and on full disks."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import AutocompressError, StorageError
from autocompress.space import SearchSpace
from autocompress.storage import TrialStorage, cut_incomplete_line
from autocompress.testing.toys import every_network, toy_space
from autocompress.trial import Outcome, Trial

SPACE = toy_space(2)
NETWORKS = SPACE.decode(every_network(SPACE))
IDENTITY: Mapping[str, Any] = {"seed": 1, "limits": {"macs": 0.1}, "names": ("a", "b")}


def measured(number: int) -> Trial:
    metrics = {"accuracy": number / 7, "accuracy_error": 0.01}
    return Trial(number, NETWORKS[number], {"macs": 100.0 + number}, metrics, Outcome.MEASURED)


def failed(number: int) -> Trial:
    return Trial(number, NETWORKS[number], {"macs": 1.5}, {}, Outcome.FAILED, "the loss is nan\nfor all")


def opened(path: Path | str, identity: Mapping[str, Any] = IDENTITY) -> TrialStorage:
    return TrialStorage(path, study="search", identity=identity)


def stored(path: Path, trials: int) -> list[Trial]:
    storage = opened(path)
    added = [failed(number) if number % 3 == 1 else measured(number) for number in range(trials)]
    for trial in added:
        storage.add(trial, SPACE, "accuracy")
    return added


# Trials ----------------------------------------------------------------------------------------------------


def test_trials_come_back_as_they_were_added(tmp_path: Path) -> None:
    added = stored(tmp_path / "trials.log", 20)
    assert opened(tmp_path / "trials.log").load(SPACE) == added


def test_studies_in_one_storage_are_apart(tmp_path: Path) -> None:
    added = stored(tmp_path / "trials.log", 3)
    other = TrialStorage(tmp_path / "trials.log", study="other", identity={"seed": 2})
    other.add(measured(9), SPACE, "accuracy")
    assert opened(tmp_path / "trials.log").load(SPACE) == added
    assert [trial.architecture for trial in other.load(SPACE)] == [NETWORKS[9]]


def test_trials_that_others_added_to_the_study_by_hand_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trials.log"
    added = stored(path, 2)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    study.enqueue_trial({"resolution": 8})
    assert opened(path).load(SPACE) == added


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({**IDENTITY, "seed": 2}, "seed"),
        ({**IDENTITY, "limits": {"macs": 0.2}}, "limits"),
        ({"seed": 1, "limits": {"macs": 0.1}}, "names"),
        ({**IDENTITY, "more": 1, "seed": 0}, "more, seed"),
    ],
)
def test_another_identity_is_refused_and_what_differs_is_named(
    tmp_path: Path, identity: Mapping[str, Any], named: str
) -> None:
    stored(tmp_path / "trials.log", 1)
    with pytest.raises(StorageError, match=f"belong to another search: {named} differ; use another run"):
        opened(tmp_path / "trials.log", identity)


def test_trials_of_another_space_cannot_be_loaded(tmp_path: Path) -> None:
    stored(tmp_path / "trials.log", 1)
    other = SearchSpace("other", SPACE.choices, SPACE.blocks)
    with pytest.raises(StorageError, match=r"trial 0 at .* is damaged: the architecture is of space 'toy'"):
        opened(tmp_path / "trials.log").load(other)


# Journals after a kill -------------------------------------------------------------------------------------

LINES = st.lists(st.binary(max_size=30).map(lambda line: line * 300), max_size=4)


@given(LINES, st.booleans())
def test_exactly_what_follows_the_last_end_of_line_is_cut(parts: list[bytes], ended: bool) -> None:
    content = b"\n".join(parts) + (b"\n" if ended else b"")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trials.log"
        path.write_bytes(content)
        cut_incomplete_line(path)
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 20000])
def test_an_incomplete_line_of_any_length_is_cut(tmp_path: Path, size: int) -> None:
    path = tmp_path / "trials.log"
    path.write_bytes(b"whole\n" + b"x" * size)
    cut_incomplete_line(path)
    assert path.read_bytes() == b"whole\n"


def test_a_journal_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot open .*absent: No such file"):
        cut_incomplete_line(tmp_path / "absent")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Four trials as Optuna writes them."""
    path = tmp_path_factory.mktemp("journal") / "trials.log"
    stored(path, 4)
    return path.read_bytes()


@settings(max_examples=40)
@given(share=st.floats(0, 1))
def test_a_journal_cut_at_any_byte_has_its_whole_trials_and_takes_more(journal: bytes, share: float) -> None:
    kept = journal[: round(share * len(journal))]
    # The first lines make the study and write its identity.
    whole = sum(b'"op_code":4' in line for line in kept.splitlines(keepends=True) if line.endswith(b"\n"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trials.log"
        path.write_bytes(kept)
        storage = opened(path)
        assert storage.load(SPACE) == [failed(i) if i == 1 else measured(i) for i in range(whole)]
        storage.add(measured(9), SPACE, "accuracy")
        storage.add(measured(10), SPACE, "accuracy")
        found = [trial.architecture for trial in opened(path).load(SPACE)]
        assert found == [*NETWORKS[:whole], NETWORKS[9], NETWORKS[10]]


def test_without_the_cut_optuna_makes_the_journal_unreadable(tmp_path: Path, journal: bytes) -> None:
    """The reason for the cut; when Optuna does it itself, this test says that ours can go."""
    path = tmp_path / "trials.log"
    path.write_bytes(journal[:-20])

    def study() -> optuna.Study:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))

    study().set_user_attr("next", 1)
    with pytest.raises(ValueError, match=r"Expecting|Extra data|Invalid|delimiter|Unterminated"):
        study().set_user_attr("next", 2)
    assert not path.read_bytes().startswith(journal)


@pytest.mark.parametrize(
    "line",
    [b"garbage\n", b"{}\n", b"[1]\n", b"null\n", b'{"op_code":99}\n', b'{"op_code":4}\n', b"\xff\x00\n"],
)
def test_a_journal_damaged_in_its_middle_is_refused(tmp_path: Path, journal: bytes, line: bytes) -> None:
    path = tmp_path / "trials.log"
    lines = journal.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(StorageError, match=r"the trials at .*trials.log are damaged: "):
        opened(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "SURELY"},
        {"architecture": "{"},
        {"architecture": '{"space":"toy","choices":{"resolution":9}}'},
        {"architecture": 3},
    ],
)
def test_a_trial_with_damaged_attributes_is_refused(
    tmp_path: Path, journal: bytes, changes: dict[str, Any]
) -> None:
    path = tmp_path / "trials.log"
    lines = [json.loads(line) for line in journal.splitlines()]
    trial = next(line for line in lines if line["op_code"] == 4)
    trial["user_attrs"] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StorageError, match=r"trial 0 at .*trials.log is damaged"):
        opened(path).load(SPACE)


def test_the_lock_that_optuna_leaves_when_it_is_killed_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "trials.log.lock").touch()
    start = time.monotonic()
    stored(tmp_path / "trials.log", 1)
    assert time.monotonic() - start < 15  # Optuna's own lock takes over after 30 s


def test_a_journal_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "trials.log"
    storage = opened(path)
    before = path.read_bytes()
    writer = threading.Thread(target=storage.add, args=(measured(0), SPACE, "accuracy"))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the cut does
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert path.read_bytes() == before
    writer.join(10)
    assert opened(path).load(SPACE) == [measured(0)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:////no/such/folder/trials.db", "unable to open database file"),
        ("nothing://host/name", "Can't load plugin"),
    ],
)
def test_a_storage_that_cannot_be_opened_says_why(url: str, reason: str) -> None:
    with pytest.raises(StorageError, match=f"cannot open the trials at {url}: .*{reason}"):
        opened(url)


@pytest.mark.parametrize("storage", ["trials.log", "runs/a/trials.log", None, 3])
def test_a_storage_that_is_neither_path_nor_address_names_the_way_out(storage: Any) -> None:
    wanted = f"the URL of an Optuna storage .*, got {storage!r}; for a file: pathlib.Path\\({storage!r}\\)"
    with pytest.raises(StorageError, match=wanted):
        opened(storage)


def test_an_identity_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    wanted = "identity must hold plain values .*, got {'x': <object .*: Object of type object is not JSON"
    with pytest.raises(AutocompressError, match=wanted):
        opened(tmp_path / "trials.log", {"x": object()})


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="file is not a database"):
        opened(f"sqlite:///{tmp_path / 'trials.db'}")


def remove(path: Path) -> None:
    path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def empty(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.touch()


def replace_by_a_copy_of_the_first_half(path: Path) -> None:
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()
    path.write_bytes(half)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove_a_trial_from_its_middle(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-2], lines[-1]]))


def append_half_a_line(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"study')


def overwrite_with_one_word(path: Path) -> None:
    path.write_bytes(b"garbage")


WHOLE = [remove, remove_folder, empty, replace_by_a_copy_of_the_first_half, cut_to_nothing, cut_in_half,
         remove_a_trial_from_its_middle, append_half_a_line, overwrite_with_one_word]  # fmt: skip


@pytest.mark.parametrize("harm", WHOLE)
def test_a_journal_that_disappears_is_written_again_with_every_trial(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "run" / "trials.log"
    stored(path, 3)
    storage = opened(path)
    storage.add(measured(3), SPACE, "accuracy")
    harm(path)
    storage.add(failed(4), SPACE, "accuracy")
    found = {trial.architecture: trial for trial in opened(path).load(SPACE)}
    wanted = [measured(0), failed(1), measured(2), measured(3), failed(4)]
    assert [replace(found[trial.architecture], number=trial.number) for trial in wanted] == wanted
    storage.add(measured(5), SPACE, "accuracy")
    assert len(opened(path).load(SPACE)) == 6


def overwrite_lines(path: Path) -> None:
    path.write_bytes(b"garbage\nmore of it\n")


def overwrite_the_beginning(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"garbage")


def overwrite_all_bytes(path: Path) -> None:
    path.write_bytes(b"\xff\x00\n" * path.stat().st_size)


@pytest.mark.parametrize("harm", [overwrite_lines, overwrite_the_beginning, overwrite_all_bytes])
def test_a_journal_that_is_damaged_meanwhile_is_put_aside_and_every_trial_written_again(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "trials.log"
    stored(path, 3)
    storage = opened(path)
    harm(path)
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match=r"trials.log were damaged during this search: .* put aside as"):
        storage.add(measured(3), SPACE, "accuracy")
    storage.add(failed(4), SPACE, "accuracy")
    assert opened(path).load(SPACE) == [measured(0), failed(1), measured(2), measured(3), failed(4)]
    (aside,) = tmp_path.glob("trials.log.damaged-*")
    assert aside.read_bytes().startswith(damaged)


def test_two_studies_write_one_journal_by_turns(tmp_path: Path) -> None:
    path = tmp_path / "trials.log"
    mine, other = (TrialStorage(path, study=name, identity={}) for name in ("mine", "other"))
    for number in range(4):
        mine.add(measured(number), SPACE, "accuracy")
        other.add(measured(9 - number), SPACE, "accuracy")
    for name, wanted in (("mine", [0, 1, 2, 3]), ("other", [9, 8, 7, 6])):
        trials = TrialStorage(path, study=name, identity={}).load(SPACE)
        assert [trial.architecture for trial in trials] == [NETWORKS[number] for number in wanted]


@pytest.mark.parametrize("harm", [remove, overwrite_all_bytes])
def test_a_database_that_is_damaged_meanwhile_is_an_error(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "trials.db"
    storage = opened(f"sqlite:///{path}")
    storage.add(measured(0), SPACE, "accuracy")
    harm(path)
    with pytest.raises(StorageError, match=r"cannot write the trials at .*trials.db: "):
        storage.add(measured(1), SPACE, "accuracy")


CLAIMED = """
import sys
from pathlib import Path
from autocompress.storage import TrialStorage
storage = sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1])
with TrialStorage(storage, study=sys.argv[2], identity={}).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def journal_in(folder: Path) -> Path:
    return folder / "trials.log"


def database_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'trials.log'}"


def database_by_its_driver_in(folder: Path) -> str:
    return f"sqlite+pysqlite:///file:{folder / 'trials.log'}?uri=true"


@pytest.mark.parametrize("storage_in", [journal_in, database_in, database_by_its_driver_in])
def test_one_process_at_a_time_searches_with_a_study(
    tmp_path: Path, storage_in: Callable[[Path], Path | str]
) -> None:
    path = storage_in(tmp_path)
    command = [sys.executable, "-c", CLAIMED, str(path), "mine"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        mine = TrialStorage(path, study="mine", identity={})
        with pytest.raises(StorageError, match=r"another process searches with study 'mine' of .*trials.log"):
            mine.claimed().__enter__()
        with TrialStorage(path, study="other", identity={}).claimed():
            pass
        other.kill()
    with mine.claimed():  # the lock ends with its process
        pass


def test_the_same_file_by_another_path_is_claimed_too(tmp_path: Path) -> None:
    stored(tmp_path / "trials.log", 1)
    (tmp_path / "link.log").symlink_to("trials.log")
    with (
        opened(tmp_path / "trials.log").claimed(),
        pytest.raises(StorageError, match="another process searches with study 'search'"),
    ):
        opened(tmp_path / "link.log").claimed().__enter__()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_needs_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(url).claimed(), opened(url).claimed():
        assert list(tmp_path.iterdir()) == []


def test_a_password_in_the_address_of_a_storage_is_not_shown() -> None:
    with pytest.raises(StorageError) as caught:
        TrialStorage("postgresql+nodriver://me:secret@nowhere/trials", study="s", identity={})
    assert "secret" not in str(caught.value)
    assert "me:***@nowhere" in str(caught.value)
