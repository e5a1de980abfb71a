"""From samples to a table: rows, the correction fitted to whole networks, and the error report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np

from autocompress.errors import MissingRowError, NegativeLatencyError, TableError
from autocompress.latency.correction import (
    Assessed,
    Checks,
    Correction,
    Granularity,
    assess,
    choose,
    figures,
)
from autocompress.latency.drift import drift_percent
from autocompress.latency.keys import parse_block
from autocompress.latency.measure import REFERENCE, Measurement, Sampled, half_width, summarize
from autocompress.latency.plan import NetworkKeys, Plan, row_name
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target
from autocompress.latency.widths import WidthGrid, WidthReport, ms_of
from autocompress.ops import SEPARATOR, border_elements
from autocompress.space import SearchSpace


def assemble(
    target: Target,
    samples: Mapping[str, Sampled],
    networks: Sequence[NetworkKeys],
    measured: Sequence[str],
    known: Mapping[str, Measurement],
    tolerance: float,
    provenance: Mapping[str, Any],
    *,
    grid: WidthGrid | None = None,
    space: SearchSpace | None = None,
) -> LatencyTable:
    """Make a table of samples: rows, the correction fitted to whole networks, and the error report.

    Args:
        target: What was measured.
        samples: By item: `row_name(key)`, `NetworkKeys.name` and `REFERENCE`.
        networks: The measured networks.
        measured: Keys of the rows among the samples.
        known: Rows of an older table, kept.
        tolerance: Rows whose interval is wider are counted as unstable.
        provenance: Of the table.
        grid: If given, operations that have no row are interpolated, and networks are priced by operation.
        space: If given, no correction is used by which one of its networks would take less than no time.

    Raises:
        TableError: A row or network was never measured, or a network took no time.
    """
    for name in (*map(row_name, measured), *(keys.name for keys in networks)):
        if name not in samples or not samples[name].steady_ms:
            raise TableError(f"there are no samples of {name!r}: the measurement is not complete, run it on")
    rows = {**known, **{key: summarize(samples[row_name(key)].steady_ms) for key in measured}}
    row_ms = {key: row.median_ms for key, row in rows.items()}
    allowed: tuple[Granularity, ...] = get_args(Granularity) if grid is None else ("op",)
    if not networks:
        blocks = grid is None and any(SEPARATOR in key for key in rows)
        granularity: Granularity = "block" if blocks else "op"
        return LatencyTable(target, rows, Correction(), None, provenance, granularity, grid)
    network_samples = [samples[keys.name].steady_ms for keys in networks]
    medians = np.array([summarize(taken).median_ms for taken in network_samples])
    assessed: dict[Granularity, Assessed] = {}
    for name in allowed:
        used = [[ms_of(key, row_ms, grid) for key in _rows_of(keys, name)] for keys in networks]
        priced = [[ms for ms in network_ms if ms is not None] for network_ms in used]
        if priced != used:
            continue
        checks = Checks(
            sums_ms=np.array([sum(network_ms) for network_ms in priced]),
            rows=np.array([float(len(network_ms)) for network_ms in priced]),
            measured_ms=medians,
            # Also rows that none of these networks has: none may get a negative price.
            least_ms=min(
                *(ms for network_ms in priced for ms in network_ms),
                *(ms for key, ms in row_ms.items() if (SEPARATOR in key) == (name == "block")),
            ),
            names=tuple(keys.name for keys in networks),
            **_borders([_rows_of(keys, name) for keys in networks], row_ms, name),
        )
        assessed[name] = assess(
            checks,
            network_samples,
            drift_percent=drift_percent(samples[REFERENCE].raw_ms) if REFERENCE in samples else None,
            unstable_rows=sum(
                half_width(sorted(samples[row_name(key)].steady_ms)) > tolerance for key in measured
            ),
            disturbed_percent=_disturbed_percent(samples),
            usable=partial(
                _never_negative, LatencyTable(target, rows, Correction(), None, {}, name, grid), space
            ),
        )
    if not assessed:
        raise TableError("the measured networks run blocks and operations that have no rows")
    correction, report = choose(assessed)
    return LatencyTable(target, rows, correction, report, provenance, report.granularity, grid)


def _never_negative(table: LatencyTable, space: SearchSpace | None, correction: Correction) -> bool:
    if space is None:
        return True
    try:
        replace(table, correction=correction).cost(space)
    except NegativeLatencyError:
        return False
    except MissingRowError:
        # Of this granularity the table prices the measured networks alone; whoever prices others is told.
        return True
    return True


def width_report(
    table: LatencyTable,
    grid: WidthGrid,
    plan: Plan,
    held_out: Mapping[str, Measurement],
    seconds: float,
) -> WidthReport | None:
    """Return how far the grid is off between its knots; `None` if no operation is between them."""
    predicted = {key: grid.price(plan.rows[key][0], table.row_ms) for key in held_out}
    compared = {key: ms for key, ms in predicted.items() if ms is not None}
    if not compared:
        return None
    return WidthReport(
        measured_rows=len(plan.rows) - len(plan.held_out),
        priced_rows=plan.priced,
        families=len(grid.knots),
        seconds=seconds,
        held_out_rows=len(compared),
        held_out=figures(
            np.array(list(compared.values())), np.array([held_out[key].median_ms for key in compared])
        ),
    )


def _borders(
    networks: Sequence[Sequence[str]], row_ms: Mapping[str, float], granularity: Granularity
) -> dict[str, Any]:
    """Return elements that enter and leave rows; nothing if a row has operations of a user's own."""
    known = {key: ms for key, ms in row_ms.items() if (SEPARATOR in key) == (granularity == "block")}
    keys = {key for network in networks for key in network} | known.keys()
    try:
        elements = {key: border_elements(parse_block(key)) for key in keys}
    except TableError:
        return {}
    return {
        "elements": np.array([float(sum(elements[key] for key in network)) for network in networks]),
        "row_ms": np.array(list(known.values())),
        "row_elements": np.array([float(elements[key]) for key in known]),
    }


def _rows_of(network: NetworkKeys, granularity: Granularity) -> list[str]:
    if granularity == "op":
        return [op for block in network.blocks for op in block]
    return [SEPARATOR.join(block) for block in network.blocks]


def _disturbed_percent(samples: Mapping[str, Sampled]) -> float:
    taken = sum(len(sampled.raw_ms) for sampled in samples.values())
    kept = sum(len(sampled.steady_ms) for sampled in samples.values())
    return 100 * (1 - kept / taken)
