"""Rows of foreign tables by block key, and the price of a space by them."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autocompress.cost import AdditiveCost, compile_cost
from autocompress.errors import MissingRowError
from autocompress.ops import Ops, block_key
from autocompress.space import SearchSpace

METRIC: Final = "latency_ms"
QUARTILES_PER_DEVIATION: Final = 1.3490
"""Interquartile range of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class ForeignRow:
    """What a foreign table says of one block.

    Attributes:
        ms: Its typical time; a median or a mean, as the format says.
        spread_ms: Interquartile range of single runs; `None` if the table does not say.
        count: Number of runs; `None` if the table does not say.
    """

    ms: float
    spread_ms: float | None = None
    count: int | None = None


def one_after_the_other(rows: Sequence[ForeignRow]) -> ForeignRow:
    """Return the row of parts that run in sequence and whose times vary independently."""
    spreads = [row.spread_ms for row in rows if row.spread_ms is not None]
    counts = [row.count for row in rows if row.count is not None]
    return ForeignRow(
        math.fsum(row.ms for row in rows),
        math.hypot(*spreads) if len(spreads) == len(rows) else None,
        min(counts) if len(counts) == len(rows) else None,
    )


def rows_cost(space: SearchSpace, rows: Mapping[str, ForeignRow]) -> AdditiveCost:
    """Compile the latency of every architecture of a space, in ms: the plain sum of its rows.

    Args:
        space: Where the blocks come from.
        rows: Key of a block (`autocompress.ops.block_key`) to its row.

    Raises:
        MissingRowError: A block of the space has no row; names the nearest one.
        CostError: A block of the space depends on too many options.
    """

    def price(ops: Ops) -> float:
        key = block_key(ops)
        if key not in rows:
            nearest = next(iter(difflib.get_close_matches(key, rows, n=1, cutoff=0.0)), None)
            raise MissingRowError(
                f"the foreign table has no row for block {key!r}; the nearest row is {nearest!r}; add "
                "what is missing"
            )
        return rows[key].ms

    return compile_cost(space, price, METRIC)
