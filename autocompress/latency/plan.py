"""What is measured of a space: distinct blocks and operations, or a grid of widths, and whole networks."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

from autocompress.cost import AdditiveCost, operation_cost
from autocompress.errors import TableError
from autocompress.latency.runtime import Blocks
from autocompress.latency.widths import Steps, WidthGrid, family_of, make_grid
from autocompress.ops import Ops, block_key
from autocompress.space import Codes, SearchSpace

CANDIDATES: Final = 2000
MAX_ROWS: Final = 20_000
HELD_OUT_ROWS: Final = 100

Asked = Literal["auto", "block", "op"]
"""Which granularity to measure; `auto` measures both."""


@dataclass(frozen=True)
class NetworkKeys:
    """A network as rows of a table.

    Attributes:
        name: Among samples; `network_name`.
        blocks: Keys of the operations of each of its priced blocks.
    """

    name: str
    blocks: tuple[tuple[str, ...], ...]


def distinct_blocks(space: SearchSpace) -> dict[str, Ops]:
    """Return each different active block of a space once, by its key."""
    result: dict[str, Ops] = {}
    known: set[Ops] = {()}
    for block in space.priced_blocks:
        for setting in space.block_settings(block):
            ops = block.operations(*setting)
            if ops not in known:
                known.add(ops)
                result.setdefault(block_key(ops), ops)
    return result


def check_networks(
    space: SearchSpace, n: int = 40, *, seed: int = 0, cost: AdditiveCost | None = None
) -> Codes:
    """Return different architectures, evenly spread in a cost from the smallest to the largest one.

    Random networks cover a narrow middle; here half of the candidates are drawn between random ones and the
    smallest or the largest, each with its own share of genes. Networks that are priced for operations which
    a runtime leaves out (`CellSpec.runs_all`) would tell nothing about the prices of those that are run.

    Args:
        space: Where they come from.
        n: How many; fewer are returned if the space has fewer, or the candidates do.
        seed: Of the candidates.
        cost: In which they are spread; MACs by default.

    Returns:
        `(m, choices)`, from least to most of it; with m >= 2 the least and the most of all candidates are
        among them: of spaces without cells, the smallest and the largest network.
    """
    if n < 1:
        return np.zeros((0, len(space.choices)), dtype=np.int64)
    rng = np.random.default_rng(seed)
    drawn = space.sample(CANDIDATES, rng)
    extremes = np.concatenate([space.smallest(), space.largest()])
    towards = extremes[rng.integers(2, size=CANDIDATES // 2)]
    share = rng.random((CANDIDATES // 2, 1))
    moved = np.where(rng.random(towards.shape) < share, towards, drawn[: len(towards)])
    pool = np.unique(space.canonical(np.concatenate([extremes, drawn, moved])), axis=0)
    pool = pool[[all(cell.runs_all for cell in space.cells(row)) for row in pool]]
    if not len(pool):
        return pool
    spread = (cost or operation_cost(space, "macs")).of(pool)
    free = np.ones(len(pool), dtype=np.bool_)
    # Of equals the first is the smallest network and the last the largest: rows are in order.
    least, most = int(spread.argmin()), len(pool) - 1 - int(spread[::-1].argmax())
    chosen = list(dict.fromkeys([least, most][:n]))
    free[chosen] = False
    for goal in np.linspace(spread[least], spread[most], n)[1:-1]:
        if not free.any():
            break
        index = int(np.where(free, np.abs(spread - goal), np.inf).argmin())
        free[index] = False
        chosen.append(index)
    return pool[sorted(chosen, key=lambda index: float(spread[index]))]


@dataclass(frozen=True)
class Plan:
    """What is measured of a space.

    Attributes:
        rows: Blocks, operations alone, or both, by key.
        networks: Whole networks that correct and check the sums of rows.
        codes: The same networks as rows of codes.
        keys: And as rows of a table.
        grid: If widths are interpolated, where they are measured.
        held_out: Keys of rows that check the interpolation and never take part in it.
        priced: How many different operations the grid prices.
    """

    rows: Mapping[str, Ops]
    networks: tuple[Blocks, ...]
    codes: Codes
    keys: tuple[NetworkKeys, ...]
    grid: WidthGrid | None = None
    held_out: tuple[str, ...] = ()
    priced: int = 0


def make_plan(space: SearchSpace, granularity: Asked, networks: int, seed: int) -> Plan:
    """Return what has to be measured to price a space.

    Args:
        space: Its distinct blocks or operations become rows.
        granularity: `"block"`, `"op"`, or `"auto"` for both.
        networks: How many whole networks; 0 for none.
        seed: Of the networks.

    Raises:
        TableError: `networks` is 1 or negative, or the granularity is another.
    """
    if networks < 0 or networks == 1:
        raise TableError(f"networks must be 0 or at least 2, got {networks}")
    if granularity not in get_args(Asked):
        raise TableError(f"granularity must be one of {', '.join(get_args(Asked))}, got {granularity!r}")
    blocks = distinct_blocks(space)
    rows = dict(blocks) if granularity in ("auto", "block") else {}
    if granularity in ("auto", "op"):
        rows.update({block_key((op,)): (op,) for ops in blocks.values() for op in ops})
    if len(rows) > MAX_ROWS:
        raise TableError(
            f"space {space.name!r} has {len(rows)} different blocks and operations; at most {MAX_ROWS} are "
            "measured one by one: measure a grid of widths instead (profile.widths: grid)"
        )
    codes = check_networks(space, networks, seed=seed)
    return Plan(rows, *networks_of(space, codes))


def plan_widths(space: SearchSpace, networks: int, seed: int, *, knots: int, steps: Steps) -> Plan:
    """Return what has to be measured to price a space whose operations differ in widths above all.

    Args:
        space: Its operations are measured on a grid of their widths.
        networks: How many whole networks; 0 for none.
        seed: Of the networks and of the rows that check the grid.
        knots: Measured widths an axis.
        steps: Of the device.

    Raises:
        TableError: `networks` is 1 or negative, or there are too many rows.
    """
    if networks < 0 or networks == 1:
        raise TableError(f"networks must be 0 or at least 2, got {networks}")
    ops = {op.key: op for ops in distinct_blocks(space).values() for op in ops}
    grid = make_grid(ops.values(), knots=knots, steps=steps)
    # What the grid does not know, operations of a user's own, is measured as it is.
    others = {key: op for key, op in ops.items() if family_of(op) not in grid.knots}
    if grid.size + len(others) > MAX_ROWS:
        raise TableError(
            f"a grid of {knots} knots an axis has {grid.size + len(others)} rows in space {space.name!r}; at "
            f"most {MAX_ROWS} are measured: use fewer knots"
        )
    rows = grid.operations(ops.values()) | others
    between = [key for key in ops if key not in rows]
    order = np.random.default_rng(seed).permutation(len(between))[:HELD_OUT_ROWS]
    held_out = tuple(between[index] for index in sorted(order))
    codes = check_networks(space, networks, seed=seed)
    return Plan(
        {key: (op,) for key, op in rows.items()} | {key: (ops[key],) for key in held_out},
        *networks_of(space, codes),
        grid,
        held_out,
        len(ops),
    )


def row_name(key: str) -> str:
    """Name a row among samples."""
    return f"block {key}"


def network_name(network: Blocks) -> str:
    """Name a network by what it runs, so that another space of the same name cannot take its samples."""
    text = "\n".join(block_key(ops) for _, ops in network)
    return f"network {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def networks_of(
    space: SearchSpace, codes: Codes
) -> tuple[tuple[Blocks, ...], Codes, tuple[NetworkKeys, ...]]:
    """Return what a plan says of networks: their operations, the codes that were given, and their keys."""
    networks = tuple(space.operations(row) for row in codes)
    keys = tuple(
        NetworkKeys(
            network_name(network),
            tuple(tuple(op.key for op in ops) for _, ops in space.priced_operations(row)),
        )
        for network, row in zip(networks, codes, strict=True)
    )
    return networks, codes, keys
