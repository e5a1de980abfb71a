"""Checking a table: whole networks that it was not fitted to, measured, and where its predictions err.

A table is measured once and used for months; meanwhile drivers, clocks and neighbours change. Some networks
that it was fitted to are measured again in the same rounds: they say by how much the machine is slower or
faster now, and what is left is the error of the prediction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.atomic import replacing, write_json
from autocompress.errors import TableError
from autocompress.latency.correction import Figures, figures, repeat_noise_percent
from autocompress.latency.measure import (
    Item,
    Measurement,
    Progress,
    Stopping,
    Timer,
    measure,
    measure_networks,
    summarize,
    time_once,
)
from autocompress.latency.plan import check_networks, network_name
from autocompress.latency.profile import Prepare, open_samples
from autocompress.latency.runtime import Blocks, Run, pinned, prepare
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target
from autocompress.latency.widths import ms_of
from autocompress.space import SearchSpace

SCHEMA: Final = "autocompress.latency_check"
VERSION: Final = 1
SAMPLES_FILE: Final = "latency_check_samples.jsonl"
AGAIN: Final = 8
"""Networks of the error report that are measured again. Rows would not do: what a block takes depends on how
cold the caches are, and so on what else runs in its rounds."""
WORST: Final = 5


@dataclass(frozen=True)
class BlockShare:
    """One block of a network that was predicted badly.

    Attributes:
        name: Of the block.
        key: Of its operations.
        predicted_ms: What it adds to the prediction.
        interpolated: Whether that comes from rows of other widths.
    """

    name: str
    key: str
    predicted_ms: float
    interpolated: bool


@dataclass(frozen=True)
class CheckedPrediction:
    """One network, predicted by the table and measured now.

    Attributes:
        architecture: Its key in the space.
        predicted_ms: By the table.
        sum_ms: Of its rows, without the correction.
        measured_ms: Median.
        low_ms: Lower end of the 95 % interval of the median.
        high_ms: Upper end.
        blocks: What the prediction is made of; given for the worst networks only.
    """

    architecture: str
    predicted_ms: float
    sum_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    blocks: tuple[BlockShare, ...] = ()


@dataclass(frozen=True)
class TableCheck:
    """What a check found.

    Attributes:
        networks: From least to greatest prediction; none took part in fitting the table.
        figures: How predictions differ from what was measured.
        machine_factor: By what networks of the error report take longer now than when it was measured, the
            median over those that were measured again in the same rounds; 1 if there are none.
        measured_again: How many that were.
        figures_at_that_speed: The same figures after predictions are multiplied by it: the error that is the
            table's own.
        raw: Figures of the sums of rows, without the correction.
        repeat_noise_percent: Median difference between the medians of both halves of the samples.
        worst: The networks with the greatest error at that speed, with their blocks.
    """

    networks: tuple[CheckedPrediction, ...]
    figures: Figures
    machine_factor: float
    measured_again: int
    figures_at_that_speed: Figures
    raw: Figures
    repeat_noise_percent: float
    worst: tuple[CheckedPrediction, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the check as it stands in a file."""
        return {"schema": SCHEMA, "version": VERSION, "unit": "ms", **asdict(self)}


def check_table(
    table: LatencyTable,
    space: SearchSpace,
    *,
    folder: Path,
    networks: int = 100,
    seed: int = 1,
    profile_seed: int = 0,
    tolerance: float = 0.02,
    min_rounds: int = 24,
    max_rounds: int = 40,
    timer: Timer = time_once,
    prepare: Prepare = prepare,
    progress: Progress | None = None,
) -> TableCheck:
    """Measure whole networks of a space and compare them with what the table predicts.

    The networks are spread evenly over the range of predictions. Samples are kept in a file in the folder: a
    check that was killed goes on.

    Args:
        table: Of this machine.
        space: The table has to price all of it.
        folder: For the samples.
        networks: How many, at least 2; those that the table was fitted to are left out.
        seed: Of the networks and the order of runs.
        profile_seed: That the table was profiled with: it leads to the networks of its error report.
        tolerance: As in `profile`.
        min_rounds: As in `profile`.
        max_rounds: As in `profile`.
        timer: Reads the clock.
        prepare: Builds what is timed.
        progress: Told how many of the samples there are.

    Raises:
        TableError: The table is of another target or machine, lacks rows, or there are fewer than 2 networks.
    """
    if networks < 2:
        raise TableError(f"a check needs at least 2 networks the table was not fitted to, got {networks}")
    table.check_target(table.target)
    cost = table.cost(space)
    fitted = {net.name for net in table.error_report.networks} if table.error_report else set()
    drawn = check_networks(space, networks + len(fitted), seed=seed, cost=cost)
    nets = [space.operations(row) for row in drawn]
    fresh = [i for i, net in enumerate(nets) if network_name(net) not in fitted]
    chosen = [fresh[i] for i in np.unique(np.linspace(0, len(fresh) - 1, networks).round().astype(int))]
    if len(chosen) < 2:
        raise TableError(f"a check needs at least 2 networks the table was not fitted to, got {len(chosen)}")
    again = measured_before(table, space, profile_seed)
    names = {i: network_name(nets[i]) for i in chosen}
    target = table.target
    items = [Item(names[i], partial(prepare, nets[i], target)) for i in chosen]
    items += [Item(name, partial(prepare, net, target)) for name, (net, _) in again.items()]
    with pinned(target):
        samples = measure(
            items,
            stopping=Stopping(tolerance, min_rounds, max_rounds),
            seed=seed,
            samples=open_samples(folder, target, SAMPLES_FILE),
            timer=timer,
            progress=progress,
        )
    factors = [summarize(samples[name].steady_ms).median_ms / ms for name, (_, ms) in again.items()]
    factor = float(np.median(factors)) if factors else 1.0
    predicted = cost.of(drawn[chosen])
    order = np.argsort(predicted, kind="stable")
    measured = [summarize(samples[names[i]].steady_ms) for i in chosen]
    checked = [
        CheckedPrediction(
            space.decode(drawn[[i]])[0].key,
            float(predicted[place]),
            _sum_ms(table, space.priced_operations(drawn[i])),
            measured[place].median_ms,
            measured[place].low_ms,
            measured[place].high_ms,
        )
        for place, i in enumerate(chosen)
    ]
    measured_ms = np.array([row.median_ms for row in measured])
    errors = np.abs(factor * predicted / measured_ms - 1)
    return TableCheck(
        networks=tuple(checked[place] for place in order),
        figures=figures(predicted, measured_ms),
        machine_factor=factor,
        measured_again=len(again),
        figures_at_that_speed=figures(factor * predicted, measured_ms),
        raw=figures(np.array([network.sum_ms for network in checked]), measured_ms),
        repeat_noise_percent=repeat_noise_percent([samples[names[i]].steady_ms for i in chosen]),
        worst=tuple(
            _with_blocks(checked[place], table, space.priced_operations(drawn[chosen[place]]))
            for place in np.argsort(-errors, kind="stable")[:WORST]
        ),
    )


