"""The agent against closed forms: targets, baseline, target networks, noise, and that it climbs."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, truncnorm

from autocompress.ddpg import DDPG, DDPGSettings, State, Transition, soften, truncated_normal
from autocompress.errors import RecipeError

SMALL = DDPGSettings(hidden=16, batch_size=8)


def state(*numbers: float) -> State:
    return np.array(numbers, dtype=np.float32)


def transitions(count: int, seed: int = 0) -> list[Transition]:
    rng = np.random.default_rng(seed)
    return [
        Transition(
            state(*rng.random(3)),
            float(rng.random()),
            float(rng.normal()),
            state(*rng.random(3)),
            index % 3 == 2,
        )
        for index in range(count)
    ]


def agent(seed: int = 0, settings: DDPGSettings = SMALL) -> DDPG:
    return DDPG(3, seed=seed, capacity=50, settings=settings)


def parameters(network: torch.nn.Module) -> list[np.ndarray[Any, Any]]:
    return [parameter.detach().numpy().copy() for parameter in network.parameters()]


def dense(values: np.ndarray[Any, Any], layer: torch.nn.Linear) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = values @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return result


def test_the_target_is_reward_less_baseline_plus_the_discounted_value_of_the_next_action() -> None:
    ddpg = agent(settings=DDPGSettings(hidden=16, discount=0.7, actor_learning_rate=0.05, baseline_decay=0.0))
    batch = transitions(6)
    ddpg.update(batch)  # networks and their targets are no longer the same
    following = np.stack([one.following for one in batch])
    # Actor and critic once more, in numpy.
    actor, critic = ddpg.target_actor, ddpg.target_critic
    hidden = np.maximum(dense(np.maximum(dense(following, actor.first), 0), actor.second), 0)
    actions = 1 / (1 + np.exp(-dense(hidden, actor.last)))
    first = np.maximum(dense(following, critic.of_state) + dense(actions, critic.of_action), 0)
    values = dense(np.maximum(dense(first, critic.second), 0), critic.last)[:, 0]
    rewards = np.array([one.reward for one in batch])
    goes_on = np.array([1, 1, 0, 1, 1, 0])
    expected = rewards - rewards.mean() + 0.7 * goes_on * values
    np.testing.assert_allclose(ddpg.targets(batch).numpy()[:, 0], expected, atol=1e-6)


def test_the_baseline_is_the_moving_average_of_the_mean_rewards_of_batches() -> None:
    ddpg = agent(settings=DDPGSettings(hidden=16, baseline_decay=0.75))
    last = [Transition(state(0, 0, 0), 0.5, reward, state(0, 0, 0), True) for reward in (1.0, 3.0, 10.0, 0.0)]
    np.testing.assert_allclose(ddpg.targets(last[:2]).numpy()[:, 0], [-1.0, 1.0])
    # 0.75 * 2 + 0.25 * 5 = 2.75
    np.testing.assert_allclose(ddpg.targets(last[2:]).numpy()[:, 0], [7.25, -2.75])
    assert ddpg.baseline == 2.75


def test_target_networks_move_by_tau() -> None:
    ddpg, other = agent(0), agent(1)
    before, towards = parameters(ddpg.actor), parameters(other.actor)
    soften(ddpg.actor, other.actor, 0.01)
    for now, old, new in zip(parameters(ddpg.actor), before, towards, strict=True):
        np.testing.assert_allclose(now, 0.99 * old + 0.01 * new, atol=1e-7)


def test_an_update_softens_both_targets_after_both_steps() -> None:
    ddpg = agent(settings=DDPGSettings(hidden=16, tau=0.25))
    before = parameters(ddpg.target_actor), parameters(ddpg.target_critic)
    ddpg.update(transitions(8))
    for old, target, source in zip(
        before, (ddpg.target_actor, ddpg.target_critic), (ddpg.actor, ddpg.critic), strict=True
    ):
        for was, now, new in zip(old, parameters(target), parameters(source), strict=True):
            np.testing.assert_allclose(now, 0.75 * was + 0.25 * new, atol=1e-6)
            assert np.abs(now - was).max() > 0


def test_the_first_steps_are_those_of_adam_on_the_error_and_up_the_critic() -> None:
    settings = DDPGSettings(hidden=16, actor_learning_rate=1e-4, critic_learning_rate=1e-3)
    ddpg, batch = agent(settings=settings), transitions(8)
    before = copy.deepcopy(ddpg)
    ddpg.update(batch)
    # Adam's first step is the learning rate, against the sign of the gradient.
    targets = before.targets(batch)
    states = torch.from_numpy(np.stack([one.state for one in batch]))
    actions = torch.tensor([[one.action] for one in batch])
    before.critic.zero_grad()
    ((before.critic(states, actions) - targets) ** 2).mean().backward()
    for now, was in zip(ddpg.critic.parameters(), before.critic.parameters(), strict=True):
        assert was.grad is not None
        clear = was.grad.abs() > 1e-4
        torch.testing.assert_close((now - was)[clear], -1e-3 * was.grad.sign()[clear], atol=2e-6, rtol=0)
    before.actor.zero_grad()
    ddpg.critic(states, before.actor(states)).mean().backward()
    for now, was in zip(ddpg.actor.parameters(), before.actor.parameters(), strict=True):
        assert was.grad is not None
        clear = was.grad.abs() > 1e-4
        torch.testing.assert_close((now - was)[clear], 1e-4 * was.grad.sign()[clear], atol=2e-6, rtol=0)


@given(st.floats(0, 1), st.floats(0, 100), st.integers(0, 2**32))
def test_noise_stays_within_the_actions(mean: float, sigma: float, seed: int) -> None:
    drawn = truncated_normal(mean, sigma, np.random.default_rng(seed))
    assert 0 <= drawn <= 1
    assert sigma > 0 or drawn == mean


@pytest.mark.parametrize(("mean", "sigma"), [(0.5, 0.5), (0.05, 0.2), (1.0, 0.5), (0.3, 0.02)])
def test_noise_is_the_truncated_normal_distribution(mean: float, sigma: float) -> None:
    rng = np.random.default_rng(0)
    drawn = [truncated_normal(mean, sigma, rng) for _ in range(4000)]
    expected = truncnorm((0 - mean) / sigma, (1 - mean) / sigma, loc=mean, scale=sigma)
    # A fixed seed; for a random one a false alarm has probability 1e-4.
    assert kstest(drawn, expected.cdf).pvalue > 1e-4


def test_replay_forgets_the_oldest_and_draws_without_repetition_where_it_can() -> None:
    ddpg = DDPG(3, seed=0, capacity=8, settings=SMALL)
    seen = transitions(11)
    ddpg.learn(seen[:3], updates=0)
    assert len(ddpg._sample()) == 8
    ddpg.learn(seen[3:], updates=0)
    assert list(ddpg.memory) == seen[3:]
    assert {id(one) for one in ddpg._sample()} == {id(one) for one in seen[3:]}


def test_it_finds_the_best_action_of_each_state() -> None:
    settings = DDPGSettings(hidden=32, actor_learning_rate=1e-3, discount=0.0)
    ddpg = DDPG(3, seed=0, capacity=1000, settings=settings)
    rng = np.random.default_rng(1)
    for episode in range(400):
        corner, warm = float(rng.integers(2)), episode < 50
        action = ddpg.random_action() if warm else ddpg.action(state(corner, 0.5, 0.5), 0.3)
        # Best are 0.2 in one state and 0.8 in the other.
        reward = -10 * (action - (0.2 + 0.6 * corner)) ** 2
        seen = Transition(state(corner, 0.5, 0.5), action, reward, state(0, 0, 0), True)
        ddpg.learn([seen], updates=0 if warm else 2)
    assert abs(ddpg.action(state(0, 0.5, 0.5), 0.0) - 0.2) < 0.1
    assert abs(ddpg.action(state(1, 0.5, 0.5), 0.0) - 0.8) < 0.1


def test_only_the_seed_decides() -> None:
    def run(seed: int) -> list[float]:
        ddpg = agent(seed)
        ddpg.learn(transitions(12), updates=2)
        return [ddpg.random_action(), *(ddpg.action(state(0.1, 0.2, 0.3), 0.1) for _ in range(3))]

    before = torch.get_rng_state()
    expected = run(0)
    assert torch.equal(torch.get_rng_state(), before)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.random.fork_rng():
            torch.manual_seed(99)
            assert run(0) == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert run(1) != expected


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    """Whether they would on this machine is luck: what is tested is that one thread adds them up."""
    ddpg, seen = agent(), []
    ddpg.actor.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ddpg.learn(transitions(2), updates=1)
        ddpg.action(state(0, 0, 0), 0.1)
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_pickled_it_goes_on_identically() -> None:
    ddpg = agent()
    ddpg.learn(transitions(12), updates=1)
    twin = pickle.loads(pickle.dumps(ddpg))
    for one in (ddpg, twin):
        one.learn(transitions(5, seed=1), updates=3)
    for ours, other in zip(parameters(ddpg.actor), parameters(twin.actor), strict=True):
        np.testing.assert_array_equal(ours, other)
    assert ddpg.action(state(1, 0, 0), 0.3) == twin.action(state(1, 0, 0), 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be an integer >= 1, got 0"),
        ({"actor_learning_rate": 0}, "actor_learning_rate must be a finite number > 0, got 0"),
        ({"critic_learning_rate": -1}, "critic_learning_rate must be a finite number > 0, got -1"),
        ({"tau": 2}, r"tau must be in 0\.\.1, got 2"),
        ({"discount": -0.5}, r"discount must be in 0\.\.1, got -0\.5"),
        ({"batch_size": 1.5}, r"batch_size must be an integer >= 1, got 1\.5"),
        ({"baseline_decay": 3}, r"baseline_decay must be in 0\.\.1, got 3"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DDPGSettings(**options)
