"""Widths from importance alone: a threshold for all layers, the proven optimum of the sum, all above zero.

What the options of a choice are worth says the space (`SearchSpace.worth`): for channels, the sum of the
scores of those that are kept. Nothing is evaluated to find the network; one is proposed.
"""

from typing import Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.errors import InfeasibleBudgetError, RecipeError, SpaceError
from autocompress.exact import separable, solve
from autocompress.space import Codes, SearchSpace
from autocompress.trial import Batch

Method = Literal["threshold", "exact", "nonzero"]


@final
class Importance:
    """Keeps what is worth most: one network, found without evaluations.

    Sources: a global threshold, Liu et al., "Learning Efficient Convolutional Networks through Network
    Slimming", ICCV 2017, section 3; the optimum under a budget as in Yao et al., HAWQ-V3, ICML 2021, there
    of bit widths.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        method: Method = "threshold",
    ) -> None:
        """Find the network.

        Args:
            constraints: Space, costs and limits; the options of the space have a worth.
            seed: Not used: nothing is random.
            objective: Not used.
            method: `threshold` goes from the unit that is worth most to the one that is worth least, and then
                adds what still fits; `exact` maximises the sum of what is kept; `nonzero` keeps all that is
                worth more than zero, in the least widths that hold it, whatever else would fit: for weights
                of which training made units zero.

        Raises:
            RecipeError: There is no such method.
            SpaceError: The options of the space have no worth.
            InfeasibleBudgetError: Nothing fits, or with `nonzero`, what is worth more than zero does not.
        """
        if method not in get_args(Method):
            raise RecipeError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        constraints.check_feasible()
        worth = worth_of(constraints.space)
        if method == "threshold":
            self._found = within(constraints, worth)
        elif method == "nonzero":
            self._found = above_zero(constraints, worth)
        else:
            value = separable(constraints.space, worth, "importance")
            self._found = solve(value, constraints, sense="maximize").codes
        self._asked = False

    def ask(self, n: int) -> Codes:
        """Propose the network once."""
        rows = self._found[: 0 if self._asked else n]
        self._asked = self._asked or len(rows) > 0
        return rows

    def tell(self, batch: Batch) -> None:
        """Learn nothing."""


def above_zero(constraints: Constraints, worth: list[NDArray[np.float64]]) -> Codes:
    """Return the network of the least options that are worth as much as the largest, `(1, choices)`.

    Raises:
        InfeasibleBudgetError: It does not fit.
    """
    space = constraints.space
    # Sums of the same numbers and some zeros may differ in their last bits.
    least = [int(np.flatnonzero(values >= values.max() * (1 - 1e-12))[0]) for values in worth]
    found = space.canonical(np.array([least], dtype=space.smallest().dtype))
    if not constraints.feasible(found)[0]:
        needed = {
            m: float(cost[0]) for m, cost in constraints.price(found).items() if m in constraints.limits
        }
        nearest = {m: max(limit, needed[m]) for m, limit in constraints.limits.items()}
        shown = ", ".join(f"{m} {needed[m]:.6g} of {limit:.6g}" for m, limit in constraints.limits.items())
        raise InfeasibleBudgetError(
            f"what is worth more than zero does not fit the budget: it needs {shown}; raise the budget, make "
            "more units zero (`autocompress sparsify`), or take method threshold",
            nearest,
        )
    return found


def worth_of(space: SearchSpace) -> list[NDArray[np.float64]]:
    """Return what the options of each choice are worth, `(options,)` a choice.

    Raises:
        SpaceError: The space does not say.
    """
    missing = [choice.name for choice in space.choices if choice.name not in space.worth]
    if missing:
        raise SpaceError(
            f"options of {missing[0]!r} of space {space.name!r} have no worth: strategies by importance need "
            "a space whose options have one, such as channels"
        )
    return [np.array(space.worth[choice.name], dtype=np.float64) for choice in space.choices]


def gains_of(space: SearchSpace, worth: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return what one more unit is worth at each step from an option to the next, never rising.

    Options are numbers of units where they are integers; else each is one more.
    """
    gains = []
    for choice, values in zip(space.choices, worth, strict=True):
        sizes: Any = choice.options if all(isinstance(o, int) for o in choice.options) else range(len(values))
        each = np.diff(values) / np.maximum(np.diff(np.array(sizes, dtype=np.float64)), 1e-12)
        gains.append(np.minimum.accumulate(each))
    return gains


def within(constraints: Constraints, worth: list[NDArray[np.float64]]) -> Codes:
    """Return the network of the lowest threshold that fits, filled up with what else fits, `(1, choices)`."""
    space = constraints.space
    gains = gains_of(space, worth)
    steps = [(float(g), position) for position, each in enumerate(gains) for g in each]
    order = [position for _, position in sorted(steps, key=lambda step: (-step[0], step[1]))]
    start = space.smallest()[0]
    rows = np.tile(start, (len(order) + 1, 1))
    for number, position in enumerate(order, start=1):
        rows[number:, position] += 1
    fits = constraints.feasible(space.canonical(rows))
    if not fits.any():
        # The cheapest network by these limits is not the one of the least widths.
        return constraints.sample(1, np.random.default_rng(0))
    last = int(np.flatnonzero(fits).max())
    best, blocked = rows[last].copy(), set()
    for position in order[last:]:
        if position in blocked:
            continue
        best[position] += 1
        if not constraints.feasible(space.canonical(best[None]))[0]:
            best[position] -= 1
            blocked.add(position)
    return space.canonical(best[None])
