"""Losses with weights of their own: the Gaussian's likelihood, the encoder of factors."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from autocompress.distill.factors import LEAST_VARIANCE, Factor, VariationalInformation
from autocompress.errors import DistillationError

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_information_is_the_likelihood_of_a_gaussian_around_three_convolutions() -> None:
    module = VariationalInformation(3, 4, seed=1).double()
    with torch.no_grad():
        module.spread.copy_(random(4))
    own, other = random(2, 3, 2, 2), random(2, 4, 2, 2, seed=1)
    weights = [p.detach().numpy()[:, :, 0, 0] for p in module.mean.parameters()]
    assert [w.shape for w in weights] == [(4, 3), (4, 4), (4, 4)]
    variance = [math.log1p(math.exp(s)) + LEAST_VARIANCE for s in module.spread.tolist()]
    terms = []
    for n, i, j in product(range(2), repeat=3):
        x = own[n, :, i, j].numpy()
        mean = weights[2] @ np.maximum(0, weights[1] @ np.maximum(0, weights[0] @ x))
        for m, t, v in zip(mean, other[n, :, i, j].tolist(), variance, strict=True):
            terms.append(((m - t) ** 2 / v + math.log(v)) / 2)
    assert module(own, other).item() == pytest.approx(np.mean(terms))


def test_the_variance_is_5_at_first_and_tends_to_the_mean_squared_error() -> None:
    module = VariationalInformation(3, 2).double()
    torch.testing.assert_close(module.variance(), torch.full((2,), 5.0).double(), rtol=1e-6, atol=0)
    own, other = random(8, 3), random(8, 2, seed=1) * torch.tensor([0.3, 2.0])
    best = (module.mean(own[:, :, None, None])[:, :, 0, 0] - other).square().mean(0).detach()
    with torch.no_grad():
        module.spread.copy_(torch.expm1(best - LEAST_VARIANCE).log())
    module(own, other).backward()
    assert module.spread.grad is not None
    assert module.spread.grad.abs().max() < 1e-12


def test_what_is_trained_along_has_gradients_and_the_larger_map_is_averaged() -> None:
    module = VariationalInformation(3, 4).double()
    own, other = random(2, 3, 2, 2), random(2, 4, 4, 4, seed=1)
    loss = module(own, other)
    pooled = other.reshape(2, 4, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(loss, module(own, pooled))
    parameters = tuple(module.parameters())
    found = torch.autograd.grad(loss, parameters)
    assert all(gradient.abs().max() > 0 for gradient in found)
    torch.autograd.gradcheck(
        lambda spread: torch.func.functional_call(module, {"spread": spread}, (own, other)), (module.spread,)
    )


def test_the_seed_decides_the_first_weights_and_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    for build in (lambda seed: VariationalInformation(3, 4, seed=seed), lambda seed: Factor(3, 4, seed=seed)):
        one, same, other = (build(seed).state_dict() for seed in (0, 0, 1))
        weights = [name for name, tensor in one.items() if tensor.dim() == 4]
        assert len(weights) == 3
        assert all(torch.equal(one[name], same[name]) for name in weights)
        assert not any(torch.equal(one[name], other[name]) for name in weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_variance_that_no_softplus_gives_is_refused() -> None:
    with pytest.raises(DistillationError, match=r"variance must be above 1e-05, got 0"):
        VariationalInformation(3, 4, variance=0.0)


def test_factors_are_of_the_map_s_size_and_three_convolutions_deep() -> None:
    module = Factor(3, 2).eval()
    x = random(2, 3, 5, 4).float()
    found = module(x)
    assert found.shape == (2, 2, 5, 4)
    assert [type(layer).__name__ for layer in module.layers] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3
    for layer in module.layers:
        x = layer(x)
    assert torch.equal(found, x)
