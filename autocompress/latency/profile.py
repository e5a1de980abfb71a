"""Profiling: measure every distinct block of a space and some whole networks, fit, and write the table."""

import hashlib
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress import __version__
from autocompress.cost import operation_cost
from autocompress.errors import TableError
from autocompress.latency.correction import Checks, Correction, ErrorReport, assess
from autocompress.latency.drift import drift_percent
from autocompress.latency.measure import (
    REFERENCE,
    Item,
    Progress,
    Stopping,
    Timer,
    half_width,
    measure,
    summarize,
    time_once,
)
from autocompress.latency.runtime import Blocks, Run, pinned, prepare, versions
from autocompress.latency.samples import SampleFile
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, describe_device
from autocompress.ops import Ops, block_key
from autocompress.space import Codes, SearchSpace

TABLE_FILE: Final = "latency_table.json"
SAMPLES_FILE: Final = "latency_samples.jsonl"
CANDIDATES: Final = 2000

Prepare = Callable[[Blocks, Target], Run]
"""Builds what is timed."""


def distinct_blocks(space: SearchSpace) -> dict[str, Ops]:
    """Return each different active block of a space once, by its key."""
    result: dict[str, Ops] = {}
    known: set[Ops] = {()}
    for block in space.blocks:
        for setting in space.block_settings(block):
            ops = block.operations(*setting)
            if ops not in known:
                known.add(ops)
                result.setdefault(block_key(ops), ops)
    return result


