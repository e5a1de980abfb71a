"""Spaces of bit widths, priced from published tables of layers.

A layer is a block. Its widths are two choices, `LAYER.weight` and `LAYER.input`, or one, `LAYER.bits`; layers
that are tied share theirs, and pinned layers have none. Choices stand in the order of the layers, weights
before inputs, which is the order in which HAQ decides them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from autocompress.cost import METRIC_UNITS, AdditiveCost, compile_cost
from autocompress.errors import CostError, QuantizationError, SpaceError
from autocompress.latency.foreign.bit_table import BitTable, Widths
from autocompress.ops import Ops, OpSpec, Shape
from autocompress.quantize.ops import Quantized, at_bits
from autocompress.space import Block, Choice, Option, SearchSpace

if TYPE_CHECKING:
    from torch import nn

WEIGHT, INPUT, BITS = ".weight", ".input", ".bits"
"""What the names of choices end in: bits of weights, of inputs, of both."""


@dataclass(frozen=True)
class TableLayer(OpSpec):
    """A row of a table of layers: a layer by its name, at some bits.

    Two layers of one shape have costs of their own in a table of a network: the name tells them apart.

    Attributes:
        layer: Name in the table.
        weight_bits: Of each weight.
        activation_bits: Of each input.
        op: What is computed, at these bits; `None` where only the name is known, which then counts as nothing
            computed and nothing stored.
    """

    layer: str
    weight_bits: int
    activation_bits: int
    op: OpSpec | None = None

    @property
    def key(self) -> str:
        """Name and bits, and the key of the operation: `layer 7@w4a8`."""
        name = f"layer {self.layer}@w{self.weight_bits}a{self.activation_bits}"
        return name if self.op is None else f"{name}: {self.op.key}"

    @property
    def in_shape(self) -> Shape:
        """That of the operation; (0, 0, 0) where it is not known."""
        return (0, 0, 0) if self.op is None else self.op.in_shape

    @property
    def out_shape(self) -> Shape:
        """That of the operation; (0, 0, 0) where it is not known."""
        return (0, 0, 0) if self.op is None else self.op.out_shape

    @property
    def macs(self) -> int:
        """Of the operation."""
        return 0 if self.op is None else self.op.macs

    @property
    def params(self) -> int:
        """Of the operation."""
        return 0 if self.op is None else self.op.params

    @property
    def size_bytes(self) -> int:
        """Of the operation, at its bits."""
        return 0 if self.op is None else self.op.size_bytes

    @property
    def bops(self) -> int:
        """Of the operation, at its bits."""
        return 0 if self.op is None else self.op.bops

    @property
    def weight_tensors(self) -> tuple[int, ...]:
        """Those of the operation."""
        return () if self.op is None else self.op.weight_tensors

    @property
    def other_tensors(self) -> tuple[int, ...]:
        """Those of the operation."""
        return () if self.op is None else self.op.other_tensors

    @property
    def peak_elements(self) -> int:
        """Those of the operation."""
        return 0 if self.op is None else self.op.peak_elements

    def module(self) -> "nn.Module":
        """Build the operation in floating point.

        Raises:
            QuantizationError: It is not known.
        """
        if self.op is None:
            raise QuantizationError(
                f"layer {self.layer!r} has a cost and no operation; give bit_space its operations to build it"
            )
        return self.op.module()


def plain(op: OpSpec) -> OpSpec | None:
    """Return the operation without its bits; `None` where only its name in a table is known."""
    if isinstance(op, TableLayer):
        return None if op.op is None else plain(op.op)
    return plain(op.op) if isinstance(op, Quantized) else op


def bit_space(
    layers: Sequence[str],
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int] | None = None,
    fixed: Mapping[str, Widths] | None = None,
    ties: Sequence[Sequence[str]] = (),
    operations: Mapping[str, OpSpec] | None = None,
    name: str = "bits",
) -> SearchSpace:
    """Make a space of the bit widths of layers.

    Args:
        layers: Names, in the order of the network: `BitTable.layers`.
        weight_bits: Legal widths of weights, ascending; of both, if there are none of activations.
        activation_bits: Legal widths of activations, ascending; without, they are those of the weights.
        fixed: Layers that are not decided, with bits of weights and of activations: published are the first
            and the last at (8, 8).
        ties: Groups of layers that have the same widths; they share the choices of the first of them.
        operations: By layer what it computes, in floating point; strategies then see shapes.
        name: Of the space.

    Raises:
        SpaceError: No layers, one stands twice, is not known, is tied twice or tied and fixed, widths do not
            ascend, or nothing is left to decide.
        QuantizationError: A width is none.
    """
    fixed, operations = dict(fixed or {}), dict(operations or {})
    _check_layers(layers, {"fixed": list(fixed), "operations": list(operations)})
    leader = _leaders(layers, ties, fixed)
    legal = {"weight_bits": tuple(weight_bits)}
    if activation_bits is not None:
        legal["activation_bits"] = tuple(activation_bits)
    for argument, widths in legal.items():
        if not widths or any(high <= low for low, high in itertools.pairwise(widths)):
            raise SpaceError(f"{argument} must be at least one width, in ascending order, got {list(widths)}")
    shared = activation_bits is None
    endings = (BITS,) if shared else (WEIGHT, INPUT)
    choices, blocks = [], []
    for layer in layers:
        op = operations.get(layer)
        if layer in fixed:
            ops = _at(layer, op, *fixed[layer])
            blocks.append(Block(layer, (), partial(_fixed, ops)))
            continue
        names = tuple(leader[layer] + ending for ending in endings)
        if leader[layer] == layer:
            choices += [Choice(n, widths) for n, widths in zip(names, legal.values(), strict=True)]
        blocks.append(Block(layer, names, partial(_both if shared else _at, layer, op)))
    if not choices:
        raise SpaceError(f"space {name!r} has nothing to decide: all {len(layers)} layers are fixed")
    for widths in itertools.product(*legal.values()):
        _at(layers[0], None, widths[0], widths[-1])
    settings = {"layers": list(layers), "fixed": {k: list(v) for k, v in fixed.items()}, **legal}
    return SearchSpace(name, tuple(choices), tuple(blocks), settings=settings)


def bit_cost(table: BitTable, space: SearchSpace, metric: str, *, scale: float | None = None) -> AdditiveCost:
    """Compile the cost that a table gives to the networks of a space.

    Args:
        table: Has a row for every layer at each of its widths.
        space: Made by `bit_space`.
        metric: What the cost is called, with its unit.
        scale: How much of the metric one unit of the table is. Has to be said where the metric is one that
            budgets know and the table has another unit, such as cycles for `latency_ms`.

    Raises:
        CostError: The scale is missing or not positive, or a block is no layer of a table.
        MissingRowError: The table lacks a row.
        TableError: A width is none.
    """
    unit = METRIC_UNITS.get(metric, table.unit)
    if scale is None and unit != table.unit:
        raise CostError(
            f"{metric} is in {unit}, table {table.source} in {table.unit!r}: say by `scale` how many {unit} "
            "one of it is, or take another name for the metric"
        )
    factor = 1.0 if scale is None else scale
    if not (factor > 0 and math.isfinite(factor)):
        raise CostError(f"scale must be a positive finite number, got {scale!r}")
    return compile_cost(space, partial(_price, table, factor), metric)


def _price(table: BitTable, factor: float, ops: Ops) -> float:
    total = 0.0
    for op in ops:
        if not isinstance(op, TableLayer):
            raise CostError(
                f"{op.key} is no layer of table {table.source}; make the space by bit_space with its layers"
            )
        total += table.at(op.layer, op.weight_bits, op.activation_bits)
    return factor * total


def _at(layer: str, op: OpSpec | None, weights: Option, activations: Option) -> Ops:
    """Return a layer at two widths; `at_bits` refuses what is no width, also of a layer without operation."""
    widths = int(weights), int(activations)
    if op is None:
        at_bits(_NOTHING, *widths)
        return (TableLayer(layer, *widths),)
    return (TableLayer(layer, *widths, op=at_bits(op, *widths)),)


_NOTHING = TableLayer("", 32, 32)


def _both(layer: str, op: OpSpec | None, bits: Option) -> Ops:
    return _at(layer, op, bits, bits)


def _fixed(ops: Ops) -> Ops:
    return ops


def _check_layers(layers: Sequence[str], named: Mapping[str, Sequence[str]]) -> None:
    if not layers or len(set(layers)) < len(layers):
        raise SpaceError(f"layers must be at least one name, each once, got {list(layers)}")
    for argument, names in named.items():
        if unknown := [name for name in names if name not in layers]:
            raise SpaceError(f"{argument} names {unknown}, which are no layers; layers are {list(layers)}")


def _leaders(
    layers: Sequence[str], ties: Sequence[Sequence[str]], fixed: Mapping[str, Widths]
) -> dict[str, str]:
    """Return by layer the one whose choices it has."""
    leader = {layer: layer for layer in layers}
    tied: set[str] = set()
    for group in ties:
        _check_layers(layers, {"ties": group})
        if len(set(group)) < 2 or tied & set(group) or fixed.keys() & set(group):
            raise SpaceError(
                f"a tie joins two or more layers that are in no other tie and not fixed, got {list(group)}"
            )
        tied |= set(group)
        first = min(group, key=list(layers).index)
        leader |= dict.fromkeys(group, first)
    return leader
