"""Rows of foreign tables by block key, and the latency table that they make."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from autocompress.latency.correction import Correction
from autocompress.latency.measure import Measurement
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target
from autocompress.ops import SEPARATOR

# Of a normal distribution, in standard deviations: interquartile range, 95th percentile, and the half width
# of the 95 % interval of the median of n runs times the root of n.
QUARTILES_PER_DEVIATION: Final = 1.3490
TAIL_PER_DEVIATION: Final = 1.6449
HALF_WIDTH_PER_DEVIATION: Final = 1.9600 * math.sqrt(math.pi / 2)


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

    def measurement(self) -> Measurement:
        """Return the row as our own tables have it, its runs taken to be normally distributed.

        A spread that is not known is written as 0, a count that is not known as 1.
        """
        deviation = (self.spread_ms or 0.0) / QUARTILES_PER_DEVIATION
        count = self.count or 1
        half = HALF_WIDTH_PER_DEVIATION * deviation / math.sqrt(count)
        return Measurement(
            median_ms=self.ms,
            low_ms=max(0.0, self.ms - half),
            high_ms=self.ms + half,
            spread_ms=self.spread_ms or 0.0,
            p95_ms=self.ms + TAIL_PER_DEVIATION * deviation,
            count=count,
        )


def one_after_the_other(rows: Sequence[ForeignRow]) -> ForeignRow:
    """Return the row of parts that run in sequence and whose times vary independently."""
    spreads = [row.spread_ms for row in rows if row.spread_ms is not None]
    counts = [row.count for row in rows if row.count is not None]
    return ForeignRow(
        math.fsum(row.ms for row in rows),
        math.hypot(*spreads) if len(spreads) == len(rows) else None,
        min(counts) if len(counts) == len(rows) else None,
    )


def latency_table(
    rows: Mapping[str, ForeignRow], target: Target, *, source: str, device: Mapping[str, Any]
) -> LatencyTable:
    """Make a latency table of foreign rows: their plain sum, without correction and without error report.

    Args:
        rows: Key of a block (`autocompress.ops.block_key`) to its row.
        target: What the times were measured for.
        source: Where they are from, for the provenance.
        device: What they were measured on; `LatencyTable.check_target` compares it.
    """
    unknown = {
        "rows_without_spread": sum(row.spread_ms is None for row in rows.values()),
        "rows_without_count": sum(row.count is None for row in rows.values()),
    }
    return LatencyTable(
        target,
        {key: row.measurement() for key, row in rows.items()},
        Correction(),
        None,
        {"device": dict(device), "source": source, "distribution": "normal (assumed)", **unknown},
        "block" if any(SEPARATOR in key for key in rows) else "op",
    )
