"""What AMC and HAQ share: an agent walks through the choices, a network an episode, and learns in between."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from autocompress.cost import Values
from autocompress.ddpg import DDPG, Transition
from autocompress.proposals import Asked, fresh_sample, one_by_one
from autocompress.ratios import RatioProcess, Walk
from autocompress.space import Codes
from autocompress.trial import Batch

# The policy does not change before it is told: more rows of one policy are worth less and less.
MOST_WAITING = 64
# Where what is drawn was asked before, noise doubles until it is nearly uniform; then rows are random.
ATTEMPTS, LEAST_SIGMA = 8, 0.01


@dataclass(frozen=True)
class Exploration:
    """How actions are varied.

    Attributes:
        warmup: Episodes whose actions are uniform in 0..1.
        sigma: Of the noise at the first episode after them.
        decay: Factor of it at each episode.
    """

    warmup: int
    sigma: float
    decay: float


class Walker(ABC):
    """One episode a network: decided choice by choice, learned from as soon as it was told.

    Every measured row is an episode, also random ones and those of `WarmStart`: its actions are those of its
    options. Every decision has the reward of the whole; updates take place between episodes, after the
    warm-up. Failed and infeasible rows are not learned from, and none is learned from twice.

    No row is asked twice: a policy so sure that it draws nothing new gets more noise until it does, and at
    last there are random rows.
    """

    def __init__(
        self,
        process: RatioProcess,
        agent: DDPG,
        rng: np.random.Generator,
        exploration: Exploration,
        updates: int,
    ) -> None:
        """Start with nothing asked.

        Args:
            process: What is walked through.
            agent: Decides.
            rng: The strategy's own generator.
            exploration: Of its actions.
            updates: After each decision of an episode.
        """
        self._process, self._agent, self._rng = process, agent, rng
        self._constraints = process.constraints
        self._exploration, self._updates = exploration, updates
        self._asked, self._told = Asked(self._constraints.space), Asked(self._constraints.space)
        # Asked and not yet told.
        self._waiting: set[bytes] = set()
        self._learned = 0

    @abstractmethod
    def _rewards(self, batch: Batch) -> Values:
        """Return the reward of every row, `(n,)`: `nan` where there is none to learn from."""

    def _decide(self, walk: Walk, action: float) -> None:
        """Decide by an action: by default by the nearest option from which the budget can be met."""
        walk.act(action)

    def _finished(self, row: Codes) -> Codes:
        """Return what becomes of a row after its last decision."""
        return row

    def ask(self, n: int) -> Codes:
        """Walk through `n` episodes; fewer where many wait to be told, or the space is exhausted."""
        most = min(n, MOST_WAITING - len(self._waiting))
        rows = one_by_one(self._drawn, most, len(self._constraints.space.choices))
        self._waiting |= {row.tobytes() for row in rows}
        return rows

    def tell(self, batch: Batch) -> None:
        """Learn from every measured row, an episode each, in their order.

        Raises:
            EvaluationError: Rows were measured, but not on the objective.
            RecipeError: The reward is not defined for a value of the objective.
        """
        self._asked.fresh(batch.codes)
        for index, reward in enumerate(self._rewards(batch).tolist()):
            row = batch.codes[index : index + 1]
            self._waiting.discard(row.tobytes())
            if not np.isnan(reward) and len(self._told.fresh(row)):
                self._learn(row, reward)

    def _drawn(self) -> Codes:
        """Return a row that was not asked before, `(1, choices)`; no row if none is left."""
        exploration = self._exploration
        sigma = exploration.sigma * exploration.decay ** (self._learned - exploration.warmup)
        for _ in range(ATTEMPTS):
            row = self._episode(sigma)
            if self._constraints.feasible(row)[0] and len(self._asked.fresh(row)):
                return row
            sigma = max(LEAST_SIGMA, 2 * sigma)
        return fresh_sample(self._constraints, 1, self._rng, self._asked)

    def _episode(self, sigma: float) -> Codes:
        walk, warm = self._process.start(), self._learned < self._exploration.warmup
        while not walk.done:
            action = self._agent.random_action() if warm else self._agent.action(walk.state, sigma)
            self._decide(walk, action)
        return self._finished(walk.row)

    def _learn(self, row: Codes, reward: float) -> None:
        """Walk through a row as an episode, and let the agent learn from it."""
        walk = self._process.start()
        episode: list[Transition] = []
        while not walk.done:
            state = walk.state
            action = walk.take(int(row[0, walk.position]))
            episode.append(Transition(state, action, reward, walk.state, walk.done))
        self._learned += 1
        warm = self._learned <= self._exploration.warmup
        self._agent.learn(episode, updates=0 if warm else self._updates)
