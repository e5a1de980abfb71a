"""Where a search keeps what it paid for: trials of an Optuna study.

Resuming is replaying: strategies are deterministic, so a search that starts again asks the same
architectures, and finds their outcomes here instead of evaluating them.
"""

import json
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast, final

from autocompress.atomic import held
from autocompress.errors import AutocompressError, StorageError
from autocompress.space import SearchSpace
from autocompress.trial import Outcome, Trial

if TYPE_CHECKING:
    import optuna


class _DamagedError(StorageError):
    """What is there cannot be read."""


class TrialStorage:
    """Paid evaluations as trials of an Optuna study; `optuna-dashboard` opens it.

    Args:
        storage: `Path` of a journal file, or URL of any Optuna storage.
        study: Name of the study.
        identity: What the trials belong to; kept in the study and compared when it is opened again.

    Raises:
        StorageError: It cannot be opened, is damaged, or belongs to another search.
        AutocompressError: The identity is not plain.
    """

    def __init__(self, storage: Path | str, *, study: str, identity: Mapping[str, Any]) -> None:
        """Open or create the study."""
        import optuna

        if not isinstance(storage, Path) and "://" not in str(storage):
            raise StorageError(
                "storage must be the pathlib.Path of a journal file, or the URL of an Optuna storage such as "
                f"'sqlite:///trials.db', got {storage!r}; for a file: pathlib.Path({storage!r})"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage, self._name = storage, study
        self._identity = plain_identity(identity)
        self._where = _shown(storage)
        self._study = self._open()
        self._frozen = self._read()
        self._file = self._file_now()

    def _open(self) -> "optuna.Study":
        import optuna

        storage, identity = self._storage, self._identity
        with self._explained("open"):
            backend: Any = storage
            if isinstance(storage, Path):
                storage.parent.mkdir(parents=True, exist_ok=True)
                backend = _journal(storage)
            study = optuna.create_study(
                storage=backend, study_name=self._name, direction="maximize", load_if_exists=True
            )
            known = study.user_attrs.get("identity")
            if known is None:
                study.set_user_attr("identity", identity)
        if known is not None and known != identity:
            differing = [key for key in {*known, *identity} if known.get(key) != identity.get(key)]
            raise StorageError(
                f"the trials at {self._where} belong to another search: {', '.join(sorted(differing))} "
                "differ; use another run directory or study name"
            )
        return study

    def _read(self) -> "list[optuna.trial.FrozenTrial]":
        with self._explained("read"):
            return self._study.get_trials(deepcopy=False)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Raise what refuses or cannot read the trials as `StorageError`."""
        try:
            yield
        except StorageError:
            raise
        except _refusals() as error:
            raise StorageError(f"cannot {doing} the trials at {self._where}: {_reason(error)}") from error
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
            # What replaying a journal line raises depends on what is wrong with it.
            raise _DamagedError(
                f"the trials at {self._where} are damaged: {error!r}; remove them to search anew"
            ) from error

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from searching with this study, where trials are in a file.

        Raises:
            StorageError: Another process does, or the folder cannot be written.
        """
        file_of_trials = _file_of(self._storage)
        if file_of_trials is None:
            yield
            return
        file_of_trials = file_of_trials.resolve()
        study = f"{zlib.crc32(self._name.encode()):08x}"
        path = file_of_trials.with_name(f".{file_of_trials.name}.{study}.lock")
        busy = (
            f"another process searches with study {self._name!r} of {self._where}; wait for it, or use "
            "another run directory or study name"
        )
        with held(path, busy):
            yield

    def _file_now(self) -> tuple[int, ...] | None:
        """Return what tells whether anyone touched the journal since; `None` for a database."""
        if not isinstance(self._storage, Path):
            return None
        try:
            found = self._storage.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _restore(self) -> None:
        """Write again what is missing, once the journal was removed, cut, overwritten or replaced.

        One that cannot be read any more is put aside: it may hold trials of other studies.
        """
        try:
            self._study = self._open()
        except _DamagedError:
            path = cast(Path, self._storage)
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            path.rename(aside)
            warnings.warn(
                f"the trials at {path} were damaged during this search: the file is put aside as "
                f"{aside.name}, and the trials of study {self._name!r} are written again",
                stacklevel=3,
            )
            self._study = self._open()
        there = {_network_of(frozen) for frozen in self._read()}
        for frozen in self._frozen:
            if _network_of(frozen) not in there:
                self._study.add_trial(frozen)

    def add(self, trial: Trial, space: SearchSpace, objective: str) -> None:
        """Append one finished trial.

        Raises:
            StorageError: It cannot be written; what was there is unchanged.
        """
        import optuna

        settings = dict(trial.architecture.settings)
        choices = [choice for choice in space.choices if choice.name in settings]
        measured = trial.outcome == Outcome.MEASURED
        states = optuna.trial.TrialState
        frozen = optuna.trial.create_trial(
            state=states.COMPLETE if measured else states.FAIL,
            value=trial.metrics[objective] if measured else None,
            params={choice.name: settings[choice.name] for choice in choices},
            distributions={
                choice.name: optuna.distributions.CategoricalDistribution(choice.options)
                for choice in choices
            },
            user_attrs={
                "architecture": trial.architecture.to_json(),
                "costs": dict(trial.costs),
                "metrics": dict(trial.metrics),
                "outcome": trial.outcome.name,
                "error": trial.error,
            },
        )
        with self._explained("write"):
            if self._file_now() != self._file:
                self._restore()
            self._study.add_trial(frozen)
            self._frozen.append(frozen)
            self._file = self._file_now()

    def load(self, space: SearchSpace) -> list[Trial]:
        """Return every finished trial, in order.

        Raises:
            StorageError: A trial cannot be read back.
        """
        trials: list[Trial] = []
        for frozen in self._read():
            attributes = frozen.user_attrs
            if "architecture" not in attributes:
                continue
            try:
                trials.append(
                    Trial(
                        number=len(trials),
                        architecture=space.from_json(attributes["architecture"]),
                        costs=attributes["costs"],
                        metrics=attributes["metrics"],
                        outcome=Outcome[attributes["outcome"]],
                        error=attributes["error"],
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise StorageError(f"trial {frozen.number} at {self._where} is damaged: {error}") from error
        return trials


def _refusals() -> tuple[type[Exception], ...]:
    """Return what storages raise where they cannot be opened or written: files, drivers, databases."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, ImportError, OptunaError, SQLAlchemyError


def _shown(storage: Path | str) -> str:
    """Return a path or URL as it may be shown: without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if isinstance(storage, Path):
        return str(storage)
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return storage


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _file_of(storage: Path | str) -> Path | None:
    """Return the file that holds the trials; `None` for a database in memory or behind a server."""
    from sqlalchemy.engine import make_url

    if isinstance(storage, Path):
        return storage
    url = make_url(storage)
    name = (url.database or ":memory:").removeprefix("file:")
    return Path(name) if url.get_backend_name() == "sqlite" and name != ":memory:" else None


def _network_of(frozen: "optuna.trial.FrozenTrial") -> Any:
    """Return what no two trials of a search share."""
    return frozen.user_attrs.get("architecture")


def plain_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping as it comes back from JSON.

    Raises:
        AutocompressError: JSON cannot hold it.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(identity), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise AutocompressError(
            "identity must hold plain values (text, numbers, lists and mappings of them), got "
            f"{dict(identity)!r}: {error}"
        ) from None
    return plain


def _journal(path: Path) -> "optuna.storages.JournalStorage":
    from optuna.storages import JournalStorage, journal

    lock = cast("journal.JournalFileOpenLock", _KernelLock(path))
    backend = journal.JournalFileBackend(str(path), lock_obj=lock)
    if path.exists():
        cut_incomplete_line(path)
    return JournalStorage(backend)


@final
class _KernelLock:
    """A lock on the journal itself, which ends with the process, however that ends.

    Optuna's own locks are files beside the journal; one that a kill leaves holds the next process for half a
    minute.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        import fcntl

        file = self._path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def cut_incomplete_line(path: Path) -> None:
    """Remove a last line without its end, as a kill leaves it: the next append would damage the journal.

    Done under a lock, so that a line that another process is writing is not cut.

    Raises:
        StorageError: The file cannot be read or written.
    """
    import fcntl

    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            end = position = file.tell()
            while position:
                start = max(0, position - 4096)
                file.seek(start)
                newline = file.read(position - start).rfind(b"\n")
                if newline >= 0:
                    position = start + newline + 1
                    break
                position = start
            if position < end:
                file.truncate(position)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
