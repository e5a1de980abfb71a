"""The file of samples that makes a profile resumable: JSON lines, appended as rounds finish.

Line 1 says what was measured where. A line `{"id": 7, "item": "..."}` names an item before its first sample;
`{"ms": {"7": 0.041}}` is one finished round; `{"finished": [7], "tolerance": 0.02}` says what needs no more.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from autocompress.errors import StorageError, TableError
from autocompress.latency.reading import parse_json, read_text
from autocompress.latency.strict import Node

SCHEMA: Final = "autocompress.latency_samples"
VERSION: Final = 1

MAX_MS: Final = 3_600_000.0
"""A run of an hour: sums of any number of such times stay finite."""


class SampleFile:
    """Rounds of samples in a file; opening it cuts an incomplete last line, as a kill leaves it.

    Attributes:
        path: The file.
        started: When the file was begun, ISO 8601 in UTC.
        rounds: Finished rounds, item to ms, in the order of time.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        """Open the file, or begin it.

        Args:
            path: The file.
            subject: What must be equal for samples to be of use: target and device.

        Raises:
            TableError: The file is damaged before its last line, or of another subject.
            StorageError: It cannot be read or written.
        """
        self.path = path
        self.rounds: list[dict[str, float]] = []
        self._names: dict[str, int] = {}
        self._finished: list[tuple[float, str]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                with path.open("r+b") as file:
                    file.truncate(len(whole))
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        if not whole:
            self.started = datetime.now(UTC).isoformat(timespec="seconds")
            self._write(
                {"schema": SCHEMA, "version": VERSION, "unit": "ms", "started": self.started, **subject}
            )
            return
        self._read(whole, subject)

    def _read(self, text: bytes, subject: dict[str, Any]) -> None:
        keys: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._check_header(row, subject)
                elif "item" in row:
                    keys[str(row["id"])] = row["item"]
                elif "finished" in row:
                    tolerance = float(row["tolerance"])
                    self._finished += [(tolerance, keys[str(identity)]) for identity in row["finished"]]
                else:
                    samples = {keys[identity]: float(ms) for identity, ms in row["ms"].items()}
                    if not all(math.isfinite(ms) and ms >= 0 for ms in samples.values()):
                        raise ValueError("a time must be a finite number >= 0")
                    self.rounds.append(samples)
            except TableError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TableError(
                    f"{self.path}, line {number} is damaged ({error}): delete the file to measure anew"
                ) from None
        self._names = {key: int(identity) for identity, key in keys.items()}

    def _check_header(self, row: Any, subject: dict[str, Any]) -> None:
        if row.get("schema") != SCHEMA or row.get("version") != VERSION or row.get("unit") != "ms":
            raise TableError(f"{self.path} is no file of {SCHEMA} version {VERSION} in ms: line 1 is {row}")
        for name, value in subject.items():
            if row.get(name) != value:
                raise TableError(
                    f"{self.path} has samples of {name} {row.get(name)}, not of {value}: delete it to "
                    "measure anew, or choose another folder"
                )
        self.started = str(row.get("started"))

    def append(self, samples_ms: dict[str, float]) -> None:
        """Append one finished round.

        Raises:
            StorageError: The disk is full, or the like.
        """
        for key in samples_ms:
            if key not in self._names:
                self._names[key] = len(self._names)
                self._write({"id": self._names[key], "item": key})
        self._write({"ms": {str(self._names[key]): ms for key, ms in samples_ms.items()}})
        self.rounds.append(samples_ms)

    def finish(self, keys: list[str], tolerance: float) -> None:
        """Note that items were measured well enough.

        Raises:
            StorageError: The disk is full, or the like.
        """
        self._write({"finished": [self._names[key] for key in keys], "tolerance": tolerance})
        self._finished += [(tolerance, key) for key in keys]

    def finished(self, tolerance: float) -> set[str]:
        """Return the items that were finished at this tolerance or a smaller one."""
        return {key for asked, key in self._finished if asked <= tolerance}

    def _write(self, row: dict[str, Any]) -> None:
        try:
            # Opened for each line: nothing is buffered when the process is killed.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Rounds:
    """What a file of samples from elsewhere says.

    Attributes:
        header: Line 1; only schema, version and unit are checked.
        rounds: Item to ms, in the order of time.
        finished: Items that were measured well enough for whoever measured them.
    """

    header: Node
    rounds: list[dict[str, float]] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)


def read_rounds(path: Path, items: Collection[str]) -> Rounds:
    """Read a file of samples that was measured elsewhere, strictly; it is not changed.

    Args:
        path: Written by a `SampleFile` or by the runner of a bundle.
        items: Those there can be.

    Raises:
        TableError: The file is absent, too large (`reading.MAX_BYTES`) or ends within a line, or a line is
            wrong; names it.
    """
    first, *rest = read_text(path, whole_lines=True)[:-1].split("\n")
    header = _parse(first, 1)
    header.object()
    header.member("schema").equal(SCHEMA)
    header.member("version").equal(VERSION)
    header.member("unit").equal("ms")
    result = Rounds(header)
    unnamed = set(items)
    names: dict[str, str] = {}
    for number, line in enumerate(rest, start=2):
        _take(_parse(line, number), result, unnamed, names)
    return result


def _parse(line: str, number: int) -> Node:
    try:
        return Node(parse_json(line).value, f"line {number}")
    except TableError as error:
        raise TableError(f"line {number}: {error}") from None


def _take(node: Node, result: Rounds, unnamed: set[str], names: dict[str, str]) -> None:
    """Take one line; `names` are the items that lines before it have named, by their number."""
    members = node.object()
    if "item" in members:
        named = node.object(("id", "item"))
        item, identity = named["item"].text(), str(named["id"].integer())
        if item not in unnamed:
            raise named["item"].wrong("an item that was to be measured, named once")
        if identity in names:
            raise named["id"].wrong("a number that no other item has")
        unnamed.remove(item)
        names[identity] = item
    elif "finished" in members:
        listed = node.object(("finished", "tolerance"))
        listed["tolerance"].number()
        for entry in listed["finished"].list():
            result.finished.add(_named(entry, str(entry.integer()), names))
    else:
        times = {}
        for identity, entry in node.object(("ms",))["ms"].object().items():
            times[_named(entry, identity, names)] = entry.number()
            if entry.number() > MAX_MS:
                raise entry.wrong(f"at most {MAX_MS:g} ms")
        result.rounds.append(times)


def _named(node: Node, identity: str, names: dict[str, str]) -> str:
    if identity not in names:
        raise node.wrong("of an item that a line before has named")
    return names[identity]
