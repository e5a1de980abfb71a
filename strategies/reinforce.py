"""Reinforcement learning: a policy over the choices, moved towards what earned more than before.

Budgets are kept by masking (`strategies.policy.Policy`), so that rewards may speak of accuracy alone.
"""

from collections.abc import Mapping
from typing import Literal, final, get_args

import numpy as np

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.errors import RecipeError
from autocompress.proposals import (
    Asked,
    check_count,
    check_one_of,
    check_positive,
    check_share,
    fresh_sample,
    random_generator,
)
from autocompress.rewards import PricedReward
from autocompress.space import Codes
from autocompress.trial import Batch
from strategies.breeding import objective_values
from strategies.controllers import LSTM, Controller, Factorized
from strategies.policy import Policy
from strategies.policy_gradient import Adam, MovingBaseline, ppo_weights, reinforce_weights

PolicyName = Literal["factorized", "lstm"]
Algorithm = Literal["reinforce", "ppo"]

BATCH_SIZES: Mapping[tuple[PolicyName, Algorithm], int] = {
    ("factorized", "reinforce"): 4,
    ("factorized", "ppo"): 4,
    ("lstm", "reinforce"): 4,
    # With 4 it finds the same and takes twice the time.
    ("lstm", "ppo"): 8,
}
LEARNING_RATES: Mapping[tuple[PolicyName, Algorithm], float] = {
    ("factorized", "reinforce"): 0.2,
    ("factorized", "ppo"): 0.1,
    ("lstm", "reinforce"): 0.02,
    ("lstm", "ppo"): 0.01,
}
"""For 100 to 500 evaluations; found on the 12-epoch validation accuracies of NAS-Bench-201 and a toy."""

# Drawn at once and kept until the policy changes: a dozen rows cost little more than one.
DRAWN_AHEAD, MOST_DRAWN = 16, 256
# After a round in which less than half of the draws were new the next one draws from a flatter policy: what
# it asks then is still near what the policy prefers. After the last one rows are random.
SHARPNESS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)


