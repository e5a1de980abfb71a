"""A space of 18 networks with 6 distinct blocks, and a clock that reads prices instead of time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from autocompress.latency.runtime import Blocks
from autocompress.latency.target import Target
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, block_key
from autocompress.space import Block, Choice, Option, SearchSpace


def stem(width: Option) -> Ops:
    return (
        Conv2d(1, 8, 8, 8, kernel=3, activation="relu"),
        Conv2d(8, int(width), 8, 8),
        Conv2d(int(width), 8, 8, 8),
    )


def body(index: int, depth: Option, kernel: Option) -> Ops:
    if index > int(depth):
        return ()
    return (Conv2d(8, 8, 8, 8, kernel=int(kernel), groups=8), Conv2d(8, 8, 8, 8), Add(8, 8, 8))


def first(depth: Option, kernel: Option) -> Ops:
    return body(1, depth, kernel)


def second(depth: Option, kernel: Option) -> Ops:
    return body(2, depth, kernel)


def head() -> Ops:
    return (GlobalAvgPool(8, 8, 8), Linear(8, 3))


@pytest.fixture
def space() -> SearchSpace:
    kernels = (3, 5)
    return SearchSpace(
        "toy",
        (
            Choice("depth", (1, 2)),
            Choice("width", (8, 16, 24)),
            Choice("first.kernel", kernels),
            Choice("second.kernel", kernels, active_when=(("depth", (2,)),)),
        ),
        (
            Block("stem", ("width",), stem),
            Block("first", ("depth", "first.kernel"), first),
            Block("second", ("depth", "second.kernel"), second),
            Block("head", (), head),
        ),
    )


@dataclass
class Prepared:
    """What the fake runtime builds: it knows its blocks, and counts how often it runs."""

    blocks: Blocks
    runs: int = 0

    def __call__(self) -> None:
        self.runs += 1


@dataclass
class FakeClock:
    """Time by price: a block takes `1 + MACs / 10^4` ms, and each run 0.5 ms more, of a block or network."""

    timed: list[str] = field(default_factory=list)
    stop_after: int | None = None

    def prepare(self, blocks: Blocks, target: Target) -> Prepared:
        return Prepared(blocks)

    def timer(self, run: Callable[[], object]) -> float:
        assert isinstance(run, Prepared)
        if self.stop_after is not None and len(self.timed) >= self.stop_after:
            raise KeyboardInterrupt
        run()
        self.timed.append(" | ".join(block_key(ops) for _, ops in run.blocks))
        return 0.5 + sum(price_ms(ops) for _, ops in run.blocks)


def price_ms(ops: Ops) -> float:
    return 1 + sum(op.macs for op in ops) / 1e4


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
