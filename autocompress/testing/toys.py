"""Toy spaces with conditions and everything around them, small enough to check by enumeration."""

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from autocompress.budget import Budget, Constraints
from autocompress.compare.problem import Problem
from autocompress.cost import OPERATION_METRICS, Values, operation_cost
from autocompress.errors import EvaluationError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool, Ops, SqueezeExcite
from autocompress.space import Block, Choice, Codes, Option, SearchSpace
from autocompress.trial import Batch, Outcome

RESOLUTIONS = (8, 12)
KERNELS = (1, 3, 5)
CHANNELS, EXPANDS = 4, (2, 4)


def _convolution(index: int, resolution: Option, depth: Option, kernel: Option) -> Ops:
    if index > int(depth):
        return ()
    return (Conv2d(4, 4, int(resolution), int(resolution), kernel=int(kernel), activation="relu"),)


def toy_space(blocks: int = 6) -> SearchSpace:
    """Make a chain of up to `blocks` convolutions: elastic resolution, depth and kernels.

    A kernel has an effect only where the depth reaches its block, so there are
    `2 * sum over d = 1..blocks of 3^d` networks: 2,184 by default, 24 with two blocks.
    """
    depths = tuple(range(1, blocks + 1))
    choices = [Choice("resolution", RESOLUTIONS), Choice("depth", depths)]
    parts = []
    for index in depths:
        condition = () if index == 1 else (("depth", depths[index - 1 :]),)
        choices.append(Choice(f"block{index}.kernel", KERNELS, active_when=condition))
        names = ("resolution", "depth", f"block{index}.kernel")
        parts.append(Block(f"block{index}", names, partial(_convolution, index)))
    return SearchSpace("toy", tuple(choices), tuple(parts), settings={"blocks": blocks})


def toy_classifier_space(blocks: int = 2, classes: int = 3) -> SearchSpace:
    """Make a classifier of images `(3, 12, 12)` of up to `blocks` inverted residuals with squeeze-excite.

    Resolution, depth, kernels and widths are elastic. There are `2 * sum over d = 1..blocks of 6^d` networks:
    84 by default.
    """
    depths = tuple(range(1, blocks + 1))
    choices = [Choice("resolution", RESOLUTIONS), Choice("depth", depths)]
    parts = [Block("stem", ("resolution",), _stem)]
    for index in depths:
        condition = () if index == 1 else (("depth", depths[index - 1 :]),)
        kernel, expand = f"block{index}.kernel", f"block{index}.expand"
        choices.append(Choice(kernel, KERNELS, active_when=condition))
        choices.append(Choice(expand, EXPANDS, active_when=condition))
        names = ("resolution", "depth", kernel, expand)
        parts.append(Block(f"block{index}", names, partial(_inverted_residual, index)))
    parts.append(Block("head", ("resolution",), partial(_head, classes)))
    settings = {"blocks": blocks, "classes": classes}
    return SearchSpace("toy_classifier", tuple(choices), tuple(parts), settings=settings)


def _stem(resolution: Option) -> Ops:
    side = int(resolution)
    return (Conv2d(3, CHANNELS, side, side, kernel=3, stride=2, activation="hard_swish"),)


