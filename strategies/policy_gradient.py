"""How rewards move a policy: advantages over a moving baseline, REINFORCE and PPO, Adam."""

from typing import final

import numpy as np

from autocompress.cost import Values
from strategies.policy import Weights

# How many of the last rewards a new one is compared with.
COMPARED = 50


@final
class MovingBaseline:
    """Turns rewards into advantages by what was told before them, never by themselves.

    A reward becomes its utility: the share of the last rewards that it beats, less the share that beats it,
    -1..1. So neither the unit of the reward nor a network that learned nothing at all decides how far the
    policy moves. From it is subtracted the moving average of the utilities before, corrected for its start at
    0 as in Adam. A batch enters both after it was used: a baseline that holds a sample's own reward depends
    on the sample, and the expected gradient is no longer that of the expected utility. (The script published
    with NAS-Bench-201, `exps/NATS-algos/reinforce.py`, updates first, so that at least a tenth of every
    reward is subtracted from itself.)

    Source of ranks in place of rewards: Wierstra et al., Natural Evolution Strategies, JMLR 15, 2014, section
    3.1, fitness shaping.
    """

    def __init__(self, decay: float) -> None:
        """Start empty, the past weighing `decay` in the average at each batch."""
        self._decay = decay
        self._recent: Values = np.zeros(0)
        self._mean, self._batches = 0.0, 0

    def advantages(self, rewards: Values) -> Values:
        """Return `utility - baseline`, `(n,)`; 0 while there is nothing to compare with."""
        if not self._batches:
            return self._utilities(rewards)
        return self._utilities(rewards) - self._mean / (1 - self._decay**self._batches)

    def update(self, rewards: Values) -> None:
        """Let a batch enter the baseline, then what later rewards are compared with."""
        if len(self._recent):
            self._mean += (1 - self._decay) * (float(self._utilities(rewards).mean()) - self._mean)
            self._batches += 1
        self._recent = np.concatenate([self._recent, rewards])[-COMPARED:]

    def _utilities(self, rewards: Values) -> Values:
        if not len(self._recent):
            return np.zeros(len(rewards))
        utilities: Values = np.sign(rewards[:, None] - self._recent).mean(axis=1)
        return utilities


def reinforce_weights(advantages: Values) -> Weights:
    """Return the weights of REINFORCE: every decision of a row has the advantage of the row."""
    return lambda logs: np.broadcast_to(advantages[:, None], logs.shape)


def ppo_weights(advantages: Values, before: Values, *, clip: float) -> Weights:
    """Return the weights of PPO's clipped objective, whose gradient they give.

    Each decision contributes `min(r * A, clip(r, 1 - clip, 1 + clip) * A)`, r being its probability now
    over that before the batch was learned; beyond the clip, in the direction of the advantage, the gradient
    is zero.

    Source: Schulman et al., Proximal Policy Optimization, 2017, equation (7).

    Args:
        advantages: `(n,)`.
        before: Log-probabilities before the batch was learned, `(n, choices)`.
        clip: Epsilon.
    """

    def weights(logs: Values) -> Values:
        ratio = np.exp(logs - before)
        gain = np.broadcast_to(advantages[:, None], logs.shape)
        beyond = np.where(gain > 0, ratio > 1 + clip, ratio < 1 - clip)
        result: Values = np.where(beyond, 0.0, ratio * gain)
        return result

    return weights


@final
class Adam:
    """Adam on a list of arrays, ascending.

    Source: Kingma & Ba, ICLR 2015, algorithm 1 (beta 0.9 and 0.999, epsilon 1e-8).
    """

    def __init__(self, parameters: list[Values], learning_rate: float) -> None:
        """Ascend on these arrays, in place."""
        self._parameters, self._rate = parameters, learning_rate
        self._first = [np.zeros_like(parameter) for parameter in parameters]
        self._second = [np.zeros_like(parameter) for parameter in parameters]
        self._steps = 0

    def ascend(self, gradients: list[Values]) -> None:
        """Take one step."""
        self._steps += 1
        first_scale, second_scale = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        moments = zip(self._parameters, gradients, self._first, self._second, strict=True)
        for parameter, gradient, first, second in moments:
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            parameter += self._rate * (first / first_scale) / (np.sqrt(second / second_scale) + 1e-8)
