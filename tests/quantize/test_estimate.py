"""Prices by shape: rows where there are some, marked estimates elsewhere, and their error."""

from pathlib import Path

import pytest
from golden.networks import mobilenet_v2

from autocompress.cost import compile_cost
from autocompress.errors import CostError, TableError
from autocompress.latency.foreign.bit_table import BitTable
from autocompress.latency.foreign.bitfusion import read_bitfusion
from autocompress.latency.foreign.haq import read_haq
from autocompress.latency.roofline import Roofline
from autocompress.ops import Add, Conv2d, Linear, OpSpec
from autocompress.quantize.estimate import ShapePrice
from autocompress.quantize.ops import at_bits
from autocompress.quantize.tables import bit_space

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tables"
ROOFLINES = {(8, 8): Roofline({8: 1e6}, 1e5, 0.001), (4, 8): Roofline({8: 2e6}, 1e5, 0.001)}


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
    rows = {
        (name, *widths): device.price((op,), weight_bits=widths[0], activation_bits=widths[1])
        for name, op in shapes().items()
        for widths, device in ROOFLINES.items()
    }
    return ShapePrice(BitTable("made up", "ms", tuple(shapes()), rows), shapes())


def published(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}, which is no part of the distribution")
    return SHARED / name


def test_a_shape_in_the_table_has_its_row_whatever_its_norm_and_activation() -> None:
    found = price()
    op = Conv2d(8, 16, 4, 4, activation="relu")
    expected = ROOFLINES[8, 8].price((shapes()["p8-4"],), weight_bits=8, activation_bits=8)
    assert found((at_bits(op, 8, 8), Add(16, 4, 4))) == expected
    assert found.estimated == []


@pytest.mark.parametrize("op", [Conv2d(24, 40, 12, 12), Conv2d(24, 24, 12, 12, kernel=3, groups=24)])
def test_another_shape_is_estimated_and_marked(op: Conv2d) -> None:
    found, quantized = price(), at_bits(op, 4, 8)
    plain = Conv2d(*list(vars(op).values())[:7], norm=False)
    expected = ROOFLINES[4, 8].price((plain,), weight_bits=4, activation_bits=8)
    assert found((quantized,)) == pytest.approx(expected, rel=1e-6)
    assert found((quantized,)) == pytest.approx(expected, rel=1e-6)
    assert found.estimated == [quantized.key]


def test_another_width_counts_as_the_next_wider_and_is_marked() -> None:
    found, op = price(), shapes()["p8-4"]
    assert found((at_bits(op, 3, 5),)) == found((at_bits(op, 4, 8),))
    assert found((at_bits(op, 6, 8),)) == found((at_bits(op, 8, 8),))
    assert found.estimated == [at_bits(op, 3, 5).key, at_bits(op, 6, 8).key]
    with pytest.raises(CostError, match="no row with at least 16 bits of weights"):
        found((at_bits(op, 16, 8),))


def test_linear_layers_are_convolutions_of_one_pixel() -> None:
    found = price()
    assert found((at_bits(Linear(16, 10), 8, 8),)) == found((at_bits(Conv2d(16, 10, 1, 1), 8, 8),)) > 0


def test_estimates_are_right_where_the_device_is_a_roofline() -> None:
    figures = price().held_out(8, 8)
    assert set(figures) == {(False, 1), (True, 1)}
    assert all(one.mape_percent < 1 for one in figures.values())
    with pytest.raises(CostError, match=r"no rows at \(2, 2\)"):
        price().held_out(2, 2)


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
@pytest.mark.parametrize(("metric", "pointwise", "depthwise"), [("latency_ms", 17, 6), ("energy_mj", 16, 13)])
def test_bitfusions_other_shapes_are_estimated_within_the_stated_error(
    metric: str, pointwise: float, depthwise: float
) -> None:
    """Mean absolute error in percent at 8 and 8 bits, five folds of shapes; up to 25 at (4, 8)."""
    tables = read_bitfusion(published("bitfusion_conv_latency_energy.csv.gz"))
    found = ShapePrice(getattr(tables, metric), tables.operations)
    figures = found.held_out(8, 8)
    assert set(figures) == {(False, 1), (True, 1), (True, 2)}
    assert figures[False, 1].mape_percent < pointwise
    assert max(figures[True, 1].mape_percent, figures[True, 2].mape_percent) < depthwise
    row = tables.operations["conv-i96-o456-14px-k1-s1-p0-g1"]
    assert found((at_bits(row, 4, 4),)) == {"latency_ms": 0.062192, "energy_mj": 0.10688197403091196}[metric]


@pytest.mark.slow
def test_haqs_other_shapes_can_be_estimated_from_mobilenet_v2() -> None:
    """Few shapes, and the error says so: 34 % on layers without groups; of others there are too few."""
    table = read_haq(published("haq_mobilenetv2_batch16_latency.npy"))
    ops = [op for op in mobilenet_v2(1.0) if isinstance(op, Conv2d | Linear)]
    found = ShapePrice(table, dict(zip(table.layers, ops, strict=True)), batch=16)
    figures = found.held_out(8, 8)
    assert figures[False, 1].mape_percent < 40
