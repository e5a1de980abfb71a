"""Equalization leaves the output as it is, and the ranges equal."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.equalize import absorb_bias, equalize
from autocompress.quantize.grid import quantized, scale_of, weight_grid
from autocompress.quantize.observers import weight_range


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Give the channels of a layer ranges from .01 to 10."""
    for parameter in layer.parameters():
        parameter.data.copy_(normal(*parameter.shape, seed=seed))
    if not list(layer.parameters()):
        return layer
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.get_parameter("weight")
    spread = torch.logspace(-2, 1, weight.shape[axis])
    weight.data *= spread.reshape([-1 if at == axis else 1 for at in range(weight.dim())])
    return layer


PAIRS = {
    "convolutions": [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)],
    "linear": [nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)],
    "flattened": [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)],
    "groups": [nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 6, 1, groups=2)],
    "depthwise second": [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)],
    "depthwise first": [nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 6, 1)],
    "transposed": [nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)],
    "three": [
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_the_output_stays_and_ranges_become_equal(name: str) -> None:
    modules = [uneven(copy.deepcopy(module), seed) for seed, module in enumerate(PAIRS[name])]
    network, x = nn.Sequential(*modules).eval(), normal(4, 3, 8, 8)
    chain = modules[1:] if name == "linear" else modules
    before = network(x).detach()
    given = [parameter.detach().clone() for parameter in network.parameters()]
    factors = equalize([chain])
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert any(not torch.allclose(a, b) for a, b in zip(given, network.parameters(), strict=True))
    layers = [module for module in chain if hasattr(module, "weight")]
    assert len(factors[0]) == len(layers) - 1
    first, last = layers[0].weight.detach(), layers[-1].weight.detach()
    rows = first.transpose(0, 1).flatten(1) if name == "transposed" else first.flatten(1)
    ranges = rows.abs().amax(1)
    if name not in ("groups", "depthwise second"):
        columns = last if name == "transposed" else last.transpose(0, 1)
        columns = columns.reshape(len(ranges), -1)
        if name == "flattened":
            columns = last.reshape(5, 8, 36).transpose(0, 1).flatten(1)
        torch.testing.assert_close(ranges, columns.abs().amax(1), rtol=1e-4, atol=0)
    if name == "three":
        torch.testing.assert_close(
            ranges, layers[1].weight.detach().flatten(1).abs().amax(1), rtol=1e-4, atol=0
        )


def test_the_factor_of_a_pair_is_that_of_the_paper() -> None:
    first, second = uneven(nn.Conv2d(3, 8, 3)), uneven(nn.Conv2d(8, 6, 3), seed=1)
    a = first.get_parameter("weight").detach().flatten(1).abs().amax(1)
    b = second.get_parameter("weight").detach().transpose(0, 1).flatten(1).abs().amax(1)
    ((factor,),) = equalize([(first, second)])
    torch.testing.assert_close(factor, (a * b).sqrt() / b, rtol=1e-4, atol=0)


def test_chains_that_share_layers_settle_together() -> None:
    layers = [uneven(nn.Conv2d(4, 4, 1), seed) for seed in range(4)]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
    x = normal(4, 4, 5, 5)
    before = network(x).detach()
    chains = list(pairwise(layers))
    equalize(chains)
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    for factor in equalize(chains):
        torch.testing.assert_close(factor[0], torch.ones(4), rtol=1e-3, atol=1e-3)


def test_one_scale_for_a_tensor_loses_less_afterwards() -> None:
    modules = [uneven(nn.Conv2d(8, 16, 3)), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    network, x = nn.Sequential(*modules), normal(4, 8, 8, 8)
    before = network(x).detach()

    def lost() -> float:
        rounded = copy.deepcopy(network)
        for layer in (rounded[0], rounded[2]):
            grid = weight_grid(6)
            scale, zero_point = scale_of(*weight_range(layer.weight, grid, None, "minmax"), grid)
            layer.weight.data = quantized(layer.weight.data, scale, zero_point, grid)
        return float((rounded(x).detach() - before).square().mean())

    plain = lost()
    equalize([modules])
    assert lost() < 0.5 * plain


def test_a_dead_channel_is_left_alone() -> None:
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    first.weight.data[1] = 0
    second.weight.data[:, 2] = 0
    ((factor,),) = equalize([(first, second)])
    assert factor[1] == factor[2] == 1
    assert first.weight.isfinite().all()
    assert second.weight.isfinite().all()


def test_absorbed_biases_leave_large_activations_as_they_are() -> None:
    beta, gamma = torch.tensor([5.0, 1.0, -2.0]), torch.tensor([1.0, -0.5, 1.0])
    first, second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, bias=False)
    network = nn.Sequential(first, nn.ReLU(), second)
    # Activations are normal with the mean and deviation of the norm.
    first.weight.data[:] = 0
    first.weight.data[:, 0, 0, 0] = gamma
    first.bias.data.copy_(beta)  # type: ignore[union-attr]
    x = normal(4, 2, 8, 8).clamp(-3, 3)
    before = network(x).detach()
    absorbed = absorb_bias(first, second, beta, gamma)
    assert absorbed.tolist() == [2.0, 0.0, 0.0]
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)
    grouped = nn.Conv2d(3, 3, 1, groups=3)
    again = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), grouped)
    again[0].load_state_dict({"weight": first.weight, "bias": beta})
    before = again(x).detach()
    absorb_bias(again[0], grouped, beta, gamma)
    torch.testing.assert_close(again(x), before, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_equalized_is_refused() -> None:
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    with pytest.raises(QuantizationError, match="ReLU6 between layers lets no factor"):
        equalize([(first, nn.ReLU6(), second)])
    with pytest.raises(QuantizationError, match="BatchNorm2d between layers"):
        equalize([(first, nn.BatchNorm2d(8), second)])
    with pytest.raises(QuantizationError, match="8 outputs cannot precede one of 3"):
        equalize([(first, first)])
    with pytest.raises(QuantizationError, match="2 or 3 of them"):
        equalize([(first, nn.ReLU())])
    with pytest.raises(QuantizationError, match="must be depthwise"):
        equalize([(first, nn.Conv2d(8, 8, 1), second)])
    with pytest.raises(QuantizationError, match="transposed convolution with groups"):
        equalize([(first, nn.ConvTranspose2d(8, 8, 1, groups=2))])
    with pytest.raises(QuantizationError, match="no bias"):
        absorb_bias(nn.Conv2d(3, 8, 1, bias=False), second, torch.ones(8), torch.ones(8))
    with pytest.raises(QuantizationError, match="beta and gamma must have the 8"):
        absorb_bias(first, second, torch.ones(7), torch.ones(7))
