"""Architectures and bits in one space: exact prices, slices that are quantized as they are said to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_networks import residual
from small_networks import small_data

from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import resize
from autocompress.errors import QuantizationError
from autocompress.latency.target import Scheme
from autocompress.ops import SqueezeExcite
from autocompress.prune.source import Source
from autocompress.quantize.joint import Joint, JointEvaluator, joint_space, quantize_layers
from autocompress.quantize.layer import quantized_layers
from autocompress.quantize.ops import Quantized
from autocompress.recipe import TaskSettings
from autocompress.space import Block, Choice, SearchSpace
from autocompress.training.evaluate import calibration_batches
from autocompress.training.task import load_task
from search_spaces.channels import channel_space
from search_spaces.mobilenet_v3 import mobilenet_v3

WIDTHS = [(w, a) for w in (2, 4, 8) for a in (4, 8)]
SCHEME = Scheme((2, 4, 8), granularity=("per_channel",))
ELASTIC = joint_space(mobilenet_v3(preset="tiny", classes=5), WIDTHS)
CHANNELS = joint_space(channel_space(Source(residual(), torch.zeros(1, 3, 8, 8)), steps=2), WIDTHS)
JOINTS = [ELASTIC, CHANNELS]


def evaluator(joint: Joint) -> JointEvaluator:
    data = small_data()
    return JointEvaluator(
        joint.base.supernet().eval(),
        joint,
        data,
        load_task(TaskSettings()),
        calibration_batches(data, 16),
        SCHEME,
    )


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(JOINTS))
def test_bits_change_bytes_and_bit_operations_and_nothing_else(seed: int, joint: Joint) -> None:
    codes = joint.space.sample(1, np.random.default_rng(seed))
    base, bits = joint.split(codes)
    for metric in ("macs", "params"):
        own, whole = operation_cost(joint.space, metric), operation_cost(joint.base, metric)
        assert float(own.of(codes)[0]) == float(whole.of(base)[0])
    quantized = [op for _, ops in joint.space.operations(codes) for op in ops if isinstance(op, Quantized)]
    # Squeeze-excite is one operation of two layers.
    twice = [op for op in quantized for _ in range(1 + isinstance(op.op, SqueezeExcite))]
    assert sorted((op.weight_bits, op.activation_bits) for op in twice) == sorted(bits.values())
    small, large = (joint.joined(base, width) for width in ((2, 4), (8, 8)))
    for metric in ("size_bytes", "bops"):
        cost = operation_cost(joint.space, metric)
        assert cost.of(small)[0] <= cost.of(codes)[0] <= cost.of(large)[0]


@pytest.mark.parametrize("joint", JOINTS)
def test_bits_of_a_block_that_is_left_out_have_no_effect(joint: Joint) -> None:
    codes = joint.space.sample(50, np.random.default_rng(0))
    active = joint.space.active(codes)
    for row, flags in zip(codes, active, strict=True):
        _, bits = joint.split(row[None])
        names = {choice.name for choice, flag in zip(joint.space.choices, flags, strict=True) if flag}
        present = {name for layer in joint.layers if layer.weight in names for name in layer.names}
        assert present == set(bits)


@pytest.mark.parametrize("joint", JOINTS)
def test_a_network_has_the_bits_that_were_chosen(joint: Joint) -> None:
    judge = evaluator(joint)
    codes = joint.space.sample(1, np.random.default_rng(3))
    _, bits = joint.split(codes)
    network, _ = judge.network(codes)
    found = {
        name: (layer.weight.grid.bits, layer.input.grid.bits) for name, layer in quantized_layers(network)
    }
    assert found == bits
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("joint", JOINTS)
def test_at_8_bits_it_computes_about_what_the_slice_does(joint: Joint) -> None:
    judge = evaluator(joint)
    codes = joint.joined(joint.base.largest(), (8, 8))
    network, size = judge.network(codes)
    (arch,) = joint.base.decode(joint.base.largest())
    plain = extract(judge.supernet, arch, recalibrate(judge.supernet, arch, judge.calibration))
    x = resize(judge.calibration[0], size)
    with torch.no_grad():
        expected, found = plain(x), network(x)
    assert float((found - expected).norm()) < 0.2 * float(expected.norm())
    assert judge(codes)["accuracy"].shape == (1,)


def test_a_budget_on_both_is_met_by_giving_up_either() -> None:
    cost = operation_cost(ELASTIC.space, "size_bytes")
    limit = 0.3 * float(cost.of(ELASTIC.joined(ELASTIC.base.largest(), (8, 8)))[0])
    limits = Budget.of({"size_bytes": limit}).resolve(ELASTIC.space, [cost])
    rows = limits.sample(50, np.random.default_rng(0), at_least=0.8)
    assert limits.feasible(rows).all()
    assert len({joint_bits(row) for row in rows}) > 10


def joint_bits(row: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple(ELASTIC.split(row[None])[1].values())


def test_equal_widths_are_one_choice_a_layer() -> None:
    joint = joint_space(mobilenet_v3(preset="tiny"), [(8, 8), (4, 4)])
    assert all(layer.weight == layer.input for layer in joint.layers)
    assert joint.space.choices[-1].options == (8,)


def test_ends_are_open_where_nothing_has_fewer_bits() -> None:
    joint = joint_space(mobilenet_v3(preset="tiny"), [(8, 8), (32, 32)])
    assert {choice.options for choice in joint.space.choices[len(joint.base.choices) :]} == {(8, 32)}


def test_a_channel_of_no_weights_keeps_its_bias() -> None:
    layer = torch.nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        layer.weight[0] = 1e-30
        layer.bias.copy_(torch.tensor([0.7, -0.3]))
    model = torch.nn.Sequential(layer).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        found = quantize_layers(model, {"0": (8, 8)}, [x], SCHEME)(x)
    assert torch.allclose(found[:, 0], expected[:, 0], atol=1e-3)


def test_inputs_that_are_never_negative_are_unsigned() -> None:
    model = residual()
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = quantize_layers(
        model, {"left": (8, 8), "stem": (8, 32)}, [x], SCHEME, norms={"stem": "stem_norm"}
    )
    layers = dict(quantized_layers(network))
    assert not layers["left"].input.grid.signed
    assert layers["stem"].input is None
    with torch.no_grad():
        assert torch.allclose(network(x), residual()(x), atol=0.1)


def test_what_cannot_be_multiplied_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no widths are legal"):
        joint_space(ELASTIC.base, [])
    with pytest.raises(QuantizationError, match="equal ones only, got 4/4, 4/8, 8/8"):
        joint_space(ELASTIC.base, [(4, 4), (4, 8), (8, 8)])
    empty = SearchSpace("empty", (Choice("a", (1, 2)),), (Block("b", ("a",), lambda option: ()),))
    with pytest.raises(QuantizationError, match="no convolutions or linear layers"):
        joint_space(empty, [(8, 8)])
