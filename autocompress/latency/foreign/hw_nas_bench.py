"""HW-NAS-Bench's tables of the FBNet space: what each operation of each layer adds to a base latency.

Source: Li et al., HW-NAS-Bench, ICLR 2021. The latency of an architecture on a device is the base plus the
sum of the differences of its operations to `skip`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from autocompress.cost import AdditiveCost, Factor, Values
from autocompress.errors import TableError
from autocompress.latency.reading import (
    cost_of,
    expect_columns,
    parse_csv,
    parse_json,
    read_text,
    reading,
    text_of,
)
from autocompress.latency.strict import Node
from autocompress.space import Choice, SearchSpace

METRIC: Final = "latency_ms"
COLUMNS: Final = ("layer", "op_index", "op", "key")
SUFFIX: Final = "_delta_ms_vs_skip"
SKIP: Final = "skip"
FBNET_LAYERS: Final = 22
DEVICE: Final = re.compile(r"[A-Za-z0-9-]+")


@dataclass(frozen=True, eq=False)
class HwNasBench:
    """Additive latencies in ms.

    Attributes:
        source: The table of blocks, for messages.
        operations: Names, in the published order; an architecture is a position in it for each layer.
        base_ms: Device to what no operation changes.
        delta_ms: Device to what each operation adds, `(layers, operations)`.
    """

    source: str
    operations: tuple[str, ...]
    base_ms: Mapping[str, float]
    delta_ms: Mapping[str, Values]

    def cost(self, device: str) -> AdditiveCost:
        """Return the latency of every architecture on a device, in ms; codes are `space()`'s.

        Raises:
            TableError: The table has no such device.
        """
        if device not in self.delta_ms:
            raise TableError(
                f"HW-NAS-Bench table {self.source}: device must be one of {', '.join(self.delta_ms)}, "
                f"got {device!r}"
            )
        factors = tuple(Factor((layer,), values.copy()) for layer, values in enumerate(self.delta_ms[device]))
        counts = (len(self.operations),) * len(factors)
        return AdditiveCost(METRIC, counts, self.base_ms[device], factors)

    def space(self) -> SearchSpace:
        """Return the choices of the table as a space without blocks: it can be searched, not built."""
        layers = len(next(iter(self.delta_ms.values())))
        choices = (Choice(f"layer{layer}", self.operations, ordinal=False) for layer in range(layers))
        return SearchSpace("hw_nas_bench_fbnet", tuple(choices), ())


def read_hw_nas_bench(blocks: Path, base: Path, *, layers: int = FBNET_LAYERS) -> HwNasBench:
    """Read the tables of blocks and of base latencies.

    Args:
        blocks: CSV `layer,op_index,op,key` and a column `DEVICE_delta_ms_vs_skip` for each device.
        base: JSON, device to ms.
        layers: How many the table must have: one that was cut between two layers looks whole.

    Raises:
        TableError: A file is absent or damaged, the two are of different devices, a row is missing or stands
            twice, or a time is negative or not finite.
    """
    with reading("HW-NAS-Bench table of blocks", blocks):
        header, rows = parse_csv(read_text(blocks, whole_lines=True))
        devices = [name.removesuffix(SUFFIX) for name in header[len(COLUMNS) :]]
        if not devices or not all(DEVICE.fullmatch(device) for device in devices):
            raise TableError(f"line 1 must end with columns DEVICE{SUFFIX}, got {header[len(COLUMNS) :]}")
        expect_columns(header, [*COLUMNS, *(f"{device}{SUFFIX}" for device in devices)])
        operations = _operations(rows, layers)
        deltas = {
            device: np.array([_delta(row, device) for row in rows]).reshape(-1, len(operations))
            for device in devices
        }
    with reading("HW-NAS-Bench base latencies", base):
        members = parse_json(read_text(base)).object()
        if set(members) != set(devices):
            raise TableError(f"must have the devices of {blocks}: {sorted(devices)}, got {sorted(members)}")
        base_ms = {device: cost_of(members[device]) for device in devices}
    return HwNasBench(str(blocks), operations, base_ms, deltas)


def _operations(rows: list[dict[str, Node]], layers: int) -> tuple[str, ...]:
    """Return the names of the operations, in order; every layer has each once, in that order."""
    first = [text_of(row, "op") for row in rows if row["layer"].value == 0]
    if not first or len(set(first)) < len(first):
        raise TableError(f"layer 0 must have each operation once, got {first}")
    for number, row in enumerate(rows):
        layer, position = divmod(number, len(first))
        found = (row["layer"].value, row["op_index"].value, row["op"].value)
        if found != (layer, position, first[position]):
            raise TableError(
                f"line {number + 2} must be layer {layer}, op_index {position}, op {first[position]}: layers "
                f"and operations in order, each once; got {found}"
            )
        text_of(row, "key")
    if len(rows) != layers * len(first):
        raise TableError(
            f"must have {layers} layers of {len(first)} operations, got {len(rows)} rows: it is truncated, "
            "or say how many layers it has"
        )
    return tuple(first)


def _delta(row: dict[str, Node], device: str) -> float:
    node = row[f"{device}{SUFFIX}"]
    value = cost_of(node)
    if row["op"].value == SKIP and value != 0:
        raise node.wrong("0: it is the difference of skip to itself")
    return value
