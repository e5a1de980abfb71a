"""The process against AMC's own bound; hard budgets; what a state says; the environment."""

import importlib
import sys
import warnings
from functools import partial

import numpy as np
import pytest
from chain_space import chain, random_scores
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.budget import Budget, Constraints
from autocompress.cost import OPERATION_METRICS, AdditiveCost, Factor, operation_cost
from autocompress.environment import RatioEnvironment
from autocompress.errors import EvaluationError, InfeasibleBudgetError, SpaceError
from autocompress.ops import Conv2d, Ops
from autocompress.ratios import RatioProcess, Walk
from autocompress.space import Block, Choice, Codes, Option, SearchSpace
from autocompress.testing.toys import every_network, tiny_constraints, toy_constraints, toy_width_space

LAYERS, CHANNELS = 5, 20
OPTIONS = tuple(range(4, CHANNELS + 1))
"""A fifth of the channels is the least, as AMC's `lbound`."""


def layer(kernel: int, side: int, entering: Option, leaving: Option) -> Ops:
    return (Conv2d(int(entering), int(leaving), side, side, kernel=kernel),)


def convolutions() -> tuple[SearchSpace, list[int]]:
    """A chain as AMC sees it, a ratio for the inputs of each layer but the first, and its layers' MACs."""
    sides, kernels = (16, 16, 8, 8, 4), (3, 1, 3, 5, 1)
    choices = tuple(Choice(f"in{index}", OPTIONS) for index in range(1, LAYERS))
    first = Block("0", ("in1",), partial(layer, kernels[0], sides[0], 3))
    blocks = [first]
    for index in range(1, LAYERS - 1):
        names = (f"in{index}", f"in{index + 1}")
        blocks.append(Block(str(index), names, partial(layer, kernels[index], sides[index])))
    last = partial(lambda kernel, side, entering: layer(kernel, side, entering, 10), kernels[-1], sides[-1])
    blocks.append(Block(str(LAYERS - 1), (f"in{LAYERS - 1}",), last))
    entering, leaving = (3, *[CHANNELS] * (LAYERS - 1)), (*[CHANNELS] * (LAYERS - 1), 10)
    macs = [
        side * side * kernel * kernel * into * out
        for side, kernel, into, out in zip(sides, kernels, entering, leaving, strict=True)
    ]
    return SearchSpace("amc", choices, tuple(blocks)), macs


@settings(max_examples=60)
@given(st.floats(0.1, 0.9), st.lists(st.floats(0, 1), min_size=LAYERS - 1, max_size=LAYERS - 1))
def test_on_a_chain_of_convolutions_the_cut_is_the_published_formula(
    preserve: float, actions: list[float]
) -> None:
    space, macs = convolutions()
    constraints = Budget.parse(f"macs={100 * preserve}%").resolve(space, [operation_cost(space, "macs")])
    walk = RatioProcess(constraints).start()
    # `strategy_dict` of the published environment: ratios of inputs and outputs, all later ones at the bound.
    least = OPTIONS[0] / CHANNELS
    ratios = [[least, least] for _ in macs]
    ratios[0][0] = ratios[-1][1] = 1.0
    for at, action in enumerate(actions, start=1):
        this = macs[at - 1] * ratios[at - 1][0] + macs[at] * ratios[at][1]
        others = sum(
            m * a * b for i, (m, (a, b)) in enumerate(zip(macs, ratios, strict=True)) if i not in (at - 1, at)
        )
        most = (preserve * sum(macs) - others) / this
        open_ = [count for count in OPTIONS if count / CHANNELS <= most + 1e-9]
        expected = min(open_, key=lambda count: (abs(count / CHANNELS - action), count)) / CHANNELS
        assert walk.act(action) == pytest.approx(expected)
        ratios[at][0] = ratios[at - 1][1] = expected
    assert walk.done


def toy_spaces() -> list[SearchSpace]:
    return [toy_constraints().space, toy_width_space(), chain(random_scores(0))]


