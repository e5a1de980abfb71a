"""Rows by block key price a space as their plain sum."""

import numpy as np
import pytest

from autocompress.errors import MissingRowError
from autocompress.latency.foreign.rows import ForeignRow, one_after_the_other, rows_cost
from autocompress.ops import Linear, Ops, block_key
from autocompress.space import Block, Choice, Option, SearchSpace


def layer(width: Option) -> Ops:
    return (Linear(4, int(width)),)


SPACE = SearchSpace("toy", (Choice("width", (2, 4)),), (Block("layer", ("width",), layer),))


def test_a_space_costs_the_sum_of_its_rows() -> None:
    rows = {block_key(layer(2)): ForeignRow(0.5), block_key(layer(4)): ForeignRow(2.0)}
    cost = rows_cost(SPACE, rows)
    assert cost.metric == "latency_ms"
    assert cost.of(np.array([[0], [1]])).tolist() == [0.5, 2.0]


def test_a_block_without_a_row_is_named_with_the_nearest() -> None:
    rows = {block_key(layer(2)): ForeignRow(0.5)}
    match = r"no row for block 'Linear\(in_features=4,out_features=4\)'; the nearest row is 'Linear\(.*=2\)'"
    with pytest.raises(MissingRowError, match=match):
        rows_cost(SPACE, rows)


def test_independent_parts_add_their_variances() -> None:
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, 4.0, 5)]) == ForeignRow(3, 5.0, 5)
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, None, 5)]) == ForeignRow(3, None, 5)
    assert one_after_the_other([ForeignRow(1, 3.0, 10), ForeignRow(2, 4.0)]) == ForeignRow(3, 5.0, None)
