"""PEEL-style reallocation: the pool is spent, what matters more gets more, and budgets hold."""

import itertools

import numpy as np
import pytest
from chain_space import LAYERS, chain, limited, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.engine import search
from autocompress.errors import RecipeError, SpaceError
from autocompress.space import Codes
from autocompress.strategy import DISTANCE
from autocompress.testing.toys import toy_batch, toy_constraints
from autocompress.trial import Outcome
from strategies.peel import PeelStyle

VARIANTS = list(itertools.product(("threshold", "uniform"), ("importance", "equal", "shift")))


@pytest.mark.parametrize(("backbone", "sharing"), VARIANTS)
@given(st.integers(0, 10_000), st.integers(20, 100), st.sampled_from([0.6, 0.8, 1.0]))
@settings(max_examples=15, deadline=None)
def test_the_pool_ends_at_zero_within_one_step(
    backbone: str, sharing: str, seed: int, percent: int, share: float
) -> None:
    constraints = limited(chain(random_scores(seed)), f"macs={percent}%")
    strategy = PeelStyle(constraints, seed=0, backbone=backbone, sharing=sharing, share=share)  # type: ignore[arg-type]
    found = strategy.ask(3)
    assert found.shape == (1, LAYERS)
    assert constraints.feasible(found).all()
    for position in range(LAYERS):
        if found[0, position] < 3:
            more = found.copy()
            more[0, position] += 1
            assert not constraints.feasible(more)[0]
    assert len(strategy.ask(1)) == 0


def test_a_layer_that_matters_more_gets_no_less() -> None:
    """Raising the importance of one layer never narrows it; both ends are reached."""
    flat = [[1.0] * 16] * LAYERS
    widths = []
    for factor in (0.01, 1.0, 100.0):
        scores = [[factor * s for s in units] if index == 2 else units for index, units in enumerate(flat)]
        found = PeelStyle(limited(chain(scores)), seed=0, backbone="uniform").ask(1)
        widths.append(int(found[0, 2]))
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_permuting_the_importance_of_like_layers_permutes_the_widths() -> None:
    """The two layers in the middle cost alike when their neighbours are alike."""
    base = [[1.0] * 16] * LAYERS
    first = [list(units) for units in base]
    first[1] = [3.0] * 16
    second = [list(units) for units in base]
    second[2] = [3.0] * 16
    one = PeelStyle(limited(chain(first), "macs=50%"), seed=0, backbone="uniform").ask(1)[0]
    other = PeelStyle(limited(chain(second), "macs=50%"), seed=0, backbone="uniform").ask(1)[0]
    assert one[1] >= other[1]
    assert other[2] >= one[2]
    assert (one[1], other[2]) != (other[1], one[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "none"}, "backbone must be one of threshold, uniform, got 'none'"),
        ({"sharing": 3}, "sharing must be one of importance, equal, shift, got 3"),
        ({"importance": "l1"}, "importance must be one of worth, loss, got 'l1'"),
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"share": 1.1}, "share must be above 0"),
        ({"share": True}, "share must be above 0"),
        ({"power": -1}, "power must be 0 or more, got -1"),
        ({"power": float("nan")}, "power must be 0 or more, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PeelStyle(limited(chain(random_scores(0))), seed=0, **options)  # type: ignore[arg-type]


def test_a_space_without_worth_is_refused() -> None:
    with pytest.raises(SpaceError, match="have no worth"):
        PeelStyle(toy_constraints(), seed=0)


@pytest.mark.parametrize("distance", [False, True])
def test_a_measured_importance_gives_to_the_layer_that_loses_most(distance: bool) -> None:
    """One evaluation a layer and one of the backbone, all within the budget; then the network."""
    widths = []
    for matters in range(1, 3):
        constraints = limited(chain([[1.0] * 16] * LAYERS), "macs=50%")
        weights = np.where(np.arange(LAYERS) == matters, 5.0, 0.5)
        asked = []

        def evaluate(
            codes: Codes, weights: np.ndarray = weights, asked: list[Codes] = asked
        ) -> dict[str, np.ndarray]:
            assert constraints.feasible(codes).all()  # noqa: B023
            asked.append(codes)
            score = (codes * weights).sum(1)
            return {"accuracy": 0.0 * score, DISTANCE: 100.0 - score} if distance else {"accuracy": score}

        evaluate.paid = True  # type: ignore[attr-defined]
        strategy = PeelStyle(constraints, seed=0, backbone="uniform", share=0.6, importance="loss")
        result = search(strategy, constraints, evaluate, evaluations=100)  # type: ignore[arg-type]
        assert len(result.trials) == LAYERS + 2
        widths.append(constraints.space.encode([result.trials[-1].architecture])[0])
    assert widths[0][1] > widths[1][1]
    assert widths[1][2] > widths[0][2]


def test_an_importance_that_could_not_be_measured_is_none() -> None:
    """Nothing is known of any layer: what rounding leaves is all that is given, and the budget holds."""
    constraints = limited(chain(random_scores(4)))
    strategy = PeelStyle(constraints, seed=0, importance="loss")
    while len(rows := strategy.ask(2)):
        strategy.tell(toy_batch(constraints, rows, Outcome.FAILED))
        last = rows[-1:]
    assert constraints.feasible(last).all()


def test_power_zero_is_an_equal_share() -> None:
    constraints = limited(chain(random_scores(3)))
    equal = PeelStyle(constraints, seed=0, backbone="uniform", power=0.0, sharing="importance").ask(1)
    np.testing.assert_array_equal(
        equal, PeelStyle(constraints, seed=0, backbone="uniform", power=0.0, sharing="equal").ask(1)
    )
