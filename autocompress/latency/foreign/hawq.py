"""HAWQ-V3's lists for one network: sensitivities, sizes, BOPs and INT4 and INT8 latencies of its layers.

Source: Yao et al., HAWQ-V3, ICML 2021; Zhen-Dong/HAWQ, `ILP.ipynb` and `bit_config.py`, where they are Python
lists; docs/foreign-tables.md has the JSON object that holds them here. Weights and activations of a layer
share a width, 4 or 8; the first and the last layer stay at 8 and are not listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from autocompress.errors import TableError
from autocompress.latency.foreign.bit_table import BitTable, Widths
from autocompress.latency.reading import cost_of, parse_json, read_text, reading
from autocompress.latency.strict import Node

WIDTHS: Final = (4, 8)
LISTS: Final = (
    "hutchinson_trace",
    "delta_weights_sq_8",
    "delta_weights_sq_4",
    "parameters_m",
    "bops_m_32x32",
    "latency_int4",
    "latency_int8",
)
NAMES: Final = ("source", "network", "note", "ties", "layers", *LISTS, "published_bits")


@dataclass(frozen=True)
class HawqTables:
    """What HAWQ-V3 published for one network; each table has rows at (4, 4) and (8, 8) bits.

    Attributes:
        network: Name.
        ties: Layers that must share a width, by position.
        sensitivity: Mean Hessian trace times the squared error of the weights.
        size: Of the weights.
        bops: Bit operations: multiply-accumulates times bits of weights times bits of activations, as the
            notebook has them: in millions, relative to 32 x 32 bits.
        latency: On a T4 by TVM; the unit is not stated.
        published: Name of a published problem, such as `latency_0.5`, to the widths of all layers.
    """

    network: str
    ties: tuple[tuple[int, ...], ...]
    sensitivity: BitTable
    size: BitTable
    bops: BitTable
    latency: BitTable
    published: Mapping[str, tuple[Widths, ...]]


def read_hawq(path: Path) -> HawqTables:
    """Read the lists of one network; layers are named by their position.

    Raises:
        TableError: The file is absent, damaged, lacks a list, has lists of several lengths, or a number in it
            is negative or not finite.
    """
    with reading("HAWQ tables", path):
        top = parse_json(read_text(path)).object(NAMES, optional=("source", "note"))
        layers = top["layers"].integer(1)
        columns = {name: _numbers(top[name], layers) for name in LISTS}

        def table(unit: str, at4: list[float], at8: list[float]) -> BitTable:
            rows = {
                (str(layer), bits, bits): value
                for bits, values in zip(WIDTHS, (at4, at8), strict=True)
                for layer, value in enumerate(values)
            }
            return BitTable(str(path), unit, tuple(map(str, range(layers))), rows)

        def scaled(name: str, factors: tuple[float, float]) -> tuple[list[float], list[float]]:
            at4, at8 = ([factor * value for value in columns[name]] for factor in factors)
            return at4, at8

        trace = columns["hutchinson_trace"]
        errors = (columns["delta_weights_sq_4"], columns["delta_weights_sq_8"])
        at4, at8 = ([t * e for t, e in zip(trace, error, strict=True)] for error in errors)
        return HawqTables(
            top["network"].text(),
            tuple(_tie(entry, layers) for entry in top["ties"].list()),
            table("1", at4, at8),
            table("MiB", *scaled("parameters_m", (0.5, 1.0))),
            table("10^6 BOPs at 32x32", *scaled("bops_m_32x32", (4 * 4 / 32**2, 8 * 8 / 32**2))),
            table("not stated", columns["latency_int4"], columns["latency_int8"]),
            {name: _widths(entry, layers) for name, entry in top["published_bits"].object().items()},
        )


def _numbers(node: Node, layers: int) -> list[float]:
    entries = node.list()
    if len(entries) != layers:
        raise TableError(f"{node.path} must have {layers} numbers, one a layer, got {len(entries)}")
    return [cost_of(entry) for entry in entries]


def _tie(node: Node, layers: int) -> tuple[int, ...]:
    tied = tuple(entry.integer() for entry in node.list())
    if len(set(tied)) != len(tied) or len(tied) < 2 or max(tied) >= layers:
        raise node.wrong(f"at least two different layers of 0..{layers - 1}")
    return tied


def _widths(node: Node, layers: int) -> tuple[Widths, ...]:
    digits = node.text()
    if len(digits) != layers or not set(digits) <= {str(bits) for bits in WIDTHS}:
        raise node.wrong(f"{layers} digits, each {' or '.join(map(str, WIDTHS))}")
    return tuple((int(digit), int(digit)) for digit in digits)
