"""The published accuracies and latencies of NAS-Bench-201 as columns over a search space.

Format: two numpy archives of 15,625 rows in one order. `accuracy.npz` has the architectures (`arch_str`, and
`ops` as positions in `op_names`, edge by edge), `params`, `macs` and accuracies in percent; `latency.npz`
has `latency_ms (rows, devices)` and `devices`.

Sources: Dong & Yang, NAS-Bench-201, ICLR 2020, and NATS-Bench (MIT); Li et al., HW-NAS-Bench, ICLR 2021
(raspi4, pixel3, fpga; MIT); Lee et al., HELP, NeurIPS 2021 (the other devices; MIT).
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from autocompress.cost import AdditiveCost, Values, operation_cost
from autocompress.errors import DataError, SpaceError
from autocompress.evaluation.tabular import TabularEvaluator, assumed_training_seconds, table_cost
from autocompress.space import Codes, SearchSpace

ACCURACY_FILE, LATENCY_FILE = "accuracy.npz", "latency.npz"
EDGES: Final = ("0->1", "0->2", "1->2", "0->3", "1->3", "2->3")
OPERATIONS: Final = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""In the order of the published codes."""
CHOICES: Final = tuple(f"edge_{edge.replace('->', '_')}" for edge in EDGES)
COUNTS: Final = ("params", "macs")
ACCURACIES: Final = (
    "c10_val_12ep",
    "c10_test_12ep",
    "c10_val_200ep",
    "c10_test_200ep",
    "c10_val_200ep_1seed",
    "c10_test_200ep_s0",
    "c10_test_200ep_s1",
    "c10_test_200ep_s2",
    "c100_test_200ep_nats",
    "c100_val_200ep_1seed",
    "c100_val_12ep",
)
"""Data set, part, epochs; in percent. A mean of up to three seeds, unless the name says one."""
FIRST: Final = ("arch_str", "ops", "op_names", "edges", *COUNTS)

SIMULATED = "simulated_s"
IMAGES, EPOCHS = 25_000, 12
"""A training for `c10_val_12ep`: half of CIFAR-10's training images, the other half validates."""
ASSUMED_MACS_PER_SECOND = 1e12
"""Assumed, not measured: the benchmark's files here have no training times."""


@dataclass(frozen=True, eq=False)
class NasBench201Table:
    """The networks of a space with what was published of them.

    Attributes:
        space: The space.
        codes: `(n, 6)`.
        columns: Accuracies in percent (`ACCURACIES`), `nan` where a seed is missing; and `simulated_s`, the
            seconds that 12 epochs would take at an assumed throughput. Each `(n,)`.
        kept: Positions of these networks among the published rows, `(n,)`.
    """

    space: SearchSpace
    codes: Codes
    columns: Mapping[str, Values]
    kept: NDArray[np.intp]

    def evaluator(self, *, paid: bool = True) -> TabularEvaluator:
        """Return the columns as an evaluator."""
        return TabularEvaluator(self.space, self.codes, self.columns, paid=paid)


def nas_bench_201_table(
    folder: Path, space: SearchSpace, *, macs_per_second: float = ASSUMED_MACS_PER_SECOND
) -> NasBench201Table:
    """Read the published accuracies.

    Args:
        folder: Where `accuracy.npz` lies.
        space: `nas_bench_201` with 16 channels, 5 cells and 10 classes; networks with operations that it
            leaves out are left out here too. The columns of CIFAR-100 are of the same cells with 100 classes.
        macs_per_second: The assumed throughput behind `simulated_s`.

    Raises:
        DataError: The file is missing, damaged or of another format, or the space is another one.
    """
    path = folder / ACCURACY_FILE
    arrays = _read(path, (*FIRST, *ACCURACIES))
    for name, expected in {"op_names": OPERATIONS, "edges": EDGES}.items():
        if tuple(arrays[name].tolist()) != expected:
            raise DataError(f"{path}: {name} must be {list(expected)}, got {arrays[name].tolist()}")
    ops = _operations(path, arrays)
    codes, kept = _codes(ops, space)
    columns = {name: _numbers(path, name, arrays[name], len(ops))[kept] for name in ACCURACIES}
    for name, values in columns.items():
        wrong = np.flatnonzero((values < 0) | (values > 100))
        if len(wrong):
            raise DataError(f"{path}: {name} must be in percent, 0..100, got {values[wrong[0]]:g}")
    macs = _counted(path, arrays, space, codes, kept)["macs"]
    columns[SIMULATED] = assumed_training_seconds(
        macs, images=IMAGES, epochs=EPOCHS, macs_per_second=macs_per_second
    )
    return NasBench201Table(space, codes, columns, kept)


