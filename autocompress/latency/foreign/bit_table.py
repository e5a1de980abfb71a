"""Costs of layers by bit width, looked up strictly: a width without a row is an error, not its neighbour."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autocompress.errors import MissingRowError, TableError

Widths = tuple[int, int]
"""Bits of the weights, bits of the activations."""

MAX_BITS: Final = 32


@dataclass(frozen=True)
class BitTable:
    """A cost for each layer and pair of bit widths.

    Attributes:
        source: The file, for messages.
        unit: Of the cost; says `(assumed)` where the publisher does not state it.
        layers: Names, in the order of the network if the table is of one.
        rows: `(layer, bits of weights, bits of activations)` to cost, finite and at least 0.
    """

    source: str
    unit: str
    layers: tuple[str, ...]
    rows: Mapping[tuple[str, int, int], float]

    def widths(self, layer: str) -> list[Widths]:
        """Return the widths that a layer has rows for, ascending; none for an unknown layer."""
        return sorted((weights, activations) for name, weights, activations in self.rows if name == layer)

    def at(self, layer: str, weight_bits: int, activation_bits: int) -> float:
        """Return the cost of one layer.

        Raises:
            TableError: A width is not an integer in 1..32; -1, which some policies write for "not
                quantized", is no width.
            MissingRowError: The table has no such row; names the nearest one.
        """
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if type(bits) is not int or not 1 <= bits <= MAX_BITS:
                raise TableError(
                    f"table {self.source}: {name} of layer {layer!r} must be an integer in 1..{MAX_BITS}, "
                    f"got {bits!r}; charge what is not quantized at a width that the table has"
                )
        row = self.rows.get((layer, weight_bits, activation_bits))
        if row is None:
            raise self._missing(layer, weight_bits, activation_bits)
        return row

    def total(self, policy: Sequence[Widths]) -> float:
        """Return the cost of a network.

        Args:
            policy: Widths of each layer, in the order of `layers`.

        Raises:
            TableError: There are more or fewer widths than layers, or one is no width.
            MissingRowError: The table has no row for a layer at its widths.
        """
        if len(policy) != len(self.layers):
            raise TableError(
                f"table {self.source}: a policy must have {len(self.layers)} pairs of bits, one a layer, "
                f"got {len(policy)}"
            )
        return math.fsum(
            self.at(layer, weights, activations)
            for layer, (weights, activations) in zip(self.layers, policy, strict=True)
        )

    def _missing(self, layer: str, weight_bits: int, activation_bits: int) -> MissingRowError:
        widths = self.widths(layer)
        if widths:
            weights, activations = min(
                widths, key=lambda pair: abs(pair[0] - weight_bits) + abs(pair[1] - activation_bits)
            )
            nearest: str | None = layer
        else:
            nearest = next(iter(difflib.get_close_matches(layer, self.layers, n=1, cutoff=0.0)), None)
            weights, activations = next(iter(self.widths(nearest or "")), (0, 0))
        return MissingRowError(
            f"table {self.source} has no row for layer {layer!r} at {weight_bits} bits of weights and "
            f"{activation_bits} of activations; the nearest row is layer {nearest!r} at {weights} and "
            f"{activations}; choose widths that the table has"
        )
