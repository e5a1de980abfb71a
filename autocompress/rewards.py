"""Rewards of reinforcement learning: accuracy and one cost as a single number, larger is better.

They steer a search inside its budget or towards a target; that no result exceeds the budget is never left
to them: limits are kept by what a strategy proposes.

Sources: MnasNet is Tan et al., CVPR 2019, section 3.1, equations (2) and (3). TuNAS is Bender et al., "Can
weight sharing outperform random architecture search?", CVPR 2020; in its repository (google-research/tunas)
`reward_for_single_cost_model` computes all three.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from autocompress.cost import Values
from autocompress.errors import RecipeError

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


mnas_soft: Reward = partial(mnasnet, alpha=-0.07, beta=-0.07)
"""A network of twice the latency is worth as much if its accuracy is 5 % higher, relatively."""

mnas_hard: Reward = partial(mnasnet, alpha=0.0, beta=-1.0)
"""The accuracy up to the target; above it, less in proportion to the excess."""

REWARDS: Mapping[str, Reward] = {
    "accuracy": plain,
    "mnas_soft": mnas_soft,
    "mnas_hard": mnas_hard,
    "tunas": tunas,
}
"""By the name that recipes give them; all but `accuracy` need a cost and its target."""
