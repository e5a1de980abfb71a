"""Profiling: measure every distinct block of a space and some whole networks, fit, and write the table."""

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from autocompress import __version__
from autocompress.cost import operation_cost
from autocompress.errors import TableError
from autocompress.latency.correction import Assessed, Checks, Correction, Granularity, assess, choose
from autocompress.latency.drift import drift_percent
from autocompress.latency.measure import (
    REFERENCE,
    Item,
    Measurement,
    Progress,
    Sampled,
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
from autocompress.ops import SEPARATOR, Ops, block_key
from autocompress.space import Codes, SearchSpace

TABLE_FILE: Final = "latency_table.json"
SAMPLES_FILE: Final = "latency_samples.jsonl"
CANDIDATES: Final = 2000

Prepare = Callable[[Blocks, Target], Run]
"""Builds what is timed."""

Asked = Literal["auto", "block", "op"]
"""Which granularity to measure; `auto` measures both."""

NetworkKeys = tuple[tuple[str, ...], ...]
"""A network as the keys of the operations of each of its blocks."""


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


@dataclass(frozen=True)
class Plan:
    """What is measured of a space.

    Attributes:
        rows: Blocks, operations alone, or both, by key.
        networks: Whole networks that correct and check the sums of rows.
    """

    rows: Mapping[str, Ops]
    networks: tuple[Blocks, ...]

    @property
    def keys(self) -> tuple[NetworkKeys, ...]:
        """The networks as keys."""
        return tuple(network_keys(network) for network in self.networks)


def make_plan(space: SearchSpace, granularity: Asked, networks: int, seed: int) -> Plan:
    """Return what has to be measured to price a space.

    Args:
        space: Its distinct blocks or operations become rows.
        granularity: `"block"`, `"op"`, or `"auto"` for both.
        networks: How many whole networks; 0 for none.
        seed: Of the networks.

    Raises:
        TableError: `networks` is 1 or negative, or the granularity is another.
    """
    if networks < 0 or networks == 1:
        raise TableError(f"networks must be 0 or at least 2, got {networks}")
    if granularity not in get_args(Asked):
        raise TableError(f"granularity must be one of {', '.join(get_args(Asked))}, got {granularity!r}")
    blocks = distinct_blocks(space)
    rows = dict(blocks) if granularity in ("auto", "block") else {}
    if granularity in ("auto", "op"):
        rows.update({block_key((op,)): (op,) for ops in blocks.values() for op in ops})
    codes = check_networks(space, networks, seed=seed)
    return Plan(rows, tuple(space.operations(row) for row in codes))


def profile(
    space: SearchSpace,
    target: Target,
    *,
    folder: Path,
    networks: int = 40,
    seed: int = 0,
    granularity: Asked = "auto",
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
        space: Its distinct blocks and operations become the rows.
        target: Device, runtime, threads, batch, number format.
        folder: Made if absent.
        networks: Whole networks that are measured for the correction and the error report; 0 for none.
        seed: Of the networks and of the order of runs.
        granularity: What is summed: `"block"`, as the runtime fuses it, `"op"`, or `"auto"`, which measures
            both and takes what predicts whole networks better.
        tolerance: Relative half width of the 95 % interval of a median at which measuring ends.
        min_rounds: Runs of each row and network, at least.
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
    stopping = Stopping(tolerance, min_rounds, max_rounds)
    plan = make_plan(space, granularity, networks, seed)
    known: Mapping[str, Measurement] = {}
    if table is not None:
        table.check_target(target)
        known = table.rows
        if space_of(table) == space.fingerprint and _complete(table, space):
            table.save(folder / TABLE_FILE)
            return table
    missing = {key: ops for key, ops in plan.rows.items() if key not in known}
    items = [Item(row_name(key), partial(prepare, [("block", ops)], target)) for key, ops in missing.items()]
    items += [
        Item(network_name(keys), partial(prepare, network, target))
        for keys, network in zip(plan.keys, plan.networks, strict=True)
    ]
    largest = max(plan.rows.values(), key=lambda ops: sum(op.macs for op in ops))
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
    provenance = {
        "device": describe_device(target.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(target),
        "autocompress": __version__,
        "measured": file.started,
        "space": {"name": space.name, "fingerprint": space.fingerprint},
    }
    result = assemble(target, samples, plan.keys, tuple(missing), known, tolerance, provenance)
    result.save(folder / TABLE_FILE)
    return result


def assemble(
    target: Target,
    samples: Mapping[str, Sampled],
    networks: Sequence[NetworkKeys],
    measured: Sequence[str],
    known: Mapping[str, Measurement],
    tolerance: float,
    provenance: Mapping[str, Any],
) -> LatencyTable:
    """Make a table of samples: rows, the correction fitted to whole networks, and the error report.

    Args:
        target: What was measured.
        samples: By item: `row_name(key)`, `network_name(keys)` and `REFERENCE`.
        networks: The measured networks.
        measured: Keys of the rows among the samples.
        known: Rows of an older table, kept.
        tolerance: Rows whose interval is wider are counted as unstable.
        provenance: Of the table.

    Raises:
        TableError: A row or network was never measured, or a network took no time.
    """
    for name in (*map(row_name, measured), *map(network_name, networks)):
        if name not in samples or not samples[name].steady_ms:
            raise TableError(f"there are no samples of {name!r}: the measurement is not complete, run it on")
    rows = {**known, **{key: summarize(samples[row_name(key)].steady_ms) for key in measured}}
    if not networks:
        granularity: Granularity = "block" if any(SEPARATOR in key for key in rows) else "op"
        return LatencyTable(target, rows, Correction(), None, provenance, granularity)
    network_samples = [samples[network_name(keys)].steady_ms for keys in networks]
    medians = np.array([summarize(taken).median_ms for taken in network_samples])
    assessed: dict[Granularity, Assessed] = {}
    for name in get_args(Granularity):
        used = [_rows_of(keys, name) for keys in networks]
        if any(key not in rows for keys in used for key in keys):
            continue
        checks = Checks(
            sums_ms=np.array([sum(rows[key].median_ms for key in keys) for keys in used]),
            rows=np.array([float(len(keys)) for keys in used]),
            measured_ms=medians,
            least_ms=min(rows[key].median_ms for keys in used for key in keys),
            names=tuple(network_name(keys) for keys in networks),
        )
        assessed[name] = assess(
            checks,
            network_samples,
            drift_percent=drift_percent(samples[REFERENCE].raw_ms) if REFERENCE in samples else None,
            unstable_rows=sum(
                half_width(sorted(samples[row_name(key)].steady_ms)) > tolerance for key in measured
            ),
            disturbed_percent=_disturbed_percent(samples),
        )
    if not assessed:
        raise TableError("the measured networks run blocks and operations that have no rows")
    correction, report = choose(assessed)
    return LatencyTable(target, rows, correction, report, provenance, report.granularity)


def _rows_of(network: NetworkKeys, granularity: Granularity) -> list[str]:
    if granularity == "op":
        return [op for block in network for op in block]
    return [SEPARATOR.join(block) for block in network]


def _disturbed_percent(samples: Mapping[str, Sampled]) -> float:
    taken = sum(len(sampled.raw_ms) for sampled in samples.values())
    kept = sum(len(sampled.steady_ms) for sampled in samples.values())
    return 100 * (1 - kept / taken)


def _complete(table: LatencyTable, space: SearchSpace) -> bool:
    return all(key in table.rows for ops in distinct_blocks(space).values() for key in table.row_keys(ops))


def space_of(table: LatencyTable) -> object:
    """Return the fingerprint of the space that a table was measured for; `None` if it does not say."""
    measured_for = table.provenance.get("space")
    return measured_for.get("fingerprint") if isinstance(measured_for, dict) else None


def row_name(key: str) -> str:
    """Name a row among samples."""
    return f"block {key}"


def network_name(network: NetworkKeys) -> str:
    """Name a network by what it runs, so that another space of the same name cannot take its samples."""
    text = "\n".join(SEPARATOR.join(block) for block in network)
    return f"network {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def network_keys(network: Blocks) -> NetworkKeys:
    """Return the keys of the operations of each block of a network."""
    return tuple(tuple(op.key for op in ops) for _, ops in network)
