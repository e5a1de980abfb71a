"""Weights that share a few values: a codebook, an index a weight, and how many bytes that takes.

Source: Han et al., "Deep Compression", ICLR 2016, sections 3 (trained quantization and weight sharing), 2
(sparse indices) and 4 (Huffman coding). There a convolution has 256 values and a linear layer 16.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError

Start = Literal["linear", "density"]
"""Where centroids start: evenly between the least and the greatest weight, so that large ones, which matter
more, get some; or with as many weights each."""


@dataclass(frozen=True)
class Codebook:
    """Shared values of a tensor.

    Attributes:
        indices: int64, in the shape of the weights.
        centroids: `(2^bits,)`, rising.
        bits: Of an index.
    """

    indices: Tensor
    centroids: Tensor
    bits: int

    @property
    def weight(self) -> Tensor:
        """The weights, each at its value."""
        return self.centroids[self.indices]


@dataclass(frozen=True)
class CodebookBytes:
    """What a codebook takes.

    Attributes:
        codebook: 4 bytes a value.
        indices: `bits` each.
        huffman: Indices in a Huffman code instead, with its table: a byte for the length of each code, from
            which the codes follow (canonical).
    """

    codebook: int
    indices: int
    huffman: int

    @property
    def total(self) -> int:
        """With plain indices."""
        return self.codebook + self.indices

    @property
    def total_huffman(self) -> int:
        """With Huffman codes."""
        return self.codebook + self.huffman


def cluster(weight: Tensor, bits: int, *, start: Start = "linear", iterations: int = 100) -> Codebook:
    """Cluster weights by Lloyd's algorithm: each to its nearest value, each value to the mean of its weights.

    Weights are sorted once; clusters of numbers are intervals, and means come from cumulative sums. A value
    that no weight is nearest to stays where it is.

    Args:
        weight: Of any shape.
        bits: 1 to 8 of an index.
        start: Where values start.
        iterations: At most; ends when nothing moves.

    Raises:
        QuantizationError: Bits are out of range, or weights are none or not finite.
    """
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise QuantizationError(f"bits of a codebook must be 1..8, got {bits!r}")
    if start not in get_args(Start):
        raise QuantizationError(f"start must be one of {get_args(Start)}, got {start!r}")
    if weight.numel() == 0 or not weight.isfinite().all():
        raise QuantizationError("weights to cluster must be there, and finite")
    given = weight.detach().flatten().double()
    ordered = given.sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    size = 1 << bits
    if start == "linear":
        centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), size, dtype=torch.float64)
    else:
        middles = (torch.arange(size) * 2 + 1) * len(ordered) // (2 * size)
        centroids = ordered[middles].clone()
    for _ in range(iterations):
        ends = torch.searchsorted(ordered, _borders(centroids))
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        members = edges.diff()
        means = sums[edges].diff() / members.clamp_min(1)
        moved = torch.where(members > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    indices = torch.bucketize(given, _borders(centroids), right=True)
    return Codebook(indices.reshape(weight.shape), centroids.to(weight.dtype), bits)


def _borders(centroids: Tensor) -> Tensor:
    """Return where one value's interval ends and the next begins."""
    return (centroids[1:] + centroids[:-1]) / 2


def codebook_bytes(codebook: Codebook) -> CodebookBytes:
    """Return how many bytes a codebook and its indices take, plain and in a Huffman code."""
    counts = torch.bincount(codebook.indices.flatten(), minlength=len(codebook.centroids)).tolist()
    lengths = huffman_lengths(counts)
    coded = sum(times * length for times, length in zip(counts, lengths, strict=True))
    return CodebookBytes(
        4 * len(codebook.centroids),
        math.ceil(codebook.indices.numel() * codebook.bits / 8),
        math.ceil(coded / 8) + len(counts),
    )


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Return the bits of each symbol's Huffman code; 0 for symbols that do not occur.

    A single symbol has a code of one bit: a decoder has to see how many there are.

    Source: Huffman, "A Method for the Construction of Minimum-Redundancy Codes", 1952.
    """
    lengths = [0] * len(counts)
    order = count()
    heap = [(times, next(order), [symbol]) for symbol, times in enumerate(counts) if times > 0]
    if len(heap) == 1:
        lengths[heap[0][2][0]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        symbols = first[2] + second[2]
        for symbol in symbols:
            lengths[symbol] += 1
        heapq.heappush(heap, (first[0] + second[0], next(order), symbols))
    return lengths


def sparse_entries(mask: Tensor, bits: int) -> int:
    """Return how many entries a sparse tensor stores when each holds its distance from the last one.

    A distance that does not fit into `bits` is bridged by entries of value zero, as in figure 2 of the
    source. Each entry takes these bits beside those of its value: 8 for convolutions there, 5 for linear
    layers.

    Args:
        mask: True where a weight is kept, of any shape.
        bits: Of a distance; the greatest that fits is 2^bits.

    Raises:
        QuantizationError: There are no bits.
    """
    if bits < 1:
        raise QuantizationError(f"bits of a distance must be at least 1, got {bits!r}")
    places = mask.flatten().nonzero().flatten()
    gaps = torch.diff(places, prepend=places.new_full((1,), -1))
    return int(len(places) + ((gaps - 1) // (1 << bits)).sum())


class SharedWeights(nn.Module):
    """A quantizer of weights by a codebook, whose values learn: `QuantizedLayer(layer, weight=...)`.

    The gradient of a value is the sum of those of its weights, as in the source's equation 3 (HAQ takes their
    mean). The layer's own weights are not read and get no gradient.

    Args:
        codebook: Of the layer's weights.

    Attributes:
        centroids: `(2^bits,)`, learned.
        indices: In the shape of the weights, fixed.
    """

    def __init__(self, codebook: Codebook) -> None:
        """Start at the values of the codebook."""
        super().__init__()
        self.bits = codebook.bits
        self.centroids = nn.Parameter(codebook.centroids.clone())
        self.indices: Tensor
        self.register_buffer("indices", codebook.indices.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shared weights.

        Raises:
            QuantizationError: The weights have another shape than those of the codebook.
        """
        if weight.shape != self.indices.shape:
            raise QuantizationError(
                f"the codebook is of weights {tuple(self.indices.shape)}, got {tuple(weight.shape)}"
            )
        return self.centroids[self.indices]

    def extra_repr(self) -> str:
        """Say what it does."""
        return f"{self.bits} bits, {len(self.centroids)} shared values"
