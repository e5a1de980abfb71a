"""The latency table of the two search benchmarks: the published Note10 table, or a made-up one without it."""

from record import SHARED

from autocompress.cost import Price
from autocompress.latency.foreign.ofa import read_ofa
from autocompress.ops import block_key
from autocompress.space import SearchSpace
from search_spaces.mobilenet_v3 import mobilenet_v3

NOTE10 = SHARED / "tables" / "ofa_note10_latency.json.gz"
RESOLUTIONS = tuple(range(160, 228, 4))


def once_for_all_space() -> SearchSpace:
    """Make the space of the published table: width 1.2, the 17 resolutions from 160 to 224 pixels."""
    return mobilenet_v3(width=1.2, resolutions=RESOLUTIONS)


def price_of(space: SearchSpace) -> tuple[Price, str]:
    """Return the price in milliseconds of a block, and where it is from."""
    if NOTE10.exists():
        return read_ofa(NOTE10).price, f"Samsung Note10, once-for-all, width 1.2 ({NOTE10.name}, MIT)"
    rows = {
        block_key(ops): 0.01 + 1e-8 * sum(op.macs for op in ops)
        for block in space.blocks
        for ops in (block.operations(*setting) for setting in space.block_settings(block))
        if ops
    }
    return (lambda ops: rows[block_key(ops)]), f"made up: {len(rows)} rows, 0.01 ms + 10 ns per 1,000 MACs"
