import copy
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, Factor, Values
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import every_network, toy_batch, toy_constraints, toy_score
from autocompress.trial import Batch, Outcome
from strategies.controllers import LSTM, NOT_TAKEN, Controller, Factorized
from strategies.policy import Policy
from strategies.policy_gradient import Adam, MovingBaseline, ppo_weights, reinforce_weights
from strategies.random_search import RandomSearch
from strategies.reinforce import Reinforce

POLICIES = pytest.mark.parametrize("name", ["factorized", "lstm"])
ALGORITHMS = pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])


class TestFactorizedReinforce(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Reinforce:
        return Reinforce(constraints, seed=seed, algorithm="reinforce")


class TestFactorizedPPO(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Reinforce:
        return Reinforce(constraints, seed=seed)


class TestLSTMReinforce(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Reinforce:
        return Reinforce(constraints, seed=seed, policy="lstm", algorithm="reinforce", lstm_units=8)


class TestLSTMPPO(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Reinforce:
        return Reinforce(constraints, seed=seed, policy="lstm", lstm_units=4, batch_size=10)


# Policies ------------------------------------------------------------------------------------------------


def controller_of(name: str, constraints: Constraints, *, seed: int = 0) -> Controller:
    """A controller that prefers some options clearly."""
    rng = np.random.default_rng(seed)
    counts = constraints.space.counts.tolist()
    controller: Controller = (
        LSTM(counts, rng, units=3, constant=2.0, temperature=0.7) if name == "lstm" else Factorized(counts)
    )
    for parameter in controller.parameters:
        parameter += rng.normal(size=parameter.shape)
    return controller


def feasible_networks(constraints: Constraints) -> Codes:
    networks = every_network(constraints.space)
    return networks[constraints.feasible(networks)]


def probabilities(policy: Policy, codes: Codes) -> Values:
    result: Values = np.exp(policy.log_probabilities(policy.decisions(codes)).sum(axis=1))
    return result


def rewards_of(codes: Codes) -> Values:
    """Rewards of any sign, without structure."""
    result: Values = np.random.default_rng(7).normal(size=len(codes)) + 3.0
    return result


def exact_gradient(policy: Policy, codes: Codes, rewards: Values) -> list[Values]:
    """Central differences of the expected reward, which is a sum over all rows."""
    gradients = []
    for parameter in policy.controller.parameters:
        gradient = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            value, found = parameter[index], []
            for step in (1e-5, -1e-5):
                parameter[index] = value + step
                found.append(float(probabilities(policy, codes) @ rewards))
            parameter[index] = value
            gradient[index] = (found[0] - found[1]) / 2e-5
        gradients.append(gradient)
    return gradients


def jointly_limited() -> Constraints:
    """Two limits that each can be met after `first = 1`, but never together; three rows fit."""
    choices = (Choice("first", (0, 1)), Choice("second", (0, 1, 2)), Choice("free", (0, 1, 2)))
    space = SearchSpace("joint", choices, ())
    counts = (2, 3, 3)
    costs = {
        metric: AdditiveCost(
            metric,
            counts,
            1.0,
            (Factor((0,), np.array([0.0, 1.0])), Factor((1,), np.array(second))),
        )
        for metric, second in {"macs": [2.0, 0.0, 1.0], "params": [0.0, 2.0, 1.0]}.items()
    }
    return Constraints(space, costs, {"macs": 2.0, "params": 2.0})


@POLICIES
@pytest.mark.parametrize("budget", ["macs=100%", "macs=50%", "macs=8%"])
def test_the_probabilities_of_all_feasible_networks_sum_to_one(name: str, budget: str) -> None:
    constraints = toy_constraints(budget, blocks=4)
    policy = Policy(constraints, controller_of(name, constraints))
    chances = probabilities(policy, feasible_networks(constraints))
    assert (chances > 0).all()
    np.testing.assert_allclose(chances.sum(), 1.0, rtol=1e-12)


@POLICIES
def test_what_does_not_fit_has_probability_exactly_zero(name: str) -> None:
    constraints = toy_constraints("macs=30%", blocks=4)
    networks = every_network(constraints.space)
    fits = constraints.feasible(networks)
    policy = Policy(constraints, controller_of(name, constraints))
    assert 0.2 < fits.mean() < 0.8
    np.testing.assert_array_equal(probabilities(policy, networks) > 0, fits)
    np.testing.assert_array_equal(policy.decisions(networks).possible, fits)
    assert (probabilities(policy, networks[~fits]) == 0).all()


@POLICIES
def test_an_option_is_closed_exactly_if_no_completion_fits(name: str) -> None:
    whole = toy_constraints("macs=100%", blocks=3)
    # The limit is met exactly by some network, which fits.
    macs = np.sort(whole.costs["macs"].of(every_network(whole.space)))
    constraints = Constraints(whole.space, whole.costs, {"macs": float(macs[len(macs) // 2])})
    policy = Policy(constraints, controller_of(name, constraints))
    rows = feasible_networks(constraints)
    decisions = policy.decisions(rows)
    for row, taken, allowed in zip(rows, decisions.taken, decisions.allowed, strict=True):
        for position in np.flatnonzero(taken != NOT_TAKEN):
            same = (rows[:, :position] == row[:position]).all(axis=1)
            # Brute force over all feasible networks that begin alike.
            completable = np.unique(rows[same, position])
            np.testing.assert_array_equal(np.flatnonzero(allowed[position]), completable)


@POLICIES
def test_networks_are_drawn_as_often_as_they_are_probable(name: str) -> None:
    constraints = toy_constraints("macs=50%", blocks=2)
    policy = Policy(constraints, controller_of(name, constraints))
    networks = feasible_networks(constraints)
    draws = policy.draw(20_000, np.random.default_rng(1))
    rows, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(draws) == 20_000
    seen = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    observed = np.array([seen.get(tuple(row), 0) for row in networks.tolist()])
    expected = 20_000 * probabilities(policy, networks)
    # Five standard deviations of each count: a false alarm with 19 networks has probability 1e-5.
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected) + 1).all()
    assert observed.sum() == 20_000


def test_a_flatter_policy_draws_uniformly_among_what_is_open() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    policy = Policy(constraints, controller_of("factorized", constraints))
    rows = policy.draw(4000, np.random.default_rng(2), sharpness=0.0)
    shares = np.bincount(rows[:, 2], minlength=3) / len(rows)
    assert np.abs(shares - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 4000)


@POLICIES
def test_limits_that_fail_only_together_lose_draws_but_no_feasible_network(name: str) -> None:
    constraints = jointly_limited()
    policy = Policy(constraints, controller_of(name, constraints))
    networks = feasible_networks(constraints)
    assert len(networks) == 3
    chances = probabilities(policy, networks)
    assert (chances > 0).all()
    assert chances.sum() < 0.95
    draws = policy.draw(2000, np.random.default_rng(3))
    assert constraints.feasible(draws).all()
    # Five standard deviations.
    share = chances.sum()
    assert abs(len(draws) / 2000 - share) < 5 * np.sqrt(share * (1 - share) / 2000)


@POLICIES
def test_the_expected_gradient_is_that_of_the_expected_reward(name: str) -> None:
    constraints = toy_constraints("macs=60%", blocks=2)
    policy = Policy(constraints, controller_of(name, constraints))
    networks = feasible_networks(constraints)
    rewards = rewards_of(networks)
    # The mean over all rows, each weighted by its probability, is the expectation.
    weights = len(networks) * probabilities(policy, networks) * rewards
    found = policy.gradients(policy.decisions(networks), reinforce_weights(weights))
    for one, other in zip(found, exact_gradient(policy, networks, rewards), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)
        assert np.abs(other).max() > 1e-3


@POLICIES
def test_the_entropy_bonus_climbs_the_entropy_of_each_decision(name: str) -> None:
    constraints = toy_constraints("macs=60%", blocks=2)
    policy = Policy(constraints, controller_of(name, constraints))
    decisions = policy.decisions(feasible_networks(constraints)[:5])
    made = decisions.made

    def entropy() -> float:
        scores = policy.controller.scores(len(made), lambda position, _: decisions.taken[:, position])
        chances = np.where(decisions.allowed, np.exp(scores), 0.0)
        total = 0.0
        for row, position in np.argwhere(made):
            p = chances[row, position] / chances[row, position].sum()
            total -= float((p[p > 0] * np.log(p[p > 0])).sum())
        return total / len(made)

    found = policy.gradients(decisions, lambda logs: np.zeros_like(logs), entropy=0.5)
    for parameter, gradient in zip(policy.controller.parameters, found, strict=True):
        for index in list(np.ndindex(parameter.shape))[::7]:
            value = parameter[index]
            parameter[index] = value + 1e-5
            above = entropy()
            parameter[index] = value - 1e-5
            below = entropy()
            parameter[index] = value
            np.testing.assert_allclose(gradient[index], 0.5 * (above - below) / 2e-5, atol=1e-8)


@POLICIES
def test_choices_without_effect_add_nothing_to_the_gradient(name: str) -> None:
    constraints = toy_constraints("macs=100%", blocks=4)
    space = constraints.space
    controller = controller_of(name, constraints)
    policy = Policy(constraints, controller)
    shallow = np.zeros((1, len(space.choices)), dtype=np.int64)
    decisions = policy.decisions(shallow)
    # Resolution, depth and the first kernel; the other three kernels have no effect at depth 1.
    np.testing.assert_array_equal(decisions.made[0], [True, True, True, False, False, False])
    assert (policy.log_probabilities(decisions)[0, 3:] == 0).all()
    gradients = policy.gradients(decisions, lambda logs: np.ones_like(logs), entropy=0.1)
    if name == "factorized":
        assert (gradients[0][3:] == 0).all()
        assert (gradients[0][:3] != 0).any()
    else:
        assert (gradients[2][3:] == 0).all()
        assert (gradients[3][3:] == 0).all()
        assert (gradients[3][:3] != 0).any()


def test_the_lstm_is_the_one_of_pytorch() -> None:
    import torch  # here, since the contract imports this file again in other processes

    counts, units = [2, 3, 4, 2], 5
    rng = np.random.default_rng(0)
    controller = LSTM(counts, rng, units=units, constant=2.5, temperature=0.5)
    for parameter in controller.parameters:
        parameter += rng.normal(size=parameter.shape)
    taken = np.array([[1, 2, 0, 1], [0, NOT_TAKEN, 3, 0], [1, 0, NOT_TAKEN, NOT_TAKEN]])
    slopes = rng.normal(size=(3, 4, 4))
    slopes *= np.arange(4) < np.array(counts)[:, None]

    weights = [torch.tensor(parameter, requires_grad=True) for parameter in controller.parameters]
    inputs, recurrent, outputs, biases = weights
    # Row 0 of the inputs is read at the start and after a choice without effect, then four rows a choice.
    tokens = np.zeros((3, 4), dtype=np.int64)
    tokens[:, 1:] = np.where(taken == NOT_TAKEN, 0, taken + 4 * np.arange(4) + 1)[:, :-1]
    identity = torch.eye(4 * units, dtype=torch.float64)
    parameters = {"weight_ih_l0": identity, "weight_hh_l0": recurrent.T}
    lstm = torch.nn.LSTM(4 * units, units, bias=False, batch_first=True, dtype=torch.float64)
    hidden = torch.func.functional_call(lstm, parameters, (inputs[tokens],))[0]
    scores = 2.5 * torch.tanh((torch.einsum("ncu,cuw->ncw", hidden, outputs) + biases) / 0.5)
    (scores * torch.tensor(slopes)).sum().backward()

    ours = controller.scores(3, lambda position, _: taken[:, position])
    np.testing.assert_allclose(ours, scores.detach().numpy(), atol=1e-12)
    for found, weight in zip(controller.gradients(taken, lambda _: slopes), weights, strict=True):
        assert weight.grad is not None
        np.testing.assert_allclose(found, weight.grad.numpy(), atol=1e-12)


def test_adam_takes_steps_of_the_learning_rate_where_the_gradient_stays_the_same() -> None:
    ours = [np.zeros((2, 2)), np.zeros(3)]
    adam = Adam(ours, 0.05)
    for _ in range(4):
        adam.ascend([np.array([[1e-3, -7.0], [0.0, 2.0]]), np.array([1.0, -1e4, 0.5])])
    np.testing.assert_allclose(ours[0], 0.2 * np.array([[1, -1], [0, 1]]), rtol=1e-4)
    np.testing.assert_allclose(ours[1], 0.2 * np.array([1, -1, 1]), rtol=1e-7)


def test_adam_is_the_published_algorithm() -> None:
    values, gradients = [np.array([0.3])], np.random.default_rng(1).normal(size=10)
    adam = Adam(values, 0.05)
    parameter, first, second = 0.3, 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        adam.ascend([np.array([gradient])])
        # Algorithm 1 of Kingma & Ba, uphill.
        first = 0.9 * first + (1 - 0.9) * gradient
        second = 0.999 * second + (1 - 0.999) * gradient**2
        parameter += 0.05 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
        np.testing.assert_allclose(values[0], [parameter], rtol=1e-10)


# Baseline and clip ---------------------------------------------------------------------------------------


def test_advantages_are_ranks_among_the_last_rewards_less_their_corrected_moving_average() -> None:
    baseline = MovingBaseline(decay=0.5)
    np.testing.assert_array_equal(baseline.advantages(np.array([3.0, 9.0])), [0.0, 0.0])
    baseline.update(np.array([1.0, 2.0, 3.0, 4.0]))
    # 3 beats two of four and is beaten by one; no average of utilities yet.
    np.testing.assert_allclose(baseline.advantages(np.array([3.0, -7.0, 2.5, 1e9])), [0.25, -1.0, 0.0, 1.0])
    baseline.update(np.array([2.5, 5.0]))
    # The average is that of 0 and 1.
    np.testing.assert_allclose(baseline.advantages(np.array([6.0])), [1.0 - 0.5])
    baseline.update(np.array([0.0]))
    # (0.5 * 0.5 * 0.5 + 0.5 * -1) / (1 - 0.25) = -0.5; 3 beats four of seven and is beaten by two.
    np.testing.assert_allclose(baseline.advantages(np.array([3.0])), [2 / 7 + 0.5])


def test_a_new_reward_is_compared_with_the_last_fifty_only() -> None:
    baseline = MovingBaseline(decay=0.0)
    baseline.update(np.full(10, 9.0))
    for _ in range(11):
        baseline.update(np.full(5, 1.0))
    # The last batch was equal to all that was left: its utility, the baseline, is 0.
    np.testing.assert_allclose(baseline.advantages(np.array([5.0])), [1.0])


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=20), st.integers(0, 19))
def test_the_advantage_of_a_reward_depends_on_no_other_of_its_batch(values: list[int], row: int) -> None:
    rewards, row = np.array(values, dtype=float), row % len(values)
    baseline = MovingBaseline(decay=0.8)
    for batch in ([1.0, -2.0], [0.0, 3.0, 1.0]):
        baseline.update(np.array(batch))
    np.testing.assert_allclose(
        baseline.advantages(rewards)[row], baseline.advantages(rewards[row : row + 1])[0]
    )
    # Nor on the unit of the rewards.
    scaled = MovingBaseline(decay=0.8)
    for batch in ([1.0, -2.0], [0.0, 3.0, 1.0]):
        scaled.update(100 * np.array(batch) - 7)
    np.testing.assert_allclose(scaled.advantages(100 * rewards - 7), baseline.advantages(rewards))


class Recorder:
    """In place of the optimiser: keeps the gradients, changes nothing."""

    def __init__(self) -> None:
        self.gradients: list[list[Values]] = []

    def ascend(self, gradients: list[Values]) -> None:
        self.gradients.append(gradients)


@POLICIES
def test_the_strategy_climbs_the_expected_utility_without_bias(name: str) -> None:
    constraints = toy_constraints("macs=60%", blocks=2)
    strategy = Reinforce(
        constraints,
        seed=0,
        policy=name,  # type: ignore[arg-type]
        algorithm="reinforce",
        batch_size=1,
        entropy=0.0,
        lstm_units=3,
    )
    networks = feasible_networks(constraints)
    rewards, rng = rewards_of(networks), np.random.default_rng(1)
    past = rng.normal(size=8) + 3.0
    for value in past:
        strategy.tell(told(constraints, networks[rng.integers(len(networks), size=1)], np.array([value])))
    policy = strategy._policy
    chances = probabilities(policy, networks)
    expected: list[NDArray[np.float64]] = [np.zeros_like(p) for p in policy.controller.parameters]
    for row in range(len(networks)):
        twin = copy.deepcopy(strategy)
        twin._optimiser = recorder = Recorder()  # type: ignore[assignment]
        twin.tell(told(constraints, networks[row : row + 1], rewards[row : row + 1]))
        for total, gradient in zip(expected, recorder.gradients[0], strict=True):
            total += chances[row] * gradient
    # How many of the past rewards each network beats, less those that beat it: known before it is drawn.
    utilities = np.array([(reward > past).mean() - (reward < past).mean() for reward in rewards])
    for found, exact in zip(expected, exact_gradient(policy, networks, utilities), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-8)
        assert np.abs(exact).max() > 1e-4


def test_ppo_has_no_gradient_beyond_the_clip() -> None:
    before = np.log(np.full((4, 1), 0.5))
    logs = before + np.log(np.array([[1.3], [1.3], [0.7], [0.7]]))
    weights = ppo_weights(np.array([2.0, -2.0, 2.0, -2.0]), before, clip=0.2)
    np.testing.assert_allclose(weights(logs), [[0.0], [-2.6], [1.4], [0.0]])


@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_ppo_climbs_the_clipped_objective(advantage: float) -> None:
    before = np.array([[-1.0, -2.0, -0.5, -0.3]])
    logs = before + np.array([[0.05, -0.1, 0.4, -0.4]])

    def objective(values: Values) -> Values:
        ratio = np.exp(values - before)
        objective: Values = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        return objective

    slope = (objective(logs + 1e-6) - objective(logs - 1e-6)) / 2e-6
    found = ppo_weights(np.array([advantage]), before, clip=0.2)(logs)
    np.testing.assert_allclose(found, slope, atol=1e-8)


@POLICIES
def test_the_first_step_of_ppo_is_that_of_reinforce(name: str) -> None:
    constraints = toy_constraints(blocks=3)
    policy = Policy(constraints, controller_of(name, constraints))
    decisions = policy.decisions(feasible_networks(constraints)[::5])
    advantages = np.linspace(-1, 2, len(decisions.taken))
    clipped = ppo_weights(advantages, policy.log_probabilities(decisions), clip=0.2)
    plain = policy.gradients(decisions, reinforce_weights(advantages))
    for one, other in zip(policy.gradients(decisions, clipped), plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_ppo_takes_as_many_steps_a_batch_as_it_is_told() -> None:
    constraints = toy_constraints()
    strategy = Reinforce(constraints, seed=0, algorithm="ppo", batch_size=3, ppo_epochs=5)
    strategy._optimiser = recorder = Recorder()  # type: ignore[assignment]
    strategy.tell(toy_batch(constraints, strategy.ask(7)))
    assert len(recorder.gradients) == 10


# The strategy --------------------------------------------------------------------------------------------


def told(constraints: Constraints, codes: Codes, values: Values) -> Batch:
    measured = np.full(len(codes), Outcome.MEASURED, dtype=np.int8)
    return Batch(codes, constraints.price(codes), {"accuracy": values}, measured)


def run(
    strategy: Reinforce | RandomSearch,
    constraints: Constraints,
    score: Callable[[Codes], Values],
    evaluations: int,
    n: int,
) -> list[Values]:
    scores = []
    for _ in range(evaluations // n):
        codes = strategy.ask(n)
        scores.append(score(codes))
        strategy.tell(told(constraints, codes, scores[-1]))
    return scores


def state(strategy: Reinforce) -> list[Values]:
    return strategy._policy.controller.parameters


@POLICIES
@ALGORITHMS
def test_it_learns_which_option_of_every_choice_is_right(name: str, algorithm: str) -> None:
    space = SearchSpace("bandits", tuple(Choice(f"arm{i}", (0, 1, 2, 3)) for i in range(8)), ())
    constraints = Constraints(space, {}, {})
    right = np.array([0, 1, 2, 3, 3, 2, 1, 0])
    strategy = Reinforce(
        constraints,
        seed=3,
        policy=name,  # type: ignore[arg-type]
        algorithm=algorithm,  # type: ignore[arg-type]
        lstm_units=16,
    )
    scores = run(strategy, constraints, lambda codes: (codes == right).mean(axis=1), 240, 4)
    assert np.mean(scores[:4]) < 0.4
    # Before, a quarter is right; a perfect network is one of 65,536.
    assert (strategy._policy.draw(100, np.random.default_rng(0)) == right).mean() > 0.75
    assert np.max(scores) >= 7 / 8


@ALGORITHMS
def test_it_beats_random_search_under_a_budget(algorithm: str) -> None:
    constraints = toy_constraints(blocks=10)

    def score(codes: Codes) -> Values:
        return toy_score(constraints.space, codes)

    wins = 0
    for seed in range(8):
        strategy = Reinforce(constraints, seed=seed, algorithm=algorithm)  # type: ignore[arg-type]
        best = max(float(s.max()) for s in run(strategy, constraints, score, 200, 4))
        drawn = run(RandomSearch(constraints, seed=seed), constraints, score, 200, 200)
        wins += best > max(float(s.max()) for s in drawn)
    # If it were no better, P(>= 7 of 8) <= 0.035; ties count as losses.
    assert wins >= 7


@POLICIES
def test_it_finds_exactly_the_feasible_networks_and_then_ends(name: str) -> None:
    constraints = toy_constraints(blocks=3)
    strategy = Reinforce(constraints, seed=1, policy=name)  # type: ignore[arg-type]
    rows = []
    while len(codes := strategy.ask(9)):
        rows.append(codes)
        strategy.tell(toy_batch(constraints, codes))
    found = np.vstack(rows)
    assert len(np.unique(found, axis=0)) == len(found)
    np.testing.assert_array_equal(np.unique(found, axis=0), feasible_networks(constraints))


@POLICIES
def test_under_limits_that_fail_only_together_every_asked_row_fits(name: str) -> None:
    constraints = jointly_limited()
    strategy = Reinforce(constraints, seed=1, policy=name)  # type: ignore[arg-type]
    rows = strategy.ask(100)
    np.testing.assert_array_equal(np.unique(rows, axis=0), feasible_networks(constraints))


def test_a_policy_that_has_become_sure_still_proposes_new_networks_near_its_favourite() -> None:
    space = SearchSpace("arms", tuple(Choice(f"arm{i}", (0, 1, 2)) for i in range(12)), ())
    strategy = Reinforce(Constraints(space, {}, {}), seed=2)
    # All zeros: with probability 0.94.
    state(strategy)[0][:, 0] = 6.0
    rows = strategy.ask(100)
    assert len(np.unique(rows, axis=0)) == 100
    # Random networks differ from it in two thirds of their genes.
    assert (rows != 0).mean() < 0.3


def test_many_rows_asked_at_once_all_come_from_the_present_policy() -> None:
    space = SearchSpace("arms", tuple(Choice(f"arm{i}", (0, 1, 2, 3)) for i in range(16)), ())
    strategy = Reinforce(Constraints(space, {}, {}), seed=2)
    state(strategy)[0][:, 0] = np.log(4.5)
    rows = strategy.ask(2500)
    assert len(np.unique(rows, axis=0)) == 2500
    # 4.5 of 7.5; the standard deviation of the mean of 40,000 genes is 0.0025.
    assert abs((rows == 0).mean() - 0.6) < 0.0125


def test_what_was_drawn_ahead_is_dropped_when_the_policy_changes() -> None:
    space = SearchSpace("arms", tuple(Choice(f"arm{i}", (0, 1, 2)) for i in range(12)), ())
    constraints = Constraints(space, {}, {})
    strategy = Reinforce(constraints, seed=2, batch_size=4)
    first = strategy.ask(4)
    strategy.tell(told(constraints, first, np.arange(4.0)))
    state(strategy)[0][:, 0] = 50.0
    np.testing.assert_array_equal(strategy.ask(1), np.zeros((1, 12)))


def test_rewards_that_are_all_the_same_teach_nothing() -> None:
    constraints = toy_constraints()
    strategy = Reinforce(constraints, seed=2, entropy=0.0)
    run(strategy, constraints, lambda codes: np.full(len(codes), 0.1 + 0.2), 50, 5)
    assert (state(strategy)[0] == 0).all()


def test_how_many_rows_are_told_at_once_has_no_influence() -> None:
    constraints = toy_constraints()
    whole, pieces = (Reinforce(constraints, seed=4, batch_size=4) for _ in range(2))
    codes = whole.ask(10)
    np.testing.assert_array_equal(pieces.ask(10), codes)
    whole.tell(toy_batch(constraints, codes))
    for start, stop in [(0, 1), (1, 7), (7, 10)]:
        pieces.tell(toy_batch(constraints, codes[start:stop]))
    np.testing.assert_array_equal(state(whole)[0], state(pieces)[0])
    assert (state(whole)[0] != 0).any()
    np.testing.assert_array_equal(whole.ask(20), pieces.ask(20))


def test_a_batch_that_is_not_full_waits() -> None:
    constraints = toy_constraints()
    strategy = Reinforce(constraints, seed=4, batch_size=4, entropy=0.0)
    codes = strategy.ask(8)
    strategy.tell(toy_batch(constraints, codes[:7]))
    assert (state(strategy)[0] == 0).all(), "the first batch is only compared with"
    strategy.tell(toy_batch(constraints, codes[7:]))
    assert (state(strategy)[0] != 0).any()


def test_only_measured_and_finite_values_are_learned_from() -> None:
    constraints = toy_constraints()
    strategy, twin = (
        Reinforce(constraints, seed=5, batch_size=3, reward="tunas", cost="macs") for _ in range(2)
    )
    codes = strategy.ask(12)
    twin.ask(12)
    values = np.array([0.1, np.nan, 0.2, np.inf, 0.3, -np.inf, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    usable = np.isfinite(values)
    strategy.tell(told(constraints, codes, values))
    strategy.tell(toy_batch(constraints, codes, Outcome.FAILED))
    strategy.tell(toy_batch(constraints, codes, Outcome.INFEASIBLE))
    twin.tell(told(constraints, codes[usable], values[usable]))
    np.testing.assert_array_equal(state(strategy)[0], state(twin)[0])
    assert (state(strategy)[0] != 0).any()


def test_rows_it_never_asked_change_the_policy_and_rows_that_do_not_fit_do_not() -> None:
    constraints = toy_constraints("macs=50%")
    networks = every_network(constraints.space)
    fits = constraints.feasible(networks)
    strategy = Reinforce(constraints, seed=6, batch_size=1)
    strategy.tell(told(constraints, networks[fits][:300:50], np.array([0.3, 0.1, 0.2, 0.1, 0.3, 0.2])))
    before = state(strategy)[0].copy()
    strategy.tell(told(constraints, networks[~fits][:5], np.full(5, 0.9)))
    np.testing.assert_array_equal(state(strategy)[0], before)
    good = networks[fits][[100]]
    chance = probabilities(strategy._policy, good)
    strategy.tell(told(constraints, good, np.array([0.9])))
    assert probabilities(strategy._policy, good) > chance


def test_in_a_batch_with_rows_that_do_not_fit_the_others_are_learned_from() -> None:
    constraints = toy_constraints("macs=50%")
    networks = every_network(constraints.space)
    fits = constraints.feasible(networks)
    strategy, twin = (Reinforce(constraints, seed=6, batch_size=size) for size in (4, 3))
    good, bad = networks[fits][[5, 60, 200]], networks[~fits][[7]]
    for values in (np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.15, 0.25])):
        strategy.tell(told(constraints, np.vstack([bad, good]), np.array([0.9, *values])))
        twin.tell(told(constraints, good, values))
    np.testing.assert_array_equal(state(strategy)[0], state(twin)[0])
    assert (state(strategy)[0] != 0).any()


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_the_absolute_reward_pulls_the_cost_to_its_target(share: float) -> None:
    constraints = toy_constraints("macs=100%", blocks=8)
    macs = constraints.costs["macs"]
    target = share * macs.maximum
    strategy = Reinforce(constraints, seed=7, reward="tunas", cost="macs", target=target)
    first = strategy.ask(100)
    strategy.tell(told(constraints, first, np.full(100, 0.5)))
    run(strategy, constraints, lambda codes: np.full(len(codes), 0.5), 300, 10)
    last = strategy._policy.draw(100, np.random.default_rng(0))
    start, end = (np.abs(macs.of(codes) / target - 1).mean() for codes in (first, last))
    assert end < 0.5 * start


def test_the_target_is_the_limit_unless_given() -> None:
    constraints = toy_constraints("macs=50%")
    limit = constraints.limits["macs"]
    by_default = Reinforce(constraints, seed=8, reward="mnas_soft", cost="macs", batch_size=2)
    given = Reinforce(constraints, seed=8, reward="mnas_soft", cost="macs", batch_size=2, target=limit)
    other = Reinforce(constraints, seed=8, reward="tunas", cost="macs", batch_size=2, target=0.1 * limit)
    codes = by_default.ask(8)
    for strategy in (by_default, given, other):
        strategy.tell(toy_batch(constraints, codes))
    np.testing.assert_array_equal(state(by_default)[0], state(given)[0])
    assert (state(by_default)[0] != state(other)[0]).any()


def test_a_metric_that_the_evaluator_does_not_give_is_an_error() -> None:
    constraints = toy_constraints()
    strategy = Reinforce(constraints, seed=0, objective="f1")
    with pytest.raises(EvaluationError, match="maximises 'f1', but the evaluator gives accuracy"):
        strategy.tell(toy_batch(constraints, strategy.ask(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "gru"}, "policy must be one of factorized, lstm, got 'gru'"),
        ({"algorithm": "a2c"}, "algorithm must be one of reinforce, ppo, got 'a2c'"),
        (
            {"reward": "mnas"},
            "reward must be one of accuracy, mnas_soft, mnas_hard, tunas, log_cost, got 'mnas'",
        ),
        ({"reward": "tunas"}, "cost must be one of macs, params, size_bytes, bops, got 'latency_ms'"),
        ({"reward": "tunas", "cost": "params"}, "needs a target for params: limit it in the budget or give"),
        (
            {"reward": "tunas", "cost": "params", "target": 0.0},
            r"target must be a finite number > 0, got 0\.0",
        ),
        ({"target": 3.0}, r"reward 'accuracy' has neither a cost nor a target, got cost=None, target=3\.0"),
        ({"cost": "macs"}, "has neither a cost nor a target, got cost='macs'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number > 0, got nan"),
        ({"entropy": -0.1}, r"entropy must be a finite number >= 0, got -0\.1"),
        ({"baseline_decay": 2}, r"baseline_decay must be in 0\.\.1, got 2"),
        ({"baseline_decay": 1}, "baseline_decay must be below 1"),
        ({"learning_rate": 0}, "learning_rate must be a finite number > 0, got 0"),
        ({"algorithm": "ppo", "ppo_epochs": 0}, "ppo_epochs must be an integer >= 1, got 0"),
        ({"ppo_clip": True}, "ppo_clip must be a finite number > 0, got True"),
        ({"policy": "lstm", "lstm_units": 0}, "lstm_units must be an integer >= 1, got 0"),
        ({"policy": "lstm", "lstm_constant": "a"}, "lstm_constant must be a finite number > 0, got 'a'"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Reinforce(toy_constraints(), **{"seed": 0, **options})  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_is_refused_when_the_search_is_made() -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        Reinforce(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)
