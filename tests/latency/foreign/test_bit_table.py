"""Costs by bit width are what the rows say; what has no row is refused, naming the nearest."""

import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.bit_table import BitTable


@pytest.fixture
def table() -> BitTable:
    rows = {("first", 4, 4): 1.0, ("first", 8, 8): 3.0, ("second", 4, 4): 10.0, ("second", 8, 4): 20.0}
    return BitTable("table.csv", "ms", ("first", "second"), rows)


def test_a_network_costs_the_sum_of_its_layers(table: BitTable) -> None:
    assert table.at("second", 8, 4) == 20
    assert table.total([(8, 8), (8, 4)]) == 23
    assert table.total([(4, 4), (4, 4)]) == 11
    assert table.widths("second") == [(4, 4), (8, 4)]
    assert table.widths("third") == []


@pytest.mark.parametrize("bits", [-1, 0, 33, 4.0, True, "4", None])
def test_what_is_no_width_is_refused_and_never_wrapped(table: BitTable, bits: int) -> None:
    with pytest.raises(TableError, match=r"weight_bits of layer 'first' must be an integer in 1\.\.32, got"):
        table.at("first", bits, 4)
    with pytest.raises(TableError, match=r"activation_bits .*; charge what is not quantized at a width"):
        table.total([(4, bits), (4, 4)])


def test_a_missing_row_is_named_with_the_nearest(table: BitTable) -> None:
    match = "'second' at 8 bits of weights and 7 of activations; the nearest row is layer 'second' at 8 and 4"
    with pytest.raises(MissingRowError, match=match):
        table.at("second", 8, 7)
    with pytest.raises(MissingRowError, match="nearest row is layer 'second' at 4 and 4"):
        table.at("secund", 4, 4)
    with pytest.raises(MissingRowError, match="nearest row is layer None"):
        BitTable("empty", "ms", (), {}).at("first", 4, 4)


def test_a_policy_of_another_length_is_refused(table: BitTable) -> None:
    with pytest.raises(TableError, match="must have 2 pairs of bits, one a layer, got 1"):
        table.total([(4, 4)])
