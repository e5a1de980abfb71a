"""Gradients of quantizers against closed forms and PyTorch's own kernels."""

import math

import pytest
import torch
from torch import Tensor

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import Grid, power_of_two, quantized, weight_grid
from autocompress.quantize.quantizer import Quantizer, learned_scales, limit_gradients

GRIDS = [
    Grid(2),
    Grid(4),
    Grid(8, narrow=True),
    Grid(3, signed=False),
    Grid(4, signed=False, symmetric=False),
]


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis", [None, 0])
def test_lsq_gradients_are_those_of_the_closed_form(grid: Grid, axis: int | None) -> None:
    x = (9 * random_numbers(5, 40)).requires_grad_()
    channels = 1 if axis is None else 5
    quantizer = Quantizer(grid, channels=channels, axis=axis)
    start = torch.linspace(0.8, 2.0, channels) * 8 / 2**grid.bits
    quantizer.scale.data.copy_(start)
    if not grid.symmetric:
        quantizer.zero_point.data.fill_(5.0)
    z = quantizer.zero_point.detach().reshape(-1, 1)
    towards = random_numbers(5, 40, seed=1)
    (quantizer(x) * towards).sum().backward()

    # Autograd of s (clip(round(x / s) + z) - z), rounding passed straight through; the clip masks x.
    x2, s2 = x.detach().clone().requires_grad_(), start.clone().requires_grad_()
    s = s2.reshape(-1, 1)
    y = s * (straight_through((x2 / s).clamp(grid.qmin - z, grid.qmax - z)))
    (y * towards).sum().backward()
    count = 40  # weights that share a scale, or features of one of the five images
    assert x.grad is not None
    assert x2.grad is not None
    assert s2.grad is not None
    torch.testing.assert_close(x.grad, x2.grad)
    assert (x.grad == 0).any()
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(
        quantizer.scale.grad, s2.grad / math.sqrt(count * grid.qmax), rtol=1e-4, atol=1e-5
    )


def test_lsq_is_the_learnable_kernel_of_pytorch() -> None:
    grid = Grid(4)
    x, given = random_numbers(3, 50), random_numbers(3, 50, seed=1)
    quantizer = Quantizer(grid)
    quantizer.scale.data.fill_(0.3)
    ours = x.clone().requires_grad_()
    (quantizer(ours) * given).sum().backward()
    theirs, scale = x.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True)
    factor = 1 / math.sqrt(50 * grid.qmax)
    y = torch._fake_quantize_learnable_per_tensor_affine(
        theirs, scale, torch.zeros(1), grid.qmin, grid.qmax, factor
    )
    (y * given).sum().backward()
    torch.testing.assert_close(quantizer(x), y.detach())
    assert ours.grad is not None
    assert theirs.grad is not None
    # Theirs masks what rounds outside, ours what lies outside: they differ within half a step of the ends.
    near = ((x / 0.3 - grid.qmax).abs() <= 0.5) | ((x / 0.3 - grid.qmin).abs() <= 0.5)
    torch.testing.assert_close(ours.grad[~near], theirs.grad[~near])
    assert quantizer.scale.grad is not None
    assert scale.grad is not None
    outside = (x / 0.3 > grid.qmax) & near | (x / 0.3 < grid.qmin) & near
    inner = given * torch.where(outside, (x / 0.3).round() - x / 0.3, 0)
    clipped = given * torch.where(outside, (x / 0.3).clamp(grid.qmin, grid.qmax).round(), 0)
    difference = (clipped - inner).sum() * factor
    torch.testing.assert_close(quantizer.scale.grad - difference, scale.grad, rtol=1e-4, atol=1e-5)


def test_pact_moves_the_clipping_level_by_what_is_clipped() -> None:
    grid = Grid(4, signed=False)
    quantizer = Quantizer(grid, gradient="pact")
    quantizer.scale.data.fill_(0.1)  # clips at 1.5
    x = torch.tensor([[-1.0, 0.3, 1.2, 1.6, 9.0]], requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert quantizer.scale.grad is not None
    assert x.grad is not None
    # d y / d level is 1 for the last two, and the level is 15 scales.
    assert float(quantizer.scale.grad) == pytest.approx((8 + 16) * 15)
    assert x.grad.tolist() == [[0, 2, 4, 0, 0]]


@pytest.mark.parametrize(
    "grid", [*GRIDS, Grid(4, levels="power_of_two_scale"), Grid(4, levels="logarithmic")]
)
def test_with_and_without_gradients_the_numbers_are_the_same(grid: Grid) -> None:
    quantizer, x = Quantizer(grid), random_numbers(4, 100)
    quantizer.scale.data.fill_(0.23)
    with torch.no_grad():
        fused = quantizer(x)
    assert torch.equal(quantizer(x).detach(), fused)
    scale = quantizer.scale.detach()
    scale = power_of_two(scale) if grid.levels == "power_of_two_scale" else scale
    assert torch.equal(quantized(x, scale, quantizer.zero_point.detach(), grid), fused)


def test_a_fixed_scale_learns_nothing() -> None:
    quantizer = Quantizer(weight_grid(4), gradient="fixed")
    x = random_numbers(4, 4).requires_grad_()
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is None
    assert x.grad is not None


def test_a_gradient_that_does_not_exist_is_refused() -> None:
    with pytest.raises(QuantizationError, match="gradient must be one of"):
        Quantizer(Grid(4), gradient="ste")  # type: ignore[arg-type]


def test_gradients_of_scales_stay_within_the_scales() -> None:
    quantizer = Quantizer(Grid(8), channels=3, axis=0)
    fixed = Quantizer(Grid(8), gradient="fixed")
    quantizer.scale.data.copy_(torch.tensor([0.5, 0.01, 2.0]))
    assert learned_scales(torch.nn.Sequential(quantizer, fixed)) == [quantizer.scale]
    quantizer.scale.grad = torch.tensor([0.2, 3.0, -9.0])
    limit_gradients([quantizer.scale])
    assert quantizer.scale.grad.tolist() == pytest.approx([0.2, 0.01, -2.0])
    limit_gradients([fixed.scale])  # has none


def test_a_weight_beyond_the_range_at_8_bits_moves_the_scale_by_the_learning_rate_at_most() -> None:
    quantizer = Quantizer(Grid(8))
    weight = torch.linspace(-1, 1, 100)
    quantizer.scale.data.fill_(0.99 / 127)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    (quantizer(weight) * torch.linspace(-50, 50, 100)).sum().backward()
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad.abs()) > 100 * float(quantizer.scale.detach())
    limit_gradients([quantizer.scale])
    optimizer.step()
    assert quantizer.scale.tolist() == pytest.approx([0.99 / 127], rel=0.01001)
