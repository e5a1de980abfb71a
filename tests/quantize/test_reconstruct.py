"""Learned rounding: where it starts, where it ends, and that it is better than rounding to the nearest."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.grid import Levels, activation_grid, scale_of, weight_grid
from autocompress.quantize.layer import QuantizedLayer, quantized_layers
from autocompress.quantize.observers import weight_range
from autocompress.quantize.quantizer import Quantizer
from autocompress.quantize.reconstruct import Settings, reconstruct
from autocompress.quantize.rounding import SoftRounding, logits_of

FAST = Settings(steps=300, batch=16, learning_rate=3e-2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return network


def quantizer_of(
    weight: Tensor, bits: int, *, symmetric: bool = True, levels: Levels = "uniform", axis: int | None = 0
) -> Quantizer:
    grid = weight_grid(bits, levels, symmetric=symmetric)
    scale, zero_point = scale_of(*weight_range(weight, grid, axis, "minmax"), grid)
    result = Quantizer(grid, channels=len(scale), axis=axis)
    result.scale.data.copy_(scale)
    result.zero_point.data.copy_(zero_point)
    return result


def at_bits(network: nn.Module, bits: int, *, inputs: bool = False) -> nn.Module:
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parent = network.get_submodule(name.rpartition(".")[0])
            read = Quantizer(activation_grid(4, positive=False, symmetric=True)) if inputs else None
            if read is not None:
                read.scale.data.fill_(0.9)
            quantized = QuantizedLayer(module, weight=quantizer_of(module.weight, bits), input=read)
            parent.register_module(name.rpartition(".")[2], quantized)
    return network


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.first(x)))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


def network() -> nn.Module:
    return fill(nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(4 * 36, 5)))


def images(count: int = 48) -> Tensor:
    # Neighbouring channels are alike: errors of weights add up, which nearest rounding does not know of.
    base = normal(count, 1, 6, 6)
    return base + 0.2 * normal(count, 4, 6, 6, seed=1)


@given(st.floats(0.001, 0.999))
def test_the_start_is_the_fraction(fraction: float) -> None:
    quantizer = Quantizer(weight_grid(8))
    weight = torch.tensor([[3 + fraction, -5 + fraction]])
    assert SoftRounding(weight, quantizer).share()[0, 0].item() == pytest.approx(fraction, abs=1e-5)
    torch.testing.assert_close(SoftRounding(weight, quantizer)(weight), weight, rtol=1e-5, atol=1e-5)


def test_logits_of_a_half_are_zero_and_the_ends_can_still_learn() -> None:
    logits = logits_of(torch.tensor([0.0, 0.5, 1.0])).requires_grad_()
    assert logits[1].abs() < 1e-6
    (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1).sum().backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", ["uniform", "power_of_two_scale"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hard_rounding_without_learning_is_rounding_to_the_nearest(
    symmetric: bool, levels: Levels, bits: int
) -> None:
    weight = normal(5, 30)
    quantizer = quantizer_of(weight, bits, symmetric=symmetric, levels=levels)
    hard = SoftRounding(weight, quantizer).hard()
    with torch.no_grad():
        assert torch.equal(hard, quantizer(weight))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", ["uniform", "power_of_two_scale"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_quantizer_returns_hard_weights_bit_for_bit(symmetric: bool, levels: Levels, bits: int) -> None:
    weight = normal(5, 3000)
    quantizer = quantizer_of(weight, bits, symmetric=symmetric, levels=levels)
    rounding = SoftRounding(weight, quantizer)
    rounding.logits.data.copy_(normal(5, 3000, seed=1))
    hard = rounding.hard()
    assert torch.equal(quantizer(hard).detach(), hard)
    with torch.no_grad():
        assert torch.equal(quantizer(hard), hard)
    assert ((hard - weight).abs() < quantizer.scale.max() * 2).all()


def test_learned_rounding_beats_the_nearest_on_correlated_inputs() -> None:
    plain = fill(nn.Sequential(nn.Linear(16, 8)))
    x = normal(256, 1) + 0.3 * normal(256, 16, seed=1)
    quantized = at_bits(plain, 3)
    (result,) = reconstruct(quantized, plain, ["0"], x, Settings(steps=600, learning_rate=1e-2))
    assert result.after < 0.5 * result.before
    fresh = normal(256, 1, seed=2) + 0.3 * normal(256, 16, seed=3)
    nearest = at_bits(plain, 3)
    with torch.no_grad():
        learned, rounded = ((net(fresh) - plain(fresh)).square().mean() for net in (quantized, nearest))
    assert learned < 0.6 * rounded


def test_blocks_get_better_and_what_is_left_is_a_plain_quantized_network() -> None:
    plain = network()
    quantized = at_bits(plain, 3)
    kinds = [type(module) for module in quantized.modules()]
    quantized[1].train()
    given = [parameter.detach().clone() for parameter in plain.parameters()]
    results = reconstruct(quantized, plain, ["0", "1", "3"], images(), FAST)
    assert [result.name for result in results] == ["0", "1", "3"]
    assert all(result.after < result.before for result in results)
    assert [type(module) for module in quantized.modules()] == kinds
    assert quantized[1].training
    for module in (*quantized.modules(), *plain.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in quantized.parameters())
    assert all(torch.equal(a, b) for a, b in zip(given, plain.parameters(), strict=True))
    for _, layer in quantized_layers(quantized):
        assert layer.weight is not None
        weight = layer.layer.get_parameter("weight")
        assert torch.equal(layer.weight(weight).detach(), weight)


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    plain = network()
    nets = [at_bits(plain, 3) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        reconstruct(net, plain, ["0"], images(), Settings(steps=40, learning_rate=2e-2, seed=seed))
    first, again, other = (net.state_dict()["0.first.layer.weight"] for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scales_of_activations_learn_after_the_weights() -> None:
    plain = network()
    nets = [at_bits(plain, 4, inputs=True) for _ in range(2)]
    (without,) = reconstruct(nets[0], plain, ["0"], images(), FAST)
    with_scales = dataclasses.replace(FAST, scale_steps=200, scale_rate=2e-2)
    (learned,) = reconstruct(nets[1], plain, ["0"], images(), with_scales)
    assert learned.after < 0.8 * without.after
    assert nets[1][0].first.input.scale != nets[0][0].first.input.scale
    assert nets[1][0].first.input.scale > 0


def test_too_few_steps_never_make_it_worse_than_the_nearest() -> None:
    plain = network()
    quantized = at_bits(plain, 3)
    settings = Settings(steps=3, learning_rate=3.0)
    results = reconstruct(quantized, plain, ["0", "1"], images(), settings)
    assert all(result.after <= result.before for result in results)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())  # type: ignore[no-any-return]


def test_a_layer_that_runs_twice_is_learned_in_a_block_around_it_and_refused_alone() -> None:
    plain = fill(nn.Sequential(Twice()))
    x = normal(64, 1) + 0.2 * normal(64, 8, seed=1)
    quantized = at_bits(plain, 3)
    with pytest.raises(QuantizationError, match=r"block '0.layer' runs 2 times"):
        reconstruct(quantized, plain, ["0.layer"], x, FAST)
    (result,) = reconstruct(quantized, plain, ["0"], x, FAST)
    assert result.after < result.before


def test_what_cannot_be_reconstructed_is_refused_before_anything_changes() -> None:
    plain, x = network(), images(4)
    quantized = at_bits(plain, 3)
    given = {name: value.clone() for name, value in quantized.state_dict().items()}
    with pytest.raises(QuantizationError, match="no module '7'"):
        reconstruct(quantized, plain, ["0", "7"], x, FAST)
    with pytest.raises(QuantizationError, match="has no quantized weights"):
        reconstruct(quantized, plain, ["0", "2"], x, FAST)
    with pytest.raises(QuantizationError, match=r"named before, as '0.first'"):
        reconstruct(quantized, plain, ["0", "0.first"], x, FAST)
    with pytest.raises(QuantizationError, match="images must not be empty"):
        reconstruct(quantized, plain, ["0"], x[:0], FAST)
    with pytest.raises(QuantizationError, match="steps and batch"):
        Settings(steps=0)
    with pytest.raises(QuantizationError, match="warm_up"):
        Settings(warm_up=1)
    layer = quantized.get_submodule("3")
    layer.register_module("weight", Quantizer(weight_grid(4, "logarithmic")))
    with pytest.raises(QuantizationError, match="rounding of '3' cannot be learned"):
        reconstruct(quantized, plain, ["0", "3"], x, FAST)
    for name, value in quantized.state_dict().items():
        assert name.startswith("3.weight") or torch.equal(value, given[name])


def test_a_block_that_reads_two_tensors_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x, x)  # type: ignore[no-any-return]

    plain = Net()
    with pytest.raises(QuantizationError, match="input of 'pair' must be one tensor"):
        reconstruct(at_bits(plain, 4), plain, ["pair"], normal(8, 4), FAST)