def check_networks(space: SearchSpace, n: int = 40, *, seed: int = 0) -> Codes:
    """Return different architectures, evenly spread in MACs from the smallest to the largest one.

    Random networks cover a narrow middle; here half of the candidates are drawn between random ones and the
    smallest or the largest, each with its own share of genes.

    Args:
        space: Where they come from.
        n: How many; fewer are returned if the space has fewer, or the candidates do.
        seed: Of the candidates.

    Returns:
        `(m, choices)`, from least to most MACs; with m >= 2 the smallest and the largest are among them.
    """
    if n < 1:
        return np.zeros((0, len(space.choices)), dtype=np.int64)
    rng = np.random.default_rng(seed)
    drawn = space.sample(CANDIDATES, rng)
    extremes = np.concatenate([space.smallest(), space.largest()])
    towards = extremes[rng.integers(2, size=CANDIDATES // 2)]
    share = rng.random((CANDIDATES // 2, 1))
    moved = np.where(rng.random(towards.shape) < share, towards, drawn[: len(towards)])
    pool = np.unique(space.canonical(np.concatenate([extremes, drawn, moved])), axis=0)
    macs = operation_cost(space, "macs").of(pool)
    ends = operation_cost(space, "macs").of(extremes)
    free = np.ones(len(pool), dtype=np.bool_)
    chosen: list[int] = []
    for extreme in extremes:
        index = int((pool == extreme).all(axis=1).argmax())
        if free[index] and len(chosen) < n:
            free[index] = False
            chosen.append(index)
    for goal in np.linspace(ends[0], ends[1], n)[1:-1]:
        if not free.any():
            break
        index = int(np.where(free, np.abs(macs - goal), np.inf).argmin())
        free[index] = False
        chosen.append(index)
    return pool[sorted(chosen, key=lambda index: float(macs[index]))]


def profile(
    space: SearchSpace,
    target: Target,
    *,
    folder: Path,
    networks: int = 40,
    seed: int = 0,
    tolerance: float = 0.02,
    min_rounds: int = 24,
    max_rounds: int = 60,
    timer: Timer | None = None,
    table: LatencyTable | None = None,
    progress: Progress | None = None,
    prepare: Prepare = prepare,
) -> LatencyTable:
    """Measure a space on a target of this machine, and write `latency_table.json` into a folder.

    Samples are kept in `latency_samples.jsonl` beside it as they are taken: called again after a kill, what
    is finished is not measured again.

    Args:
        space: Its distinct blocks become the rows.
        target: Runtime, threads, batch.
        folder: Made if absent.
        networks: Whole networks that are measured for the correction and the error report; 0 for none.
        seed: Of the networks and of the order of runs.
        tolerance: Relative half width of the 95 % interval of a median at which measuring ends.
        min_rounds: Runs of each block and network, at least.
        max_rounds: And at most.
        timer: Reads the clock; tests bring their own.
        table: Taken as it is if it was measured for this space and lacks no row. Otherwise rows it has are
            taken over instead of measured, and the correction is fitted to this space.
        progress: Told how many of the samples there are.
        prepare: Builds what is timed; tests bring their own.

    Raises:
        TableError: The given table is of another target; the file of samples is damaged or of another
            target; `networks` is 1 or negative.
        StorageError: The folder cannot be written.
    """
    if networks < 0 or networks == 1:
        raise TableError(f"networks must be 0 or at least 2, got {networks}")
    stopping = Stopping(tolerance, min_rounds, max_rounds)
    blocks = distinct_blocks(space)
    rows = {}
    if table is not None:
        table.check_target(target)
        rows = dict(table.rows)
    missing = {key: ops for key, ops in blocks.items() if key not in rows}
    if table is not None and not missing and _space_of(table) == space.fingerprint:
        table.save(folder / TABLE_FILE)
        return table
    codes = check_networks(space, networks, seed=seed)
    checked = [space.operations(row) for row in codes]
    items = [
        Item(_block_name(key), partial(prepare, [("block", ops)], target)) for key, ops in missing.items()
    ]
    items += [Item(_network_name(network), partial(prepare, network, target)) for network in checked]
    largest = max(blocks.values(), key=lambda ops: sum(op.macs for op in ops))
    subject = {"target": target.conditions(), "device": describe_device(target.device)}
    file = SampleFile(folder / SAMPLES_FILE, subject)
    with pinned(target):
        samples = measure(
            items,
            stopping=stopping,
            seed=seed,
            samples=file,
            reference=Item(REFERENCE, partial(prepare, [("block", largest)], target)),
            timer=timer or time_once,
            progress=progress,
        )
    rows.update({key: summarize(samples[_block_name(key)].steady_ms) for key in missing})
    network_samples = [samples[_network_name(network)].steady_ms for network in checked]
    correction, report = Correction(), None
    if checked:
        unstable = sum(half_width(sorted(samples[_block_name(key)].steady_ms)) > tolerance for key in missing)
        checks = Checks(
            sums_ms=np.array([sum(rows[block_key(ops)].median_ms for _, ops in net) for net in checked]),
            blocks=np.array([float(len(net)) for net in checked]),
            measured_ms=np.array([summarize(taken).median_ms for taken in network_samples]),
            least_ms=min(row.median_ms for row in rows.values()),
        )
        correction, report = assess(
            checks,
            network_samples,
            drift_percent=drift_percent(samples[REFERENCE].raw_ms),
            unstable_rows=unstable,
        )
    result = _table(space, target, rows, (correction, report), file.started)
    result.save(folder / TABLE_FILE)
    return result


def _space_of(table: LatencyTable) -> object:
    measured_for = table.provenance.get("space")
    return measured_for.get("fingerprint") if isinstance(measured_for, dict) else None


def _block_name(key: str) -> str:
    return f"block {key}"


def _network_name(network: Blocks) -> str:
    """Name a network by what it runs, so that another space of the same name cannot take its samples."""
    text = "\n".join(block_key(ops) for _, ops in network)
    return f"network {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _table(
    space: SearchSpace,
    target: Target,
    rows: dict[str, Any],
    fitted: tuple[Correction, ErrorReport | None],
    measured: str,
) -> LatencyTable:
    provenance = {
        "device": describe_device(target.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(target),
        "autocompress": __version__,
        "measured": measured,
        "space": {"name": space.name, "fingerprint": space.fingerprint},
    }
    return LatencyTable(target, rows, fitted[0], fitted[1], provenance)