def drawn(walk: Walk, actions: list[float]) -> Codes:
    count = 0
    while not walk.done:
        assert walk.state.dtype == np.float32
        assert ((walk.state >= 0) & (walk.state <= 1)).all()
        ratio = walk.act(actions[count % len(actions)])
        assert 0 < ratio <= 1
        count += 1
    return walk.row


@settings(max_examples=120)
@given(
    st.integers(0, 2),
    st.lists(st.floats(0, 1), min_size=3, max_size=9),
    st.fixed_dictionaries({metric: st.floats(0.02, 1.2) for metric in OPERATION_METRICS}),
    st.integers(1, 3),
)
def test_no_actions_ever_end_over_any_of_the_limits(
    which: int, actions: list[float], shares: dict[str, float], count: int
) -> None:
    space = toy_spaces()[which]
    costs = {metric: operation_cost(space, metric) for metric in OPERATION_METRICS}
    limits = {
        metric: costs[metric].minimum + share * (costs[metric].maximum - costs[metric].minimum)
        for metric, share in list(shares.items())[:count]
    }
    constraints = Constraints(space, costs, {metric: (1 + 1e-12) * limit for metric, limit in limits.items()})
    try:
        process = RatioProcess(constraints)
    except InfeasibleBudgetError:
        return
    row = drawn(process.start(), actions)
    assert constraints.feasible(row).all()
    np.testing.assert_array_equal(row, space.canonical(row))


def jointly_limited() -> Constraints:
    """Two limits that each can be met after `first = 2`, but never together."""
    space = SearchSpace(
        "joint", (Choice("first", (1, 2)), Choice("second", (1, 2, 3)), Choice("free", (1, 2))), ()
    )
    costs = {
        metric: AdditiveCost(
            metric, (2, 3, 2), 1.0, (Factor((0,), np.array([0.0, 1.0])), Factor((1,), np.array(second)))
        )
        for metric, second in {"macs": [2.0, 0.0, 1.0], "params": [0.0, 2.0, 1.0]}.items()
    }
    return Constraints(space, costs, {"macs": 2.0, "params": 2.0})


def test_limits_that_can_be_met_one_by_one_but_not_together_are_met_together() -> None:
    constraints = jointly_limited()
    networks = every_network(constraints.space)
    fitting = {tuple(row) for row in networks[constraints.feasible(networks)].tolist()}
    # `first = 2` leaves 0 of each limit beyond itself: each alone could be met, both together cannot.
    assert {row[0] for row in fitting} == {0}
    found = set()
    for actions in np.random.default_rng(0).random((200, 3)).tolist():
        found.add(tuple(drawn(RatioProcess(constraints).start(), actions)[0].tolist()))
    assert found == fitting


def test_every_feasible_network_can_be_reached_under_one_limit() -> None:
    constraints = toy_constraints("macs=45%", blocks=3)
    process = RatioProcess(constraints)
    networks = every_network(constraints.space)
    for row in networks[constraints.feasible(networks)]:
        walk = process.start()
        while not walk.done:
            walk.act(float(process.ratios[walk.position][row[walk.position]]))
        np.testing.assert_array_equal(walk.row[0], row)


def test_a_state_says_where_the_walk_is_and_what_is_left() -> None:
    space = chain(random_scores(0))
    macs = operation_cost(space, "macs")
    constraints = Budget.parse("macs=40%").resolve(space, [macs, operation_cost(space, "params")])
    process = RatioProcess(constraints)
    walk = process.start()
    assert process.features == len(walk.state) == 9
    full = float(macs.of(space.largest())[0])
    least = float(macs.of(space.smallest())[0])
    limit = constraints.limits["macs"]
    # Index, options, largest, least ratio: all but the index are the same for every choice.
    np.testing.assert_array_equal(walk.state[:4], 0)
    np.testing.assert_allclose(
        walk.state[5:], [0, (full - least) / full, (limit - least) / full, 1], rtol=1e-6
    )
    assert walk.act(0.6) == 0.5  # 0.5 and 0.75 are options: 8 and 12 of 16
    after, cheapest = float(macs.of(np.array([[1, 3, 3, 3]]))[0]), float(macs.of(np.array([[1, 0, 0, 0]]))[0])
    expected = [(full - after) / full, (after - cheapest) / full, (limit - cheapest) / full, 0.5]
    np.testing.assert_allclose(walk.state[5:], expected, rtol=1e-6)
    np.testing.assert_allclose(walk.state[0], 1 / 3)
    # Choices in the middle are between two others, and save most: 1 after the spread.
    np.testing.assert_allclose(walk.state[4], 1)