@final
class Reinforce:
    """A policy draws architectures; those that earn more than the baseline become more likely.

    Whatever is measured is learned from, in the order of the tells and in batches, as if the present policy
    had drawn it: also rows that were drawn before earlier batches were learned, rows given by `WarmStart`,
    and the random rows that stand in where a policy has become so sure that it draws nothing new. The
    gradient is unbiased where rows are asked and told a batch at a time and nothing repeats. Infeasible and
    failed rows are not learned from.

    Sources: Williams, Machine Learning 8, 1992 (REINFORCE); Zoph & Le, ICLR 2017 (for architectures, with a
    moving baseline and entropy as in Mnih et al., 2016); Schulman et al., 2017 (PPO). Masking by exact
    bounds and deduplication are added here.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        policy: PolicyName = "factorized",
        algorithm: Algorithm = "ppo",
        reward: str = "accuracy",
        cost: str | None = None,
        target: float | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        entropy: float = 0.05,
        baseline_decay: float = 0.9,
        ppo_epochs: int = 4,
        ppo_clip: float = 0.2,
        lstm_units: int = 32,
        lstm_constant: float = 2.5,
        lstm_temperature: float = 1.0,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise.
            policy: `"factorized"` draws every choice on its own; `"lstm"` given the choices before it.
            algorithm: `"reinforce"` takes one step a batch, `"ppo"` several, clipped.
            reward: A name of `autocompress.rewards.REWARDS`.
            cost: The metric in the reward, by default `latency_ms`; not with `"accuracy"`.
            target: Of that cost, in its unit; by default its limit. Not with `"accuracy"`.
            batch_size: Measured rows that are learned from at once; by default `BATCH_SIZES`.
            learning_rate: Of Adam; by default `LEARNING_RATES`.
            entropy: Weight of the entropy of every decision; advantages are in -2..2.
            baseline_decay: Weight of the past in the moving averages, at each batch.
            ppo_epochs: Steps on each batch.
            ppo_clip: How far PPO moves a probability in the direction of its advantage, as a share.
            lstm_units: Width of the LSTM.
            lstm_constant: Bound of its scores; one option is at most `exp(2 * constant)` times as likely as
                another.
            lstm_temperature: Divides what the bound is put on.

        Raises:
            RecipeError: An option is unknown, out of its range, or has nothing to act on.
            InfeasibleBudgetError: Nothing fits.
        """
        self._rng = random_generator(seed)
        self._objective = objective
        self._reward = PricedReward.of(constraints, reward, cost, target)
        check_one_of("policy", policy, get_args(PolicyName))
        self._ppo = check_one_of("algorithm", algorithm, get_args(Algorithm)) == "ppo"
        size = BATCH_SIZES[policy, algorithm] if batch_size is None else batch_size
        self._batch_size = check_count("batch_size", size)
        self._entropy = check_positive("entropy", entropy, zero=True)
        self._epochs = check_count("ppo_epochs", ppo_epochs) if self._ppo else 1
        self._clip = check_positive("ppo_clip", ppo_clip)
        if check_share("baseline_decay", baseline_decay) == 1:
            raise RecipeError("baseline_decay must be below 1, or no reward ever enters the baseline")
        self._baseline = MovingBaseline(baseline_decay)
        counts = constraints.space.counts.tolist()
        controller: Controller
        if policy == "lstm":
            controller = LSTM(
                counts,
                self._rng,
                units=check_count("lstm_units", lstm_units),
                constant=check_positive("lstm_constant", lstm_constant),
                temperature=check_positive("lstm_temperature", lstm_temperature),
            )
        else:
            controller = Factorized(counts)
        rate = LEARNING_RATES[policy, algorithm] if learning_rate is None else learning_rate
        self._optimiser = Adam(controller.parameters, check_positive("learning_rate", rate))
        constraints.check_feasible()
        self._constraints = constraints
        self._policy = Policy(constraints, controller)
        self._asked = Asked(constraints.space)
        self._drawn: Codes = np.zeros((0, len(counts)), dtype=np.int64)
        # Told, but not yet a batch.
        self._codes, self._rewards = self._drawn, np.zeros(0)

    def ask(self, n: int) -> Codes:
        """Draw `n` architectures that were not asked before; fewer once the space is exhausted."""
        found = [self._asked.fresh(self._drawn, at_most=n)]
        missing, flatter = n - len(found[0]), 0
        while missing and flatter < len(SHARPNESS):
            wanted = min(missing, MOST_DRAWN)
            draws = max(wanted, DRAWN_AHEAD)
            self._drawn = self._policy.draw(draws, self._rng, sharpness=SHARPNESS[flatter])
            found.append(self._asked.fresh(self._drawn, at_most=wanted))
            missing -= len(found[-1])
            flatter += 2 * len(found[-1]) < wanted
        if missing:
            found.append(fresh_sample(self._constraints, missing, self._rng, self._asked))
        return np.vstack(found)

    def tell(self, batch: Batch) -> None:
        """Learn from the measured rows, a batch at a time; what does not fill one waits.

        Raises:
            EvaluationError: Rows were measured, but not on the objective.
            RecipeError: The reward is not defined for a value of the objective.
        """
        codes, rewards = self._rewarded(batch)
        self._codes = np.vstack([self._codes, codes])
        self._rewards = np.concatenate([self._rewards, rewards])
        while len(self._codes) >= self._batch_size:
            self._learn(self._codes[: self._batch_size], self._rewards[: self._batch_size])
            self._codes = self._codes[self._batch_size :]
            self._rewards = self._rewards[self._batch_size :]

    def _rewarded(self, batch: Batch) -> tuple[Codes, Values]:
        values = objective_values(batch, self._objective)
        usable = ~np.isnan(values)
        return batch.codes[usable], self._reward(values[usable], batch.costs, usable)

    def _learn(self, codes: Codes, rewards: Values) -> None:
        """Climb the gradient of one batch; what was drawn ahead came from the policy before."""
        decisions = self._policy.decisions(codes)
        # A row that does not fit, or by the last bit only, has no chance that could be raised.
        possible = decisions.possible
        if not possible.any():
            return
        decisions, rewards = decisions[possible], rewards[possible]
        advantages = self._baseline.advantages(rewards)
        self._baseline.update(rewards)
        if self._ppo:
            before = self._policy.log_probabilities(decisions)
            weights = ppo_weights(advantages, before, clip=self._clip)
        else:
            weights = reinforce_weights(advantages)
        for _ in range(self._epochs):
            self._optimiser.ascend(self._policy.gradients(decisions, weights, entropy=self._entropy))
        self._drawn = self._drawn[:0]