def _inverted_residual(index: int, resolution: Option, depth: Option, kernel: Option, expand: Option) -> Ops:
    if index > int(depth):
        return ()
    side, middle = int(resolution) // 2, CHANNELS * int(expand)
    return (
        Conv2d(CHANNELS, middle, side, side, activation="relu"),
        Conv2d(middle, middle, side, side, kernel=int(kernel), groups=middle, activation="relu"),
        SqueezeExcite(middle, side, side, middle // 4),
        Conv2d(middle, CHANNELS, side, side),
        Add(CHANNELS, side, side),
    )


def _head(classes: int, resolution: Option) -> Ops:
    side = int(resolution) // 2
    return (GlobalAvgPool(CHANNELS, side, side), Linear(CHANNELS, classes))


def toy_width_space(classes: int = 3) -> SearchSpace:
    """Make a classifier of images `(3, 8, 8)` whose stem, stage, middle, hidden and last widths are elastic.

    There are `2 * 3 * 2 * 2 * (1 + 2 * 2) = 120` networks.
    """
    choices = (
        Choice("depth", (1, 2)),
        Choice("stem.width", (4, 6)),
        Choice("stage.width", (2, 4, 8)),
        Choice("block1.expand", (1, 2)),
        Choice("block2.kernel", (1, 3), active_when=(("depth", (2,)),)),
        Choice("block2.expand", (1, 2), active_when=(("depth", (2,)),)),
        Choice("head.width", (3, 5)),
    )
    blocks = (
        Block("stem", ("stem.width",), _wide_stem),
        Block("block1", ("stem.width", "stage.width", "block1.expand"), _widening),
        Block("block2", ("depth", "stage.width", "block2.kernel", "block2.expand"), _wide_residual),
        Block("head", ("stage.width", "head.width"), partial(_wide_head, classes)),
    )
    return SearchSpace("toy_widths", choices, blocks, settings={"classes": classes})


def _wide_stem(width: Option) -> Ops:
    return (
        Conv2d(3, int(width), 8, 8, kernel=3, bias=True, norm=False, activation="sigmoid"),
        MaxPool(int(width), 8, 8),
    )


def _widening(stem: Option, width: Option, expand: Option) -> Ops:
    middle = int(stem) * int(expand)
    return (
        Conv2d(int(stem), middle, 4, 4, activation="hard_swish"),
        Conv2d(middle, middle, 4, 4, kernel=3, groups=middle, activation="relu"),
        Conv2d(middle, int(width), 4, 4),
    )


def _wide_residual(depth: Option, width: Option, kernel: Option, expand: Option) -> Ops:
    if int(depth) < 2:
        return ()
    channels, middle = int(width), int(width) * int(expand)
    return (
        Conv2d(channels, middle, 4, 4, activation="relu"),
        Conv2d(middle, middle, 4, 4, kernel=int(kernel), groups=middle, activation="relu"),
        SqueezeExcite(middle, 4, 4, middle // 2),
        Conv2d(middle, channels, 4, 4),
        Add(channels, 4, 4),
    )


def _wide_head(classes: int, width: Option, features: Option) -> Ops:
    return (
        GlobalAvgPool(int(width), 4, 4),
        Linear(int(width), int(features), activation="hard_sigmoid"),
        Linear(int(features), classes),
    )


def toy_constraints(budget: str = "macs=50%", *, blocks: int = 6) -> Constraints:
    """Resolve a budget on the toy space; its costs are MACs, parameters and bytes.

    Raises:
        InfeasibleBudgetError: Nothing fits.
    """
    space = toy_space(blocks)
    costs = [operation_cost(space, metric) for metric in OPERATION_METRICS]
    return Budget.parse(budget).resolve(space, costs)


def tiny_constraints(options: Sequence[int]) -> Constraints:
    """Return a space of a few choices with so many options each, all of them feasible."""
    choices = tuple(
        Choice(f"kernel{index}", tuple(range(1, 2 * count, 2))) for index, count in enumerate(options)
    )
    blocks = tuple(Block(choice.name, (choice.name,), _kernel) for choice in choices)
    space = SearchSpace("tiny", choices, blocks, settings={"options": list(options)})
    costs = [operation_cost(space, metric) for metric in OPERATION_METRICS]
    return Budget.parse("macs=100%").resolve(space, costs)


def _kernel(kernel: Option) -> Ops:
    return (Conv2d(CHANNELS, CHANNELS, 8, 8, kernel=int(kernel)),)


def every_network(space: SearchSpace) -> Codes:
    """Return all canonical rows of a small space, in lexicographic order."""
    rows = np.array(list(itertools.product(*(range(int(count)) for count in space.counts))), dtype=np.int64)
    canonical: Codes = rows[(rows == space.canonical(rows)).all(axis=1)]
    return canonical


def toy_score(space: SearchSpace, codes: Codes) -> Values:
    """Return a stand-in for accuracy, 0..1: larger networks are better, with smaller and smaller gains."""
    size = (codes * space.active(codes)).sum(axis=1)
    score: Values = np.sqrt(size / max(1.0, float((space.counts - 1).sum())))
    return score


class ToyEvaluator:
    """Scores as `toy_score` does, each network for as many simulated seconds as it has genes."""

    paid = True

    def __init__(self, space: SearchSpace, *, failing: bool = False) -> None:
        """Make it; one that fails does so for every third network, by the sum of its codes."""
        self._space, self._failing = space, failing

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return `accuracy` and `simulated_s`, each `(n,)`.

        Raises:
            EvaluationError: If it fails.
        """
        if self._failing and (codes.sum(axis=1) % 3 == 0).any():
            raise EvaluationError("out of luck")
        seconds = np.full(len(codes), float(codes.shape[1]))
        return {"accuracy": toy_score(self._space, codes), "simulated_s": seconds}


def toy_problem(budget: str = "macs=50%", blocks: int = 6, failing: bool = False) -> Problem:
    """Return a problem whose optimum is known by enumeration, for `autocompress compare`."""
    constraints = toy_constraints(budget, blocks=blocks)
    networks = every_network(constraints.space)
    best = toy_score(constraints.space, networks[constraints.feasible(networks)]).max()
    return Problem(
        name=f"toy of {blocks} blocks, {budget}",
        constraints=constraints,
        evaluator=ToyEvaluator(constraints.space, failing=failing),
        optimum=float(best),
        simulated=True,
    )


def toy_batch(
    constraints: Constraints,
    codes: Codes,
    outcome: Outcome = Outcome.MEASURED,
    *,
    objective: str = "accuracy",
) -> Batch:
    """Return what an engine would tell of these rows if all had this outcome."""
    measured = outcome == Outcome.MEASURED
    values = toy_score(constraints.space, codes) if measured else np.full(len(codes), np.nan)
    outcomes = np.full(len(codes), outcome, dtype=np.int8)
    return Batch(codes, constraints.price(codes), {objective: values}, outcomes)
