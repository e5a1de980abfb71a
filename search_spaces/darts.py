"""The DARTS space: a normal and a reduction cell of four nodes, each node two of its edges.

Source: Liu et al., DARTS, ICLR 2019, section 3.1, and its repository. A choice is a node: which two earlier
nodes it reads, and by which operations. That is 49, 147, 294 and 490 options, 1.1e18 networks of two cells.
What differentiable searches mix are the edges (`SearchSpace.edges`): 14 a cell with eight operations each,
`none` among them. The option of a node is as probable as its two edges are (`Relaxation`), so that the most
probable network without a budget is the one that DARTS keeps.

The network of a search is small (`channels=16, layers=8`), that of the evaluation large (`channels=36,
layers=20`): two settings of one space with the same choices.
"""

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final

from autocompress.errors import SpaceError
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import Architecture, Block, Choice, Option, SearchSpace
from search_spaces.darts_ops import (
    EDGES,
    INPUTS,
    OPERATIONS,
    STEPS,
    DartsCell,
    Edge,
    Pass,
    Preprocess,
    is_free,
    node_text,
    parse_node,
)

KINDS: Final = ("normal", "reduce")
STEM: Final = 3
"""The stem has so many times the channels of a cell's node."""


def darts(
    *,
    channels: int = 16,
    layers: int = 8,
    operations: Sequence[str] = OPERATIONS,
    in_channels: int = 3,
    classes: int = 10,
    resolution: int = 32,
) -> SearchSpace:
    """Make the space.

    Args:
        channels: Of every node of the first cells; doubled by each of the two reduction cells.
        layers: Cells, at least 3; those after one and after two thirds are reduction cells.
        operations: What an edge can be, of `none`, `max_pool_3x3`, `avg_pool_3x3`, `skip_connect`,
            `sep_conv_3x3`, `sep_conv_5x5`, `dil_conv_3x3`, `dil_conv_5x5`; always in this order.
        in_channels: Channels of the images.
        classes: Classes of the data.
        resolution: Pixels of a side of the images, a multiple of 4.

    Raises:
        SpaceError: An argument is out of its range.
    """
    counts = {"channels": channels, "layers": layers, "in_channels": in_channels, "classes": classes}
    for name, count in {**counts, "resolution": resolution}.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {count!r}")
    if layers < 3:
        raise SpaceError(f"layers must be at least 3: two of them are reduction cells; got {layers}")
    if resolution % 4:
        raise SpaceError(f"resolution must be a multiple of 4: it is halved twice; got {resolution}")
    given = [operations] if isinstance(operations, str) else list(operations)
    if len(set(given)) != len(given) or not set(given) <= set(OPERATIONS) or not set(given) - {"none"}:
        raise SpaceError(
            f"operations must be different ones of {', '.join(OPERATIONS)}, one of them not none; "
            f"got {operations!r}"
        )
    used = tuple(name for name in OPERATIONS if name in given)
    stem = Conv2d(in_channels, STEM * channels, resolution, resolution, kernel=3)
    fork = Pass(STEM * channels, resolution, "twice")
    blocks = [
        Block("stem", (), partial(_fixed, (stem, fork)), (Block("stem.conv", (), partial(_fixed, (stem,))),))
    ]
    before = last = STEM * channels
    width, size, halved = channels, resolution, False
    for layer in range(layers):
        reduction = layer in (layers // 3, 2 * layers // 3)
        width *= 2 if reduction else 1
        blocks.append(_block(f"cell{layer + 1}", before, last, width, size, reduction, halved))
        before, last = last, STEPS * width
        size, halved = size // 2 if reduction else size, reduction
    head = (GlobalAvgPool(last, size, size), Linear(last, classes))
    taken = (Pass(last, size, "last"), *head)
    blocks.append(
        Block("head", (), partial(_fixed, taken), (Block("head.linear", (), partial(_fixed, head)),))
    )
    choices, edges = [], []
    for kind in KINDS:
        edges += [Choice(f"{kind}.edge_{s}_{t}", used, ordinal=False) for s, t in EDGES]
        choices += [_node(kind, node, used) for node in range(INPUTS, INPUTS + STEPS)]
    settings = {**counts, "operations": list(used), "resolution": resolution}
    return SearchSpace("darts", tuple(choices), tuple(blocks), settings=settings, edges=tuple(edges))


@lru_cache(maxsize=64)
def _node(kind: str, node: int, operations: tuple[str, ...]) -> Choice:
    """Return the choice of a node: two of its edges and what they are, from the cheapest to the dearest."""
    names = [name for name in operations if name != "none"]

    def cost(text: str) -> tuple[int, str]:
        strides = {source: 2 if kind == "reduce" and source < INPUTS else 1 for source in range(node)}
        edges = [(name, strides[source]) for name, source in parse_node(text)]
        return sum(Edge(4, 4, name, s).params for name, s in edges if not is_free(name, s)), text

    options = sorted(
        (
            node_text([(one, first), (other, second)])
            for first, second in itertools.combinations(range(node), 2)
            for one, other in itertools.product(names, repeat=2)
        ),
        key=cost,
    )
    terms = tuple(
        tuple((f"{kind}.edge_{source}_{node}", name) for name, source in parse_node(text)) for text in options
    )
    return Choice(f"{kind}.node{node}", tuple(options), ordinal=False, terms=terms)


def _fixed(ops: Ops) -> Ops:
    return ops


def _block(
    name: str, before: int, last: int, channels: int, size: int, reduction: bool, halved: bool
) -> Block:
    kind = KINDS[reduction]
    nodes = tuple(f"{kind}.node{node}" for node in range(INPUTS, INPUTS + STEPS))
    first = Preprocess(before, channels, 2 * size if halved else size, halved)
    second = Preprocess(last, channels, size)
    parts = [
        Block(f"{name}.preprocess0", (), partial(_fixed, (first,))),
        Block(f"{name}.preprocess1", (), partial(_fixed, (second,))),
    ]
    for source, target in EDGES:
        stride = 2 if reduction and source < INPUTS else 1
        pixels = size // 2 if reduction and source >= INPUTS else size
        run = partial(_edge, channels, pixels, source, stride)
        parts.append(Block(f"{name}.edge_{source}_{target}", (f"{kind}.node{target}",), run))
    return Block(
        name,
        nodes,
        partial(_cell, before, last, channels, size, reduction, halved),
        tuple(parts),
        tuple(f"{kind}.edge_{source}_{target}" for source, target in EDGES),
    )


def _cell(
    before: int, last: int, channels: int, size: int, reduction: bool, halved: bool, *nodes: Option
) -> Ops:
    return (DartsCell(before, last, channels, size, reduction, halved, tuple(map(str, nodes))),)


def _edge(channels: int, size: int, source: int, stride: int, node: Option) -> Ops:
    """Return what the edge from a source runs under an option of its target."""
    for operation, start in parse_node(str(node)):
        if start == source and not is_free(operation, stride):
            return (Edge(channels, size, operation, stride),)
    return ()


# Genotypes ----------------------------------------------------------------------------------------------


def genotype(architecture: Architecture) -> str:
    """Return an architecture as the repository of DARTS prints it: `Genotype(normal=[(...), ...`."""
    concat = f"range({INPUTS}, {INPUTS + STEPS})"
    cells = []
    for kind in KINDS:
        nodes = [parse_node(str(architecture[f"{kind}.node{at}"])) for at in range(INPUTS, INPUTS + STEPS)]
        cells.append(f"{kind}={[edge for node in nodes for edge in node]!r}, {kind}_concat={concat}")
    return f"Genotype({', '.join(cells)})"


def from_genotype(space: SearchSpace, text: object) -> Architecture:
    """Return the architecture of a genotype, as the repositories of DARTS and its followers print it.

    Nothing is evaluated.

    Args:
        space: A DARTS space.
        text: `Genotype(normal=[(operation, source), ...], normal_concat=range(2, 6), reduce=...)`, with two
            edges a node; or the named tuple itself, which prints so.

    Raises:
        SpaceError: The text is no genotype, it joins other nodes than the four, reads one node twice, or the
            space lacks an operation.
    """
    settings: dict[str, Option] = {}
    for kind in KINDS:
        # The named tuple of other repositories prints as they write it.
        edges = _edges(str(text), kind)
        for at in range(STEPS):
            pair = edges[2 * at : 2 * at + 2]
            options = map(str, space.variables[f"{kind}.edge_0_{INPUTS + at}"].options)
            known = [name for name in options if name != "none"]
            for operation, source in pair:
                if operation not in known or not 0 <= source < INPUTS + at:
                    raise SpaceError(
                        f"node {INPUTS + at} of the {kind} cell reads nodes 0 to {INPUTS + at - 1} by one of "
                        f"{', '.join(known)}; got {(operation, source)}"
                    )
            if pair[0][1] == pair[1][1]:
                raise SpaceError(f"node {INPUTS + at} of the {kind} cell reads one node twice: {pair}")
            settings[f"{kind}.node{INPUTS + at}"] = node_text(pair)
    return space.architecture(settings)


def _edges(text: str, kind: str) -> list[tuple[str, int]]:
    """Return the eight edges of a cell of a genotype."""
    wrong = (
        f"a genotype has {kind}=[(operation, source), ...] of {2 * STEPS} edges and {kind}_concat of nodes "
    )
    concat = re.search(
        rf"\b{kind}_concat\s*=\s*(range\(\s*2\s*,\s*6\s*\)|\[\s*2\s*,\s*3\s*,\s*4\s*,\s*5\s*\])", text
    )
    match = re.search(rf"\b{kind}\s*=\s*(\[[^\]]*\])", text)
    if match is None or concat is None:
        raise SpaceError(f"{wrong}2 to 5; got {text!r}")
    try:
        found: Any = ast.literal_eval(match[1])
    except (ValueError, SyntaxError):
        found = None
    if (
        not isinstance(found, list)
        or len(found) != 2 * STEPS
        or not all(
            isinstance(edge, tuple) and len(edge) == 2 and isinstance(edge[0], str) and type(edge[1]) is int
            for edge in found
        )
    ):
        raise SpaceError(f"{wrong}2 to 5; got {match[1]!r}")
    return found


def drawing(architecture: Architecture | Mapping[str, Option]) -> str:
    """Return both cells as text, a line a node."""
    lines = []
    for kind in KINDS:
        lines.append(f"{kind} cell: 0 and 1 are the outputs of the two cells before; output: 2 to 5 joined")
        for node in range(INPUTS, INPUTS + STEPS):
            (one, first), (other, second) = parse_node(str(architecture[f"{kind}.node{node}"]))
            lines.append(f"  {node} = {one}({first}) + {other}({second})")
    return "\n".join(lines)
