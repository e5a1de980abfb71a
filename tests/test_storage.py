"""Trials in an Optuna journal after kills, damage and on full disks."""

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import StorageError
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
        ("trials.log", "Could not parse"),
        ("sqlite:////no/such/folder/trials.db", "unable to open database file"),
        ("nothing://host/name", "Can't load plugin"),
    ],
)
def test_a_storage_that_cannot_be_opened_says_why(url: str, reason: str) -> None:
    with pytest.raises(StorageError, match=f"cannot open the trials at {url}: .*{reason}"):
        opened(url)


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


@pytest.mark.parametrize("harm", [remove, remove_folder, empty])
def test_a_journal_that_disappears_is_written_again_with_every_trial(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "run" / "trials.log"
    stored(path, 3)
    storage = opened(path)
    storage.add(measured(3), SPACE, "accuracy")
    harm(path)
    storage.add(failed(4), SPACE, "accuracy")
    assert opened(path).load(SPACE) == [measured(0), failed(1), measured(2), measured(3), failed(4)]
    storage.add(measured(5), SPACE, "accuracy")
    assert len(opened(path).load(SPACE)) == 6


CLAIMED = """
import sys
from pathlib import Path
from autocompress.storage import TrialStorage
with TrialStorage(Path(sys.argv[1]), study=sys.argv[2], identity={}).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_searches_with_a_study(tmp_path: Path) -> None:
    path = tmp_path / "trials.log"
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


def test_a_password_in_the_address_of_a_storage_is_not_shown() -> None:
    with pytest.raises(StorageError) as caught:
        TrialStorage("postgresql+nodriver://me:secret@nowhere/trials", study="s", identity={})
    assert "secret" not in str(caught.value)
    assert "me:***@nowhere" in str(caught.value)
