"""HAQ: an agent walks through the layers and says how many bits weights and inputs get.

Source: Wang et al., "HAQ: Hardware-Aware Automated Quantization with Mixed Precision", CVPR 2019, and its
repository (mit-han-lab/haq, `rl_quantize.py`, `lib/rl/ddpg.py`, `lib/env/linear_quantize_env.py`). The agent
is `autocompress.ddpg`, whose head says why it is not one of stable-baselines3: neither the actor's sigmoid
with truncated noise around it nor the baseline in the critic's target can be expressed there.

Any space of numbers can be walked through; bits of a table of layers are made by
`autocompress.quantize.tables`. Networks are scored by the evaluator of the search: published is the training
accuracy of the epoch of finetuning itself, a fault that an evaluator with held-out images does not have.

Other published faults that are not here: an activation that is "not quantized" wraps around in the table
(`BitTable` refuses -1); the first and the last layer are pinned only on the way down (pinned layers are no
choices); the indicator of weights or inputs is that of the decision before; the first state has what the last
episode did.
"""

from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import Values
from autocompress.ddpg import DDPG, DDPGSettings
from autocompress.errors import RecipeError
from autocompress.proposals import check_count, check_one_of, check_positive, check_share, random_generator
from autocompress.quantize.features import layer_features
from autocompress.ratios import RatioProcess, Walk, equal_slices
from autocompress.space import Codes
from autocompress.trial import Batch
from strategies.breeding import objective_values
from strategies.walking import Exploration, Walker

PUBLISHED_EPISODES, PUBLISHED_WARMUP, PUBLISHED_DECAY = 600, 20, 0.99
REWARD_SCALE = 0.1
"""Lambda; accuracies are in percent there."""

Limiting = Literal["bounds", "wall"]


