"""HAQ keeps the contract and the budget both ways, sees what is published, and repeats none of its faults."""

import pickle
from typing import Any

import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.errors import EvaluationError, InfeasibleBudgetError, QuantizationError, RecipeError
from autocompress.latency.foreign.bit_table import BitTable, Widths
from autocompress.ops import Conv2d, Linear
from autocompress.plugins import load_strategy
from autocompress.quantize.features import COLUMNS, layer_features
from autocompress.quantize.tables import bit_cost, bit_space
from autocompress.ratios import RatioProcess, equal_slices
from autocompress.space import Choice, Codes
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import toy_batch, toy_constraints
from strategies.haq import Haq, filled, haq_compat, walled

OPS = {
    "stem": Conv2d(3, 8, 16, 16, kernel=3, stride=2),
    "depthwise": Conv2d(8, 8, 8, 8, kernel=3, groups=8),
    "project": Conv2d(8, 16, 8, 8),
    "fc": Linear(16, 10),
}
BITS = range(2, 9)


@pytest.mark.slow
class TestHaq(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Haq:
        # Updates take most of the time, and what they do is the agent's, which has tests of its own.
        return small(constraints, seed, warmup=50, batch_size=8)


@pytest.mark.slow
class TestWall(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Haq:
        return small(constraints, seed, limiting="wall", fill=False, ranked=False)


def small(constraints: Constraints, seed: int = 0, **options: Any) -> Haq:
    return Haq(constraints, seed=seed, **{"hidden": 8, "warmup": 5, "batch_size": 16, **options})


def bits(share: float = 0.5, fixed: dict[str, Widths] | None = None) -> Constraints:
    """Four layers of which layer l costs `(l + 1) w a`; a share of the cost at 8 bits is allowed."""
    rows = {
        (layer, w, a): float((index + 1) * w * a)
        for index, layer in enumerate(OPS)
        for w in range(2, 9)
        for a in range(2, 9)
    }
    table = BitTable("made up", "ms", tuple(OPS), rows)
    space = bit_space(tuple(OPS), weight_bits=BITS, activation_bits=BITS, fixed=fixed, operations=OPS)
    cost = bit_cost(table, space, "latency_ms")
    return Constraints(space, {"latency_ms": cost}, {"latency_ms": share * cost.maximum})


def cost_of(constraints: Constraints, row: Codes) -> float:
    return float(constraints.costs["latency_ms"].of(row)[0])


def test_both_forms_are_found_by_name() -> None:
    assert load_strategy("strategies.haq:Haq") is Haq
    compat = load_strategy("strategies.haq:haq_compat")(bits(), seed=0)
    rows = compat.ask(5)
    assert len(rows) == 5
    assert bits().feasible(rows).all()


# What the agent sees and does --------------------------------------------------------------------------


def test_the_features_are_those_of_the_layer_that_a_choice_is_of() -> None:
    found = layer_features(bits().space)
    assert found.shape == (8, len(COLUMNS))
    expected = [
        [0, 3, 8, 2, 3, 216, 256, 0],
        [1, 8, 8, 1, 3, 72, 64, 1],
        [0, 8, 16, 1, 1, 128, 64, 2],
        [0, 16, 10, 0, 1, 160, 1, 3],
    ]
    np.testing.assert_array_equal(found[::2, :8], expected)
    np.testing.assert_array_equal(found[1::2, :8], expected)


def test_the_indicator_is_that_of_the_decision_to_be_made() -> None:
    """Published: 1 for the first weights, then 1 again for their inputs, and 0 for the next weights."""
    process = RatioProcess(bits(1.0), actions=equal_slices, also=layer_features(bits().space))
    walk, seen = process.start(), []
    # After the four columns of every process: index, options, largest option, least action.
    column = 4 + COLUMNS.index("of_weights")
    while not walk.done:
        seen.append(float(walk.state[column]))
        walk.act(0.5)
    assert seen == [1, 0] * 4
    shared = bit_space(tuple(OPS), weight_bits=BITS)
    assert layer_features(shared)[:, -1].tolist() == [1] * 4


def test_without_operations_the_widths_alone_tell_weights_from_inputs() -> None:
    features = layer_features(bit_space(("a", "b"), weight_bits=BITS, activation_bits=BITS))
    np.testing.assert_array_equal(features, [[0] * 7 + [i // 2, 1 - i % 2] for i in range(4)])
    # Channels are no bits at all.
    assert layer_features(toy_constraints().space)[:, -1].tolist() == [1] * 8


def test_the_first_state_does_not_know_the_last_episode() -> None:
    """Published: the columns of layer 0 keep what the last episode wrote into them."""
    process = RatioProcess(bits(), actions=equal_slices, also=layer_features(bits().space))
    first = process.start().state.copy()
    walk = process.start()
    while not walk.done:
        walk.act(0.1)
    np.testing.assert_array_equal(process.start().state, first)
    assert first[-1] == 1.0  # the last action, before there was any


def test_every_width_has_an_equal_slice_of_the_actions_and_the_ends_are_inside() -> None:
    """Published `round(1.5 + 7 a)`, b of 2..8, without what rounding does at 0 and 1."""
    constraints = bits(1.0)
    process = RatioProcess(constraints, actions=equal_slices)
    prefix = np.zeros((1, 0), dtype=np.int64)
    for action in [*np.linspace(0.003, 0.997, 101), 0.0, 1.0]:
        option, _ = process.nearest(prefix, float(action), None)
        wanted = min(max(round(1.5 + 7 * action), 2), 8)
        assert constraints.space.choices[0].options[option] == wanted
    np.testing.assert_allclose(equal_slices(Choice("c", (2, 4, 8)), "s"), [1 / 6, 1 / 2, 5 / 6])


def test_pinned_layers_are_pinned_in_every_row_also_under_budgets_that_nothing_breaks() -> None:
    """Published: a policy that is within the budget keeps whatever the agent said of first and last."""
    for share in (0.7, 1.0):
        constraints = bits(share, fixed={"stem": (8, 8), "fc": (8, 8)})
        for limiting in ("bounds", "wall"):
            for row in small(constraints, limiting=limiting).ask(10):
                widths = [
                    (op.weight_bits, op.activation_bits)  # type: ignore[attr-defined]
                    for _, ops in constraints.space.operations(row)
                    for op in ops
                ]
                assert widths[0] == widths[-1] == (8, 8)


def test_what_is_not_quantized_cannot_be_minus_one() -> None:
    """Published: -1 is an index, and 7 bits are charged."""
    with pytest.raises(QuantizationError, match="not at -1"):
        bits(fixed={"stem": (8, -1)})


# The budget --------------------------------------------------------------------------------------------


def wall_by_hand(constraints: Constraints, row: Codes) -> Codes:
    """ALGORITHMS A1.2: from the last layer to the first its inputs, then its weights, testing each time."""
    pairs = row.reshape(-1, 2).copy()
    while cost_of(constraints, pairs.reshape(1, -1)) > constraints.limits["latency_ms"]:
        for layer in reversed(range(len(pairs))):
            for which in (1, 0):
                if pairs[layer, which] > 0:
                    pairs[layer, which] -= 1
                if cost_of(constraints, pairs.reshape(1, -1)) <= constraints.limits["latency_ms"]:
                    return pairs.reshape(1, -1)
    return pairs.reshape(1, -1)


def test_the_wall_is_the_published_one() -> None:
    constraints = bits(0.4)
    rng = np.random.default_rng(0)
    for row in constraints.space.sample(50, rng):
        np.testing.assert_array_equal(walled(constraints, row[None]), wall_by_hand(constraints, row[None]))


def test_the_wall_takes_from_late_layers_and_inputs_first_and_bounds_do_not_touch_what_fits() -> None:
    constraints = bits(0.95)
    row = walled(constraints, constraints.space.largest())
    assert row.tolist() == [[6, 6, 6, 6, 6, 6, 6, 5]]


def test_filling_spends_the_budget_and_nothing_more_fits() -> None:
    constraints = bits(0.4)
    rng = np.random.default_rng(0)
    for row in constraints.sample(30, rng):
        result = filled(constraints, row[None], rng.random(8))
        assert constraints.feasible(result)[0]
        assert (result >= row).all()
        for position in np.flatnonzero(result[0] < 6):
            larger = result.copy()
            larger[0, position] += 1
            assert not constraints.feasible(larger)[0]
    over = constraints.space.largest()
    np.testing.assert_array_equal(filled(constraints, over, np.ones(8)), over)


@pytest.mark.parametrize("limiting", ["bounds", "wall"])
def test_the_least_feasible_budget_leaves_one_network_and_below_it_there_is_none(limiting: str) -> None:
    least = bits(4 / 64)
    strategy = small(least, limiting=limiting)
    rows = strategy.ask(5)
    np.testing.assert_array_equal(rows, least.space.smallest())
    strategy.tell(one_batch(least, rows, [0.5]))
    assert len(strategy.ask(5)) == 0
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        small(bits(0.99 * 4 / 64), limiting=limiting)


# Learning ----------------------------------------------------------------------------------------------


def one_batch(
    constraints: Constraints, rows: Codes, accuracies: list[float], metric: str = "accuracy"
) -> Any:
    from autocompress.trial import Batch

    metrics = {metric: np.array(accuracies)}
    return Batch(rows, constraints.price(rows), metrics, np.zeros(len(rows), dtype=np.int8))


def rewards(strategy: Haq) -> list[float]:
    """Of every episode in the replay memory, once its decisions all agree."""
    per_decision = np.array([one.reward for one in strategy._agent.memory]).reshape(-1, 8)
    assert (per_decision == per_decision[:, :1]).all()
    return [float(reward) for reward in per_decision[:, 0]]


def test_the_published_reward_is_a_tenth_of_the_percents_lost() -> None:
    constraints = bits()
    strategy = small(constraints, ranked=False, original=0.72)
    rows = strategy.ask(2)
    strategy.tell(one_batch(constraints, rows, [0.70, 0.73]))
    assert rewards(strategy) == pytest.approx([-0.2, 0.1])


def test_without_an_original_rewards_are_relative_to_the_first_row() -> None:
    constraints = bits()
    strategy = small(constraints, ranked=False)
    for accuracy in (0.5, 0.6):
        strategy.tell(one_batch(constraints, strategy.ask(1), [accuracy]))
    assert rewards(strategy) == pytest.approx([0.0, 1.0])


def test_ranks_do_not_depend_on_the_scale_of_the_objective() -> None:
    found = []
    for factor in (1.0, 1e-6):
        constraints = bits()
        strategy = small(constraints)
        for accuracy in (0.5, 0.7, 0.6, 0.5):
            strategy.tell(one_batch(constraints, strategy.ask(1), [factor * accuracy]))
        found.append(rewards(strategy))
    assert found[0] == found[1] == pytest.approx([0.0, 0.5, 0.0, -0.5])


def test_noise_and_warm_up_are_the_published_ones_and_shares_of_shorter_searches() -> None:
    published, short = Haq(bits(), seed=0), Haq(bits(), seed=0, episodes=60)
    assert (published._exploration.warmup, published._exploration.decay) == (20, 0.99)
    assert published._agent._settings.actor_learning_rate == 1e-4
    assert published._agent.memory.maxlen == 128 * 8
    assert short._exploration.warmup == 2
    assert short._exploration.decay**58 == pytest.approx(0.99**580)
    assert short._agent._settings.actor_learning_rate == pytest.approx(1e-3)


def test_compat_is_the_published_search() -> None:
    strategy = haq_compat(bits(), seed=0)
    assert (strategy._wall, strategy._fill, strategy._ranked) == (True, False, False)


def test_pickled_with_rows_that_wait_it_goes_on_identically() -> None:
    constraints = bits()
    strategy = small(constraints, warmup=1)
    rows = strategy.ask(3)
    twin = pickle.loads(pickle.dumps(strategy))
    for one in (strategy, twin):
        one.tell(one_batch(constraints, rows, [0.5, 0.6, 0.4]))
    np.testing.assert_array_equal(strategy.ask(5), twin.ask(5))


# Bad input ---------------------------------------------------------------------------------------------


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
        ({"limiting": "soft"}, "limiting must be one of bounds, wall, got 'soft'"),
        ({"original": -1.0}, r"original must be a finite number >= 0, got -1\.0"),
        ({"fill": 1}, "fill must be true or false, got 1"),
        ({"ranked": "no"}, "ranked must be true or false, got 'no'"),
    ],
)
def test_options_are_checked_when_the_search_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Haq(bits(), **{"seed": 0, **options})


def test_what_an_evaluator_gives_must_have_the_objective() -> None:
    constraints = toy_constraints()
    strategy = small(constraints)
    with pytest.raises(EvaluationError, match="maximises 'accuracy', but the evaluator gives top5"):
        strategy.tell(toy_batch(constraints, strategy.ask(1), objective="top5"))
