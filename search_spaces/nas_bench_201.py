"""The NAS-Bench-201 space: one cell of six edges, five operations each, repeated in three stages.

Source: Dong & Yang, NAS-Bench-201, ICLR 2020. With 16 channels, 5 cells a stage and 10 classes its 15,625
networks have exactly the published parameters and multiply-accumulates. Counted are convolutions and the
classifier; the published FLOPs add the bias of the classifier, 10 for CIFAR-10.

A block is a cell, which depends on all six choices; its edges price it. What a profile measures is a row an
operation and stage; what the sums of a cell cost is left to the correction by whole networks.
"""

from collections.abc import Sequence
from functools import partial

from autocompress.errors import SpaceError
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import Architecture, Block, Choice, Option, SearchSpace
from search_spaces.nas_bench_201_ops import (
    EDGES,
    FREE,
    OPERATIONS,
    Cell,
    Edge,
    NormReLU,
    Reduction,
    cell_operations,
    cell_text,
)

STAGES = 3
CHOICES = tuple(f"edge_{source}_{target}" for source, target in EDGES)
"""Names of the choices: source and target node, in the order of the published tables."""


def nas_bench_201(
    *,
    channels: int = 16,
    cells: int = 5,
    operations: Sequence[str] = OPERATIONS,
    in_channels: int = 3,
    classes: int = 10,
    resolution: int = 32,
) -> SearchSpace:
    """Make the space.

    Args:
        channels: Of the first stage; each later stage has twice as many.
        cells: Cells a stage.
        operations: What an edge can be, of `none`, `skip_connect`, `avg_pool_3x3`, `nor_conv_1x1`,
            `nor_conv_3x3`; always in this order, from smallest to largest.
        in_channels: Channels of the images.
        classes: Classes of the data.
        resolution: Pixels of a side of the images, a multiple of 4.

    Raises:
        SpaceError: An argument is out of its range.
    """
    counts = {"channels": channels, "cells": cells, "in_channels": in_channels, "classes": classes}
    for name, count in {**counts, "resolution": resolution}.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {count!r}")
    if resolution % 4:
        raise SpaceError(f"resolution must be a multiple of 4: it is halved twice; got {resolution}")
    given = [operations] if isinstance(operations, str) else list(operations)
    if not given or len(set(given)) != len(given) or not set(given) <= set(OPERATIONS):
        raise SpaceError(f"operations must be different ones of {', '.join(OPERATIONS)}, got {operations!r}")
    options = tuple(name for name in OPERATIONS if name in given)
    stem = Conv2d(in_channels, channels, resolution, resolution, kernel=3)
    blocks = [Block("stem", (), partial(_fixed, (stem,)))]
    width, size = channels, resolution
    for stage in range(1, STAGES + 1):
        if stage > 1:
            reduction = Reduction(width, 2 * width, size)
            blocks.append(Block(f"reduction{stage - 1}", (), partial(_fixed, (reduction,))))
            width, size = 2 * width, size // 2
        blocks += [_cell_block(f"stage{stage}.cell{cell}", width, size) for cell in range(1, cells + 1)]
    head = (NormReLU(width, size), GlobalAvgPool(width, size, size), Linear(width, classes))
    blocks.append(Block("head", (), partial(_fixed, head)))
    settings = {**counts, "operations": list(options), "resolution": resolution}
    choices = tuple(Choice(name, options, ordinal=False) for name in CHOICES)
    return SearchSpace("nas_bench_201", choices, tuple(blocks), settings=settings)


def _fixed(ops: Ops) -> Ops:
    return ops


def _cell_block(name: str, channels: int, size: int) -> Block:
    parts = tuple(Block(f"{name}.{edge}", (edge,), partial(_edge, channels, size)) for edge in CHOICES)
    return Block(name, CHOICES, partial(_cell, channels, size), parts)


def _cell(channels: int, size: int, *operations: Option) -> Ops:
    return (Cell(channels, size, cell_text([str(name) for name in operations])),)


def _edge(channels: int, size: int, operation: Option) -> Ops:
    """Return what an edge runs; `none` and the identity run nothing."""
    return () if operation in FREE else (Edge(channels, size, str(operation)),)


def arch_str(architecture: Architecture) -> str:
    """Return the benchmark's name of an architecture, `|nor_conv_3x3~0|+|...`."""
    return cell_text([str(architecture[name]) for name in CHOICES])


def from_arch_str(space: SearchSpace, text: str) -> Architecture:
    """Return the architecture of this name.

    Raises:
        SpaceError: The text is no cell, or the space lacks one of its operations.
    """
    return space.architecture(dict(zip(CHOICES, cell_operations(text), strict=True)))
