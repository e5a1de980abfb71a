"""What an operation says of itself against the module that it builds, and published totals of networks."""

import ast
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.networks import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import SpaceError
from autocompress.network import build_network
from autocompress.ops import (
    ACTIVATIONS,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    OpSpec,
    SqueezeExcite,
    block_key,
    make_divisible,
)

PUBLISHED = json.loads(
    (Path(__file__).parent / "golden/published_networks.json").read_text(encoding="utf-8")
)["rows"]

SMALL = st.integers(1, 9)
ACTIVATION = st.sampled_from(sorted(ACTIVATIONS))


@st.composite
def convolutions(draw: st.DrawFn) -> Conv2d:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Conv2d(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 4)),
        draw(SMALL),
        draw(SMALL),
        kernel=draw(st.integers(1, 7)),
        stride=draw(st.integers(1, 3)),
        groups=groups,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(ACTIVATION),
    )


@st.composite
def max_pools(draw: st.DrawFn) -> MaxPool:
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return MaxPool(draw(SMALL), draw(st.integers(kernel, 9)), draw(st.integers(kernel, 9)), kernel, stride)


OPERATIONS: st.SearchStrategy[OpSpec] = st.one_of(
    convolutions(),
    max_pools(),
    st.builds(SqueezeExcite, SMALL, SMALL, SMALL, SMALL),
    st.builds(GlobalAvgPool, SMALL, SMALL, SMALL),
    st.builds(Linear, SMALL, SMALL, st.booleans(), ACTIVATION),
    st.builds(Add, SMALL, SMALL, SMALL),
)


