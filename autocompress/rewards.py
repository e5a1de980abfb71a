"""Rewards of reinforcement learning: accuracy and one cost as a single number, larger is better.

They steer a search inside its budget or towards a target; that no result exceeds the budget is never left
to them: limits are kept by what a strategy proposes.

Sources: MnasNet is Tan et al., CVPR 2019, section 3.1, equations (2) and (3). TuNAS is Bender et al., "Can
weight sharing outperform random architecture search?", CVPR 2020; in its repository (google-research/tunas)
`reward_for_single_cost_model` computes all three. AMC is He et al., ECCV 2018, section 3.1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import RecipeError
from autocompress.proposals import check_one_of, check_positive

Reward = Callable[[Values, Values, float], Values]
"""Of accuracy `(n,)`, cost `(n,)` and the target of the cost in its unit: `(n,)`, larger is better."""

TUNAS_SLOPE = -0.1
"""For accuracies in 0..1: the default of `mobile_architecture_search.py` in the repository of TuNAS."""


def plain(accuracy: Values, cost: Values, target: float) -> Values:
    """Return the accuracy, whatever the cost: where the budget is kept by masking, this is enough."""
    del cost, target
    return accuracy


def mnasnet(accuracy: Values, cost: Values, target: float, *, alpha: float, beta: float) -> Values:
    """Return `accuracy * (cost / target)^w`, w being alpha up to the target and beta above it.

    Args:
        accuracy: `(n,)`, 0 or more, in any unit.
        cost: `(n,)`, positive.
        target: Positive, in the unit of the cost.
        alpha: Exponent at or below the target.
        beta: Exponent above the target.

    Raises:
        RecipeError: An accuracy is negative: the slower of two networks would then be the better one.
    """
    if (accuracy < 0).any():
        raise RecipeError(
            f"a MnasNet reward multiplies the accuracy, which must be 0 or more, got {accuracy.min():g}; "
            "use the reward 'tunas' or 'accuracy' for an objective that can be negative"
        )
    ratio = cost / target
    reward: Values = accuracy * ratio ** np.where(ratio <= 1, alpha, beta)
    return reward


def tunas(accuracy: Values, cost: Values, target: float, *, slope: float = TUNAS_SLOPE) -> Values:
    """Return `accuracy + slope * |cost / target - 1|`: pulls the cost to its target from both sides.

    Args:
        accuracy: `(n,)`.
        cost: `(n,)`.
        target: Positive, in the unit of the cost.
        slope: Negative (beta), in the unit of the accuracy; multiply it by 100 for percent.
    """
    reward: Values = accuracy + slope * np.abs(cost / target - 1)
    return reward


def log_cost(accuracy: Values, cost: Values, target: float) -> Values:
    """Return `-(1 - accuracy) * ln(cost)`: the error, weighed by the logarithm of what it costs.

    The published two are this with `macs` (R_FLOPs, `acc_flops_reward` in its repository) and with `params`
    (R_Param). They look for small networks without a budget.

    Args:
        accuracy: `(n,)`, at most 1.
        cost: `(n,)`, above 1 in its unit.
        target: Not used.

    Raises:
        RecipeError: An accuracy is above 1, or a cost at most 1: the larger of two networks would win.
    """
    del target
    if (accuracy > 1).any() or (cost <= 1).any():
        raise RecipeError(
            "the reward 'log_cost' needs accuracies up to 1 (not percent) and costs above 1 in their unit, "
            f"got accuracy {accuracy.max():g} and cost {cost.min():g}; use the reward 'tunas' or 'mnas_soft'"
        )
    reward: Values = -(1 - accuracy) * np.log(cost)
    return reward


mnas_soft: Reward = partial(mnasnet, alpha=-0.07, beta=-0.07)
"""A network of twice the latency is worth as much if its accuracy is 5 % higher, relatively."""

mnas_hard: Reward = partial(mnasnet, alpha=0.0, beta=-1.0)
"""The accuracy up to the target; above it, less in proportion to the excess."""

REWARDS: Mapping[str, Reward] = {
    "accuracy": plain,
    "mnas_soft": mnas_soft,
    "mnas_hard": mnas_hard,
    "tunas": tunas,
    "log_cost": log_cost,
}
"""By the name that recipes give them; all but `accuracy` need a cost, all but it and `log_cost` a target."""


@dataclass(frozen=True)
class PricedReward:
    """The reward of a recipe, with the cost that it speaks of.

    Attributes:
        function: Of accuracies, costs and target.
        cost: Name of the metric; empty where only the accuracy counts.
        target: Of that cost, in its unit.
    """

    function: Reward
    cost: str
    target: float

    @classmethod
    def of(
        cls, constraints: Constraints, name: str, cost: str | None, target: float | None
    ) -> "PricedReward":
        """Make it of what a recipe says.

        Args:
            constraints: Has the costs; their limits are the targets unless others are given.
            name: Of `REWARDS`.
            cost: By default `latency_ms`.
            target: Of the cost.

        Raises:
            RecipeError: There is no such reward or cost, or a target is missing or has no meaning.
        """
        function = REWARDS[check_one_of("reward", name, tuple(REWARDS))]
        if function is plain:
            if cost is not None or target is not None:
                raise RecipeError(
                    f"reward {name!r} has neither a cost nor a target, got cost={cost!r}, target={target!r}; "
                    "the budget is kept in any case"
                )
            return cls(function, "", 1.0)
        cost = check_one_of("cost", "latency_ms" if cost is None else cost, tuple(constraints.costs))
        if function is log_cost:
            if target is not None:
                raise RecipeError(f"reward {name!r} has no target, got target={target!r}")
            return cls(function, cost, 1.0)
        if target is None:
            if cost not in constraints.limits:
                raise RecipeError(
                    f"reward {name!r} needs a target for {cost}: limit it in the budget or give target=..."
                )
            target = constraints.limits[cost]
        return cls(function, cost, check_positive("target", target))

    def __call__(self, accuracy: Values, costs: Mapping[str, Values], usable: NDArray[np.bool_]) -> Values:
        """Return the rewards of the usable rows, whose accuracies are given."""
        cost = np.asarray(costs[self.cost])[usable] if self.cost else accuracy
        return self.function(accuracy, cost, self.target)
