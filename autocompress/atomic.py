"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autocompress.errors import AutocompressError, StorageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file in the folder of `path`; on success it takes the place of `path`.

    Raises:
        StorageError: The disk is full, the folder cannot be written, or the like; `path` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; results are to be shared like other files.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a kill left in a folder; nobody else may be writing there."""
    for path in folder.glob(".*.*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, busy: str = "") -> Iterator[None]:
    """Hold a folder for this process, made if absent, by the file `.lock` in it.

    Args:
        folder: The folder.
        busy: What to say where another process holds it, instead of "wait, or stop it and call again".

    Raises:
        StorageError: Another process holds it, or it cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    said = f"another process is working on {folder}: wait until it ends, or stop it and call again"
    with held(path, busy or said):
        yield


@contextmanager
def held(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file, made if absent, for this process; its folder is there.

    Args:
        path: Of the file.
        busy: What to say where another process holds it; without, wait until it does not.

    Raises:
        StorageError: Another process holds it, or it cannot be written.
    """
    import fcntl

    try:
        file = path.open("ab")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise StorageError(busy) from None
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        StorageError: It cannot be written; an older file is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, payload: Any) -> None:
    """Write JSON, indented, whole or not at all; `nan` and infinity are refused.

    Raises:
        StorageError: It cannot be written; an older file is unchanged.
    """
    write_text(path, json.dumps(payload, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, error: Callable[[str], AutocompressError], what: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: Makes the error that is raised when the file is absent or damaged.
        what: What the file should be, for the message.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{what} not found: {path}") from None
    except (OSError, ValueError, RecursionError) as reason:
        # ValueError: not UTF-8, not JSON, or a number of thousands of digits; RecursionError: as many
        # brackets.
        raise error(f"{what} {path} cannot be read: {reason}") from None
