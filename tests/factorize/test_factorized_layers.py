"""Layers as sequences of smaller ones: full ranks, counts, closed forms of costs, refusals."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import FactorizationError
from autocompress.factorize.decompose import relative_error
from autocompress.factorize.layers import Fire, depthwise_separable, factorized, fire, kernel_of
from autocompress.factorize.methods import (
    METHODS,
    Method,
    applicable,
    composed,
    decomposed,
    full_rank,
    geometry_of,
    macs_of,
    parts,
    rank_at_energy,
    ranks_below,
    weights_of,
)


def seeded(make: Any, *args: Any, seed: int = 0, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def macs_run(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() // 2


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding: Any = draw(st.sampled_from(["valid", "ints", "ints", "same"]))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    if padding == "ints":
        padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    elif padding == "same":
        assume(all(side % 2 for side in kernel))  # PyTorch warns of others
    made: nn.Conv2d = seeded(
        nn.Conv2d,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    )
    return made


@settings(max_examples=60)
@given(convolutions(), st.data())
def test_at_full_rank_a_sequence_computes_what_the_layer_does(layer: nn.Conv2d, data: st.DataObject) -> None:
    geometry = geometry_of(layer)
    method = data.draw(st.sampled_from(applicable(geometry)))
    made = factorized(layer, method, full_rank(geometry, method))
    x = images(2, layer.in_channels, 11, 12)
    torch.testing.assert_close(made(x), layer(x), atol=2e-5, rtol=1e-5)


@settings(max_examples=60)
@given(convolutions(), st.data())
def test_counts_are_those_of_what_runs(layer: nn.Conv2d, data: st.DataObject) -> None:
    geometry = geometry_of(layer)
    method = data.draw(st.sampled_from(applicable(geometry)))
    ranks = ranks_below(geometry, method, (11, 12), float("inf"))
    rank = data.draw(st.sampled_from(ranks))
    made, found = factorized(layer, method, rank), parts(geometry, method, rank)
    x = images(1, layer.in_channels, 11, 12)
    assert macs_of(found, (11, 12)) == macs_run(made, x)
    bias = 0 if layer.bias is None else layer.out_channels
    assert weights_of(found) + bias == sum(p.numel() for p in made.parameters())
    assert geometry.out_size((11, 12)) == tuple(made(x).shape[2:])
    # The layer itself is counted in the same way.
    assert geometry.weights * torch.Size(geometry.out_size((11, 12))).numel() == macs_run(layer, x)


@settings(max_examples=40)
@given(convolutions(), st.data())
def test_a_sequence_is_the_convolution_with_the_composed_kernel(
    layer: nn.Conv2d, data: st.DataObject
) -> None:
    geometry = geometry_of(layer)
    method = data.draw(st.sampled_from(applicable(geometry)))
    rank = data.draw(st.sampled_from(ranks_below(geometry, method, (11, 12), float("inf"))))
    made = factorized(layer, method, rank)
    near = copy.deepcopy(layer)
    with torch.no_grad():
        near.weight.copy_(composed(method, rank, decomposed(kernel_of(layer), method)(rank)))
    x = images(2, layer.in_channels, 11, 12)
    torch.testing.assert_close(made(x), near(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["svd", "spatial", "depthwise", "tucker"])
def test_errors_fall_with_the_rank_to_zero(method: Method) -> None:
    layer = seeded(nn.Conv2d, 6, 8, 3, padding=1)
    kernels = decomposed(layer.weight, method)
    ranks = ranks_below(geometry_of(layer), method, (8, 8), float("inf"))
    errors = [relative_error(layer.weight, composed(method, rank, kernels(rank))) for rank in ranks]
    assert len(ranks) > 5
    assert errors[0] < 1
    assert all(after < before + 1e-9 for before, after in pairwise(errors))
    assert errors[-1] < 1e-6


@settings(max_examples=40)
@given(st.sampled_from(["svd", "spatial", "depthwise", "tucker"]), st.floats(0.05, 1), st.integers(0, 9))
def test_the_energy_that_is_asked_for_is_kept(method: Method, energy: float, seed: int) -> None:
    layer = seeded(nn.Conv2d, 5, 7, 3, seed=seed)
    rank = rank_at_energy(layer.weight, method, energy)
    error = relative_error(layer.weight, composed(method, rank, decomposed(layer.weight, method)(rank)))
    assert error**2 <= 1 - energy + 1e-9
    if isinstance(rank, int) and rank > 1:  # of those, the rank is the smallest
        less = composed(method, rank - 1, decomposed(layer.weight, method)(rank - 1))
        assert relative_error(layer.weight, less) ** 2 > 1 - energy - 1e-9
    made = factorized(layer, method, energy=energy)
    other = factorized(layer, method, rank)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))


def test_the_energy_of_all_input_channels_counts_together() -> None:
    weight = torch.zeros(3, 2, 1, 3)
    weight[0, 0, 0, 0] = 10.0
    weight[:, 1, 0] = 4 * torch.eye(3)
    # Squares of 116, 16 and 16 for one, two and three kernels a channel: .784 and .892 of 148.
    ranks = {0.78: 1, 0.8: 2, 0.88: 2, 0.9: 3}
    assert {energy: rank_at_energy(weight, "depthwise", energy) for energy in ranks} == ranks


def test_one_side_of_tucker_that_needs_few_channels_limits_the_other() -> None:
    weight = torch.zeros(2, 20, 1, 2)
    weight[0, :, 0, 0], weight[0, :, 0, 1] = torch.randn(20), torch.randn(20)
    weight[1] = 1e-3 * torch.randn(20, 1, 2)
    rank = rank_at_energy(weight, "tucker", 0.9)
    assert rank == (2, 1)


def test_a_linear_layer_becomes_two() -> None:
    layer = seeded(nn.Linear, 12, 9)
    made = factorized(layer, "svd", 3)
    assert [name for name, _ in made.named_children()] == ["reduce", "expand"]
    reduce, expand = made
    assert reduce.bias is None
    assert torch.equal(expand.bias, layer.bias)  # type: ignore[arg-type]
    values = torch.linalg.svdvals(layer.weight.detach().double())
    product = expand.weight.detach().double() @ reduce.weight.detach().double()  # type: ignore[operator]
    error = float((product - layer.weight.detach()).norm())
    assert error == pytest.approx(float(values[3:].square().sum().sqrt()), rel=1e-5)
    x = images(4, 5, 12)
    torch.testing.assert_close(factorized(layer, "svd", 9)(x), layer(x), atol=1e-5, rtol=1e-5)
    assert macs_run(made, x) == 20 * 3 * (12 + 9)


def test_only_the_last_part_has_the_bias_and_all_have_what_the_layer_is() -> None:
    layer = seeded(nn.Conv2d, 4, 4, 3, dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    for method in METHODS:
        made = factorized(layer, method, (2, 2) if method == "tucker" else 2)
        assert [part.bias is not None for part in made] == [False] * (len(made) - 1) + [True]
        assert all(p.dtype == torch.float64 for p in made.parameters())
        assert all(p.requires_grad == name.endswith("bias") for name, p in made.named_parameters())
        assert not any(module.training for module in made.modules())


def test_a_layer_is_not_changed_and_no_random_number_is_drawn() -> None:
    layer = seeded(nn.Conv2d, 4, 4, 3)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    made = factorized(layer, "spatial", 2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_reach_all_parts() -> None:
    for method in METHODS:
        made = factorized(seeded(nn.Conv2d, 4, 4, 3), method, (2, 2) if method == "tucker" else 2)
        made(images(1, 4, 6, 6)).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())


# Compact replacements ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(8, 16, 3), (5, 7, 5)])
def test_depthwise_separable_costs_one_over_outputs_plus_one_over_points(
    inputs: int, outputs: int, kernel: int
) -> None:
    layer = seeded(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2)
    x = images(1, inputs, 10, 10)
    ratio = macs_run(depthwise_separable(layer), x) / macs_run(layer, x)
    assert ratio == pytest.approx(1 / outputs + 1 / kernel**2)


def test_a_separable_convolution_is_found_again() -> None:
    depthwise = seeded(nn.Conv2d, 4, 4, 3, groups=4, bias=False)
    pointwise = seeded(nn.Conv2d, 4, 6, 1)
    layer = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight.copy_(pointwise.weight * depthwise.weight[:, 0])
        layer.bias.copy_(pointwise.bias)  # type: ignore[union-attr]
    x = images(2, 4, 7, 7)
    made = depthwise_separable(layer)
    torch.testing.assert_close(made(x), pointwise(depthwise(x)), atol=1e-5, rtol=1e-5)
    assert [name for name, _ in made.named_children()] == ["depthwise", "pointwise"]


def test_the_first_convolution_of_resnet_has_9408_weights() -> None:
    assert geometry_of(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)).weights == 9408


@pytest.mark.parametrize("stride", [1, 2])
def test_a_fire_module_has_the_shape_and_the_cost_of_the_paper(stride: int) -> None:
    layer = seeded(nn.Conv2d, 96, 128, 3, stride=stride, padding=1)
    made = fire(layer, 16)
    assert isinstance(made, Fire)
    # SqueezeNet's fire2 (table 1): 16, 64 and 64 filters after 96 channels, 11,920 parameters with biases.
    assert sum(p.numel() for p in made.parameters()) == 11_920
    x = images(1, 96, 9, 9)
    assert made(x).shape == layer(x).shape
    places = layer(x)[0, 0].numel()
    assert macs_run(made, x) == 81 * 96 * 16 + places * 64 * 16 * (1 + 9)
    squeezed = torch.relu(made.squeeze(x))
    assert torch.equal(made(x)[:, :64], made.expand_point(squeezed))
    assert torch.equal(made(x)[:, 64:], made.expand_square(squeezed))


def test_a_fire_module_is_seeded_and_keeps_the_bias() -> None:
    layer, state = seeded(nn.Conv2d, 8, 10, 3, padding=2, dilation=2), torch.get_rng_state()
    one, same, other = fire(layer, 3, share=0.3), fire(layer, 3, share=0.3), fire(layer, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.squeeze.weight, same.squeeze.weight)
    assert not torch.equal(one.squeeze.weight, other.squeeze.weight)
    bias = torch.cat([one.expand_point.bias, one.expand_square.bias])  # type: ignore[list-item]
    assert torch.equal(bias, layer.bias)
    assert one.expand_square.out_channels == 3
    assert fire(seeded(nn.Conv2d, 4, 4, 3, padding="same", bias=False), 2).expand_point.bias is None


def test_fire_modules_that_cannot_be_are_refused() -> None:
    with pytest.raises(FactorizationError, match=r"half of what its kernel reaches, \(2, 2\).*got \(0, 0\)"):
        fire(nn.Conv2d(4, 4, 3), 2)
    with pytest.raises(FactorizationError, match=r"kernel larger than 1x1.*got 1x1"):
        fire(nn.Conv2d(4, 4, 1), 2)
    with pytest.raises(FactorizationError, match="0 of 4 for the larger"):
        fire(nn.Conv2d(4, 4, 3, padding=1), 2, share=0.1)
    with pytest.raises(FactorizationError, match="share must be a number between 0 and 1, got 1"):
        fire(nn.Conv2d(4, 4, 3, padding=1), 2, share=1)
    with pytest.raises(FactorizationError, match=r"squeeze must be an integer in 1\.\.4, got 5"):
        fire(nn.Conv2d(4, 4, 3, padding=1), 5)


# Refusals ----------------------------------------------------------------------------------------------


class Mine(nn.Conv2d):
    pass


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def extended() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_buffer("scale", torch.ones(1))
    return layer


def overridden() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


def damaged() -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (lambda: Mine(4, 4, 3), "Mine is neither"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is neither"),
        (lambda: nn.ReLU(), "ReLU is neither"),
        (lambda: nn.LazyLinear(4), "no shape yet"),
        (hooked, "hooks"),
        (lambda: weight_norm(nn.Linear(4, 4)), "parametrizations"),
        (extended, "other tensors"),
        (overridden, r"forward\(\) was replaced"),
        (damaged, "nan or infinity"),
        (lambda: nn.Linear(4, 4, device="meta"), "no values"),
    ],
)
def test_layers_that_cannot_be_factorized_are_refused(layer: Any, reason: str) -> None:
    with pytest.raises(FactorizationError, match=reason):
        factorized(layer(), "svd", 1)


def test_wrong_methods_and_ranks_are_refused() -> None:
    conv, linear = nn.Conv2d(4, 6, 3), nn.Linear(4, 4)
    with pytest.raises(FactorizationError, match=r"method must be one of svd, spatial.*got 'qr'"):
        factorized(conv, "qr", 1)  # type: ignore[arg-type]
    with pytest.raises(FactorizationError, match=r"tucker does not apply to Linear .*: take svd"):
        factorized(linear, "tucker", (1, 1))
    with pytest.raises(FactorizationError, match="spatial does not apply to Conv2d with a 1x3 kernel"):
        factorized(nn.Conv2d(4, 4, (1, 3)), "spatial", 1)
    with pytest.raises(FactorizationError, match=r"rank of svd must be an integer in 1\.\.6, got 7"):
        factorized(conv, "svd", 7)
    with pytest.raises(FactorizationError, match=r"rank of tucker must be a pair.*at most \(4, 6\), got 2"):
        factorized(conv, "tucker", 2)
    with pytest.raises(FactorizationError, match=r"rank_out of tucker must be an integer in 1\.\.6, got 7"):
        factorized(conv, "tucker", (2, 7))
    with pytest.raises(FactorizationError, match=r"rank of tucker \(1, 12\).*\(1, 9\) does the same"):
        factorized(nn.Conv2d(4, 12, 3), "tucker", (1, 12))
    with pytest.raises(FactorizationError, match="either a rank or an energy"):
        factorized(conv, "svd")
    with pytest.raises(FactorizationError, match="either a rank or an energy"):
        factorized(conv, "svd", 1, energy=0.9)
    with pytest.raises(FactorizationError, match="cp has no singular values"):
        factorized(conv, "cp", energy=0.9)
    with pytest.raises(FactorizationError, match=r"expected nn.Linear or nn.Conv2d, got ReLU"):
        geometry_of(nn.ReLU())
