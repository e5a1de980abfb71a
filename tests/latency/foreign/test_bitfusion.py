"""BitFusion's convolutions: latency and energy by shape and bits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.bitfusion import FixedCost, layer_of, read_bitfusion
from autocompress.ops import Conv2d

Change = Callable[[str, str, str], Path]

POINTWISE = Conv2d(96, 456, 14, 14)
DEPTHWISE = Conv2d(112, 112, 56, 56, kernel=3, groups=112)


def test_costs_are_looked_up_by_the_shape_of_a_convolution(folder: Path) -> None:
    tables = read_bitfusion(folder / "bitfusion.csv")
    assert tables.latency_ms.at(layer_of(POINTWISE), 4, 4) == 0.062192
    assert tables.latency_ms.at(layer_of(POINTWISE), 8, 4) == 0.125
    assert tables.energy_mj.at(layer_of(DEPTHWISE), 8, 8) == 0.8764909197900798
    assert tables.latency_ms.widths(layer_of(POINTWISE)) == [(4, 4), (8, 4)]
    assert (tables.latency_ms.unit, tables.energy_mj.unit) == ("ms", "mJ")
    assert tables.fixed["head"] == FixedCost(0.295904, 0.5061844841862639)
    assert tables.fixed["tail"].latency_ms == 0.081608


def test_a_shape_or_width_without_a_row_is_refused_with_the_nearest(folder: Path) -> None:
    table = read_bitfusion(folder / "bitfusion.csv").latency_ms
    with pytest.raises(MissingRowError, match=r"the nearest row is layer 'conv-i96-o456-14px.*' at 8 and 4"):
        table.at(layer_of(POINTWISE), 8, 6)
    with pytest.raises(
        MissingRowError, match=r"no row for layer 'conv-i96-o464-.*nearest row is layer 'conv-i96"
    ):
        table.at(layer_of(Conv2d(96, 464, 14, 14)), 4, 4)
    with pytest.raises(TableError, match="square inputs only, got 14x28"):
        layer_of(Conv2d(96, 456, 14, 28))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("8,4,0.125,0.25", "8,4,-0.125,0.25", "line 3, column latency_ms must be at least 0, got -0.125"),
        ("8,4,0.125,0.25", "8,4,0.125,nan", "column energy_mJ must be a finite number, got 'nan'"),
        ("8,4,0.125,0.25", "8,4,inf,0.25", "column latency_ms must be a finite number, got 'inf'"),
        ("8,4,0.125,0.25", "4,4,0.125,0.25", r"line 3: \('conv-i96-o456-.*', 4, 4\) stands twice"),
        ("8,4,0.125,0.25", "0,4,0.125,0.25", "w_bits must be an integer >= 1, got 0"),
        ("8,4,0.125,0.25", "-1,4,0.125,0.25", "w_bits must be an integer >= 1, got -1"),
        ("8,4,0.125,0.25", "8,64,0.125,0.25", "a_bits must be at most 32, got 64"),
        ("8,4,0.125,0.25", "8.5,4,0.125,0.25", "w_bits must be an integer >= 1, got 8.5"),
        ("8,4,0.125,0.25", "8,,0.125,0.25", "a_bits must be an integer >= 1, got ''"),
        ("latency_ms", "latency_us", "line 1 must be in_c,out_c,.*, got 'in_c"),
        ("energy_mJ", "energy_mj", "line 1 must be in_c,out_c"),
        ("112,112,56,3,1,1,112", "112,112,56,3,1,1,100", "groups must be a divisor of 112 and 112 channels"),
        (
            "112,112,56,3,1,1,112",
            "112,112,56,99,1,1,112",
            "kernel must be at most the padded input, 58, got 99",
        ),
        ("112,112,56,3,1,1,112", "112,112,56,3,0,1,112", "stride must be an integer >= 1"),
        ("tail,", "neck,", "in_c must be a number of channels, or head or tail"),
        ("tail,,", "tail,8,", "in_c must be a number of channels, or head or tail"),
        ("tail,", "head,", "line 6: head stands twice"),
        ("tail,,,,,,,,,0.081608,0.15180756309769594\n", "tail,,,,,,,,,0.08", "must have 11|end of a line"),
    ],
)
def test_a_wrong_file_is_refused(changed: Change, old: str, new: str, match: str) -> None:
    path = changed("bitfusion.csv", old, new)
    with pytest.raises(TableError, match=rf"BitFusion table .*bitfusion\.csv: .*{match}"):
        read_bitfusion(path)


@pytest.mark.slow
def test_the_published_table_is_read_whole(shared: Callable[[str], Path]) -> None:
    tables = read_bitfusion(shared("tables/bitfusion_conv_latency_energy.csv.gz"))
    assert len(tables.latency_ms.rows) == len(tables.energy_mj.rows) == 6567
    assert len(tables.latency_ms.layers) == 779
    assert tables.latency_ms.at(layer_of(DEPTHWISE), 8, 8) == 0.7954519999999999
    assert set(tables.fixed) == {"head", "tail"}
    with pytest.raises(MissingRowError, match="at 4 bits of weights and 5 of activations"):
        tables.latency_ms.at(layer_of(POINTWISE), 4, 5)
