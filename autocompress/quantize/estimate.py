"""Prices of operations at few bits by their shape: a table's row, or an estimate that is marked as one.

A table of a network or of a search space has some shapes and widths. To its rows a roofline is fitted, for
depthwise and for other convolutions apart, with one rate of computing and one of memory for all widths: bytes
go with the bits, and multiplications with what the hardware makes of them. A width that the table lacks is
priced by the model's ratio to the next wider row of the shape, if there is one. What was estimated is listed,
and `held_out` says how far estimates are off for shapes that the table has.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np

from autocompress.errors import CostError
from autocompress.latency.correction import Correction, Figures, figures
from autocompress.latency.foreign.bit_table import BitTable
from autocompress.latency.foreign.bitfusion import read_bitfusion
from autocompress.latency.measure import Measurement
from autocompress.latency.plan import distinct_blocks
from autocompress.latency.roofline import PARAMETERS, Roofline, fit
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target
from autocompress.ops import Conv2d, Linear, Ops, OpSpec, block_key
from autocompress.quantize.ops import Quantized
from autocompress.quantize.tables import TableLayer, plain
from autocompress.space import SearchSpace

Kind = str
"""`grouped`, as depthwise convolutions are, or `dense`."""


@final
class ShapePrice:
    """The price of operations at their bits: `compile_cost(space, price, metric)` takes it.

    Norms, biases and activations are part of a layer in a table; operations without MACs (pooling, additions,
    conversions) are in none, and cost nothing here.
    """

    def __init__(
        self,
        table: BitTable,
        operations: Mapping[str, OpSpec],
        *,
        batch: int = 1,
        computes: Callable[[int], int] = int,
    ) -> None:
        """Sort the rows by shape; layers of one shape are averaged.

        Args:
            table: Costs of layers.
            operations: By layer what it computes; layers without are not used.
            batch: Images that the costs are for.
            computes: At how many bits the hardware multiplies numbers of so many: as many, or as
                `fused_bits` says.

        Raises:
            CostError: An operation is neither a convolution nor a linear layer.
        """
        self._table, self._batch, self._computes = table, batch, computes
        shapes = {layer: _shape(op) for layer, op in operations.items()}
        found: dict[Quantized, list[float]] = {}
        for (layer, weights, activations), cost in table.rows.items():
            if layer in shapes:
                found.setdefault(Quantized(shapes[layer], weights, activations), []).append(cost)
        self._rows = {op: float(np.mean(costs)) for op, costs in found.items()}
        self._fits: dict[Kind, Roofline] = {}
        self._estimated: dict[str, None] = {}

    @property
    def estimated(self) -> list[str]:
        """Keys of the operations that were priced so far without a row of their own, in order."""
        return list(self._estimated)

    def __call__(self, ops: Ops) -> float:
        """Return the cost of operations in sequence, in the unit of the table.

        Raises:
            CostError: An operation with MACs has no bits, or is neither a convolution nor a linear layer.
            TableError: The table has too few rows of such a kind to fit anything to them.
        """
        return sum(self._price(op) for op in ops)

    def held_out(self, *, folds: int = 5, seed: int = 0) -> dict[str, Figures]:
        """Return how far estimates are off for shapes that were left out, in turn, at all widths.

        Args:
            folds: Parts of the shapes of a kind that are left out in turn.
            seed: Of the parts.

        Returns:
            By kind; kinds of fewer shapes than that takes are left out.
        """
        result = {}
        for kind in sorted({_kind(op.op) for op in self._rows}):
            rows = self._of_kind(kind)
            shapes = list(dict.fromkeys(op.op for op in rows))
            if len(shapes) < folds + PARAMETERS["roofline"]:
                continue
            predicted: dict[Quantized, float] = {}
            order = np.random.default_rng(seed).permutation(len(shapes))
            for part in np.array_split(order, folds):
                out = {shapes[index] for index in part}
                model = self._fit({op: cost for op, cost in rows.items() if op.op not in out})
                predicted |= {op: self._modelled(model, op) for op in rows if op.op in out}
            result[kind] = figures(
                np.array([predicted[op] for op in rows]), np.array(list(rows.values()), dtype=np.float64)
            )
        return result

    def _price(self, op: OpSpec) -> float:
        inner = op.op if isinstance(op, TableLayer) and op.op is not None else op
        computed = plain(op)
        if computed is None or not computed.macs:
            return 0.0
        if not isinstance(inner, Quantized):
            raise CostError(
                f"table {self._table.source} has costs at few bits, and {op.key} has none: wrap it by at_bits"
            )
        asked = Quantized(_shape(computed), inner.weight_bits, inner.activation_bits)
        if asked in self._rows:
            return self._rows[asked]
        self._estimated[op.key] = None
        model = self._fitted(_kind(asked.op))
        found = self._modelled(model, asked)
        # The same shape at the next wider bits says more of it than any model.
        wider = [row for row in self._rows if row.op == asked.op and _holds(row, asked)]
        if wider:
            nearest = min(wider, key=lambda row: (row.bops, row.weight_bits))
            found *= self._rows[nearest] / self._modelled(model, nearest)
        return found

    def _effort(self, weight_bits: int, activation_bits: int) -> float:
        return float(self._computes(weight_bits) * self._computes(activation_bits))

    def _modelled(self, model: Roofline, op: Quantized) -> float:
        weights, activations = op.weight_bits, op.activation_bits
        (rate,) = model.macs_per_ms.values()
        at_bits = replace(
            model, macs_per_ms={max(weights, activations): rate / self._effort(weights, activations)}
        )
        return at_bits.price((op,), batch=self._batch, weight_bits=weights, activation_bits=activations)

    def _fitted(self, kind: Kind) -> Roofline:
        if kind not in self._fits:
            rows = self._of_kind(kind)
            self._fits[kind] = self._fit(rows if len(rows) >= PARAMETERS["roofline"] else self._rows)
        return self._fits[kind]

    def _fit(self, rows: Mapping[Quantized, float]) -> Roofline:
        return fit([(op,) for op in rows], list(rows.values()), batch=self._batch, effort=self._effort)

    def _of_kind(self, kind: Kind) -> dict[Quantized, float]:
        return {op: cost for op, cost in self._rows.items() if _kind(op.op) == kind}


def _holds(row: Quantized, asked: Quantized) -> bool:
    return row.weight_bits >= asked.weight_bits and row.activation_bits >= asked.activation_bits


def bitfusion_table(path: Path, space: SearchSpace, target: Target) -> LatencyTable:
    """Return a latency table of a space on BitFusion, by its published table and estimates beside it.

    Operations that the accelerator's table has no rows of (pooling, additions) take no time in it. Which rows
    are estimates, and how far such are off for shapes that were held out, stands in the provenance.

    Args:
        path: The published table.
        space: Whose operations are priced.
        target: What the table is said to be of.

    Raises:
        TableError: The file is absent, damaged or not such a table.
        CostError: An operation is neither a convolution nor a linear layer, or stays in floating point.
    """
    tables = read_bitfusion(path)
    price = ShapePrice(tables.latency_ms, tables.operations, batch=target.batch, computes=fused_bits)
    rows = {}
    for op in dict.fromkeys(op for ops in distinct_blocks(space).values() for op in ops):
        ms = price((op,))
        rows[block_key((op,))] = Measurement(ms, ms, ms, 0.0, ms, 1)
    errors = {kind: round(found.mape_percent, 1) for kind, found in price.held_out().items()}
    provenance = {
        "device": {"name": "BitFusion, simulated"},
        "source": str(path),
        "space": {"name": space.name, "fingerprint": space.fingerprint},
        "estimated": price.estimated,
        "error of estimates, %": errors,
    }
    return LatencyTable(target, rows, Correction(), None, provenance, "op")


def fused_bits(bits: int) -> int:
    """Return at how many bits BitFusion multiplies numbers of so many: 2, 4, 8 or 16.

    Source: Sharma et al., "Bit Fusion", ISCA 2018, section 3: bricks of 2 bits are fused by powers of two.
    """
    return max(2, 1 << (bits - 1).bit_length())


def _kind(shape: OpSpec) -> Kind:
    return "grouped" if isinstance(shape, Conv2d) and shape.groups > 1 else "dense"


def _shape(op: OpSpec) -> Conv2d:
    """Return the convolution alone; a linear layer is one of a single pixel."""
    if isinstance(op, Linear):
        return Conv2d(op.in_features, op.out_features, 1, 1, norm=False)
    if isinstance(op, Conv2d):
        return Conv2d(
            op.in_channels,
            op.out_channels,
            op.height,
            op.width,
            kernel=op.kernel,
            stride=op.stride,
            groups=op.groups,
            norm=False,
        )
    raise CostError(f"tables of layers have convolutions and linear layers, not {op.key}")
