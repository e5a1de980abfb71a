"""Latency tables of ProxylessNAS and once-for-all: YAML or JSON, a key with shapes to a mean time.

Means are in ms. docs/foreign-tables.md has the keys; `ofa_keys` makes those of a block.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.ofa_keys import (
    Expand,
    check_keys,
    has_attention,
    meaning_of_expand,
    ofa_keys,
)
from autocompress.latency.foreign.rows import QUARTILES_PER_DEVIATION, ForeignRow, one_after_the_other
from autocompress.latency.foreign.strict_yaml import parse_yaml
from autocompress.latency.reading import cost_of, parse_json, read_text, reading
from autocompress.latency.strict import Node
from autocompress.ops import Ops, block_key
from autocompress.space import SearchSpace

SUFFIXES: Final = (".json", ".yaml", ".yml")
FIELDS: Final = ("mean", "std", "var", "count")


@dataclass(frozen=True)
class OfaTable:
    """Times of a network's parts.

    Attributes:
        source: The file, for messages.
        expand: What `expand` means in the keys.
        attention: Whether the keys say `se` and `hs`.
        rows: Key to time; the spread is the interquartile range of a normal distribution with the published
            deviation.
    """

    source: str
    expand: Expand
    attention: bool
    rows: Mapping[str, ForeignRow]

    def row(self, ops: Ops) -> ForeignRow:
        """Return the time of a block: the sum of its rows, one for all but heads.

        Raises:
            MissingRowError: The table lacks a row; names its key and the nearest one.
            TableError: No key says what the block runs.
        """
        return one_after_the_other(self._rows(ops))

    def _rows(self, ops: Ops) -> list[ForeignRow]:
        keys = ofa_keys(ops, expand=self.expand, attention=self.attention)
        for key in keys:
            if key not in self.rows:
                nearest = next(iter(difflib.get_close_matches(key, self.rows, n=1, cutoff=0.0)), None)
                raise MissingRowError(
                    f"OFA table {self.source} has no row {key!r}; the nearest row is {nearest!r}; use the "
                    "space, width and resolutions that the table was made for"
                )
        return [self.rows[key] for key in keys]

    def price(self, ops: Ops) -> float:
        """Return the ms of a block, for `autocompress.cost.compile_cost`."""
        return math.fsum(row.ms for row in self._rows(ops))


def block_table(space: SearchSpace, table: OfaTable) -> dict[str, ForeignRow]:
    """Return the time of every distinct block of a space by its `block_key`.

    Raises:
        MissingRowError: The table lacks a row of a block.
        TableError: No key says what a block runs.
    """
    rows: dict[str, ForeignRow] = {}
    for block in space.priced_blocks:
        for setting in space.block_settings(block):
            ops = block.operations(*setting)
            if ops and (key := block_key(ops)) not in rows:
                rows[key] = table.row(ops)
    return rows


def ofa_price(path: Path, ops: Ops, *, expand: Expand | None = None) -> float:
    """Return the ms of one block by a table; for more than one, use `read_ofa(path).price`."""
    return read_ofa(path, expand=expand).price(ops)


def read_ofa(path: Path, *, expand: Expand | None = None, resolution: int | None = None) -> OfaTable:
    """Read a table.

    Args:
        path: `.yaml`, `.yml` or `.json`, each also with `.gz`: {key: row} or {resolution: {key: row}}. A row
            has `mean` in ms, and may have `std` or `var` (ms^2), and `count`.
        expand: What `expand` means in the keys; `None` decides by `meaning_of_expand`.
        resolution: Use the rows of one resolution; `None` uses all. A key has the shapes, so that it is the
            same work at each resolution it stands at, and its runs are pooled.

    Raises:
        TableError: The file is absent, damaged or no such table, a key stands twice, a time is negative or
            not finite, or what `expand` means is not given and not clear.
    """
    if expand is not None and expand not in get_args(Expand):
        raise TableError(f"expand must be one of {', '.join(get_args(Expand))}, got {expand!r}")
    with reading("OFA table", path):
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if suffix not in SUFFIXES:
            raise TableError(f"its name must end in {', '.join(SUFFIXES)}, or one of them and .gz")
        # YAML that was cut within a number is YAML; JSON is not.
        top = (
            parse_json(read_text(path))
            if suffix == ".json"
            else parse_yaml(read_text(path, whole_lines=True))
        )
        tables = _tables(top)
        if resolution is not None:
            if resolution not in tables:
                raise TableError(f"resolution must be one of {[r for r in tables if r]}, got {resolution}")
            tables = {resolution: tables[resolution]}
        measured: dict[str, list[ForeignRow]] = {}
        for rows in tables.values():
            for key, node in rows.items():
                measured.setdefault(key, []).append(_row(node))
        if not measured:
            raise TableError("must have at least one row, got none")
        check_keys(measured)
        expand = expand or meaning_of_expand(measured)
        if expand is None:
            raise TableError(
                "whether expand is a ratio or a number of middle channels is not clear from its numbers; say "
                "expand='ratio' (ProxylessNAS) or expand='channels' (once-for-all)"
            )
        pooled = {key: _pool(rows) for key, rows in measured.items()}
        return OfaTable(str(path), expand, has_attention(pooled), pooled)


def _tables(top: Node) -> dict[int | None, dict[str, Node]]:
    """Return the rows by resolution; a file without resolutions has one table, `None`."""
    members = top.object()
    if not members or not all(key.isascii() and key.isdigit() and len(key) < 6 for key in members):
        return {None: members}
    tables: dict[int | None, dict[str, Node]] = {}
    for key, node in members.items():
        if int(key) in tables:
            raise TableError(f"resolution {int(key)} stands twice; remove one")
        tables[int(key)] = node.object()
    return tables


def _row(node: Node) -> ForeignRow:
    members = node.object(FIELDS, optional=FIELDS[1:])
    if "std" in members and "var" in members:
        raise TableError(f"{node.path} must have std or var, got both")
    deviation = None
    if "std" in members:
        deviation = cost_of(members["std"])
    elif "var" in members:
        deviation = math.sqrt(cost_of(members["var"]))
    return ForeignRow(
        cost_of(members["mean"]),
        None if deviation is None else QUARTILES_PER_DEVIATION * deviation,
        members["count"].integer(1) if "count" in members else None,
    )


def _pool(rows: Sequence[ForeignRow]) -> ForeignRow:
    """Return what all runs of one key were together: their mean, spread and count.

    Runs count alike; where a row does not say how many it had, rows do.
    """
    if len(rows) == 1:
        return rows[0]
    counts = [row.count for row in rows if row.count is not None]
    known = len(counts) == len(rows)
    weights = counts if known else [1] * len(rows)
    total = sum(weights)
    mean = math.fsum(weight * row.ms for weight, row in zip(weights, rows, strict=True)) / total
    spread = None
    if all(row.spread_ms is not None for row in rows):
        # Variance within the rows and between them, both in interquartile ranges.
        between = (QUARTILES_PER_DEVIATION * (row.ms - mean) for row in rows)
        squares = ((row.spread_ms or 0.0) ** 2 + gap**2 for row, gap in zip(rows, between, strict=True))
        spread = math.sqrt(math.fsum(w * square for w, square in zip(weights, squares, strict=True)) / total)
    return ForeignRow(mean, spread, total if known else None)
