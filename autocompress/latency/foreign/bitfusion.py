"""BitFusion's simulated latency and energy of convolutions by shape and bit widths.

Source: Wang et al., APQ, CVPR 2020, which searches with it; Sharma et al., Bit Fusion, ISCA 2018, the
simulator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from autocompress.errors import TableError
from autocompress.latency.foreign.bit_table import MAX_BITS, BitTable
from autocompress.latency.reading import cost_of, expect_columns, parse_csv, read_text, reading, shown
from autocompress.latency.strict import Node
from autocompress.ops import Conv2d

SHAPE: Final = ("in_c", "out_c", "in_size", "kernel", "stride", "pad", "groups")
BITS: Final = ("w_bits", "a_bits")
COSTS: Final = ("latency_ms", "energy_mJ")
FIXED: Final = ("head", "tail")
"""Parts of the network that are not quantized: their rows have no shape and no bits."""


@dataclass(frozen=True)
class FixedCost:
    """Cost of a part whose widths are not searched."""

    latency_ms: float
    energy_mj: float


@dataclass(frozen=True)
class BitFusionTables:
    """Costs of convolutions; `layer_of` names the layer of an operation.

    Attributes:
        latency_ms: Latency, in ms.
        energy_mj: Energy, in mJ.
        operations: Layer to what it computes, where the padding is that of `Conv2d`.
        fixed: `head` and `tail`, where the table has them.
    """

    latency_ms: BitTable
    energy_mj: BitTable
    operations: Mapping[str, Conv2d]
    fixed: Mapping[str, FixedCost]


def layer_of(op: Conv2d) -> str:
    """Return the name of the layer with the shape of a convolution.

    Raises:
        TableError: Its input is not square, which the table cannot say.
    """
    if op.height != op.width:
        raise TableError(f"BitFusion tables have square inputs only, got {op.height}x{op.width} in {op.key}")
    shape = (op.in_channels, op.out_channels, op.height, op.kernel, op.stride, op.kernel // 2, op.groups)
    return _name(shape)


def _name(shape: tuple[int, ...]) -> str:
    inputs, outputs, size, kernel, stride, pad, groups = shape
    return f"conv-i{inputs}-o{outputs}-{size}px-k{kernel}-s{stride}-p{pad}-g{groups}"


def read_bitfusion(path: Path) -> BitFusionTables:
    """Read a table.

    Args:
        path: CSV or CSV.gz `in_c,out_c,in_size,kernel,stride,pad,groups,w_bits,a_bits,latency_ms,energy_mJ`.

    Raises:
        TableError: The file is absent or damaged, has other columns or units, a row stands twice, a shape or
            width is impossible, or a cost is negative or not finite.
    """
    with reading("BitFusion table", path):
        header, rows = parse_csv(read_text(path, whole_lines=True))
        expect_columns(header, [*SHAPE, *BITS, *COSTS])
        latency: dict[tuple[str, int, int], float] = {}
        energy: dict[tuple[str, int, int], float] = {}
        operations: dict[str, Conv2d] = {}
        fixed: dict[str, FixedCost] = {}
        for number, row in enumerate(rows, start=2):
            cost = FixedCost(*(cost_of(row[name]) for name in COSTS))
            if isinstance(row["in_c"].value, str):
                name = _fixed_name(row)
                if name in fixed:
                    raise TableError(f"line {number}: {name} stands twice; remove one")
                fixed[name] = cost
                continue
            shape = _shape(row)
            key = (_name(shape), _width(row["w_bits"]), _width(row["a_bits"]))
            if key in latency:
                raise TableError(f"line {number}: {key} stands twice; a shape has one row a pair of bits")
            latency[key], energy[key] = cost.latency_ms, cost.energy_mj
            inputs, outputs, size, kernel, stride, pad, groups = shape
            if pad == kernel // 2:
                operations[key[0]] = Conv2d(
                    inputs, outputs, size, size, kernel=kernel, stride=stride, groups=groups, norm=False
                )
        layers = tuple(dict.fromkeys(name for name, _, _ in latency))
        return BitFusionTables(
            BitTable(str(path), "ms", layers, latency),
            BitTable(str(path), "mJ", layers, energy),
            operations,
            fixed,
        )


def _fixed_name(row: Mapping[str, Node]) -> str:
    name = row["in_c"].value
    given = [row[column].value for column in (*SHAPE[1:], *BITS)]
    if name not in FIXED or any(value != "" for value in given):
        raise row["in_c"].wrong(
            f"a number of channels, or {' or '.join(FIXED)} in a row without shape (it has {shown(given)})"
        )
    return str(name)


def _shape(row: Mapping[str, Node]) -> tuple[int, ...]:
    shape = tuple(row[name].integer(0 if name == "pad" else 1) for name in SHAPE)
    inputs, outputs, size, kernel, _, pad, groups = shape
    if math.gcd(inputs, outputs) % groups:
        raise row["groups"].wrong(f"a divisor of {inputs} and {outputs} channels")
    if kernel > size + 2 * pad:
        raise row["kernel"].wrong(f"at most the padded input, {size + 2 * pad}")
    return shape


def _width(node: Node) -> int:
    bits = node.integer(1)
    if bits > MAX_BITS:
        raise node.wrong(f"at most {MAX_BITS}")
    return bits
