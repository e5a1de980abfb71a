"""A chain of convolutions whose widths are chosen, with what options are worth; for tests of strategies."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.ops import Conv2d, Ops
from autocompress.space import Block, Choice, Option, SearchSpace

LAYERS, WIDTHS = 4, (4, 8, 12, 16)


def _layer(index: int, entering: Option, leaving: Option) -> Ops:
    return (Conv2d(int(entering), int(leaving), 8, 8, kernel=3),)


def _first(leaving: Option) -> Ops:
    return (Conv2d(3, int(leaving), 8, 8, kernel=3),)


def _last(entering: Option) -> Ops:
    return (Conv2d(int(entering), 10, 8, 8),)


def chain(scores: Sequence[Sequence[float]]) -> SearchSpace:
    """Return the space; scores of the units of each layer, 16 each, from the most important down."""
    choices = tuple(Choice(f"layer{index}", WIDTHS) for index in range(LAYERS))
    blocks = [Block("first", (choices[0].name,), _first)]
    for index in range(1, LAYERS):
        names = (choices[index - 1].name, choices[index].name)
        blocks.append(Block(f"between{index}", names, partial(_layer, index)))
    blocks.append(Block("last", (choices[-1].name,), _last))
    worth = {
        choice.name: tuple(float(np.sum(units[:width])) for width in WIDTHS)
        for choice, units in zip(choices, scores, strict=True)
    }
    return SearchSpace("chain", choices, tuple(blocks), worth=worth)


def limited(space: SearchSpace, budget: str = "macs=40%") -> Constraints:
    """Return a space under a budget on MACs."""
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


def random_scores(seed: int) -> list[list[float]]:
    """Return falling scores of 16 units for each layer."""
    rng = np.random.default_rng(seed)
    return [sorted(rng.gamma(2, size=16), reverse=True) for _ in range(LAYERS)]