def measured_before(table: LatencyTable, space: SearchSpace, seed: int) -> dict[str, tuple[Blocks, float]]:
    """Return some networks of a table's error report, small to large, and what they took then, in ms.

    Args:
        table: With the report; without, there are none.
        space: The one it was measured for; of another space, there are none.
        seed: That the table was profiled with.
    """
    if table.error_report is None:
        return {}
    then_ms = {net.name: net.measured_ms for net in table.error_report.networks}
    codes = check_networks(space, len(then_ms), seed=seed)
    nets = {network_name(net): net for net in (space.operations(row) for row in codes)}
    known = [name for name in nets if name in then_ms]
    places = np.unique(np.linspace(0, len(known) - 1, min(AGAIN, len(known))).round().astype(int))
    return {known[place]: (nets[known[place]], then_ms[known[place]]) for place in places}


def measure_beside(
    checked: Mapping[str, tuple[Blocks, float]],
    prepared: Mapping[str, Run],
    target: Target,
    *,
    count: int = 200,
) -> tuple[dict[str, Measurement], float | None]:
    """Measure prepared networks, and networks of the error report beside them; to be called `pinned`.

    Args:
        checked: From `measured_before`.
        prepared: By name.
        target: What they were prepared for.
        count: Runs of each.

    Returns:
        The measurements, and how much longer the checked networks take now than when the table was measured
        (the median over them; `None` without any): the speed of a shared machine changes.
    """
    runs = {**prepared, **{name: prepare(blocks, target) for name, (blocks, _) in checked.items()}}
    measured = measure_networks(runs, target=target, count=count)
    factors = [measured.pop(name).median_ms / then_ms for name, (_, then_ms) in checked.items()]
    return measured, float(np.median(factors)) if factors else None


def _sum_ms(table: LatencyTable, net: Blocks) -> float:
    """Return the plain sum of what the blocks of a network take alone."""
    return sum(ms_of(key, table.row_ms, table.grid) or 0.0 for _, ops in net for key in table.row_keys(ops))


def _with_blocks(checked: CheckedPrediction, table: LatencyTable, net: Blocks) -> CheckedPrediction:
    blocks = tuple(
        BlockShare(name, " > ".join(op.key for op in ops), table.price(ops), table.interpolates(ops))
        for name, ops in net
    )
    return CheckedPrediction(**{**vars(checked), "blocks": blocks})


def save_check(check: TableCheck, path: Path, *, title: str) -> None:
    """Write a check as JSON, and a plot of it beside, with the ending `.svg`; each whole or not at all.

    Raises:
        StorageError: They cannot be written.
    """
    write_json(path, check.to_json())
    factor = check.machine_factor
    points = np.array([(factor * net.predicted_ms, net.measured_ms) for net in check.networks])
    plot(path.with_suffix(".svg"), {f"predicted, times {factor:.3f} (speed of now)": points}, title=title)


def plot(path: Path, series: Mapping[str, Any], *, title: str) -> None:
    """Plot predicted against measured latencies, with lines at 5 % and 10 %.

    Args:
        path: An SVG file.
        series: Label to an array `(n, 2)`, predicted and measured ms.
        title: Above the plot.

    Raises:
        StorageError: It cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    everything = np.concatenate(list(series.values()))
    ends = np.array([everything.min() * 0.95, everything.max() * 1.05])
    axes.plot(ends, ends, color="0.3", linewidth=1)
    for share, style in ((0.05, "--"), (0.10, ":")):
        for sign in (-1, 1):
            axes.plot(ends, ends * (1 + sign * share), style, color="0.6", linewidth=0.8)
    for label, points in series.items():
        axes.scatter(points[:, 0], points[:, 1], s=10, label=label)
    axes.set(xlabel="predicted (ms)", ylabel="measured (ms)", title=title, xlim=ends, ylim=ends)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
