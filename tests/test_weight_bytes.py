"""Bytes of weights at any width, against the parameters of the modules."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_spaces import every_row, spaces
from torch import nn

from autocompress.budget import Budget
from autocompress.cost import compile_cost, operation_cost
from autocompress.errors import CostError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec, Shape, SqueezeExcite
from autocompress.space import SearchSpace
from autocompress.weight_bytes import weight_bytes
from search_spaces.mobilenet_v3 import mobilenet_v3

OPERATIONS: list[OpSpec] = [
    Conv2d(3, 5, 4, 4, kernel=3),
    Conv2d(6, 6, 4, 4, kernel=5, groups=6, bias=True, activation="relu"),
    Conv2d(6, 4, 4, 4, groups=2, bias=True, norm=False),
    Conv2d(6, 4, 4, 4, norm=False),
    SqueezeExcite(7, 4, 4, 3),
    Linear(7, 5),
    Linear(7, 5, bias=False),
    GlobalAvgPool(3, 4, 4),
    MaxPool(3, 4, 4),
    Add(3, 4, 4),
]


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.key)
@pytest.mark.parametrize(("weight_bits", "other_bits"), [(8, 32), (4, 32), (3, 5), (1, 16), (32, 32)])
def test_every_tensor_of_the_module_takes_its_bits_rounded_up(
    op: OpSpec, weight_bits: int, other_bits: int
) -> None:
    expected = 0
    for parameter in op.module().parameters():
        bits = parameter.numel() * (weight_bits if parameter.dim() > 1 else other_bits)
        expected += (bits + 7) // 8
    assert weight_bytes((op,), weight_bits=weight_bits, other_bits=other_bits) == expected
    assert sum(op.weight_tensors) + sum(op.other_tensors) == op.params


def test_bytes_by_hand() -> None:
    ops = (Conv2d(3, 5, 4, 4, kernel=3), Linear(3, 3))
    # 135 weights, scale and shift of 5 channels; 9 weights and 3 biases.
    assert weight_bytes(ops, weight_bits=8) == 135 + 40 + 9 + 12
    assert weight_bytes(ops, weight_bits=4) == 68 + 40 + 5 + 12
    assert weight_bytes((), weight_bits=4) == 0


@given(spaces())
def test_at_32_bits_they_are_the_size_of_every_network(space: SearchSpace) -> None:
    rows = every_row(space)
    cost = compile_cost(space, partial(weight_bytes, weight_bits=32), "size_bytes")
    assert cost.of(rows).tolist() == operation_cost(space, "size_bytes").of(rows).tolist()


def test_a_budget_limits_the_bytes_of_a_space_at_8_bits() -> None:
    space = mobilenet_v3(preset="tiny")
    cost = compile_cost(space, partial(weight_bytes, weight_bits=8), "size_bytes")
    largest = space.largest()
    by_block = [weight_bytes(ops, weight_bits=8) for _, ops in space.operations(largest)]
    assert cost.of(largest).tolist() == [sum(by_block)]
    limit = Budget.parse("size_bytes=80%").resolve(space, [cost]).limits["size_bytes"]
    assert limit == pytest.approx(0.8 * sum(by_block))


@dataclass(frozen=True)
class Scan(OpSpec):
    """An operation of a user's own, which knows nothing of bits."""

    channels: int

    @property
    def in_shape(self) -> Shape:
        return self.channels, 4, 4

    @property
    def out_shape(self) -> Shape:
        return self.channels, 4, 4

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return 10 * self.channels

    def module(self) -> nn.Module:
        raise AssertionError("built")


class HalfScan(Scan):
    @property
    def weight_tensors(self) -> tuple[int, ...]:
        return (6 * self.channels,)


def test_all_parameters_of_an_operation_of_one_s_own_are_weights_unless_it_says_which() -> None:
    assert weight_bytes((Scan(3),), weight_bits=4) == 15
    assert weight_bytes((HalfScan(3),), weight_bits=4) == 9 + 4 * 12


@pytest.mark.parametrize("value", [0, -8, 4.0, True, "8"])
@pytest.mark.parametrize("name", ["weight_bits", "other_bits"])
def test_bits_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(CostError, match=f"{name} must be an integer >= 1, got {value!r}"):
        weight_bytes((), **{"weight_bits": 8, name: value})


@given(st.sampled_from(OPERATIONS), st.integers(1, 31))
def test_more_bits_never_take_fewer_bytes(op: OpSpec, bits: int) -> None:
    assert weight_bytes((op,), weight_bits=bits) <= weight_bytes((op,), weight_bits=bits + 1)