def test_of_two_equally_near_options_the_smaller_is_taken() -> None:
    walk = RatioProcess(tiny_constraints((2,))).start()
    assert walk.act(2 / 3) == pytest.approx(1 / 3)  # of 1 and 3


def test_rows_are_walked_through_as_they_were_drawn() -> None:
    process = RatioProcess(toy_constraints("macs=40%"))
    walk, states, ratios = process.start(), [], []
    while not walk.done:
        states.append(walk.state)
        ratios.append(walk.act(0.7))
    again = process.start()
    for seen, ratio in zip(states, ratios, strict=True):
        np.testing.assert_array_equal(again.state, seen)
        assert again.take(int(walk.row[0, again.position])) == ratio
    assert again.done


def test_choices_without_effect_or_alternative_are_passed_over() -> None:
    walk = RatioProcess(toy_constraints("macs=100%", blocks=3)).start()
    walk.act(1.0)
    walk.act(0.0)  # depth 1: two of three kernels have no effect
    walk.act(0.5)
    assert walk.done
    assert RatioProcess(tiny_constraints((1, 1))).start().done


@pytest.mark.parametrize("options", [("small", "large"), (0, 1, 2), (3, 1)])
def test_options_that_are_no_ratios_are_refused(options: tuple[Option, ...]) -> None:
    space = SearchSpace("odd", (Choice("odd", options),), ())
    with pytest.raises(
        SpaceError, match=r"options of choice 'odd' of space 'odd' must be positive, .*reinforce"
    ):
        RatioProcess(Constraints(space, {}, {}))


# The environment -----------------------------------------------------------------------------------------


def test_gymnasium_finds_nothing_wrong_with_the_environment() -> None:
    constraints = toy_constraints("macs=50%")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(RatioEnvironment(constraints, lambda codes: float(codes.sum())), skip_render_check=True)


def test_an_episode_of_the_environment_is_a_walk() -> None:
    constraints = toy_constraints("macs=30%")
    environment = RatioEnvironment(constraints, lambda codes: float(codes.sum()))
    walk = RatioProcess(constraints).start()
    rng = np.random.default_rng(0)
    seen, _ = environment.reset(seed=1)
    while True:
        np.testing.assert_array_equal(seen, walk.state)
        action = rng.random(1, dtype=np.float32)
        seen, reward, terminated, truncated, information = environment.step(action)
        assert information["ratio"] == walk.act(float(action[0]))
        assert not truncated
        if terminated:
            break
        assert reward == 0
    assert walk.done
    np.testing.assert_array_equal(information["codes"], walk.row)
    assert constraints.feasible(information["codes"]).all()
    assert information["costs"]["macs"] == constraints.costs["macs"].of(walk.row)[0]
    assert reward == walk.row.sum()
    with pytest.raises(EvaluationError, match=r"the episode is over: call reset\(\)"):
        environment.step(action)


def test_the_environment_says_what_it_cannot_do() -> None:
    with pytest.raises(SpaceError, match="space 'tiny' has one network only: there is nothing to decide"):
        RatioEnvironment(tiny_constraints((1,)), lambda codes: 0.0)
    environment = RatioEnvironment(tiny_constraints((3,)), lambda codes: float("nan"))
    environment.reset()
    with pytest.raises(EvaluationError, match="reward of a row must be a finite number, got nan"):
        environment.step(np.ones(1, dtype=np.float32))


def test_without_gymnasium_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "autocompress.environment")
    with pytest.raises(ImportError, match=r"pip install 'autocompress\[rl\]'"):
        importlib.import_module("autocompress.environment")
