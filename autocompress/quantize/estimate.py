"""Prices of operations at few bits by their shape: a table's row, or an estimate that is marked as one.

A table of a network or of a search space has some shapes and widths. For other shapes a roofline is fitted
to the rows at the same widths, depthwise convolutions and strides apart; for other widths the next wider ones
of the table count, as hardware without them would compute. What was estimated is listed, and `held_out` says
how far such estimates are off for shapes that the table has.
"""

from collections.abc import Mapping
from typing import final

import numpy as np

from autocompress.errors import CostError
from autocompress.latency.correction import Figures
from autocompress.latency.foreign.bit_table import BitTable, Widths
from autocompress.latency.roofline import PARAMETERS, Roofline, fit, held_out
from autocompress.ops import Conv2d, Linear, Ops, OpSpec
from autocompress.quantize.ops import Quantized
from autocompress.quantize.tables import TableLayer, plain

Kind = tuple[bool, int]
"""Whether a convolution is depthwise or grouped, and its stride."""


@final
class ShapePrice:
    """The price of operations at their bits: `compile_cost(space, price, metric)` takes it.

    Norms, biases and activations are part of a layer in a table; operations without MACs (pooling, additions,
    conversions) are in none, and cost nothing here.
    """

    def __init__(self, table: BitTable, operations: Mapping[str, OpSpec], *, batch: int = 1) -> None:
        """Sort the rows by shape; layers of one shape are averaged.

        Args:
            table: Costs of layers.
            operations: By layer what it computes; layers without are not used.
            batch: Images that the costs are for.

        Raises:
            CostError: An operation is neither a convolution nor a linear layer.
        """
        self._table, self._batch = table, batch
        found: dict[Widths, dict[Conv2d, list[float]]] = {}
        shapes = {layer: _shape(op) for layer, op in operations.items()}
        for (layer, weights, activations), cost in table.rows.items():
            if layer in shapes:
                found.setdefault((weights, activations), {}).setdefault(shapes[layer], []).append(cost)
        self._rows = {
            widths: {shape: float(np.mean(costs)) for shape, costs in rows.items()}
            for widths, rows in found.items()
        }
        self._fits: dict[tuple[Kind, Widths], Roofline] = {}
        self._estimated: dict[str, None] = {}

    @property
    def estimated(self) -> list[str]:
        """Keys of the operations that were priced so far without a row of their own, in order."""
        return list(self._estimated)

    def __call__(self, ops: Ops) -> float:
        """Return the cost of operations in sequence, in the unit of the table.

        Raises:
            CostError: An operation with MACs has no bits, is neither a convolution nor a linear layer, or has
                more bits than any row.
            TableError: The table has too few rows of such a kind to fit anything to them.
        """
        return sum(self._price(op) for op in ops)

    def held_out(self, weight_bits: int, activation_bits: int, *, folds: int = 5) -> dict[Kind, Figures]:
        """Return by kind how far estimates at two widths are off for shapes that were left out in turn.

        Kinds with fewer shapes than that takes are left out; those are fitted together with all others.

        Raises:
            CostError: The table has no row at these widths.
        """
        widths = (weight_bits, activation_bits)
        if widths not in self._rows:
            raise CostError(
                f"table {self._table.source} has no rows at {widths}; it has {sorted(self._rows)}"
            )
        result = {}
        for kind in sorted({_kind(shape) for shape in self._rows[widths]}):
            rows = self._of_kind(kind, widths)
            if len(rows) >= folds + PARAMETERS["roofline"]:
                result[kind] = held_out(
                    "roofline",
                    [(shape,) for shape in rows],
                    list(rows.values()),
                    folds=folds,
                    batch=self._batch,
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
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
        shape, asked = _shape(computed), (inner.weight_bits, inner.activation_bits)
        widths = self._next_wider(asked)
        row = self._rows[widths].get(shape)
        if row is not None and widths == asked:
            return row
        self._estimated[op.key] = None
        if row is not None:
            return row
        model = self._fitted(_kind(shape), widths)
        return model.price((shape,), batch=self._batch, weight_bits=widths[0], activation_bits=widths[1])

    def _next_wider(self, asked: Widths) -> Widths:
        wider = [widths for widths in self._rows if widths[0] >= asked[0] and widths[1] >= asked[1]]
        if not wider:
            raise CostError(
                f"table {self._table.source} has no row with at least {asked[0]} bits of weights and "
                f"{asked[1]} of activations; it has {sorted(self._rows)}"
            )
        return min(wider, key=lambda widths: (widths[0] * widths[1], widths))

    def _fitted(self, kind: Kind, widths: Widths) -> Roofline:
        if (kind, widths) not in self._fits:
            rows = self._of_kind(kind, widths)
            if len(rows) < PARAMETERS["roofline"]:
                rows = self._rows[widths]
            self._fits[kind, widths] = fit(
                [(shape,) for shape in rows],
                list(rows.values()),
                batch=self._batch,
                weight_bits=widths[0],
                activation_bits=widths[1],
            )
        return self._fits[kind, widths]

    def _of_kind(self, kind: Kind, widths: Widths) -> dict[Conv2d, float]:
        return {shape: cost for shape, cost in self._rows[widths].items() if _kind(shape) == kind}


def _kind(shape: Conv2d) -> Kind:
    return shape.groups > 1, shape.stride


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
