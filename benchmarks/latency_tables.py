"""The latency table of the two search benchmarks: the published Note10 table, or a made-up one without it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from record import SHARED

from autocompress.cost import Price
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, OpSpec, SqueezeExcite, block_key
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
        return _note10(NOTE10), f"Samsung Note10, once-for-all, width 1.2 ({NOTE10.name}, MIT)"
    rows = {
        block_key(ops): 0.01 + 1e-8 * sum(op.macs for op in ops)
        for block in space.blocks
        for ops in (block.operations(*setting) for setting in space.block_settings(block))
        if ops
    }
    return (lambda ops: rows[block_key(ops)]), f"made up: {len(rows)} rows, 0.01 ms + 10 ns per 1,000 MACs"


def _note10(path: Path) -> Price:
    """Price blocks by the published keys (`expanded_conv-input:HxWxC-...`, see once-for-all).

    The keys have shapes, so one table serves all resolutions; where two resolutions share a shape, they
    share the row of the first.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        tables = json.load(file)
    milliseconds: dict[str, float] = {}
    for table in tables.values():
        for key, row in table.items():
            milliseconds.setdefault(key, float(row["mean"]))

    def price(ops: Ops) -> float:
        return sum(milliseconds[key] for key in _keys(ops))

    return price


def _shapes(first: OpSpec, last: OpSpec) -> str:
    (c, h, w), (out, oh, ow) = first.in_shape, last.out_shape
    return f"input:{h}x{w}x{c}-output:{oh}x{ow}x{out}"


def _keys(ops: Ops) -> Iterator[str]:
    first, *rest = ops
    if not rest:
        yield f"Conv-{_shapes(first, first)}"
    elif isinstance(rest[0], GlobalAvgPool):
        pool, mix, classifier = rest
        if isinstance(first, Conv2d) and isinstance(mix, Conv2d) and isinstance(classifier, Linear):
            yield f"Conv_1-{_shapes(first, first)}"
            yield f"AvgPool2D-{_shapes(pool, pool)}"
            yield f"Conv_2-{_shapes(mix, mix)}"
            yield f"Logits-input:1x1x{classifier.in_features}-output:{classifier.out_features}"
    else:
        yield _block_key(ops, isinstance(ops[-1], Add))


def _block_key(ops: Ops, skip: bool) -> str:
    convolutions = [op for op in ops if isinstance(op, Conv2d)]
    # The first block has no expansion.
    expand, depthwise, project = convolutions if len(convolutions) == 3 else convolutions[:1] + convolutions
    attention = any(isinstance(op, SqueezeExcite) for op in ops)
    return (
        f"expanded_conv-{_shapes(expand, project)}-expand:{depthwise.in_channels}-kernel:{depthwise.kernel}"
        f"-stride:{depthwise.stride}-idskip:{int(skip)}-se:{int(attention)}"
        f"-hs:{int(depthwise.activation == 'hard_swish')}"
    )