def measured_macs(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Multiply-accumulates for one image from the layers' real weights and outputs, by hooks."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight = layer.get_parameter("weight")
        total += output[0].numel() * weight[0].numel()

    handles = [
        layer.register_forward_hook(count)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        output: Tensor = module(x)
    for handle in handles:
        handle.remove()
    return total, output


# An operation and its module ---------------------------------------------------------------------------


@given(OPERATIONS)
def test_the_module_has_the_shapes_macs_and_parameters_that_the_operation_states(op: OpSpec) -> None:
    module = op.module().eval()
    macs, output = measured_macs(module, torch.zeros(2, *op.in_shape))
    assert macs == op.macs
    # A linear layer ends a chain of images: one vector an image.
    assert output.shape == ((2, op.out_shape[0]) if isinstance(op, Linear) else (2, *op.out_shape))
    assert sum(parameter.numel() for parameter in module.parameters()) == op.params
    assert op.size_bytes == sum(p.numel() * p.element_size() for p in module.parameters())


@settings(max_examples=25)
@given(OPERATIONS)
def test_macs_are_those_of_pytorch_s_own_counter_on_the_meta_device(op: OpSpec) -> None:
    with torch.device("meta"):
        module = op.module().eval()
        # Two floating-point operations a multiply-accumulate; elementwise work counts zero there too.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.empty(1, *op.in_shape))
    assert counter.get_total_flops() == 2 * op.macs


def test_the_numbers_of_one_convolution_by_hand() -> None:
    op = Conv2d(16, 32, 14, 14, kernel=3, stride=2, bias=True, activation="relu")
    assert op.out_shape == (32, 7, 7)
    assert op.macs == 3 * 3 * 16 * 32 * 7 * 7 == 225_792
    assert op.params == 3 * 3 * 16 * 32 + 32 + 2 * 32 == 4_704
    assert op.size_bytes == 4 * 4_704
    depthwise = Conv2d(32, 32, 7, 7, kernel=5, groups=32)
    assert depthwise.depthwise
    assert depthwise.macs == 25 * 32 * 49
    assert not Conv2d(1, 1, 7, 7).depthwise


def test_the_parts_of_a_convolution_have_names_that_a_loader_can_rely_on() -> None:
    module = Conv2d(3, 8, 4, 4, activation="hard_swish").module()
    assert [name for name, _ in module.named_children()] == ["conv", "bn", "act"]
    assert isinstance(module.get_submodule("act"), nn.Hardswish)
    plain = Conv2d(3, 8, 4, 4, norm=False).module()
    assert [name for name, _ in plain.named_children()] == ["conv"]


def test_squeeze_excite_scales_each_channel_as_its_paper_says() -> None:
    module = SqueezeExcite(4, 3, 3, 2).module()
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    squeezed = x.sum((2, 3)) / 9
    hidden = torch.relu(squeezed @ parameters["reduce.weight"].flatten(1).T + parameters["reduce.bias"])
    logits = hidden @ parameters["expand.weight"].flatten(1).T + parameters["expand.bias"]
    gate = torch.clamp(logits / 6 + 0.5, 0, 1)  # hard sigmoid: ReLU6(x + 3) / 6
    with torch.no_grad():
        torch.testing.assert_close(module(x), x * gate[:, :, None, None])


# Keys --------------------------------------------------------------------------------------------------


@given(OPERATIONS, OPERATIONS)
def test_keys_are_equal_exactly_for_equal_operations(first: OpSpec, second: OpSpec) -> None:
    assert (first.key == second.key) == (first == second)
    assert hash(first) == hash(dataclasses.replace(first))
    assert dataclasses.replace(first).key == first.key


@given(OPERATIONS)
def test_a_key_is_the_expression_that_makes_the_operation(op: OpSpec) -> None:
    kinds = {kind.__name__: kind for kind in OpSpec.__subclasses__()}
    name, _, rest = op.key.removesuffix(")").partition("(")
    fields = dict(item.split("=") for item in rest.split(","))
    arguments = {
        field: value if field == "activation" else ast.literal_eval(value) for field, value in fields.items()
    }
    assert kinds[name](**arguments) == op


def test_the_key_of_a_block_joins_the_keys_of_its_operations_in_order() -> None:
    ops = (Conv2d(3, 8, 4, 4, kernel=3, activation="relu"), Add(8, 4, 4))
    assert block_key(ops) == (
        "Conv2d(in_channels=3,out_channels=8,height=4,width=4,kernel=3,activation=relu)"
        " > Add(channels=8,height=4,width=4)"
    )
    assert block_key(()) == ""


# Channels ----------------------------------------------------------------------------------------------


@given(st.floats(0.1, 4000), st.sampled_from([1, 4, 8, 16]))
def test_rounded_channels_are_multiples_close_by_and_never_below_nine_tenths(
    value: float, divisor: int
) -> None:
    rounded = make_divisible(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= max(divisor, 0.9 * value)
    # No further than half a step, but where that would lose more than a tenth.
    assert rounded <= max(divisor, value + divisor)
    if abs(rounded - value) > divisor / 2 and rounded > divisor:
        assert rounded - divisor < 0.9 * value


@pytest.mark.parametrize(
    # MobileNetV2 at 0.35 and 0.75, MobileNetV3 attention: published channel counts.
    ("value", "channels"),
    [(32 * 0.35, 16), (24 * 0.35, 8), (96 * 0.35, 32), (24 * 0.75, 24), (72 // 4, 24), (960 // 4, 240)],
)
def test_channels_are_rounded_as_in_the_published_networks(value: float, channels: int) -> None:
    assert make_divisible(value) == channels


# Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Conv2d, (0, 8, 4, 4), "Conv2d.in_channels must be an integer >= 1, got 0"),
        (Conv2d, (3, 8, 4, 4, 3, -1), "Conv2d.stride must be an integer >= 1, got -1"),
        (Conv2d, (3, 8.0, 4, 4), r"Conv2d.out_channels must be an integer >= 1, got 8\.0"),
        (
            Conv2d,
            (4, 6, 4, 4, 3, 1, 4),
            r"Conv2d.groups must divide in_channels \(4\) and out_channels \(6\), got 4",
        ),
        (Conv2d, (3, 8, 4, 4, 3, 1, 1, False, True, "swish"), "Conv2d.activation must be one of .*'swish'"),
        (SqueezeExcite, (8, 4, 4, 0), "SqueezeExcite.hidden must be an integer >= 1, got 0"),
        (GlobalAvgPool, (8, 0, 4), "GlobalAvgPool.height must be an integer >= 1, got 0"),
        (MaxPool, (8, 4, 4, 0), "MaxPool.kernel must be an integer >= 1, got 0"),
        (MaxPool, (8, 1, 4), "MaxPool.kernel 2 is larger than the padded input of 1x4"),
        (Linear, (8, 0), "Linear.out_features must be an integer >= 1, got 0"),
        (Linear, (8, 8, True, "swish"), "Linear.activation must be one of .*got 'swish'"),
        (Add, (8, 4, "4"), "Add.width must be an integer >= 1, got '4'"),
    ],
)
def test_an_impossible_operation_is_refused_with_field_rule_and_value(
    kind: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        kind(*arguments)


# Published networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["network"])
def test_published_networks_have_the_published_macs_and_parameters(row: dict[str, Any]) -> None:
    ops = NETWORKS[row["network"]]()
    decimals = len(row["million_macs"].partition(".")[2])
    assert f"{sum(op.macs for op in ops) / 1e6:.{decimals}f}" == row["million_macs"]
    if row["params"] is not None:
        assert sum(op.params for op in ops) == row["params"]


@pytest.mark.parametrize("name", ["mobilenet_v2 1.0", "mobilenet_v2 0.35", "vgg-16"])
def test_operations_of_a_chain_fit_together(name: str) -> None:
    shape = (3, 224, 224)
    for op in NETWORKS[name]():
        if isinstance(op, Linear):
            shape = (shape[0] * shape[1] * shape[2], 1, 1)
        assert op.in_shape == shape
        shape = op.out_shape
    assert shape == (1000, 1, 1)


@pytest.mark.parametrize("name", ["mobilenet_v2 0.35", "vgg-16"])
def test_thop_counts_the_same_macs_and_parameters(name: str) -> None:
    with warnings.catch_warnings():
        # thop is unmaintained: it imports distutils, which Python 3.11 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        import thop

    ops = NETWORKS[name]()
    with torch.device("meta"):
        network = build_network([(f"op{index}", (op,)) for index, op in enumerate(ops)]).eval()
    layers = {type(module) for module in network.modules() if not list(module.children())}
    # thop counts batch norm and pooling as well, by rules of its own; ours is convolution and linear only.
    free = dict.fromkeys(layers - {nn.Conv2d, nn.Linear}, _count_nothing)
    x = torch.empty(1, *ops[0].in_shape, device="meta")
    macs, params = thop.profile(network, inputs=(x,), custom_ops=free, verbose=False)
    assert macs == sum(op.macs for op in ops)
    assert params == sum(op.params for op in ops)


def _count_nothing(module: nn.Module, x: Any, y: Any) -> None:
    """thop's signature of a rule."""