@final
class Haq(Walker):
    """Decides choice by choice, weights before inputs, each option an equal slice of the actions.

    The budget is kept as AMC keeps it, by bounds: an action is moved to the nearest option from which the
    rest can still fit. `limiting="wall"` is as published instead: whatever was decided, as long as the
    network is over the budget, choices lose one option each, from the last to the first (of a layer the
    inputs before the weights), over and over. What late layers get is then less than what the agent said.

    Where the budget has room left after the last decision, `fill` spends it: choices get one option more as
    long as one fits, in the order of how far the agent's action was above the option taken. More bits never
    make a network worse, and an episode within the budget by far says little.

    For the rest see `Walker`. With fewer than the published 600 episodes, warm-up, noise and steps of the
    actor are shares of them.
    """

    def __init__(
        self,
        constraints: Constraints,
        *,
        seed: int,
        objective: str = "accuracy",
        original: float | None = None,
        limiting: Limiting = "bounds",
        fill: bool = True,
        ranked: bool = True,
        episodes: int = PUBLISHED_EPISODES,
        warmup: int | None = None,
        sigma: float = 0.5,
        sigma_decay: float | None = None,
        updates: int = 1,
        replay: int = 128,
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
            objective: The metric to maximise, 0..1.
            original: Its value before quantization, which rewards are relative to; by default that of the
                first row that is told. The agent subtracts a baseline: the search hardly depends on it.
            limiting: How the budget is kept.
            fill: Spend what is left of the budget; published is not to.
            ranked: Learn from the rank of a row among those told so far, in -1..1, instead of the published
                `0.1 * (objective - original)` in percent: that of bad rows outweighs all differences among
                good ones.
            episodes: How many evaluations the search is planned to have. It may have more or fewer.
            warmup: Episodes whose actions are uniform in 0..1; by default 20 of 600.
            sigma: Of the noise at the first episode after them.
            sigma_decay: Factor of it at each episode; by default 0.99, for fewer than 600 episodes so much
                that as little is left at the end.
            updates: After each decision of an episode.
            replay: Episodes that are remembered.
            hidden: Units of each hidden layer.
            actor_learning_rate: By default the published 1e-4, times 600 / episodes for fewer of them.
            critic_learning_rate: Of Adam.
            tau: How far the target networks move at each update.
            discount: Of the value of the next state.
            batch_size: Decisions of an update.
            baseline_decay: Weight of the past in the moving average of rewards that is subtracted from them.

        Raises:
            RecipeError: An option is out of its range.
            SpaceError: Options of the space are not positive numbers in ascending order.
            InfeasibleBudgetError: Nothing fits.
        """
        self._objective = objective
        self._original = None if original is None else check_positive("original", original, zero=True)
        self._wall = check_one_of("limiting", limiting, ("bounds", "wall")) == "wall"
        for name, value in (("fill", fill), ("ranked", ranked)):
            if not isinstance(value, bool):
                raise RecipeError(f"{name} must be true or false, got {value!r}")
        self._fill, self._ranked = fill, ranked
        self._seen: list[float] = []
        self._wishes: NDArray[np.float64] = np.zeros(len(constraints.space.choices))
        shorter = max(1.0, PUBLISHED_EPISODES / check_count("episodes", episodes))
        share = PUBLISHED_WARMUP / PUBLISHED_EPISODES
        warmup = check_count("warmup", max(1, round(share * episodes)) if warmup is None else warmup)
        check_positive("sigma", sigma)
        if sigma_decay is None:
            noisy = PUBLISHED_EPISODES - PUBLISHED_WARMUP
            sigma_decay = PUBLISHED_DECAY ** max(1.0, noisy / max(1, episodes - warmup))
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
        process = RatioProcess(constraints, actions=equal_slices, also=layer_features(constraints.space))
        agent = DDPG(
            process.features,
            seed=int(rng.integers(2**62)),
            capacity=check_count("replay", replay) * len(constraints.space.choices),
            settings=settings,
        )
        super().__init__(process, agent, rng, exploration, updates)

    def _decide(self, walk: Walk, action: float) -> None:
        position = walk.position
        if not self._wall:
            taken = walk.act(action)
        else:
            taken = walk.take(int(np.abs(self._process.ratios[position] - action).argmin()))
        self._wishes[position] = action - taken

    def _finished(self, row: Codes) -> Codes:
        if self._wall:
            row = walled(self._constraints, row)
        return filled(self._constraints, row, self._wishes) if self._fill else row

    def _rewards(self, batch: Batch) -> Values:
        values = objective_values(batch, self._objective)
        usable = ~np.isnan(values)
        if not usable.any():
            return values
        if self._original is None:
            self._original = float(values[usable][0])
        if not self._ranked:
            return REWARD_SCALE * 100 * (values - self._original)
        self._seen += values[usable].tolist()
        seen = np.sort(self._seen)
        middle = np.searchsorted(seen, values) + np.searchsorted(seen, values, side="right")
        rewards: Values = np.where(usable, middle / len(seen) - 1.0, np.nan)
        return rewards


def walled(constraints: Constraints, row: Codes) -> Codes:
    """Return a row `(1, choices)` after the published sweeps, until it fits or all is at its smallest.

    Source: mit-han-lab/haq, `lib/env/linear_quantize_env.py`, `_final_action_wall`.
    """
    row = row.copy()
    while not constraints.feasible(row)[0] and (row > 0).any():
        for position in range(row.shape[1] - 1, -1, -1):
            if row[0, position] > 0:
                row[0, position] -= 1
                row = constraints.space.canonical(row)
            if constraints.feasible(row)[0]:
                break
    return row


def filled(constraints: Constraints, row: Codes, order: NDArray[np.float64]) -> Codes:
    """Return a feasible row with options added one by one, as long as one fits; others come back as they are.

    Args:
        constraints: What fits.
        row: `(1, choices)`, canonical.
        order: Those of the greatest number first, `(choices,)`; in a round each gets one.
    """
    space = constraints.space
    if not constraints.limits or not constraints.feasible(row)[0]:
        return row
    ranking = np.argsort(-order, kind="stable")
    grown = True
    while grown:
        active = space.active(row)[0]
        able = [int(p) for p in ranking if active[p] and row[0, p] + 1 < space.counts[p]]
        candidates = np.repeat(row, len(able), axis=0)
        candidates[np.arange(len(able)), able] += 1
        candidates = space.canonical(candidates)
        fits = constraints.feasible(candidates) if len(able) else np.zeros(0, dtype=np.bool_)
        grown = False
        for position in [p for p, fit in zip(able, fits, strict=True) if fit]:
            larger = row.copy()
            larger[0, position] += 1
            larger = space.canonical(larger)
            if constraints.feasible(larger)[0]:
                row, grown = larger, True
    return row


def haq_compat(
    constraints: Constraints, *, seed: int, objective: str = "accuracy", episodes: int = PUBLISHED_EPISODES
) -> Haq:
    """Make the published search: the wall instead of bounds, budget left as it is, rewards of the accuracy.

    Raises:
        RecipeError: An option is out of its range.
        SpaceError: Options of the space are not positive numbers in ascending order.
        InfeasibleBudgetError: Nothing fits.
    """
    return Haq(
        constraints,
        seed=seed,
        objective=objective,
        limiting="wall",
        fill=False,
        ranked=False,
        episodes=episodes,
    )
