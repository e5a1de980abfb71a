"""The distribution that a controller and a budget make over the rows of a space, and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.space import Codes
from strategies.controllers import NOT_TAKEN, Controller, follow


@dataclass(frozen=True, eq=False)
class Decisions:
    """Canonical rows as decisions of a policy.

    Attributes:
        taken: `(n, choices)`, `NOT_TAKEN` where a choice has no effect.
        allowed: `(n, choices, width)`: the options that were open at each choice.
    """

    taken: Codes
    allowed: NDArray[np.bool_]

    @property
    def made(self) -> NDArray[np.bool_]:
        """Where there was a decision, `(n, choices)`."""
        made: NDArray[np.bool_] = self.taken != NOT_TAKEN
        return made

    @property
    def possible(self) -> NDArray[np.bool_]:
        """Which rows took only options that were open, `(n,)`."""
        was_open = np.take_along_axis(self.allowed, self.taken[:, :, None], axis=2)[:, :, 0]
        holds: NDArray[np.bool_] = np.all(was_open | ~self.made, axis=1)
        return holds

    def __getitem__(self, rows: NDArray[np.bool_]) -> "Decisions":
        """Return some of the rows."""
        return Decisions(self.taken[rows], self.allowed[rows])


Weights = Callable[[Values], Values]
"""Given the log-probability of each option taken, `(n, choices)`: the weight of its gradient, same shape."""


@final
class Policy:
    """A distribution over the canonical rows of a space that fit their limits.

    Options of a choice are masked where `Cost.lower_bound` of some limited metric says that no completion
    fits. With one limit every draw therefore ends feasible, and the probabilities of all feasible rows sum
    to 1. Several limits, each of which can still be met, may be impossible to meet together: such draws are
    dropped, and the probabilities of the feasible rows sum to less.
    """

    def __init__(self, constraints: Constraints, controller: Controller) -> None:
        """Mask a controller."""
        self.controller = controller
        self._constraints = constraints
        space = constraints.space
        self._counts = [int(count) for count in space.counts]
        self._parents = {
            space.positions[parent] for choice in space.choices for parent, _ in choice.active_when
        }

    def draw(self, n: int, rng: np.random.Generator, *, sharpness: float = 1.0) -> Codes:
        """Draw `n` rows and return those that fit, which under one limit are all of them.

        Args:
            n: How many.
            rng: Source of randomness.
            sharpness: Factor of the scores: below 1 draws from a flatter distribution, 0 from the uniform
                one, over the same options.

        Returns:
            Canonical codes `(m, choices)`, m <= n.
        """
        space = self._constraints.space
        codes = np.zeros((n, len(self._counts)), dtype=np.int64)
        active = space.active(codes)

        def act(position: int, scores: Values) -> NDArray[np.int64]:
            nonlocal active
            open_ = self._open(codes[:, :position])
            # The greatest of scores with Gumbel noise is a draw from their softmax; masked ones never win.
            noisy = np.where(open_, sharpness * scores + rng.gumbel(size=scores.shape), -np.inf)
            effective = active[:, position]
            codes[:, position] = noisy.argmax(axis=1) * effective
            if position in self._parents:
                active = space.active(codes)
            return np.where(effective, codes[:, position], NOT_TAKEN)

        self.controller.scores(n, act)
        return codes[self._constraints.feasible(codes)]

    def decisions(self, codes: Codes) -> Decisions:
        """Return canonical rows as decisions, also rows that the policy did not draw."""
        active = self._constraints.space.active(codes)
        allowed = np.zeros((*codes.shape, max(self._counts)), dtype=np.bool_)
        for position, count in enumerate(self._counts):
            allowed[:, position, :count] = self._open(codes[:, :position])
        return Decisions(np.where(active, codes, NOT_TAKEN), allowed)

    def log_probabilities(self, decisions: Decisions) -> Values:
        """Return the log-probability of each decision given those before.

        Returns:
            `(n, choices)`: 0 where there was nothing to decide, -inf where the option was not open. The sum
            over choices is the log-probability of the row.
        """
        scores = self.controller.scores(len(decisions.taken), follow(decisions.taken))
        return _of_taken(_log_softmax(scores, decisions.allowed), decisions)

    def gradients(self, decisions: Decisions, weights: Weights, *, entropy: float = 0.0) -> list[Values]:
        """Return the ascent direction of the mean over rows, one array a parameter.

        It is the mean over rows of the sum over decisions of `weight * grad log-probability + entropy * grad
        H`, H being the entropy of the options that were open there. The weights are constants to it; all rows
        must be possible.
        """
        rows = np.arange(len(decisions.taken))[:, None]
        columns = np.arange(len(self._counts))

        def slopes(scores: Values) -> Values:
            logs = _log_softmax(scores, decisions.allowed)
            chances = np.exp(logs)
            finite = np.where(decisions.allowed, logs, 0.0)
            weight = weights(_of_taken(logs, decisions))[..., None]
            slope = -weight * chances
            slope[rows, columns, decisions.taken] += np.broadcast_to(weight[..., 0], decisions.taken.shape)
            surprise = -(chances * finite).sum(axis=2, keepdims=True)
            slope -= entropy * chances * (finite + surprise)
            result: Values = slope * (decisions.made[..., None] / len(decisions.taken))
            return result

        return self.controller.gradients(decisions.taken, slopes)

    def _open(self, prefix: Codes) -> NDArray[np.bool_]:
        """Return which options of the next choice can still end within every limit, `(n, options)`."""
        n, position = prefix.shape
        count = self._counts[position]
        fits = np.ones(n * count, dtype=np.bool_)
        if self._constraints.limits:
            extended = np.empty((n, count, position + 1), dtype=np.int64)
            extended[:, :, :position] = prefix[:, None]
            extended[:, :, position] = np.arange(count)
            rows = extended.reshape(n * count, position + 1)
            for metric, limit in self._constraints.limits.items():
                fits &= self._constraints.costs[metric].lower_bound(rows) <= limit
        return fits.reshape(n, count)


def _log_softmax(scores: Values, allowed: NDArray[np.bool_]) -> Values:
    """Return log-probabilities over the last axis, -inf where an option is not allowed."""
    masked = np.where(allowed, scores, -np.inf)
    greatest = masked.max(axis=-1, keepdims=True)
    masked -= np.where(np.isfinite(greatest), greatest, 0.0)
    total = np.exp(masked).sum(axis=-1, keepdims=True)
    result: Values = masked - np.log(np.where(total > 0, total, 1.0))
    return result


def _of_taken(logs: Values, decisions: Decisions) -> Values:
    # Where nothing was taken the last option is looked up, and dropped.
    found = np.take_along_axis(logs, decisions.taken[:, :, None], axis=2)[:, :, 0]
    return np.where(decisions.made, found, 0.0)
