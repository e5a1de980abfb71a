"""Spaces of bits over published tables: order, ties, pinned layers, strict look-ups, published figures."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.networks import mobilenet_v2

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.errors import CostError, MissingRowError, QuantizationError, SpaceError, TableError
from autocompress.exact import solve
from autocompress.latency.foreign.bit_table import BitTable, Widths
from autocompress.latency.foreign.haq import read_haq
from autocompress.latency.foreign.hawq import read_hawq
from autocompress.ops import Conv2d, Linear, OpSpec
from autocompress.quantize.ops import at_bits
from autocompress.quantize.tables import TableLayer, bit_cost, bit_space, plain
from autocompress.space import SearchSpace

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tables"


def table(layers: int = 3, unit: str = "ms") -> BitTable:
    """Layer l costs `100 l + 10 w + a` at w and a bits, from 2 to 8."""
    rows = {
        (f"l{layer}", w, a): float(100 * layer + 10 * w + a)
        for layer in range(layers)
        for w in range(2, 9)
        for a in range(2, 9)
    }
    return BitTable("made up", unit, tuple(f"l{layer}" for layer in range(layers)), rows)


def published(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}, which is no part of the distribution")
    return SHARED / name


def cost_of(space: SearchSpace, source: BitTable, settings: Mapping[str, int]) -> float:
    row = space.encode([space.architecture(settings)])
    return float(bit_cost(source, space, "latency_ms").of(row)[0])


def test_choices_stand_in_the_order_of_layers_weights_before_inputs() -> None:
    space = bit_space(table().layers, weight_bits=(2, 4, 8), activation_bits=(4, 8), fixed={"l0": (8, 8)})
    assert [c.name for c in space.choices] == ["l1.weight", "l1.input", "l2.weight", "l2.input"]
    assert [c.options for c in space.choices] == [(2, 4, 8), (4, 8), (2, 4, 8), (4, 8)]
    chosen = {"l1.weight": 2, "l1.input": 8, "l2.weight": 4, "l2.input": 4}
    assert cost_of(space, table(), chosen) == 88 + (100 + 28) + (200 + 44)


def test_one_choice_a_layer_where_weights_and_activations_share_widths() -> None:
    space = bit_space(table().layers, weight_bits=(4, 8))
    assert [c.name for c in space.choices] == ["l0.bits", "l1.bits", "l2.bits"]
    assert cost_of(space, table(), {"l0.bits": 4, "l1.bits": 8, "l2.bits": 4}) == 44 + 188 + 244


def test_tied_layers_share_the_choices_of_the_first() -> None:
    space = bit_space(table().layers, weight_bits=(4, 8), activation_bits=(2, 8), ties=[("l2", "l0")])
    assert [c.name for c in space.choices] == ["l0.weight", "l0.input", "l1.weight", "l1.input"]
    settings = {"l0.weight": 4, "l0.input": 2, "l1.weight": 8, "l1.input": 8}
    assert cost_of(space, table(), settings) == 42 + 188 + 242


def test_operations_are_those_of_the_layers_at_their_bits() -> None:
    ops = {"l0": Conv2d(3, 8, 8, 8, kernel=3), "l2": Linear(8, 10)}
    space = bit_space(table().layers, weight_bits=(2, 8), activation_bits=(4, 8), operations=ops)
    found = [op for _, part in space.operations(space.smallest()) for op in part]
    assert [plain(op) for op in found] == [ops["l0"], None, ops["l2"]]
    first = at_bits(ops["l0"], 2, 4)
    assert (found[0].size_bytes, found[0].bops) == (first.size_bytes, first.bops)
    size = float(operation_cost(space, "size_bytes").of(space.smallest())[0])
    # 216 weights of 2 bits and 2 x 8 of the norm; 80 weights of 2 bits and 10 biases.
    assert size == 54 + 4 * 16 + 20 + 4 * 10
    assert (found[0].in_shape, found[0].macs, found[1].macs) == ((3, 8, 8), ops["l0"].macs, 0)
    assert type(found[0].module()) is type(ops["l0"].module())
    with pytest.raises(QuantizationError, match="layer 'l1' has a cost and no operation"):
        found[1].module()


def test_two_layers_of_one_shape_keep_their_own_costs() -> None:
    op = Conv2d(8, 8, 4, 4)
    space = bit_space(table(2).layers, weight_bits=(8,), operations={"l0": op, "l1": op})
    assert float(bit_cost(table(2), space, "latency_ms").of(space.largest())[0]) == 88 + 188


def test_a_space_can_be_pickled_and_its_fingerprint_knows_what_is_pinned() -> None:
    one = bit_space(table().layers, weight_bits=(4, 8), fixed={"l0": (8, 8)})
    other = bit_space(table().layers, weight_bits=(4, 8), fixed={"l0": (8, 4)})
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint != other.fingerprint


def test_a_width_that_the_table_lacks_is_refused_when_costs_are_compiled() -> None:
    space = bit_space(table().layers, weight_bits=(4, 16))
    with pytest.raises(MissingRowError, match="no row for layer 'l0' at 16 bits"):
        bit_cost(table(), space, "latency_ms")


def test_another_unit_has_to_be_translated() -> None:
    space = bit_space(table().layers, weight_bits=(4, 8))
    cycles = table(unit="cycles (assumed)")
    with pytest.raises(CostError, match="latency_ms is in ms, table made up in 'cycles"):
        bit_cost(cycles, space, "latency_ms")
    assert float(bit_cost(cycles, space, "cycles").of(space.largest())[0]) == 88 + 188 + 288
    assert float(bit_cost(cycles, space, "latency_ms", scale=0.5).of(space.largest())[0]) == 282
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(CostError, match="scale must be a positive finite number"):
            bit_cost(cycles, space, "latency_ms", scale=wrong)


def test_blocks_of_another_space_are_no_layers() -> None:
    space = bit_space(table().layers, weight_bits=(4, 8))
    stranger = bit_space(("other",), weight_bits=(4, 8))
    with pytest.raises(MissingRowError, match="'other'"):
        bit_cost(table(), stranger, "latency_ms")
    ops: tuple[OpSpec, ...] = (Conv2d(3, 3, 4, 4),)
    block = type(space.blocks[0])("b", ("l0.bits",), lambda bits: ops)
    with pytest.raises(CostError, match="is no layer of table made up"):
        bit_cost(table(), SearchSpace("s", space.choices, (block,)), "latency_ms")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ()}, "layers must be at least one name"),
        ({"layers": ("l0", "l0")}, "each once"),
        ({"weight_bits": ()}, "weight_bits must be at least one width"),
        ({"weight_bits": (8, 4)}, r"in ascending order, got \[8, 4\]"),
        ({"activation_bits": (4, 4)}, "activation_bits must be .* ascending"),
        ({"fixed": {"l9": (8, 8)}}, r"fixed names \['l9'\], which are no layers"),
        ({"operations": {"l9": Linear(2, 2)}}, r"operations names \['l9'\]"),
        ({"ties": [("l0",)]}, "a tie joins two or more"),
        ({"ties": [("l0", "l1"), ("l1", "l2")]}, "in no other tie"),
        ({"ties": [("l0", "l1")], "fixed": {"l0": (8, 8)}}, "not fixed"),
        ({"fixed": dict.fromkeys(("l0", "l1", "l2"), (8, 8))}, "nothing to decide"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: Any, message: str) -> None:
    given = {"layers": table().layers, "weight_bits": (4, 8), "activation_bits": (4, 8), **arguments}
    with pytest.raises(SpaceError, match=message):
        bit_space(given.pop("layers"), **given)


@pytest.mark.parametrize(
    "arguments", [{"weight_bits": (-1, 8)}, {"weight_bits": (8,), "fixed": {"l0": (8, -1)}}]
)
def test_what_is_no_width_is_refused_with_and_without_operations(arguments: Any) -> None:
    for operations in ({}, {layer: Linear(2, 2) for layer in table().layers}):
        with pytest.raises(QuantizationError, match="not at -1"):
            bit_space(table().layers, operations=operations, **arguments)


# Published ---------------------------------------------------------------------------------------------

# ALGORITHMS A1.5: cost of uniform widths relative to 8 bits; the second with first and last layer kept at 8.
UNIFORM = {
    7: (0.8300, 0.8353),
    6: (0.6726, 0.6833),
    5: (0.5279, 0.5438),
    4: (0.3966, 0.4177),
    3: (0.2802, 0.3065),
    2: (0.1783, 0.2098),
}
PINNED: dict[str, Widths] = {"0": (8, 8), "52": (8, 8)}


@pytest.mark.slow
def test_uniform_widths_cost_what_is_published_of_haqs_table() -> None:
    source = read_haq(published("haq_mobilenetv2_batch16_latency.npy"))
    for column, fixed in enumerate(({}, PINNED)):
        space = bit_space(source.layers, weight_bits=range(2, 9), activation_bits=range(2, 9), fixed=fixed)
        cost = bit_cost(source, space, "cycles")
        assert float(cost.of(space.largest())[0]) == 39_624_933
        for bits, relative in UNIFORM.items():
            found = float(cost.of(space.largest() - (8 - bits))[0]) / 39_624_933
            assert round(found, 4) == relative[column]
        one_sided = {(4, 8): 0.7882, (8, 4): 0.5059}
        for (weights, activations), relative_cost in one_sided.items() if not fixed else ():
            row = np.array([[weights - 2, activations - 2] * 53])
            assert round(float(cost.of(row)[0]) / 39_624_933, 4) == relative_cost


@pytest.mark.slow
def test_the_published_policy_is_a_row_of_the_space_once_its_first_activation_is_charged() -> None:
    source = read_haq(published("haq_mobilenetv2_batch16_latency.npy"))
    policy = json.loads(published("haq_mobilenetv2_policy.json").read_text(encoding="utf-8"))["policy"]
    with pytest.raises(TableError, match="got -1"):
        source.total([(w, a) for w, a in policy])
    space = bit_space(source.layers, weight_bits=range(2, 9), activation_bits=range(2, 9), fixed=PINNED)
    row = np.array([[bits - 2 for pair in policy[1:-1] for bits in pair]])
    space.validate(row)
    assert round(float(bit_cost(source, space, "cycles").of(row)[0]) / 39_624_933, 4) == 0.5965


@pytest.mark.slow
def test_the_layers_of_haqs_table_are_those_of_mobilenet_v2() -> None:
    """53 in module order; of 17 depthwise ones the 13 above 7 x 7 hardly mind the bits of their weights."""
    source = read_haq(published("haq_mobilenetv2_batch16_latency.npy"))
    ops = [op for op in mobilenet_v2(1.0) if isinstance(op, Conv2d | Linear)]
    assert len(ops) == len(source.layers) == 53
    free = {int(layer) for layer in source.layers if source.at(layer, 8, 8) < 1.05 * source.at(layer, 1, 8)}
    depthwise = {index for index, op in enumerate(ops) if isinstance(op, Conv2d) and op.groups > 1}
    large = {index for index in depthwise if ops[index].out_shape[1] > 7}
    assert (len(depthwise), len(large)) == (17, 13)
    assert free == large | {0, 2, 5, 8, 11, 14, 17}


@pytest.mark.slow
def test_the_published_assignments_of_resnet_18_are_optimal_in_spaces_whose_choices_are_tied() -> None:
    """All nine; `tests/test_exact.py` has the same with ties given to the solver."""
    tables = read_hawq(published("hawq_v3_resnet18.json"))
    layers = tables.size.layers
    ties = [tuple(layers[position] for position in tie) for tie in tables.ties]
    space = bit_space(layers, weight_bits=(4, 8), ties=ties)
    value = bit_cost(tables.sensitivity, space, "sensitivity")
    sources = {"modelsize": tables.size, "bops": tables.bops, "latency": tables.latency}
    assert len(tables.published) == 9
    for name, policy in tables.published.items():
        metric, fraction = name.split("_")
        cost = bit_cost(sources[metric], space, "published")
        four, eight = float(cost.of(space.smallest())[0]), float(cost.of(space.largest())[0])
        limit = four + float(fraction) * (eight - four)
        optimum = solve(
            value, Constraints(space, {"published": cost}, {"published": limit}), sense="minimize"
        )
        found = [op for _, ops in space.operations(optimum.codes) for op in ops]
        assert all(isinstance(op, TableLayer) for op in found)
        assert tuple((op.weight_bits, op.activation_bits) for op in found) == policy  # type: ignore[attr-defined]


def test_a_budget_in_percent_of_a_size_finds_its_metric() -> None:
    ops = {layer: Linear(8, 8, bias=False) for layer in table().layers}
    space = bit_space(table().layers, weight_bits=range(2, 9), operations=ops)
    constraints = Budget.parse("size_bytes=50%").resolve(space, [operation_cost(space, "size_bytes")])
    assert constraints.feasible(space.largest() - 4)[0]
    assert not constraints.feasible(space.largest() - 3)[0]
