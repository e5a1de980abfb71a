"""A small DDPG agent for one action in 0..1: deterministic policy gradients as AMC and HAQ use them.

stable-baselines3 (2.9.2 was read) cannot express it: its actor ends in tanh and its noise is added to the
mean whatever that is, then clipped (`OffPolicyAlgorithm._sample_action`), where the published noise is a
normal distribution truncated to the actions, around the mean; and no baseline can enter the target of
`TD3.train`. Updates at the end of an episode alone it can do (`train_freq=(1, "episode")`,
`gradient_steps=-1`). A user's own library can have the same process by `autocompress.environment`.

Sources: Lillicrap et al., ICLR 2016 (DDPG); He et al., AMC, ECCV 2018, section 3.1; Wang et al., HAQ, CVPR
2019, section 3.1, and its repository (mit-han-lab/haq, `lib/rl/ddpg.py`), whose defaults these are.
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.proposals import check_count, check_positive, check_share

State = NDArray[np.float32]
"""`(features,)`, each about 0..1."""


@dataclass(frozen=True)
class Transition:
    """One decision.

    Attributes:
        state: What the agent saw.
        action: What it did, 0..1.
        reward: Of the whole episode: the published code gives it to every decision.
        following: What it saw next; of the last decision, anything.
        last: Whether the episode ended with it.
    """

    state: State
    action: float
    reward: float
    following: State
    last: bool


@dataclass(frozen=True)
class DDPGSettings:
    """The published hyper-parameters.

    Attributes:
        hidden: Units of both hidden layers of actor and critic.
        actor_learning_rate: Of Adam.
        critic_learning_rate: Of Adam.
        tau: How far the target networks move at each update.
        discount: Of the value of the next state.
        batch_size: Transitions of an update.
        baseline_decay: Weight of the past in the moving average of the mean reward of batches.
    """

    hidden: int = 300
    actor_learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    tau: float = 0.01
    discount: float = 1.0
    batch_size: int = 64
    baseline_decay: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: A value is out of its range.
        """
        check_count("hidden", self.hidden)
        check_positive("actor_learning_rate", self.actor_learning_rate)
        check_positive("critic_learning_rate", self.critic_learning_rate)
        check_share("tau", self.tau)
        check_share("discount", self.discount)
        check_count("batch_size", self.batch_size)
        check_share("baseline_decay", self.baseline_decay)


