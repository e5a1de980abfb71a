"""What the readers of tables share: bytes, text, JSON and CSV, read strictly, never executed.

A file is not trusted: its size is known before it is read, nothing in it is unpickled or constructed,
and whatever is wrong with it is a `TableError` that names the file.
"""

import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from autocompress.errors import TableError
from autocompress.latency.strict import Node

# The largest published table has 0.4 MB. JSON of this size becomes at most 1.5 GB of objects in memory.
MAX_BYTES: Final = 64 * 2**20
# Sums and products of a whole table stay finite.
MAX_COST: Final = 1e100
DECIMAL: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")


@contextmanager
def reading(what: str, path: Path, *, described: str = "docs/foreign-tables.md") -> Iterator[None]:
    """Put the kind of file, its path and where its format is described into every `TableError`."""
    try:
        yield
    except TableError as error:
        raise TableError(f"{what} {path}: {error}; the format is described in {described}") from None


def shown(value: object) -> str:
    """Return a value for a message, at most 80 characters of it."""
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of at most `MAX_BYTES`, unpacked if its name ends in `.gz`.

    Raises:
        TableError: It is absent, no file, too large before or after unpacking, or damaged.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise TableError("must be a regular file, got a folder or a device")
        if found.st_size > MAX_BYTES:
            raise _too_large(f"{found.st_size} bytes")
        with path.open("rb") as file:
            packed = path.suffix == ".gz"
            # One byte more than allowed is read, never all that a small file may unpack to.
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise TableError("not found; give the path of the file") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        # ValueError: a path with a null character.
        raise TableError(f"cannot be read, truncated or damaged: {error}; get it anew") from None
    if len(content) > MAX_BYTES:
        raise _too_large(f"more than {MAX_BYTES} bytes")
    return content


def _too_large(received: str) -> TableError:
    return TableError(f"must have at most {MAX_BYTES} bytes, also unpacked, got {received}; is it a table?")


def read_text(path: Path, *, whole_lines: bool = False) -> str:
    """Return the content as text.

    Args:
        path: The file.
        whole_lines: Refuse a file that does not end with the end of a line: it was cut, and half of a number
            is a number.

    Raises:
        TableError: As `read_bytes`; it is not UTF-8, has null characters, or its last line has no end.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TableError(
            f"must be text in UTF-8, got byte {content[error.start]:#04x} at {error.start}"
        ) from None
    if "\0" in text:
        raise TableError(f"must be text, got a null character at {text.index(chr(0))}")
    if whole_lines and not text.endswith("\n"):
        raise TableError(
            f"must end with the end of a line, got {shown(text[-20:])}: it may be truncated; if it is whole, "
            "add a line break"
        )
    return text


def parse_json(text: str) -> Node:
    """Parse JSON; a key that stands twice, NaN, Infinity and integers of over 18 digits are refused.

    Raises:
        TableError: It is not such JSON.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_int=_short_integer
        )
    except TableError:
        raise
    except (ValueError, RecursionError) as error:
        raise TableError(f"must be JSON, got {shown(text)}: {error}; it may be truncated") from None
    return Node(value, "")


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise stands_twice(key)
            seen.add(key)
    return result


def stands_twice(key: str) -> TableError:
    """Return the error for a key that is not unique."""
    return TableError(f"key {shown(key)} stands twice; a key must be unique: remove one")


def _no_constant(name: str) -> float:
    raise TableError(f"a number must be finite, got {name}")


def _short_integer(digits: str) -> int:
    if not INTEGER.fullmatch(digits):
        raise TableError(f"an integer must have at most 18 digits, got {shown(digits)}")
    return int(digits)


def number_or_text(text: str) -> int | float | str:
    """Return a plain decimal as a number, and anything else (`nan`, `1_0`, `0x1`) as the text it is."""
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


def parse_csv(text: str) -> tuple[list[str], list[dict[str, Node]]]:
    """Return the header of a CSV text and its rows, each a value by column.

    Raises:
        TableError: The header is empty or names a column twice, or a row has more or fewer values.
    """
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(lines, [])
        if not header or len(set(header)) < len(header):
            raise TableError(f"line 1 must name every column once, got {shown(header)}")
        rows = []
        for cells in lines:
            where = f"line {lines.line_num}"
            if len(cells) != len(header):
                raise TableError(f"{where} must have {len(header)} values, got {len(cells)}: {shown(cells)}")
            rows.append(
                {
                    name: Node(number_or_text(cell), f"{where}, column {name}")
                    for name, cell in zip(header, cells, strict=True)
                }
            )
    except csv.Error as error:
        raise TableError(f"must be CSV, got a line that is not: {error}; it may be truncated") from None
    if not rows:
        raise TableError("must have at least one row below the header, got none")
    return header, rows


def expect_columns(header: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse a header that is not exactly the expected one."""
    if list(header) != list(expected):
        raise TableError(f"line 1 must be {','.join(expected)}, got {shown(','.join(header))}")


def cost_of(node: Node) -> float:
    """Return a time or another cost: finite, at least 0, at most `MAX_COST`."""
    value = node.number()
    if value > MAX_COST:
        raise node.wrong(f"at most {MAX_COST:g}")
    return value


def text_of(row: Mapping[str, Node], column: str) -> str:
    """Return a value of a CSV row that must be text."""
    value = row[column].value
    if not isinstance(value, str) or not value:
        raise row[column].wrong("a text")
    return value