def nas_bench_201_latencies(folder: Path, table: NasBench201Table) -> dict[str, AdditiveCost]:
    """Read the published latencies as costs in ms, by device.

    Each is one dense table over the six choices: networks were measured as a whole.

    Args:
        folder: Where `latency.npz` lies.
        table: The networks, from `nas_bench_201_table`; the rows of both files have one order.

    Raises:
        DataError: The file is missing, damaged or of another format.
    """
    path = folder / LATENCY_FILE
    arrays = _read(path, ("latency_ms", "devices"))
    devices = [str(device) for device in arrays["devices"].ravel()]
    latency = arrays["latency_ms"]
    rows = len(OPERATIONS) ** len(EDGES)
    if latency.shape != (rows, len(devices)) or len(set(devices)) != len(devices):
        raise DataError(
            f"{path}: latency_ms must have shape ({rows}, {len(devices)}), a column for each of {devices}, "
            f"got {latency.shape}"
        )
    costs = {}
    for device, column in zip(devices, latency.T, strict=True):
        values = _numbers(path, f"latency_ms of {device}", column, rows)
        if not (values > 0).all():
            raise DataError(f"{path}: latency_ms of {device} must be positive, got {np.min(values):g}")
        costs[device] = table_cost(table.space, table.codes, values[table.kept], "latency_ms")
    return costs


def _read(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return these arrays of an archive; nothing in it is unpickled."""
    try:
        # Opened here: numpy leaves the file open when it is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive.files)}")
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a numpy archive: {error}") from None


def _operations(path: Path, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Return the published codes `(15625, 6)`, once they are all there and are what the names say."""
    ops = arrays["ops"]
    shape = (len(OPERATIONS) ** len(EDGES), len(EDGES))
    whole = ops.shape == shape and np.issubdtype(ops.dtype, np.integer)
    if not whole or ops.min() < 0 or ops.max() >= len(OPERATIONS):
        raise DataError(f"{path}: ops must be integers 0..4 of shape {shape}, got {ops.dtype} {ops.shape}")
    if len(np.unique(ops, axis=0)) != len(ops):
        raise DataError(f"{path}: ops must hold every architecture once; some stand there twice")
    if arrays["arch_str"].shape != ops.shape[:1]:
        raise DataError(f"{path}: arch_str must have shape {ops.shape[:1]}, got {arrays['arch_str'].shape}")
    pattern = "|+|".join(
        "|".join(f"{{{position}}}~{edge[0]}" for position, edge in enumerate(EDGES) if edge[-1] == node)
        for node in "123"
    ).join("||")
    for row, (codes, text) in enumerate(zip(ops.tolist(), arrays["arch_str"].tolist(), strict=True)):
        expected = pattern.format(*(OPERATIONS[code] for code in codes))
        if text != expected:
            raise DataError(f"{path}: row {row} is called {text!r}, but its ops are {expected!r}")
    return ops.astype(np.int64)


def _codes(ops: NDArray[np.int64], space: SearchSpace) -> tuple[Codes, NDArray[np.intp]]:
    """Return the rows of the space, and which published ones they are."""
    names = tuple(choice.name for choice in space.choices)
    if names != CHOICES:
        raise DataError(f"the choices of the space must be {', '.join(CHOICES)}, got {', '.join(names)}")
    # (choice, published code) -> code of the space, -1 where it has no such option.
    table = np.full((len(CHOICES), len(OPERATIONS)), -1, dtype=np.int64)
    for position, choice in enumerate(space.choices):
        for published, name in enumerate(OPERATIONS):
            if name in choice.options:
                table[position, published] = choice.code(name)
    codes = table[np.arange(len(CHOICES)), ops]
    kept = np.flatnonzero((codes >= 0).all(axis=1))
    if len(kept) != space.size:
        raise SpaceError(
            f"space {space.name!r} has {space.size} networks, of which the table has {len(kept)}: its "
            f"options must be among {', '.join(OPERATIONS)}"
        )
    return codes[kept], kept


def _counted(
    path: Path, arrays: Mapping[str, NDArray[Any]], space: SearchSpace, codes: Codes, kept: NDArray[np.intp]
) -> dict[str, Values]:
    """Return parameters and MACs `(n,)` by the space, once they are the published ones."""
    counted = {name: operation_cost(space, name).of(codes) for name in COUNTS}
    for name, values in counted.items():
        published = _numbers(path, name, arrays[name], len(arrays["ops"]))[kept]
        wrong = np.flatnonzero(values != published)
        if len(wrong):
            raise DataError(
                f"{path}: {name} of row {kept[wrong[0]]} are {published[wrong[0]]:.0f} in the table and "
                f"{values[wrong[0]]:.0f} in the space; the table is of nas_bench_201(channels=16, cells=5, "
                "classes=10)"
            )
    return counted


def _numbers(path: Path, name: str, values: NDArray[Any], rows: int) -> Values:
    if values.shape != (rows,) or not np.issubdtype(values.dtype, np.number):
        raise DataError(
            f"{path}: {name} must be numbers of shape ({rows},), got {values.dtype} {values.shape}"
        )
    numbers = values.astype(np.float64)
    if np.isinf(numbers).any():
        raise DataError(f"{path}: {name} must be finite, or nan where it is missing, got inf")
    return numbers