@final
class DDPG:
    """An actor that maps states to actions, and a critic that values both; learns from a replay memory.

    Deterministic in its arguments and the order of calls, can be pickled, and neither uses nor changes the
    global generators.
    """

    def __init__(self, features: int, *, seed: int, capacity: int, settings: DDPGSettings) -> None:
        """Draw the initial weights.

        Args:
            features: Length of a state.
            seed: Of weights, noise and batches.
            capacity: Transitions that are remembered; the oldest are forgotten.
            settings: Hyper-parameters.

        Raises:
            RecipeError: `capacity` is not an integer of at least 1.
        """
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(int(self._rng.integers(2**62)))
        self.actor = _Actor(features, settings.hidden, generator)
        self.critic = _Critic(features, settings.hidden, generator)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self._actor_step = torch.optim.Adam(self.actor.parameters(), settings.actor_learning_rate)
        self._critic_step = torch.optim.Adam(self.critic.parameters(), settings.critic_learning_rate)
        self.memory: deque[Transition] = deque(maxlen=check_count("capacity", capacity))
        self.baseline: float | None = None

    def action(self, state: State, sigma: float) -> float:
        """Return the actor's action with noise: normal around it, truncated to 0..1; 0 is no noise."""
        with _one_thread(), torch.no_grad():
            mean = float(self.actor(torch.from_numpy(state)[None]))
        return truncated_normal(mean, sigma, self._rng)

    def random_action(self) -> float:
        """Return an action that is uniform in 0..1."""
        return float(self._rng.random())

    def learn(self, episode: Iterable[Transition], *, updates: int) -> None:
        """Remember a finished episode, with so many updates after each of its decisions."""
        with _one_thread():
            for transition in episode:
                self.memory.append(transition)
                for _ in range(updates):
                    self.update(self._sample())

    def update(self, batch: Sequence[Transition]) -> None:
        """Move the critic to the targets of a batch, the actor up the critic, and the target networks."""
        states = torch.from_numpy(np.stack([transition.state for transition in batch]))
        actions = torch.tensor([[transition.action] for transition in batch])
        targets = self.targets(batch)
        self._critic_step.zero_grad()
        loss: Tensor = nn.functional.mse_loss(self.critic(states, actions), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._critic_step.step()
        self._actor_step.zero_grad()
        loss = -self.critic(states, self.actor(states)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self._actor_step.step()
        soften(self.target_actor, self.actor, self._settings.tau)
        soften(self.target_critic, self.critic, self._settings.tau)

    def targets(self, batch: Sequence[Transition]) -> Tensor:
        """Return what the critic is to say of a batch, `y = r - b + discount * Q'(s', mu'(s'))`, `(n, 1)`.

        The baseline b is moved by the batch first, so that the first batch is compared with itself. After the
        last decision of an episode there is no next state.
        """
        rewards = np.array([transition.reward for transition in batch])
        mean, decay = float(rewards.mean()), self._settings.baseline_decay
        self.baseline = mean if self.baseline is None else decay * self.baseline + (1 - decay) * mean
        following = torch.from_numpy(np.stack([transition.following for transition in batch]))
        goes_on = torch.tensor([[0.0 if transition.last else 1.0] for transition in batch])
        gains = torch.from_numpy((rewards - self.baseline).astype(np.float32))[:, None]
        with torch.no_grad():
            values = self.target_critic(following, self.target_actor(following))
        targets: Tensor = gains + self._settings.discount * goes_on * values
        return targets

    def _sample(self) -> list[Transition]:
        """Draw a batch, without repetition where there are enough."""
        size, known = self._settings.batch_size, len(self.memory)
        drawn = self._rng.choice(known, size=size, replace=known < size)
        return [self.memory[index] for index in drawn.tolist()]


class _Actor(nn.Module):
    """Two hidden layers, then a sigmoid: states `(n, features)` to actions `(n, 1)`."""

    def __init__(self, features: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = _linear(features, hidden, generator)
        self.second = _linear(hidden, hidden, generator)
        self.last = _linear(hidden, 1, generator)

    def forward(self, states: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.relu(self.second(torch.relu(self.first(states))))))


class _Critic(nn.Module):
    """State and action, each by a layer of its own, then as the actor: values `(n, 1)`."""

    def __init__(self, features: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.of_state = _linear(features, hidden, generator)
        # Not part of the layer above: the weights of the one action start as wide as 1.
        self.of_action = _linear(1, hidden, generator)
        self.second = _linear(hidden, hidden, generator)
        self.last = _linear(hidden, 1, generator)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        first = torch.relu(self.of_state(states) + self.of_action(actions))
        values: Tensor = self.last(torch.relu(self.second(first)))
        return values


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a layer as PyTorch initialises it, from a generator of one's own."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def soften(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of the target by a share of the way to the source's."""
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
            slow.lerp_(fast, tau)


def truncated_normal(mean: float, sigma: float, rng: np.random.Generator) -> float:
    """Draw from a normal distribution given that it is in 0..1, by inverting its distribution function.

    Args:
        mean: Before truncation, in 0..1.
        sigma: Before truncation; 0 returns the mean.
        rng: Source of randomness; one number is drawn in any case.
    """
    share = float(rng.random())
    if sigma <= 0:
        return mean
    normal = NormalDist(mean, sigma)
    low, high = normal.cdf(0.0), normal.cdf(1.0)
    # The inverse is not defined at 0 and 1.
    quantile = min(max(low + share * (high - low), 1e-300), 1 - 1e-16)
    return min(max(normal.inv_cdf(quantile), 0.0), 1.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold PyTorch at one thread: sums depend on their number, and a search is resumed by repeating it.

    Layers this small are not faster with more.
    """
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)
