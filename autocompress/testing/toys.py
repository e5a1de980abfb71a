"""Toy spaces with conditions and everything around them, small enough to check by enumeration."""

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from autocompress.budget import Budget, Constraints
from autocompress.compare.problem import Problem
from autocompress.cost import OPERATION_METRICS, Values, operation_cost
from autocompress.errors import EvaluationError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, SqueezeExcite
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
