"""AMC keeps the contract and the budget, learns at the end of episodes, and beats random search on a toy."""

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

from autocompress.budget import Budget, Constraints
from autocompress.cost import AdditiveCost, Factor, Values, operation_cost
from autocompress.engine import search
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError, SpaceError
from autocompress.ops import Conv2d, Ops
from autocompress.plugins import load_strategy
from autocompress.ratios import RatioProcess
from autocompress.space import Block, Choice, Codes, Option, SearchSpace
from autocompress.strategy import Strategy, WarmStart
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import ToyEvaluator, tiny_constraints, toy_batch, toy_constraints
from autocompress.trial import Batch, Outcome
from strategies.amc import Amc
from strategies.random_search import RandomSearch


class TestAmc(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Amc:
        return Amc(constraints, seed=seed, hidden=8, warmup=5, batch_size=16)


def small(constraints: Constraints, seed: int = 0, **options: Any) -> Amc:
    return Amc(constraints, seed=seed, **{"hidden": 8, "warmup": 3, "batch_size": 8, **options})


def learned(strategy: Amc) -> list[tuple[float, float]]:
    """Action and reward of every decision in the replay memory."""
    return [(one.action, one.reward) for one in strategy._agent.memory]


def weights(strategy: Amc) -> list[np.ndarray[Any, Any]]:
    return [parameter.detach().numpy().copy() for parameter in strategy._agent.actor.parameters()]


def changed(before: list[np.ndarray[Any, Any]], after: list[np.ndarray[Any, Any]]) -> bool:
    return any((one != other).any() for one, other in zip(before, after, strict=True))


def test_it_is_found_by_name() -> None:
    assert load_strategy("strategies.amc:Amc") is Amc


def test_every_row_fits_several_limits() -> None:
    space = toy_constraints().space
    costs = [operation_cost(space, metric) for metric in ("macs", "params", "size_bytes")]
    constraints = Budget.parse("macs=35%,params=50%,size_bytes=45%").resolve(space, costs)
    strategy = small(constraints)
    for _ in range(30):
        rows = strategy.ask(2)
        assert constraints.feasible(rows).all()
        strategy.tell(toy_batch(constraints, rows))


def test_weights_move_at_the_end_of_episodes_only_and_not_before_the_warm_up_is_over() -> None:
    constraints = toy_constraints()
    strategy = small(constraints, warmup=2)
    before = weights(strategy)
    for _ in range(2):
        strategy.tell(toy_batch(constraints, strategy.ask(1)))
    assert not changed(before, weights(strategy))
    rows = strategy.ask(3)
    assert not changed(before, weights(strategy))
    strategy.tell(toy_batch(constraints, rows[:1]))
    assert changed(before, weights(strategy))


def test_nothing_is_learned_from_rows_that_failed_or_were_told_before() -> None:
    constraints = toy_constraints()
    strategy = small(constraints, warmup=1)
    rows = strategy.ask(4)
    for outcome in (Outcome.FAILED, Outcome.INFEASIBLE):
        strategy.tell(toy_batch(constraints, rows[:1], outcome))
    assert learned(strategy) == []
    strategy.tell(toy_batch(constraints, rows))
    before, count = weights(strategy), len(learned(strategy))
    strategy.tell(toy_batch(constraints, rows))
    assert len(learned(strategy)) == count
    assert not changed(before, weights(strategy))


def test_an_episode_keeps_the_ratios_that_were_possible_and_gives_its_reward_to_every_decision() -> None:
    constraints = toy_constraints("macs=20%")
    strategy, twin = small(constraints), small(constraints)
    (row,) = strategy.ask(1)
    # The same agent draws the same actions.
    possible, walk = [], RatioProcess(constraints).start()
    while not walk.done:
        possible.append(walk.act(twin._agent.random_action()))
    np.testing.assert_array_equal(walk.row[0], row)
    batch = toy_batch(constraints, row[None])
    strategy.tell(batch)
    reward = float(batch.metrics["accuracy"][0])
    assert learned(strategy) == [(action, reward) for action in possible]
    assert [one.last for one in strategy._agent.memory] == [False] * (len(possible) - 1) + [True]


def test_rows_given_beforehand_are_episodes_of_their_ratios() -> None:
    constraints = toy_constraints("macs=100%", blocks=2)
    strategy = small(constraints)
    row = constraints.space.largest()
    strategy.tell(toy_batch(constraints, row))
    assert learned(strategy) == [(1.0, 1.0)] * 4
    asked = []
    while len(rows := strategy.ask(5)):
        asked += rows.tolist()
        strategy.tell(toy_batch(constraints, rows))
    assert row[0].tolist() not in asked
    assert len(asked) == 23  # all others of the 24


def test_the_noise_becomes_smaller_and_the_warm_up_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = toy_constraints("macs=100%")
    strategy = small(constraints, episodes=40, warmup=None, sigma=0.4)
    seen: list[float] = []
    inner = strategy._agent.action

    def spy(state: Any, sigma: float) -> float:
        seen.append(sigma)
        return inner(state, sigma)

    monkeypatch.setattr(strategy._agent, "action", spy)
    # An eighth of 40.
    for _ in range(5):
        strategy.tell(toy_batch(constraints, strategy.ask(1)))
    assert seen == []
    first: list[float] = []
    for _ in range(36):
        seen.clear()
        strategy.tell(toy_batch(constraints, strategy.ask(1)))
        first.append(seen[0])
    # From 0.4 to a twentieth of it in the 35 episodes after the warm-up.
    np.testing.assert_allclose(first, [0.4 * 0.05 ** (index / 35) for index in range(36)])


def test_steps_of_the_actor_are_larger_in_shorter_searches() -> None:
    rates = {
        episodes: small(toy_constraints(), episodes=episodes)._agent._settings.actor_learning_rate
        for episodes in (100, 800, 5000)
    }
    assert rates == pytest.approx({100: 8e-4, 800: 1e-4, 5000: 1e-4})


@pytest.mark.parametrize(("cost", "name"), [("macs", "FLOPs"), ("params", "parameters")])
def test_the_published_rewards_with_costs(cost: str, name: str) -> None:
    """acc_flops_reward, `-(1 - acc / 100) * ln(FLOPs)`, and `-Error * log(#Param)`."""
    del name
    constraints = toy_constraints()
    strategy = small(constraints, reward="log_cost", cost=cost)
    row = strategy.ask(1)
    batch = toy_batch(constraints, row)
    strategy.tell(batch)
    error, priced = 1 - batch.metrics["accuracy"][0], batch.costs[cost][0]
    assert learned(strategy)[0][1] == pytest.approx(-error * np.log(priced))


def test_at_most_so_many_rows_wait_to_be_told() -> None:
    constraints = toy_constraints("macs=100%")
    strategy = small(constraints)
    rows = strategy.ask(1000)
    assert len(rows) == 64
    assert len(strategy.ask(1000)) == 0
    strategy.tell(toy_batch(constraints, rows[:10], Outcome.FAILED))
    assert len(strategy.ask(1000)) == 10


def test_it_goes_on_after_a_warm_start_in_the_engine() -> None:
    constraints = toy_constraints()
    first = constraints.space.canonical(constraints.sample(1, np.random.default_rng(0)))
    evaluator = ToyEvaluator(constraints.space, failing=True)
    result = search(WarmStart(small(constraints), first), constraints, evaluator, evaluations=30)
    assert len(result.trials) == 30
    assert {trial.outcome for trial in result.trials} == {Outcome.MEASURED, Outcome.FAILED}
    assert all(trial.costs["macs"] <= constraints.limits["macs"] for trial in result.trials)


def test_pickled_with_rows_that_wait_it_goes_on_identically() -> None:
    constraints = toy_constraints()
    strategy = small(constraints, warmup=1)
    for _ in range(3):
        strategy.tell(toy_batch(constraints, strategy.ask(2)))
    rows = strategy.ask(3)
    twin = pickle.loads(pickle.dumps(strategy))
    for one in (strategy, twin):
        one.tell(toy_batch(constraints, rows))
    assert learned(strategy) == learned(twin)
    np.testing.assert_array_equal(strategy.ask(5), twin.ask(5))


# Learning ------------------------------------------------------------------------------------------------

LAYERS, WIDTHS = 10, tuple(range(4, 33, 4))


def _convolution(entering: Option, leaving: Option) -> Ops:
    return (Conv2d(int(entering), int(leaving), 8, 8, kernel=3),)


def uneven(late: bool) -> tuple[Constraints, Values]:
    """Ten layers of equal cost, of which the last ones, or the first ones, matter most; 40 % of the MACs."""
    choices = tuple(Choice(f"layer{index}", WIDTHS) for index in range(LAYERS))
    blocks = [Block("first", ("layer0",), partial(_convolution, 3))]
    for index in range(1, LAYERS):
        blocks.append(Block(f"block{index}", (f"layer{index - 1}", f"layer{index}"), _convolution))
    blocks.append(Block("last", (f"layer{LAYERS - 1}",), partial(_convolution, leaving=10)))
    space = SearchSpace("uneven", choices, tuple(blocks))
    weights = np.exp(np.linspace(-4, 4, LAYERS) * (1 if late else -1))
    constraints = Budget.parse("macs=40%").resolve(space, [operation_cost(space, "macs")])
    return constraints, weights / weights.sum()


def best_of(strategy: Strategy, constraints: Constraints, weights: Values, evaluations: int) -> float:
    best = 0.0
    for _ in range(evaluations):
        rows = strategy.ask(1)
        score: Values = 0.5 + 0.4 * ((rows + 1) / len(WIDTHS)) @ weights
        best = max(best, float(score[0]))
        outcomes = np.zeros(1, dtype=np.int8)
        strategy.tell(Batch(rows, constraints.price(rows), {"accuracy": score}, outcomes))
    return best


@pytest.mark.slow
def test_it_finds_better_networks_than_random_search_with_as_many_evaluations() -> None:
    """Five fixed seeds, three with the layers that matter at the end; if they stand first, greed is enough.

    Over six seeds with late layers the gain is 0.014 with a standard deviation of 0.009; with 150 evaluations
    there was none: it needs its time.
    """
    gains = []
    for seed in range(5):
        late, evaluations = seed < 3, 200 if seed < 3 else 100
        constraints, weights = uneven(late)
        strategy = Amc(constraints, seed=seed, episodes=evaluations, hidden=64)
        found = best_of(strategy, constraints, weights, evaluations)
        gains.append(found - best_of(RandomSearch(constraints, seed=seed), constraints, weights, evaluations))
    assert np.mean(gains[:3]) > 0.007
    assert np.mean(gains[3:]) > 0.007


# Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"episodes": 0}, "episodes must be an integer >= 1, got 0"),
        ({"warmup": 0}, "warmup must be an integer >= 1, got 0"),
        ({"sigma": 0}, "sigma must be a finite number > 0, got 0"),
        ({"sigma_decay": 1.5}, r"sigma_decay must be in 0\.\.1, got 1\.5"),
        ({"updates": 0}, "updates must be an integer >= 1, got 0"),
        ({"replay": 0}, "replay must be an integer >= 1, got 0"),
        ({"hidden": 2.5}, r"hidden must be an integer >= 1, got 2\.5"),
        ({"tau": 7}, r"tau must be in 0\.\.1, got 7"),
        ({"reward": "flops"}, "reward must be one of accuracy, .*log_cost, got 'flops'"),
        (
            {"reward": "log_cost", "cost": "watts"},
            "cost must be one of macs, params, size_bytes, bops, got 'watts'",
        ),
        ({"reward": "log_cost", "cost": "macs", "target": 3}, "'log_cost' has no target, got target=3"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Amc(toy_constraints(), **{"seed": 0, **options})


def test_a_budget_that_nothing_fits_and_a_space_without_numbers_are_refused() -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        Amc(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)
    space = SearchSpace("words", (Choice("kind", ("small", "large"), ordinal=False),), ())
    cost = AdditiveCost("macs", (2,), 1.0, (Factor((0,), np.array([0.0, 1.0])),))
    with pytest.raises(SpaceError, match="take a strategy for any options, such as 'reinforce'"):
        Amc(Constraints(space, {"macs": cost}, {"macs": 2.0}), seed=0)


def test_what_an_evaluator_gives_must_have_the_objective_and_suit_the_reward() -> None:
    constraints = tiny_constraints((5, 5))
    strategy = small(constraints, reward="log_cost", cost="macs")
    rows: Codes = strategy.ask(1)
    with pytest.raises(EvaluationError, match="maximises 'accuracy', but the evaluator gives top5"):
        strategy.tell(toy_batch(constraints, rows, objective="top5"))
    percent = Batch(rows, constraints.price(rows), {"accuracy": np.array([71.0])}, np.zeros(1, dtype=np.int8))
    with pytest.raises(RecipeError, match="needs accuracies up to 1"):
        strategy.tell(percent)
