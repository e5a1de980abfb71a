"""Profiling: measure what a space needs on a target of this machine, fit, and write the table."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from autocompress import __version__
from autocompress.errors import TableError
from autocompress.latency.assemble import assemble, width_report
from autocompress.latency.measure import (
    REFERENCE,
    Item,
    Measurement,
    Progress,
    Sampled,
    Stopping,
    Timer,
    measure,
    summarize,
    time_once,
)
from autocompress.latency.plan import (
    Asked,
    Plan,
    distinct_blocks,
    make_plan,
    plan_widths,
    row_name,
)
from autocompress.latency.runtime import Blocks, Run, pinned, prepare, versions
from autocompress.latency.samples import SampleFile
from autocompress.latency.steps import learn_steps, probe_steps, steps_of
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, describe_device
from autocompress.latency.widths import DEFAULT_KNOTS, ms_of
from autocompress.space import SearchSpace

TABLE_FILE: Final = "latency_table.json"
SAMPLES_FILE: Final = "latency_samples.jsonl"

Prepare = Callable[[Blocks, Target], Run]
"""Builds what is timed."""

Row = NDArray[np.int64]

PrepareNetwork = Callable[[Row], Run]
"""Builds a whole network from its row of codes."""

Widths = Literal["all", "grid"]


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
    max_rounds: int = 40,
    timer: Timer | None = None,
    table: LatencyTable | None = None,
    progress: Progress | None = None,
    prepare: Prepare = prepare,
    widths: Widths = "all",
    knots: int = DEFAULT_KNOTS,
    prepare_network: PrepareNetwork | None = None,
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
        widths: `"all"` measures every block and operation. `"grid"`, for spaces of channel counts, learns the
            steps of the device, measures a grid of widths and interpolates between; always by operation.
        knots: Measured widths an axis of the grid.
        prepare_network: Builds a whole network, from its row of codes, for spaces whose blocks only price a
            network that is built otherwise.

    Raises:
        TableError: The given table is of another target; the file of samples is damaged or of another
            target; `networks` is 1 or negative, `knots` below 2, or `widths` another text.
        StorageError: The folder cannot be written.
    """
    stopping = Stopping(tolerance, min_rounds, max_rounds)
    if widths not in get_args(Widths):
        raise TableError(f"widths must be one of {', '.join(get_args(Widths))}, got {widths!r}")
    if table is not None:
        table.check_target(target)
        if space_of(table) == space.fingerprint and _complete(table, space, widths):
            table.save(folder / TABLE_FILE)
            return table
    file = open_samples(folder, target)
    timer = timer or time_once
    started = time.monotonic()
    probed: dict[str, Measurement] = {}
    if widths == "grid":
        probed = probe_steps(target, stopping=stopping, samples=file, timer=timer, prepare=prepare)
        steps = steps_of(learn_steps({key: row.median_ms for key, row in probed.items()}))
        plan = plan_widths(space, networks, seed, knots=knots, steps=steps)
    else:
        plan = make_plan(space, granularity, networks, seed)
    known: Mapping[str, Measurement] = {}
    if table is not None:
        known = {key: row for key, row in table.rows.items() if key not in plan.held_out}
    missing = tuple(key for key in plan.rows if key not in known)
    samples = take_samples(
        plan,
        target,
        file,
        rows=missing,
        stopping=stopping,
        seed=seed,
        timer=timer,
        progress=progress,
        prepare=prepare,
        prepare_network=prepare_network,
    )
    seconds = time.monotonic() - started
    provenance = provenance_of(space, target, file.started)
    measured = tuple(key for key in missing if key not in plan.held_out)
    result = assemble(
        target,
        samples,
        plan.keys,
        measured,
        {**known, **probed},
        tolerance,
        provenance,
        grid=plan.grid,
        space=space,
    )
    if plan.grid is not None:
        held_out = {key: summarize(samples[row_name(key)].steady_ms) for key in plan.held_out}
        result = replace(result, width_report=width_report(result, plan.grid, plan, held_out, seconds))
    result.save(folder / TABLE_FILE)
    return result


def open_samples(folder: Path, target: Target, name: str = SAMPLES_FILE) -> SampleFile:
    """Open or begin the file of samples of a target on this machine.

    Raises:
        TableError: It is damaged, or of another target or machine.
        StorageError: It cannot be read or written.
    """
    subject = {"target": target.conditions(), "device": describe_device(target.device)}
    return SampleFile(folder / name, subject)


def take_samples(
    plan: Plan,
    target: Target,
    file: SampleFile,
    *,
    rows: Sequence[str],
    stopping: Stopping,
    seed: int = 0,
    timer: Timer = time_once,
    progress: Progress | None = None,
    prepare: Prepare = prepare,
    prepare_network: PrepareNetwork | None = None,
) -> dict[str, Sampled]:
    """Measure some rows and all networks of a plan, interleaved.

    Returns:
        Samples by `row_name`, `NetworkKeys.name` and `REFERENCE`.
    """
    items = [Item(row_name(key), partial(prepare, [("block", plan.rows[key])], target)) for key in rows]
    items += [
        Item(
            keys.name,
            partial(prepare, network, target) if prepare_network is None else partial(prepare_network, codes),
        )
        for keys, network, codes in zip(plan.keys, plan.networks, plan.codes, strict=True)
    ]
    largest = max(plan.rows.values(), key=lambda ops: sum(op.macs for op in ops))
    with pinned(target):
        return measure(
            items,
            stopping=stopping,
            seed=seed,
            samples=file,
            reference=Item(REFERENCE, partial(prepare, [("block", largest)], target)),
            timer=timer,
            progress=progress,
        )


def provenance_of(space: SearchSpace, target: Target, measured: str) -> dict[str, Any]:
    """Return where the numbers of a table of this machine come from."""
    return {
        "device": describe_device(target.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(target),
        "autocompress": __version__,
        "measured": measured,
        "space": {"name": space.name, "fingerprint": space.fingerprint},
    }


def _complete(table: LatencyTable, space: SearchSpace, widths: Widths) -> bool:
    """Return whether a table prices every block, by measured rows alone unless a grid is asked for."""
    grid = table.grid if widths == "grid" else None
    keys = {key for ops in distinct_blocks(space).values() for key in table.row_keys(ops)}
    return all(ms_of(key, table.row_ms, grid) is not None for key in keys)


def space_of(table: LatencyTable) -> object:
    """Return the fingerprint of the space that a table was measured for; `None` if it does not say."""
    measured_for = table.provenance.get("space")
    return measured_for.get("fingerprint") if isinstance(measured_for, dict) else None
