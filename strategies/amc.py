"""AMC: an agent walks through the choices and says of each which share of its largest option to keep.

Source: He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, and its
repository (mit-han-lab/amc, `amc_search.py` and `env/channel_pruning_env.py`). Here the state holds options
and costs (`autocompress.ratios`) instead of kernel sizes and strides, so that any space of numbers can be
walked through; networks are scored by the evaluator of the search, not after a least squares fit of weights.
Two faults of the released environment are not taken over: what it says of costs in the first state is of
weights, and the last group of residual layers is not shared.
"""

from typing import final

import numpy as np

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.ddpg import DDPG, DDPGSettings
from autocompress.proposals import check_count, check_positive, check_share, random_generator
from autocompress.ratios import RatioProcess
from autocompress.rewards import PricedReward
from autocompress.trial import Batch
from strategies.breeding import objective_values
from strategies.walking import Exploration, Walker

PUBLISHED_EPISODES, PUBLISHED_WARMUP = 800, 100
LAST_SIGMA = 0.05
"""Share of its start that the noise has at the end of a search."""


@final
class Amc(Walker):
    """One episode a network: decided choice by choice, learned from as soon as it was told.

    Every measured row is an episode, also random ones and those of `WarmStart`: its actions are the ratios of
    its options. (The released code keeps the actions that were wished for, before the budget cut them. On the
    toy of `tests/strategies/test_amc.py` whose late layers matter, those found 0.875 instead of 0.881 in 200
    evaluations, mean of 6 seeds.) Every decision has the reward of the whole; updates take place between
    episodes, after the warm-up. Failed and infeasible rows are not learned from.

    Published are 800 episodes, the first 100 uniformly random, and noise that falls by 5 % an episode.
    Here warm-up, noise and the actor's steps are shares of `episodes`: with the published numbers a search of
    a hundred evaluations would be warm-up alone.

    No row is asked twice: a policy so sure that it draws nothing new gets more noise until it does, and at
    last there are random rows.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        reward: str = "accuracy",
        cost: str | None = None,
        target: float | None = None,
        episodes: int = 200,
        warmup: int | None = None,
        sigma: float = 0.5,
        sigma_decay: float | None = None,
        updates: int = 1,
        replay: int = 100,
        hidden: int = 300,
        actor_learning_rate: float | None = None,
        critic_learning_rate: float = 1e-3,
        tau: float = 0.01,
        discount: float = 1.0,
        batch_size: int = 64,
        baseline_decay: float = 0.5,
    ) -> None:
        """Make the search.

        Args:
            constraints: Space, costs and limits.
            seed: Equal seeds and equal calls give equal sequences.
            objective: The metric to maximise; 0..1 suits the published learning rates.
            reward: A name of `autocompress.rewards.REWARDS`; published are `accuracy` (under a budget) and
                `log_cost` with `macs` or `params` (without one).
            cost: The metric in the reward, by default `latency_ms`; not with `"accuracy"`.
            target: Of that cost, in its unit, for rewards that have one; by default its limit.
            episodes: How many evaluations the search is planned to have. It may have more or fewer.
            warmup: Episodes whose actions are uniform in 0..1; by default an eighth of all.
            sigma: Of the noise at the first episode after them.
            sigma_decay: Factor of it at each episode, published 0.95; by default a twentieth of the noise is
                left at the end.
            updates: After each decision of an episode.
            replay: Episodes that are remembered.
            hidden: Units of each hidden layer.
            actor_learning_rate: By default the published 1e-4, times 800 / episodes for fewer of them: as
                many steps as there would lead as far.
            critic_learning_rate: Of Adam.
            tau: How far the target networks move at each update.
            discount: Of the value of the next state.
            batch_size: Decisions of an update.
            baseline_decay: Weight of the past in the moving average of rewards that is subtracted from them.

        Raises:
            RecipeError: An option is unknown, out of its range, or has nothing to act on.
            SpaceError: Options of the space are not positive numbers in ascending order.
            InfeasibleBudgetError: Nothing fits.
        """
        self._objective = objective
        self._reward = PricedReward.of(constraints, reward, cost, target)
        shorter = max(1.0, PUBLISHED_EPISODES / check_count("episodes", episodes))
        share = PUBLISHED_WARMUP / PUBLISHED_EPISODES
        warmup = check_count("warmup", max(1, round(share * episodes)) if warmup is None else warmup)
        check_positive("sigma", sigma)
        if sigma_decay is None:
            sigma_decay = LAST_SIGMA ** (1 / max(1, episodes - warmup))
        exploration = Exploration(warmup, sigma, check_share("sigma_decay", sigma_decay))
        check_count("updates", updates)
        rng = random_generator(seed)
        settings = DDPGSettings(
            hidden=hidden,
            actor_learning_rate=1e-4 * shorter if actor_learning_rate is None else actor_learning_rate,
            critic_learning_rate=critic_learning_rate,
            tau=tau,
            discount=discount,
            batch_size=batch_size,
            baseline_decay=baseline_decay,
        )
        process = RatioProcess(constraints)
        agent = DDPG(
            process.features,
            seed=int(rng.integers(2**62)),
            capacity=check_count("replay", replay) * len(constraints.space.choices),
            settings=settings,
        )
        super().__init__(process, agent, rng, exploration, updates)

    def _rewards(self, batch: Batch) -> Values:
        values = objective_values(batch, self._objective)
        usable = ~np.isnan(values)
        rewards = np.full(len(batch), np.nan)
        rewards[usable] = self._reward(values[usable], batch.costs, usable)
        return rewards
