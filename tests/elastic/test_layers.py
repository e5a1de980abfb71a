"""Elastic layers one by one, against convolutions that are written out."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.elastic.layers import (
    NORM_EPS,
    ElasticConv2d,
    ElasticLayer,
    ElasticLinear,
    ElasticModule,
    ElasticSqueezeExcite,
    elastic_layer,
    slot,
)
from autocompress.elastic.supernet import batch_statistics
from autocompress.errors import SpaceError
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec, Shape, SqueezeExcite


def random_parameters(layer: ElasticLayer, seed: int = 0) -> ElasticLayer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def conv_layer(*ops: Conv2d, kernel_transform: bool = True) -> ElasticConv2d:
    layer = random_parameters(elastic_layer("here", ops, kernel_transform=kernel_transform))
    assert isinstance(layer, ElasticConv2d)
    return layer


def inputs(op: OpSpec, batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, *op.in_shape, generator=torch.Generator().manual_seed(seed))


def bare(in_channels: int, out_channels: int, kernel: int, *, groups: int = 1, side: int = 5) -> Conv2d:
    return Conv2d(in_channels, out_channels, side, side, kernel, groups=groups, norm=False)


def slow_convolution(x: Tensor, weight: Tensor, *, stride: int = 1, groups: int = 1) -> Tensor:
    """The definition, one output at a time, zeros around the image, as numpy."""
    kernel = weight.shape[-1]
    padded = np.pad(x.detach().double().numpy(), [(0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2])
    filters = weight.detach().double().numpy()
    outputs, inputs_of_group = filters.shape[:2]
    side = (padded.shape[-1] - kernel) // stride + 1
    result = np.zeros((len(padded), outputs, side, side))
    for n, o, i, j in np.ndindex(*result.shape):
        first = o // (outputs // groups) * inputs_of_group
        rows, columns = slice(i * stride, i * stride + kernel), slice(j * stride, j * stride + kernel)
        result[n, o, i, j] = (padded[n, first : first + inputs_of_group, rows, columns] * filters[o]).sum()
    return torch.from_numpy(result).float()


# Convolution ------------------------------------------------------------------------------------------


def test_a_narrow_convolution_uses_the_first_channels() -> None:
    full, narrow = bare(4, 6, 3), bare(2, 3, 3)
    layer = conv_layer(full, narrow)
    x = inputs(narrow)
    expected = slow_convolution(x, layer.weight[:3, :2])
    torch.testing.assert_close(layer(x, narrow, batch_statistics), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [5, 6])
def test_a_strided_convolution_is_the_definition_at_odd_and_even_sizes(stride: int, side: int) -> None:
    op = Conv2d(3, 2, side, side, 3, stride, norm=False)
    layer = conv_layer(op)
    output = layer(inputs(op), op, batch_statistics)
    assert output.shape[1:] == op.out_shape
    torch.testing.assert_close(output, slow_convolution(inputs(op), layer.weight, stride=stride))


def test_full_size_uses_the_parameter_itself() -> None:
    full, narrow = bare(4, 6, 3), bare(2, 3, 3)
    layer = conv_layer(full, narrow)
    assert layer.sliced(full)["conv.weight"] is layer.weight
    assert layer.sliced(narrow)["conv.weight"] is not layer.weight


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_new_kernel_transform_is_the_centre_crop(kernel: int) -> None:
    full, small = bare(2, 2, 7), bare(2, 2, kernel)
    layer = elastic_layer("here", [full, small], kernel_transform=True)
    assert isinstance(layer, ElasticConv2d)
    margin = (7 - kernel) // 2
    crop = layer.weight[:, :, margin : 7 - margin, margin : 7 - margin]
    torch.testing.assert_close(layer.sliced(small)["conv.weight"], crop, rtol=0, atol=0)
    torch.testing.assert_close(
        layer(inputs(small), small, batch_statistics), slow_convolution(inputs(small), crop)
    )


@pytest.mark.parametrize("kernel", [7, 5, 3, 1])
def test_without_transforms_every_kernel_is_the_centre_crop(kernel: int) -> None:
    ops = [bare(2, 3, size) for size in (1, 3, 5, 7)]
    layer = conv_layer(*ops, kernel_transform=False)
    assert len(layer.transforms) == 0
    margin = (7 - kernel) // 2
    crop = layer.weight[:, :, margin : 7 - margin, margin : 7 - margin]
    assert torch.equal(layer.sliced(bare(2, 3, kernel))["conv.weight"], crop)


def test_kernel_transforms_are_chained_from_size_to_size() -> None:
    # Cai et al., ICLR 2020, section 3.3, one filter at a time with explicit matrices: 7 to 5, then 5 to 3.
    ops = [bare(2, 3, kernel) for kernel in (3, 5, 7)]
    layer = conv_layer(*ops)
    assert {name: tuple(p.shape) for name, p in layer.transforms.items()} == {"5": (25, 25), "3": (9, 9)}
    to_5, to_3 = (layer.transforms[size].detach().double().numpy() for size in ("5", "3"))
    expected = {5: np.zeros((3, 2, 5, 5)), 3: np.zeros((3, 2, 3, 3))}
    for o, i in itertools.product(range(3), range(2)):
        filter_7 = layer.weight[o, i].detach().double().numpy()
        filter_5 = (to_5 @ filter_7[1:6, 1:6].ravel()).reshape(5, 5)
        expected[5][o, i] = filter_5
        expected[3][o, i] = (to_3 @ filter_5[1:4, 1:4].ravel()).reshape(3, 3)
    for kernel, weight in expected.items():
        found = layer.sliced(bare(2, 3, kernel))["conv.weight"]
        torch.testing.assert_close(found, torch.from_numpy(weight).float(), rtol=1e-4, atol=1e-4)


def test_a_transform_is_shared_by_all_channels_and_serves_narrow_slices() -> None:
    full, small = bare(4, 6, 5), bare(3, 2, 3)
    layer = conv_layer(full, small)
    crop = layer.weight[:2, :3, 1:4, 1:4].reshape(2, 3, 9)
    expected = torch.einsum("oik,jk->oij", crop, layer.transforms["3"]).reshape(2, 3, 3, 3)
    torch.testing.assert_close(layer.sliced(small)["conv.weight"], expected)


def test_odd_and_even_kernels_at_one_place_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"here: odd and even kernels have no common centre, got \[3, 4\]"):
        elastic_layer("here", [bare(2, 2, 3), bare(2, 2, 4)], kernel_transform=True)


def test_depthwise_channels_keep_their_own_filters() -> None:
    full, small = bare(6, 6, 5, groups=6), bare(4, 4, 3, groups=4)
    layer = conv_layer(full, small, kernel_transform=False)
    assert layer.weight.shape == (6, 1, 5, 5)
    expected = slow_convolution(inputs(small), layer.weight[:4, :, 1:4, 1:4], groups=4)
    torch.testing.assert_close(layer(inputs(small), small, batch_statistics), expected)


def test_narrow_grouped_convolutions_take_the_first_channels_of_each_group() -> None:
    full, narrow = bare(8, 12, 3, groups=2), bare(4, 6, 3, groups=2)
    layer = conv_layer(full, narrow)
    weight = torch.cat([layer.weight[0:3, :2], layer.weight[6:9, :2]])
    assert torch.equal(layer.sliced(narrow)["conv.weight"], weight)
    expected = slow_convolution(inputs(narrow), weight, groups=2)
    torch.testing.assert_close(layer(inputs(narrow), narrow, batch_statistics), expected)
    assert layer.sliced(full)["conv.weight"].data_ptr() == layer.weight.data_ptr()


def test_more_groups_than_the_largest_use_a_prefix_of_its_inputs() -> None:
    full, grouped = bare(8, 8, 3, groups=2), bare(8, 8, 3, groups=4)
    layer = conv_layer(full, grouped)
    assert torch.equal(layer.sliced(grouped)["conv.weight"], layer.weight[:, :2])
    expected = slow_convolution(inputs(grouped), layer.weight[:, :2], groups=4)
    torch.testing.assert_close(layer(inputs(grouped), grouped, batch_statistics), expected)


def test_norm_bias_and_activation_follow_the_convolution_in_this_order() -> None:
    op = Conv2d(2, 3, 4, 4, bias=True, activation="relu")
    layer = conv_layer(op)
    assert layer.norm_weight is not None
    assert layer.norm_bias is not None
    x = inputs(op, batch=5)
    raw = (slow_convolution(x, layer.weight) + layer.bias.detach().view(1, -1, 1, 1)).double()
    mean, variance = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), correction=0, keepdim=True)
    scaled = (raw - mean) / (variance + 1e-5).sqrt() * layer.norm_weight.view(1, -1, 1, 1)
    expected = (scaled + layer.norm_bias.view(1, -1, 1, 1)).clamp_min(0).float()
    torch.testing.assert_close(layer(x, op, batch_statistics), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_setting_without_norm_or_bias_uses_none_though_the_layer_has_both(norm: bool, bias: bool) -> None:
    full = Conv2d(2, 3, 4, 4, bias=True, norm=True)
    op = Conv2d(2, 3, 4, 4, bias=bias, norm=norm)
    layer = conv_layer(full, op)
    module = op.module()
    module.load_state_dict(layer.sliced(op), strict=False)
    assert set(layer.sliced(op)) == {name for name, _ in module.named_parameters()}
    torch.testing.assert_close(layer(inputs(op), op, batch_statistics), module(inputs(op)))


@pytest.mark.parametrize("name", ["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "silu"])
def test_activations_are_those_of_the_plain_modules(name: str) -> None:
    op = Conv2d(2, 3, 4, 4, norm=False, activation=name)
    layer = conv_layer(op)
    with torch.no_grad():
        layer.weight.mul_(4)  # reach the flat parts
    module = op.module()
    module.load_state_dict(layer.sliced(op))
    assert torch.equal(layer(inputs(op), op, batch_statistics), module(inputs(op)))


# What is kept for speed -------------------------------------------------------------------------------


def test_without_gradients_the_slice_follows_every_change_of_the_weights() -> None:
    full, small = bare(4, 4, 5), bare(2, 3, 3)
    layer = conv_layer(full, small)
    x = inputs(small)

    def current() -> Tensor:
        with torch.no_grad():
            return layer(x, small, batch_statistics)

    def expected() -> Tensor:
        return F.conv2d(x, layer.sliced(small)["conv.weight"].detach(), padding=1)

    assert torch.equal(current(), expected())
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.transforms["3"].add_(1),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda: layer.to(memory_format=torch.channels_last),
    ):
        before = current()
        with torch.no_grad():
            change()
        torch.testing.assert_close(current(), expected())
        assert torch.equal(before, current()) == layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_without_gradients_replaced_parameters_are_seen() -> None:
    small = bare(2, 3, 3)
    layer = conv_layer(bare(4, 4, 5), small)
    x = inputs(small)
    with torch.no_grad():
        for factor in range(1, 20):  # freed tensors come back at the same address
            other = {name: p * factor for name, p in layer.named_parameters()}
            found = torch.func.functional_call(layer, other, (x, small, batch_statistics))
            weight = layer.sliced(small, other)["conv.weight"]
            torch.testing.assert_close(found, F.conv2d(x, weight, padding=1))
            del other, weight


# What is active ---------------------------------------------------------------------------------------


def used_entries(layer: ElasticLayer, op: OpSpec) -> dict[str, Tensor]:
    """Change one entry after the other: does any output change?"""
    x = inputs(op, batch=3)
    found = {}
    with torch.no_grad():
        before = layer(x, op, batch_statistics)
        for name, parameter in layer.named_parameters():
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            for index in np.ndindex(*parameter.shape):
                old = parameter[index].clone()
                parameter[index] += 1.7
                mask[index] = not torch.allclose(layer(x, op, batch_statistics), before, rtol=1e-4, atol=1e-4)
                parameter[index] = old
            found[name] = mask
    return found


CASES: dict[str, tuple[OpSpec, OpSpec]] = {
    "narrow": (Conv2d(3, 3, 4, 4, 3), Conv2d(2, 2, 4, 4, 3)),
    "full": (Conv2d(3, 3, 4, 4, 3), Conv2d(3, 3, 4, 4, 3)),
    "without norm": (Conv2d(2, 3, 4, 4), Conv2d(2, 3, 4, 4, norm=False)),
    "kernel": (bare(2, 2, 5), bare(2, 2, 3)),
    "kernel and width": (bare(2, 2, 5), bare(1, 1, 3)),
    "depthwise": (bare(4, 4, 3, groups=4), bare(2, 2, 1, groups=2)),
    "groups": (bare(4, 4, 3, groups=2), bare(2, 2, 3, groups=2)),
    "linear": (Linear(4, 5), Linear(3, 2)),
    "squeeze-excite": (SqueezeExcite(4, 3, 3, 3), SqueezeExcite(2, 3, 3, 2)),
}


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_active_entries_are_those_whose_change_changes_an_output(case: str, transform: bool) -> None:
    full, op = CASES[case]
    layer = random_parameters(elastic_layer("here", [full, op], kernel_transform=transform), seed=1)
    if isinstance(layer, ElasticSqueezeExcite):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.abs_().mul_(0.1)  # neither ReLU nor hard sigmoid is flat there
    expected = used_entries(layer, op)
    found = layer.active(op)
    assert set(found) == set(expected)
    for name, mask in found.items():
        assert torch.equal(mask, expected[name]), name


def test_of_the_larger_transform_only_rows_that_the_smaller_kernel_reads_are_active() -> None:
    layer = conv_layer(bare(1, 1, 7), bare(1, 1, 5), bare(1, 1, 3))
    masks = layer.active(bare(1, 1, 3))
    centre = torch.zeros(5, 5, dtype=torch.bool)
    centre[1:4, 1:4] = True
    assert torch.equal(masks["transforms.5"], centre.view(25, 1).expand(25, 25))
    assert masks["transforms.3"].all()
    assert not layer.active(bare(1, 1, 5))["transforms.3"].any()
    ring = torch.zeros(7, 7, dtype=torch.bool)
    ring[1:6, 1:6] = True  # the transform to 5 mixes all its 25 inputs
    assert torch.equal(masks["weight"][0, 0], ring)


# Linear, squeeze-excite -------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4))
def test_a_narrow_linear_layer_is_the_corner_of_the_matrix(features: int, outputs: int) -> None:
    op = Linear(features, outputs)
    layer = random_parameters(elastic_layer("here", [Linear(5, 4), op], kernel_transform=True))
    assert isinstance(layer, ElasticLinear)
    assert layer.bias is not None
    x = inputs(op)
    expected = torch.stack(
        [
            torch.stack(
                [(row.flatten() * layer.weight[o, :features]).sum() + layer.bias[o] for o in range(outputs)]
            )
            for row in x
        ]
    )
    torch.testing.assert_close(layer(x, op, batch_statistics), expected)


def test_a_linear_layer_without_bias_uses_none_though_the_layer_has_one() -> None:
    op = Linear(3, 2, bias=False)
    layer = random_parameters(elastic_layer("here", [Linear(3, 2), op], kernel_transform=True))
    assert set(layer.sliced(op)) == {"linear.weight"}
    assert isinstance(layer, ElasticLinear)
    torch.testing.assert_close(
        layer(inputs(op), op, batch_statistics), inputs(op).flatten(1) @ layer.weight.T
    )


def test_a_narrow_squeeze_excite_scales_by_its_first_hidden_channels() -> None:
    op = SqueezeExcite(3, 4, 4, 2)
    layer = random_parameters(elastic_layer("here", [SqueezeExcite(5, 4, 4, 3), op], kernel_transform=True))
    assert isinstance(layer, ElasticSqueezeExcite)
    x = inputs(op)
    reduce, expand = layer.reduce_weight[:2, :3, 0, 0], layer.expand_weight[:3, :2, 0, 0]
    hidden = (x.mean((2, 3)) @ reduce.T + layer.reduce_bias[:2]).clamp_min(0)
    scale = ((hidden @ expand.T + layer.expand_bias[:3] + 3) / 6).clamp(0, 1)
    torch.testing.assert_close(layer(x, op, batch_statistics), x * scale[:, :, None, None])


# Operations of the space's own ------------------------------------------------------------------------


class ChannelScale(nn.Module):
    def __init__(self, channels: int, *, dropout: float = 0.0, counts: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.dropout = nn.Dropout(dropout)
        if counts:
            self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x * self.scale)


@dataclass(frozen=True)
class Scale(OpSpec):
    channels: int
    side: int = 3
    dropout: float = 0.0
    counts: bool = False
    extra: bool = False

    @property
    def in_shape(self) -> Shape:
        return self.channels, self.side, self.side

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return self.channels

    def module(self) -> nn.Module:
        module: nn.Module = ChannelScale(self.channels, dropout=self.dropout, counts=self.counts)
        return nn.Sequential(module, nn.PReLU()) if self.extra else module


def test_an_operation_of_the_space_s_own_is_sliced_by_leading_entries() -> None:
    full, small = Scale(5), Scale(3)
    layer = random_parameters(elastic_layer("here", [small, full], kernel_transform=True))
    assert isinstance(layer, ElasticModule)
    scale = dict(layer.named_parameters())["module.scale"]
    torch.testing.assert_close(layer(inputs(small), small, batch_statistics), inputs(small) * scale[:3])
    assert layer.sliced(full)["scale"] is scale
    assert layer.active(small)["module.scale"].flatten().tolist() == [True] * 3 + [False] * 2


def test_dropout_of_an_operation_of_the_space_s_own_rests_in_evaluation_mode() -> None:
    op = Scale(4, dropout=0.5)
    layer = elastic_layer("here", [op], kernel_transform=True)
    x = inputs(op)
    assert torch.equal(layer.eval()(x, op, batch_statistics), x)
    dropped = layer.train()(x, op, batch_statistics)
    assert 0 < int((dropped == 0).sum()) < x.numel()


def test_buffers_of_an_operation_of_the_space_s_own_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"here: the module of Scale has buffers.*Conv2d\(norm=True\)"):
        elastic_layer("here", [Scale(4, counts=True)], kernel_transform=True)


@dataclass(frozen=True)
class Normed(OpSpec):
    """Scale, then one of two batch norms: an operation that runs some of several alternatives."""

    channels: int
    which: str = "first"
    eps: float = NORM_EPS

    @property
    def in_shape(self) -> Shape:
        return self.channels, 3, 3

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return 3 * self.channels

    def module(self) -> nn.Module:
        norm = nn.BatchNorm2d(self.channels, eps=self.eps)
        return nn.Sequential(OrderedDict(scale=ChannelScale(self.channels), **{self.which: norm}))

    @classmethod
    def shared_module(cls, ops: Sequence[OpSpec]) -> nn.Module:
        full = cast(Normed, max(ops, key=lambda op: op.params))
        norms = {cast(Normed, op).which: nn.BatchNorm2d(full.channels, eps=full.eps) for op in ops}
        return nn.ModuleDict({"scale": ChannelScale(full.channels), **norms})


def test_batch_norm_of_an_operation_of_the_space_s_own_is_given_to_whoever_runs_it() -> None:
    full, small = Normed(5), Normed(3, "second")
    layer = random_parameters(elastic_layer("here", [full, small], kernel_transform=True))
    assert list(layer.buffers()) == []
    asked: list[tuple[str, Tensor, Tensor]] = []

    def normalise(name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 0.0) -> Tensor:
        assert eps == NORM_EPS
        asked.append((name, weight, bias))
        return 2 * x

    own = dict(layer.named_parameters())
    x = inputs(small)
    torch.testing.assert_close(layer(x, small, normalise), 2 * x * own["module.scale.scale"][:3])
    ((name, weight, bias),) = asked
    assert name == "here.second"
    assert torch.equal(weight, own["module.second.weight"][:3])
    assert torch.equal(bias, own["module.second.bias"][:3])
    assert layer.norms(small) == {"second.": ("here.second", 3)}
    assert layer.norms(full) == {"first.": ("here.first", 5)}


def test_alternatives_have_weights_of_their_own_and_share_the_rest() -> None:
    first, second = Normed(4), Normed(4, "second")
    layer = random_parameters(elastic_layer("here", [first, second], kernel_transform=True))
    one, other = layer.sliced(first), layer.sliced(second)
    assert one["scale.scale"] is other["scale.scale"]
    assert set(one) ^ set(other) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    unused = {name for name, mask in layer.active(first).items() if not mask.any()}
    assert unused == {"module.second.weight", "module.second.bias"}


def test_a_module_that_is_a_batch_norm_itself_is_run_so_too() -> None:
    layer = ElasticModule("here", "Norm", nn.BatchNorm2d(4))
    assert set(dict(layer.named_parameters())) == {"module.weight", "module.bias"}
    assert list(layer.buffers()) == []


def test_batch_norm_has_the_precision_of_its_module() -> None:
    layer = random_parameters(elastic_layer("here", [Normed(4, eps=0.5)], kernel_transform=True))
    own, x = dict(layer.named_parameters()), inputs(Normed(4))
    scaled = x * own["module.scale.scale"]
    expected = F.batch_norm(
        scaled, None, None, own["module.first.weight"], own["module.first.bias"], training=True, eps=0.5
    )
    torch.testing.assert_close(layer(x, Normed(4, eps=0.5), batch_statistics), expected)
    other = F.batch_norm(
        scaled, None, None, own["module.first.weight"], own["module.first.bias"], training=True
    )
    assert not torch.allclose(expected, other)


def test_modules_of_many_operations_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.elastic.layers.MAX_STATICS", 2)
    layer = random_parameters(elastic_layer("here", [Scale(c) for c in range(1, 6)], kernel_transform=True))
    for channels in (1, 2, 3, 4, 5, 1):
        op = Scale(channels)
        scale = dict(layer.named_parameters())["module.scale"]
        expected = inputs(op) * scale[:channels]
        torch.testing.assert_close(layer(inputs(op), op, batch_statistics), expected)
        assert len(layer._statics) <= 2


def test_settings_with_other_parameters_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"here: .*Scale\(channels=3,extra=True\)"):
        elastic_layer("here", [Scale(4), Scale(3, extra=True)], kernel_transform=True)


@pytest.mark.parametrize("op", [GlobalAvgPool(2, 4, 4), MaxPool(2, 4, 4)], ids=["average", "maximum"])
def test_pooling_has_no_parameters_and_takes_any_size(op: OpSpec) -> None:
    layer = elastic_layer("here", [op, type(op)(3, 6, 6)], kernel_transform=True)  # type: ignore[call-arg]
    assert list(layer.parameters()) == []
    assert layer.active(op) == {}
    assert torch.equal(layer(inputs(op), op, batch_statistics), op.module()(inputs(op)))


# Places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "long"),
    [
        (Conv2d(8, 4, 4, 4), Conv2d(4, 8, 4, 4)),
        (Conv2d(4, 8, 4, 4, 3), Conv2d(4, 4, 4, 4, 5)),
        (Linear(8, 4), Linear(4, 8)),
        (SqueezeExcite(8, 4, 4, 2), SqueezeExcite(4, 4, 4, 8)),
        (Conv2d(8, 8, 4, 4, norm=False), Conv2d(4, 4, 4, 4)),
    ],
    ids=lambda op: op.key,
)
def test_settings_of_which_none_contains_all_others_are_refused(wide: OpSpec, long: OpSpec) -> None:
    for ops in ([wide, long], [long, wide]):
        with pytest.raises(SpaceError, match=r"here: .* is the largest operation but does not contain"):
            elastic_layer("here", ops, kernel_transform=True)


def test_depthwise_and_full_convolutions_are_different_places() -> None:
    assert slot(1, bare(4, 4, 3)) == "1_conv2d"
    assert slot(1, bare(4, 4, 3, groups=4)) == "1_depthwise"
    assert slot(2, bare(4, 4, 3, groups=2)) == "2_conv2d"
    assert slot(0, GlobalAvgPool(2, 4, 4)) == "0_globalavgpool"
