"""Times of blocks as plain CSV, made by hand or by a device's own profiler; the header names the unit."""

import re
from pathlib import Path
from typing import Final

from autocompress.errors import TableError
from autocompress.latency.foreign.rows import ForeignRow
from autocompress.latency.reading import cost_of, parse_csv, read_text, reading, shown, text_of

MS_PER_UNIT: Final = {"ms": 1.0, "us": 1e-3, "s": 1e3}
OPERATION: Final = r"[A-Za-z_][A-Za-z0-9_]*\([^()<>]*\)"
BLOCK_KEY: Final = re.compile(rf"{OPERATION}(?: > {OPERATION})*")


def read_plain_csv(path: Path) -> dict[str, ForeignRow]:
    """Read times by block key, in ms.

    Args:
        path: CSV or CSV.gz `key,median_UNIT`, optionally with `spread_UNIT` (interquartile range), `count` or
            both after it; UNIT is ms, us or s, the same in both. Keys are `autocompress.ops.block_key`s, in
            quotes because they have commas.

    Raises:
        TableError: The file is absent or damaged, has other columns or units, a key stands twice or is none,
            or a time is negative or not finite.
    """
    with reading("latency CSV", path):
        header, rows = parse_csv(read_text(path, whole_lines=True))
        unit = _unit(header)
        factor = MS_PER_UNIT[unit]
        result: dict[str, ForeignRow] = {}
        for row in rows:
            key = text_of(row, "key")
            if not BLOCK_KEY.fullmatch(key):
                raise row["key"].wrong("a block key such as 'Linear(in_features=8,out_features=3)'")
            if key in result:
                raise TableError(f"{row['key'].path}: {shown(key)} stands twice; a key must be unique")
            spread, count = row.get(f"spread_{unit}"), row.get("count")
            result[key] = ForeignRow(
                factor * cost_of(row[f"median_{unit}"]),
                None if spread is None else factor * cost_of(spread),
                None if count is None else count.integer(1),
            )
        return result


def _unit(header: list[str]) -> str:
    """Return the unit that a header states."""
    for unit in MS_PER_UNIT:
        optional = [f"spread_{unit}", "count"]
        for rest in ([], optional, optional[:1], optional[1:]):
            if header == ["key", f"median_{unit}", *rest]:
                return unit
    allowed = ", ".join(f"median_{unit}" for unit in MS_PER_UNIT)
    raise TableError(
        f"line 1 must be key,median_UNIT[,spread_UNIT][,count] with one of {allowed}, got "
        f"{shown(','.join(header))}"
    )
