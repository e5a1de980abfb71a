"""Folders that are whole or absent: filled under another name, flushed to disk, then renamed."""

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from autocompress.errors import ExportError


@contextmanager
def replacing_folder(folder: Path, own: Set[str]) -> Iterator[Path]:
    """Give an empty folder beside `folder`; on success it takes the place of `folder`.

    A rename cannot replace a folder that has files, so the old one is moved aside first. A run that is
    killed in that instant leaves it there, and the next call moves it back. What a killed run had begun is
    removed. One call at a time for one folder.

    Args:
        folder: Where the files shall be in the end.
        own: Names of files that may be replaced; a folder with other files is refused.

    Raises:
        ExportError: The folder holds other files, or the file system refuses; `folder` is unchanged.
    """
    folder = folder.absolute()
    fresh = folder.parent / f".{folder.name}.exporting"
    aside = folder.parent / f".{folder.name}.replaced"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder, fresh, aside)
        _refuse_others(folder, own)
        fresh.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        if folder.exists():
            folder.rename(aside)
        fresh.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise ExportError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        # After success `folder` is the new one, and what stands aside is removed; after a failure it is
        # moved back.
        _recover(folder, fresh, aside)


def _recover(folder: Path, fresh: Path, aside: Path) -> None:
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    for path in (aside, fresh):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_others(folder: Path, own: Set[str]) -> None:
    # `__pycache__` appears when someone imports the loader where it lies.
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others := sorted(names - own - {"__pycache__"}):
        raise ExportError(
            f"{folder} holds files that are no part of an export and would be lost: "
            f"{', '.join(others[:5])}; export to a folder of its own"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
