"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autocompress.atomic import locked, read_json, remove_leftovers, replacing, write_json, write_text
from autocompress.errors import StorageError, TableError


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too: nothing temporary may stay."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "note.txt", "größe\n")
    assert content(tmp_path / "a" / "b") == {"note.txt": "größe\n"}


def test_a_file_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "old and longer")
    write_text(tmp_path / "note.txt", "new")
    assert content(tmp_path) == {"note.txt": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_leaves_the_older_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "note.txt", "old")

    def write_half() -> None:
        with replacing(tmp_path / "note.txt") as temporary:
            temporary.write_text("hal", encoding="utf-8")
            raise error("stop")

    with pytest.raises(StorageError if error is OSError else error, match="stop"):
        write_half()
    assert content(tmp_path) == {"note.txt": "old"}


def test_the_older_file_is_readable_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "old")
    with replacing(tmp_path / "note.txt") as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "old"
        assert temporary.parent == tmp_path  # a rename is atomic within one file system only
    assert content(tmp_path) == {"note.txt": "new"}


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call",
    [(Path, "write_text"), (os, "fsync"), (Path, "replace"), (Path, "chmod")],
    ids=lambda call: call[1],
)
def test_a_full_disk_is_a_storage_error_and_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, str]
) -> None:
    write_json(tmp_path / "state.json", {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(*call, full_disk)
        with pytest.raises(StorageError, match=r"cannot write .*state\.json: No space left on device"):
            write_json(tmp_path / "state.json", {"step": 2})
    assert {name: json.loads(text) for name, text in content(tmp_path).items()} == {"state.json": {"step": 1}}


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    # Tests may run as root, whom permissions do not bind; a file in the way binds everyone.
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"cannot write .*runs/demo/state\.json: Not a directory"):
        write_json(tmp_path / "runs" / "demo" / "state.json", {})
    assert content(tmp_path) == {"runs": "a file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_that_is_read_only_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StorageError, match=r"cannot write .*: Permission denied"):
        write_text(tmp_path / "note.txt", "new")


def test_a_process_that_is_killed_while_writing_leaves_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "old")
    code = (
        "import os, pathlib, signal, sys\n"
        "from autocompress.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('hal')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "note.txt")], check=False)
    assert result.returncode == -9
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "old"


def test_files_have_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours.txt", "")
    (tmp_path / "theirs.txt").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours.txt", "theirs.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "state.json", [1])
    with pytest.raises((ValueError, TypeError), match="JSON"):
        write_json(tmp_path / "state.json", [value])
    assert content(tmp_path) == {"state.json": "[\n  1\n]\n"}


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    payload = {"name": "größe", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "state.json", payload)
    assert read_json(tmp_path / "state.json", TableError, "latency table") == payload


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"{", r"latency table .*state\.json cannot be read: Expecting property name"),
        (b"\xff\xfe", r"latency table .*state\.json cannot be read: .*codec can't decode"),
        (b"[" * 100_000, r"latency table .*state\.json cannot be read: .*recursion"),
        (b"1" * 5000, r"latency table .*state\.json cannot be read: .*integer string"),
        (None, r"latency table not found: .*state\.json"),
    ],
)
def test_a_damaged_file_is_the_error_of_its_reader(
    tmp_path: Path, written: bytes | None, message: str
) -> None:
    path = tmp_path / "state.json"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(TableError, match=message):
        read_json(path, TableError, "latency table")


def test_a_folder_in_place_of_a_file_is_the_error_of_its_reader(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"latency table .* cannot be read: .*directory"):
        read_json(tmp_path, TableError, "latency table")


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".lock", "a.json", ".hidden.json", "b.tmp"]
    for name in (*kept, ".a.json.x1y2.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with (
        locked(folder),
        pytest.raises(StorageError, match=f"another process is working on {folder}: wait until it ends"),
        locked(folder),
    ):
        pass
    with locked(folder):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/\.lock"), locked(tmp_path / "file"):
        pass
