"""Prices by shape: rows where there are some, marked estimates elsewhere, and their error."""

from pathlib import Path

import numpy as np
import pytest
from golden.networks import mobilenet_v2

from autocompress.cost import compile_cost
from autocompress.errors import CostError, TableError
from autocompress.latency.foreign.bit_table import BitTable
from autocompress.latency.foreign.bitfusion import read_bitfusion
from autocompress.latency.foreign.haq import read_haq
from autocompress.latency.roofline import Roofline
from autocompress.ops import Add, Conv2d, Linear, OpSpec
from autocompress.quantize.estimate import ShapePrice, fused_bits
from autocompress.quantize.ops import at_bits
from autocompress.quantize.tables import bit_space

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tables"
WIDTHS = ((8, 8), (4, 8))


def device(op: OpSpec, weight_bits: int, activation_bits: int) -> float:
    """What a device takes that multiplies at 2, 4 or 8 bits, in proportion to both."""
    effort = fused_bits(weight_bits) * fused_bits(activation_bits)
    roofline = Roofline({max(weight_bits, activation_bits): 64e6 / effort}, 1e5, 0.001)
    return roofline.price((op,), weight_bits=weight_bits, activation_bits=activation_bits)


def shapes() -> dict[str, Conv2d]:
    """Fifteen pointwise and fifteen depthwise ones."""
    found = {}
    for channels in (8, 16, 32, 48, 64):
        for side in (4, 8, 16):
            found[f"p{channels}-{side}"] = Conv2d(channels, 2 * channels, side, side, norm=False)
            found[f"d{channels}-{side}"] = Conv2d(
                channels, channels, side, side, kernel=3, groups=channels, norm=False
            )
    return found


def price() -> ShapePrice:
    """Of a device that is a roofline at each pair of widths."""
    rows = {(name, *widths): device(op, *widths) for name, op in shapes().items() for widths in WIDTHS}
    return ShapePrice(BitTable("made up", "ms", tuple(shapes()), rows), shapes(), computes=fused_bits)


def published(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}, which is no part of the distribution")
    return SHARED / name


def test_a_shape_in_the_table_has_its_row_whatever_its_norm_and_activation() -> None:
    found = price()
    op = Conv2d(8, 16, 4, 4, activation="relu")
    expected = device(shapes()["p8-4"], 8, 8)
    assert found((at_bits(op, 8, 8), Add(16, 4, 4))) == expected
    assert found.estimated == []


@pytest.mark.parametrize("op", [Conv2d(24, 40, 12, 12), Conv2d(24, 24, 12, 12, kernel=3, groups=24)])
def test_another_shape_is_estimated_and_marked(op: Conv2d) -> None:
    found, quantized = price(), at_bits(op, 4, 8)
    plain = Conv2d(*list(vars(op).values())[:7], norm=False)
    expected = device(plain, 4, 8)
    assert found((quantized,)) == pytest.approx(expected, rel=1e-6)
    assert found((quantized,)) == pytest.approx(expected, rel=1e-6)
    assert found.estimated == [quantized.key]


@pytest.mark.parametrize("widths", [(2, 2), (3, 5), (6, 8), (4, 4)])
def test_another_width_is_scaled_as_the_hardware_computes_and_moves_it(widths: tuple[int, int]) -> None:
    found, op = price(), shapes()["p64-16"]
    assert found((at_bits(op, *widths),)) == pytest.approx(device(op, *widths), rel=1e-6)
    assert found.estimated == [at_bits(op, *widths).key]


def test_fewer_bits_are_never_estimated_to_cost_more() -> None:
    found = price()
    for op in (Conv2d(24, 40, 12, 12), Conv2d(24, 24, 12, 12, kernel=3, groups=24)):
        costs = np.array([[found((at_bits(op, w, a),)) for a in range(2, 9)] for w in range(2, 9)])
        assert (np.diff(costs, axis=0) >= 0).all()
        assert (np.diff(costs, axis=1) >= 0).all()


def test_linear_layers_are_convolutions_of_one_pixel() -> None:
    found = price()
    assert found((at_bits(Linear(16, 10), 8, 8),)) == found((at_bits(Conv2d(16, 10, 1, 1), 8, 8),)) > 0


def test_estimates_are_right_where_the_device_is_a_roofline() -> None:
    figures = price().held_out()
    assert set(figures) == {"dense", "grouped"}
    assert all(one.mape_percent < 1 for one in figures.values())


def test_what_has_no_bits_or_is_no_layer_is_refused() -> None:
    with pytest.raises(CostError, match="has costs at few bits"):
        price()((Conv2d(8, 16, 4, 4),))
    with pytest.raises(CostError, match="convolutions and linear layers, not Add"):
        ShapePrice(BitTable("made up", "ms", ("a",), {("a", 8, 8): 1.0}), {"a": Add(2, 4, 4)})
    few = ShapePrice(BitTable("made up", "ms", ("a",), {("a", 8, 8): 1.0}), {"a": Linear(2, 2)})
    with pytest.raises(TableError, match="at least 3 different rows"):
        few((at_bits(Linear(3, 3), 8, 8),))


def test_a_space_of_bits_is_priced_by_shapes() -> None:
    operations: dict[str, OpSpec] = {"one": shapes()["p8-4"], "two": Linear(16, 10)}
    space = bit_space(("one", "two"), weight_bits=(4, 8), activation_bits=(8,), operations=operations)
    found = price()
    cost = compile_cost(space, found, "latency_ms")
    by_hand = sum(found((at_bits(op, 8, 8),)) for op in operations.values())
    assert float(cost.of(space.largest())[0]) == pytest.approx(by_hand)
    assert all("Linear" in key for key in found.estimated)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "dense", "grouped"), [("latency_ms", 26, 9), ("energy_mj", 25, 22)])
def test_bitfusions_other_shapes_are_estimated_within_the_stated_error(
    metric: str, dense: float, grouped: float
) -> None:
    """Mean absolute error in percent at all nine pairs of widths, five folds of shapes."""
    tables = read_bitfusion(published("bitfusion_conv_latency_energy.csv.gz"))
    found = ShapePrice(getattr(tables, metric), tables.operations, computes=fused_bits)
    figures = found.held_out()
    assert figures["dense"].mape_percent < dense
    assert figures["grouped"].mape_percent < grouped
    row = tables.operations["conv-i96-o456-14px-k1-s1-p0-g1"]
    assert found((at_bits(row, 4, 4),)) == {"latency_ms": 0.062192, "energy_mj": 0.10688197403091196}[metric]


@pytest.mark.slow
def test_haqs_other_shapes_can_be_estimated_from_mobilenet_v2() -> None:
    """Few shapes, and the error says so."""
    table = read_haq(published("haq_mobilenetv2_batch16_latency.npy"))
    ops = [op for op in mobilenet_v2(1.0) if isinstance(op, Conv2d | Linear)]
    found = ShapePrice(table, dict(zip(table.layers, ops, strict=True)), batch=16)
    assert found.held_out()["dense"].mape_percent < 60
