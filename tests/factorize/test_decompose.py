"""Decompositions: closed forms of the errors, slow second implementations, laws of ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.errors import FactorizationError
from autocompress.factorize.canonical import composed, cp_factors
from autocompress.factorize.decompose import (
    depthwise_factors,
    rank_by_energy,
    relative_error,
    spatial_factors,
    spatial_matrix,
    svd_factors,
    tucker_factors,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def from_tucker(enter: Tensor, core: Tensor, leave: Tensor) -> Tensor:
    return torch.einsum("ci,oiyx,to->tcyx", enter, core, leave)


def slow_spatial(vertical: Tensor, horizontal: Tensor) -> np.ndarray:
    """The kernel that a column and then a row make, term by term."""
    v, h = vertical.numpy(), horizontal.numpy()
    kernel = np.zeros((h.shape[0], v.shape[1], v.shape[2], h.shape[3]))
    for t, c, y, x in np.ndindex(*kernel.shape):
        kernel[t, c, y, x] = sum(v[k, c, y, 0] * h[t, k, 0, x] for k in range(v.shape[0]))
    return kernel


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_error_of_a_truncated_svd_is_the_tail_of_the_singular_values(
    rows: int, columns: int, data: st.DataObject
) -> None:
    matrix = normal(rows, columns, seed=data.draw(st.integers(0, 99)))
    rank = data.draw(st.integers(1, min(rows, columns)))
    left, right = svd_factors(matrix.float(), rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    tail = np.linalg.svd(matrix.float().double().numpy(), compute_uv=False)[rank:]
    assert float((matrix.float() - left @ right).norm()) == pytest.approx(
        math.sqrt((tail**2).sum()), abs=1e-9
    )
    # The singular values are split evenly.
    torch.testing.assert_close(left.T @ left, right @ right.T, atol=1e-9, rtol=1e-9)


def test_a_matrix_by_hand() -> None:
    left, right = svd_factors(torch.diag(torch.tensor([3.0, 4.0])), 1)
    torch.testing.assert_close(left @ right, torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64)))
    assert relative_error(torch.diag(torch.tensor([3.0, 4.0])), left @ right) == pytest.approx(3 / 5)


@settings(max_examples=30)
@given(shapes, st.data())
def test_a_column_and_a_row_make_the_nearest_kernel(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    weight = normal(*shape)
    out, channels, height, width = shape
    rank = data.draw(st.integers(1, min(channels * height, out * width)))
    vertical, horizontal = spatial_factors(weight, rank)
    assert vertical.shape == (rank, channels, height, 1)
    assert horizontal.shape == (out, rank, 1, width)
    matrix = np.zeros((channels * height, out * width))
    for t, c, y, x in np.ndindex(*shape):
        matrix[c * height + y, t * width + x] = weight[t, c, y, x]
    np.testing.assert_array_equal(spatial_matrix(weight).numpy(), matrix)
    tail = np.linalg.svd(matrix, compute_uv=False)[rank:]
    error = np.linalg.norm(weight.numpy() - slow_spatial(vertical, horizontal))
    assert error == pytest.approx(math.sqrt((tail**2).sum()), abs=1e-9)


def test_a_separable_filter_needs_one_column_and_one_row() -> None:
    sobel = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 0.0, -1.0])
    vertical, horizontal = spatial_factors(sobel[None, None], 1)
    torch.testing.assert_close(vertical[0, 0] @ horizontal[0, 0], sobel.double())


@settings(max_examples=30)
@given(shapes, st.data())
def test_kernels_of_each_input_channel_are_the_nearest(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    weight = normal(*shape)
    out, channels, height, width = shape
    multiplier = data.draw(st.integers(1, min(out, height * width)))
    depthwise, pointwise = depthwise_factors(weight, multiplier)
    assert depthwise.shape == (channels * multiplier, 1, height, width)
    assert pointwise.shape == (out, channels * multiplier, 1, 1)
    kernel, tail = np.zeros(shape), 0.0
    for t, c in np.ndindex(out, channels):
        for at in range(c * multiplier, (c + 1) * multiplier):
            kernel[t, c] += pointwise[t, at, 0, 0].item() * depthwise[at, 0].numpy()
    for c in range(channels):
        values = np.linalg.svd(weight[:, c].flatten(1).numpy(), compute_uv=False)
        tail += (values[multiplier:] ** 2).sum()
    assert np.linalg.norm(weight.numpy() - kernel) == pytest.approx(math.sqrt(tail), abs=1e-9)


def test_a_kernel_of_low_channel_ranks_is_found_again() -> None:
    weight = from_tucker(normal(7, 2), normal(3, 2, 3, 3, seed=1), normal(8, 3, seed=2))
    enter, core, leave = tucker_factors(weight, 2, 3)
    assert relative_error(weight, from_tucker(enter, core, leave)) < 1e-10
    torch.testing.assert_close(enter.T @ enter, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(leave.T @ leave, torch.eye(3, dtype=torch.float64))


@settings(max_examples=30)
@given(shapes, st.data())
def test_tucker_is_no_worse_than_its_start_and_no_better_than_its_bound(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    weight = normal(*shape)
    out, channels, points = shape[0], shape[1], shape[2] * shape[3]
    rank_in = data.draw(st.integers(1, min(channels, out * points)))
    rank_out = data.draw(st.integers(-(-rank_in // points), min(out, rank_in * points)))
    error = float((weight - from_tucker(*tucker_factors(weight, rank_in, rank_out))).square().sum())
    into, leaving = weight.transpose(0, 1).flatten(1), weight.flatten(1)
    tails = [
        float(torch.linalg.svdvals(side)[rank:].square().sum())
        for side, rank in ((into, rank_in), (leaving, rank_out))
    ]
    # De Lathauwer et al. 2000, property 10: HOSVD loses no more than both tails; nothing less than either.
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9
    enter, leave = (torch.linalg.svd(side)[0] for side in (into, leaving))
    enter, leave = enter[:, :rank_in], leave[:, :rank_out]
    core = torch.einsum("tcyx,ci,to->oiyx", weight, enter, leave)
    assert error <= float((weight - from_tucker(enter, core, leave)).square().sum()) + 1e-9


def test_iterations_of_tucker_improve_on_its_start() -> None:
    weight = normal(8, 8, 3, 3)
    error = relative_error(weight, from_tucker(*tucker_factors(weight, 3, 3)))
    enter = torch.linalg.svd(weight.transpose(0, 1).flatten(1))[0][:, :3]
    leave = torch.linalg.svd(weight.flatten(1))[0][:, :3]
    core = torch.einsum("tcyx,ci,to->oiyx", weight, enter, leave)
    assert error < relative_error(weight, from_tucker(enter, core, leave)) - 1e-3


def test_neither_side_of_tucker_can_be_improved_alone() -> None:
    weight = normal(8, 7, 3, 3)
    enter, core, leave = tucker_factors(weight, 3, 2)
    into = torch.einsum("tcyx,to->coyx", weight, leave).flatten(1)
    leaving = torch.einsum("tcyx,ci->tiyx", weight, enter).flatten(1)
    for side, rank in ((into, 3), (leaving, 2)):
        best = float(torch.linalg.svdvals(side)[:rank].square().sum())
        assert float(core.square().sum()) == pytest.approx(best, rel=1e-4)


def test_a_sum_of_products_is_found_again() -> None:
    weight = composed([normal(9, 3), normal(7, 3, seed=1), normal(3, 3, seed=2), normal(3, 3, seed=3)])
    found = cp_factors(weight, 3, sweeps=2000)
    assert found.error < 1e-2
    factors = [found.leave, found.enter, found.vertical, found.horizontal]
    assert found.error == pytest.approx(relative_error(weight, composed(factors)))
    assert found.error == min(found.errors)
    assert len(found.errors) == 3
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    torch.testing.assert_close(norms, norms[:1].expand(4, -1))


def test_a_sum_of_products_is_a_sum_of_products() -> None:
    factors = [normal(3, 2), normal(2, 2, seed=1), normal(2, 2, seed=2), normal(1, 2, seed=3)]
    slow = np.zeros((3, 2, 2, 1))
    for t, c, y, x in np.ndindex(*slow.shape):
        slow[t, c, y, x] = sum(
            float(factors[0][t, r] * factors[1][c, r] * factors[2][y, r] * factors[3][x, r]) for r in range(2)
        )
    np.testing.assert_allclose(composed(factors).numpy(), slow)


@pytest.mark.parametrize("rank", [1, 4])
def test_no_factor_of_a_cp_can_be_improved_alone(rank: int) -> None:
    weight = normal(6, 5, 3, 2).numpy()
    found = cp_factors(normal(6, 5, 3, 2), rank)
    factors = [f.numpy() for f in (found.leave, found.enter, found.vertical, found.horizontal)]
    for axis, letter in enumerate("tcyx"):
        letters = "tcyx".replace(letter, "")
        others = [factor for at, factor in enumerate(factors) if at != axis]
        products = np.einsum(",".join(f"{one}r" for one in letters) + f"->{letters}r", *others)
        rows = np.moveaxis(weight, axis, -1).reshape(-1, weight.shape[axis])
        best = np.linalg.lstsq(products.reshape(-1, rank), rows)[0]
        error = np.linalg.norm(rows - products.reshape(-1, rank) @ best) / np.linalg.norm(weight)
        # The last factor was solved for last; the others until next to nothing changed.
        assert found.error == pytest.approx(error, abs=1e-9 if letter == "x" else 1e-4)


def test_cp_is_the_same_every_time_and_does_not_touch_the_random_numbers_of_others() -> None:
    before = torch.get_rng_state()
    one, other = cp_factors(normal(5, 4, 3, 3), 6), cp_factors(normal(5, 4, 3, 3), 6)
    assert torch.equal(one.leave, other.leave)
    assert torch.equal(torch.get_rng_state(), before)
    assert cp_factors(normal(5, 4, 3, 3), 6, seed=1).errors != one.errors


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_several_starts_is_taken(seed: int) -> None:
    weight = normal(6, 6, 3, 3, seed=seed)
    few, many = cp_factors(weight, 4, starts=1), cp_factors(weight, 4, starts=3)
    assert many.errors[0] == pytest.approx(few.error)
    assert many.error == min(many.errors) <= few.error
    factors = [many.leave, many.enter, many.vertical, many.horizontal]
    assert relative_error(weight, composed(factors)) == pytest.approx(many.error)


def test_starts_differ_even_where_singular_vectors_would_do_for_all() -> None:
    assert len(set(cp_factors(normal(6, 6, 3, 3), 1).errors)) == 3


def test_kernels_of_zeros_are_decomposed_without_an_error() -> None:
    zeros = torch.zeros(4, 3, 3, 3)
    assert cp_factors(zeros, 2).error == 0
    assert relative_error(zeros, from_tucker(*tucker_factors(zeros, 2, 2))) == 0
    assert rank_by_energy(torch.zeros(4), 0.9) == 1


def test_ranks_by_energy_by_hand() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0])  # squares 9, 4, 1, 1 of 15
    shares = {0.1: 1, 9 / 15 - 1e-6: 1, 9 / 15 + 1e-6: 2, 13 / 15 + 1e-6: 3, 14 / 15 + 1e-6: 4, 1.0: 4}
    assert {energy: rank_by_energy(values, energy) for energy in shares} == shares


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.floats(0.01, 1))
def test_a_rank_by_energy_is_the_smallest_that_keeps_it(numbers: list[float], energy: float) -> None:
    values = sorted(numbers, reverse=True)
    rank = rank_by_energy(torch.tensor(values, dtype=torch.float64), energy)
    total = math.fsum(v * v for v in values)
    assert math.fsum(v * v for v in values[:rank]) >= energy * total * (1 - 1e-9)
    if rank > 1:
        assert math.fsum(v * v for v in values[: rank - 1]) <= energy * total * (1 + 1e-9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(FactorizationError, match=r"rank must be an integer in 1\.\.2, got 3"):
        svd_factors(normal(2, 3), 3)
    with pytest.raises(FactorizationError, match=r"rank must be an integer in 1\.\.2, got True"):
        svd_factors(normal(2, 3), True)
    with pytest.raises(FactorizationError, match=r"expected a matrix \(rows, columns\), got \(2, 3, 1, 1\)"):
        svd_factors(normal(2, 3, 1, 1), 1)
    with pytest.raises(FactorizationError, match=r"expected a kernel .*, got list"):
        spatial_factors([1.0], 1)  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match="finite values"):
        tucker_factors(torch.full((2, 2, 3, 3), math.nan), 1, 1)
    with pytest.raises(FactorizationError, match="finite values"):
        cp_factors(torch.ones(2, 2, 3, 3, device="meta"), 1)
    with pytest.raises(FactorizationError, match=r"rank_in \(5\) and rank_out \(1\) differ by more"):
        tucker_factors(normal(5, 6, 2, 2), 5, 1)
    with pytest.raises(FactorizationError, match=r"rank_out must be an integer in 1\.\.5, got 0"):
        tucker_factors(normal(5, 6, 2, 2), 2, 0)
    with pytest.raises(FactorizationError, match=r"multiplier must be an integer in 1\.\.2, got 4"):
        depthwise_factors(normal(2, 6, 3, 3), 4)
    with pytest.raises(FactorizationError, match=r"rank must be an integer in 1\.\.18, got 19"):
        cp_factors(normal(2, 8, 3, 3), 19)
    with pytest.raises(FactorizationError, match="starts must be an integer >= 1, got 0"):
        cp_factors(normal(2, 2, 3, 3), 1, starts=0)
    for energy in (0, 1.1, math.nan, True, "all"):
        with pytest.raises(FactorizationError, match=r"energy must be a number in \(0, 1\], got"):
            rank_by_energy(torch.ones(2), energy)  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match="do not rise"):
        rank_by_energy(torch.tensor([1.0, 2.0]), 0.5)
