"""Codebooks: Lloyd's laws, bytes by hand, Huffman codes between the bounds of entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.codebook import (
    Codebook,
    SharedWeights,
    cluster,
    codebook_bytes,
    huffman_lengths,
    sparse_entries,
)
from autocompress.quantize.layer import QuantizedLayer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_lloyd(values: list[float], centroids: list[float], rounds: int) -> list[float]:
    for _ in range(rounds):
        nearest = [int(max((-abs(v - c), at) for at, c in enumerate(centroids))[1]) for v in values]
        groups = [[v for v, n in zip(values, nearest, strict=True) if n == c] for c in range(len(centroids))]
        centroids = [sum(g) / len(g) if g else c for g, c in zip(groups, centroids, strict=True)]
    return centroids


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_centroids_are_those_of_the_slow_algorithm(bits: int) -> None:
    weight = normal(60).double()
    book = cluster(weight, bits, iterations=30)
    start = torch.linspace(float(weight.min()), float(weight.max()), 2**bits).tolist()
    expected = torch.tensor(slow_lloyd(weight.tolist(), start, 30), dtype=torch.float64)
    torch.testing.assert_close(book.centroids, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["linear", "density"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_weight_is_at_its_nearest_value_and_values_are_means(start: str, bits: int) -> None:
    weight = normal(8, 4, 3, 3)
    book = cluster(weight, bits, start=start, iterations=1000)  # type: ignore[arg-type]
    distances = (weight.flatten()[:, None] - book.centroids).abs()
    torch.testing.assert_close((book.weight - weight).abs().flatten(), distances.amin(1))
    for index in book.indices.unique():
        torch.testing.assert_close(
            weight[book.indices == index].mean(), book.centroids[index], rtol=1e-4, atol=1e-5
        )


def test_few_distinct_weights_are_kept_exactly() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 0.0], [0.5, 2.0, -1.0, 2.0]])
    assert torch.equal(cluster(weight, 3).weight, weight)
    constant = torch.full((3, 3), 0.7)
    assert torch.equal(cluster(constant, 2).weight, constant)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0))
def test_huffman_codes_lie_within_a_bit_of_the_entropy_and_can_be_decoded(counts: list[int]) -> None:
    lengths = huffman_lengths(counts)
    total = sum(counts)
    entropy = -sum(n / total * math.log2(n / total) for n in counts if n)
    mean = sum(n * length for n, length in zip(counts, lengths, strict=True)) / total
    used = [length for n, length in zip(counts, lengths, strict=True) if n]
    assert entropy - 1e-9 <= mean
    assert mean < entropy + 1 or len(used) == 1
    # Kraft: a full tree, so that no code can be shorter.
    assert sum(2.0**-length for length in used) == (1 if len(used) > 1 else 0.5)
    assert all(length == 0 for n, length in zip(counts, lengths, strict=True) if not n)


def test_huffman_lengths_by_hand() -> None:
    assert huffman_lengths([8, 4, 2, 1, 1, 0]) == [1, 2, 3, 4, 4, 0]


def test_bytes_are_those_by_hand() -> None:
    indices = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2)
    size = codebook_bytes(Codebook(indices, torch.arange(4.0), 2))
    # Lengths 1, 2, 3, 3: 8 + 8 + 6 + 6 = 28 bits, and four bytes of lengths.
    assert (size.codebook, size.indices, size.huffman) == (16, 4, 4 + 4)
    assert (size.total, size.total_huffman) == (20, 24)


def test_distances_that_do_not_fit_are_bridged() -> None:
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 3, 11, 20, 37]] = True
    # Distances 1, 3, 8, 9, 17; with 3 bits up to 8: one filler for 9, two for 17.
    assert sparse_entries(mask, 3) == 5 + 1 + 2
    assert sparse_entries(mask, 5) == 5
    assert sparse_entries(mask & False, 3) == 0
    assert sparse_entries(torch.ones(4, 4, dtype=torch.bool), 3) == 16


def test_the_gradient_of_a_value_is_the_sum_of_those_of_its_weights() -> None:
    layer = nn.Conv2d(3, 4, 3)
    book = cluster(layer.weight, 2)
    shared = QuantizedLayer(layer, weight=SharedWeights(book))  # type: ignore[arg-type]
    x, towards = normal(2, 3, 6, 6), normal(2, 4, 4, 4, seed=1)
    (shared(x) * towards).sum().backward()
    free = book.weight.clone().requires_grad_()
    (nn.functional.conv2d(x, free, layer.bias) * towards).sum().backward()
    assert free.grad is not None
    expected = torch.stack([free.grad[book.indices == index].sum() for index in range(4)])
    torch.testing.assert_close(shared.weight.centroids.grad, expected, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"must be 1\.\.8, got 9"):
        cluster(normal(4), 9)
    with pytest.raises(QuantizationError, match="finite"):
        cluster(torch.tensor([math.nan]), 2)
    with pytest.raises(QuantizationError, match="start must be one of"):
        cluster(normal(4), 2, start="random")  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="at least 1, got 0"):
        sparse_entries(torch.ones(3) > 0, 0)
    with pytest.raises(QuantizationError, match=r"weights \(4, 4\), got \(4, 3\)"):
        SharedWeights(cluster(normal(4, 4), 2))(normal(4, 3))
