"""Which networks a step draws: laws of counts that hold for every seed, and frequencies."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from small_spaces import spaces

from autocompress.errors import RecipeError
from autocompress.recipe import Phase, TrainSettings
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.paths import (
    fair_draws,
    fair_paths,
    networks_of_step,
    phases_of,
    restricted_sample,
)

SPACE = toy_classifier_space()
COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
# Statistical tests have fixed seeds; a right program fails a change of seeds with this probability.
FALSE_ALARM = 1e-4


def many_draws(counts: list[int], steps: range, seed: int = 0) -> Codes:
    """All draws of some steps, `(steps, paths, choices)`."""
    return np.stack([fair_draws(np.array(counts), step, seed=seed) for step in steps])


def times_drawn(draws: Codes, choice: int, options: int) -> list[int]:
    return np.bincount(draws[..., choice].ravel(), minlength=options).tolist()


# Strict fairness --------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 6), SEEDS, st.integers(0, 10**9))
def test_with_equally_many_options_each_is_drawn_exactly_once_a_step(
    options: int, choices: int, seed: int, step: int
) -> None:
    draws = fair_draws(np.full(choices, options), step, seed=seed)
    np.testing.assert_array_equal(np.sort(draws, axis=0), np.tile(np.arange(options)[:, None], choices))


@given(COUNTS, SEEDS, st.integers(0, 200))
@example([3, 4], 0, 1)  # the fourth path of the step before leaves two options of three behind
@example([5, 7], 0, 3)
def test_in_every_step_options_of_a_choice_are_drawn_equally_often_up_to_one(
    counts: list[int], seed: int, step: int
) -> None:
    draws = fair_draws(np.array(counts), step, seed=seed)
    assert draws.shape == (max(counts), len(counts))
    for choice, options in enumerate(counts):
        drawn = times_drawn(draws, choice, options)
        assert len(drawn) == options
        assert max(drawn) - min(drawn) <= 1


@given(COUNTS, SEEDS, st.integers(1, 40))
def test_over_the_first_steps_options_of_a_choice_are_drawn_equally_often_up_to_one(
    counts: list[int], seed: int, steps: int
) -> None:
    draws = many_draws(counts, range(steps), seed)
    for choice, options in enumerate(counts):
        drawn = times_drawn(draws, choice, options)
        assert sum(drawn) == steps * max(counts)
        assert max(drawn) - min(drawn) <= 1


@given(COUNTS, SEEDS, st.integers(0, 5))
def test_a_whole_round_draws_every_option_exactly_equally_often(
    counts: list[int], seed: int, rounds: int
) -> None:
    """The least common multiple of all counts, in paths, is a whole number of rounds of every choice."""
    steps = math.lcm(*counts) // max(counts)
    draws = many_draws(counts, range(rounds * steps, (rounds + 1) * steps), seed)
    for choice, options in enumerate(counts):
        assert times_drawn(draws, choice, options) == [steps * max(counts) // options] * options


def test_every_path_alone_is_uniform_over_genes_as_a_single_path_is() -> None:
    counts, steps = [2, 3, 4], 4800
    draws = many_draws(counts, range(steps))
    for path in (0, 3):
        joint = np.ravel_multi_index(tuple(draws[:, path].T), (2, 3, 4))
        found = np.bincount(joint, minlength=24)
        assert stats.chisquare(found).pvalue > FALSE_ALARM


def test_over_its_rounds_each_option_is_the_one_drawn_more_often_equally_often() -> None:
    """Two of three options are drawn once in a first step of four paths, one twice; by turns, at random."""
    extra = [times_drawn(many_draws([3, 4], range(step, step + 1)), 0, 3) for step in range(0, 9000, 3)]
    twice = np.array(extra).argmax(axis=1)
    assert stats.chisquare(np.bincount(twice, minlength=3)).pvalue > FALSE_ALARM


def test_choices_with_equally_many_options_do_not_favour_the_same_one() -> None:
    """In a first step of four paths one option of three is drawn twice: which, independently for each."""
    table = np.zeros((3, 3), dtype=np.int64)
    for step in range(0, 3000, 3):
        draws = many_draws([3, 3, 4], range(step, step + 1))
        table[tuple(int(np.argmax(times_drawn(draws, choice, 3))) for choice in (0, 1))] += 1
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_which_options_meet_on_a_path_changes_with_every_step() -> None:
    draws = many_draws([5, 5], range(1000))
    met = [frozenset(map(tuple, step.tolist())) for step in draws]
    again = sum(before == now for before, now in itertools.pairwise(met))
    # One of 120 permutations comes again by chance: more than 24 of 999 times with probability 2e-6.
    assert again <= 24


def test_draws_are_a_function_of_seed_and_step_whatever_was_drawn_before() -> None:
    counts = np.array([2, 3, 5])
    forward = {step: fair_draws(counts, step, seed=4) for step in range(50)}
    for step in reversed(range(50)):
        np.testing.assert_array_equal(fair_draws(counts, step, seed=4), forward[step])
    assert len({forward[step].tobytes() for step in range(50)}) == 50
    assert any((fair_draws(counts, step, seed=5) != forward[step]).any() for step in range(3))


@given(spaces(), SEEDS, st.integers(0, 99))
def test_paths_are_the_draws_made_canonical(space: SearchSpace, seed: int, step: int) -> None:
    paths = fair_paths(space, step, seed=seed)
    space.validate(paths)
    np.testing.assert_array_equal(paths, space.canonical(paths))
    draws = fair_draws(space.counts, step, seed=seed)
    active = space.active(draws)
    np.testing.assert_array_equal(paths[active], draws[active])


def test_options_of_a_conditional_choice_take_effect_equally_often_in_expectation() -> None:
    """Not strictly: where depth 3 of 1, 2, 3 is one path of a step, only one of three options can."""
    depth = Choice("depth", (1, 2, 3))
    kernel = Choice("block3.kernel", (3, 5, 7), active_when=(("depth", (3,)),))
    space = SearchSpace("conditional", (depth, kernel), ())
    effective: Counter[int] = Counter()
    for step in range(3000):
        paths = fair_paths(space, step, seed=0)
        active = space.active(paths)[:, 1]
        assert active.sum() == 1
        effective.update(paths[active, 1].tolist())
    assert stats.chisquare([effective[option] for option in range(3)]).pvalue > FALSE_ALARM


# Steps of each schedule -------------------------------------------------------------------------------------


def settings(**given_: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 5} | given_)


def drawn(chosen: TrainSettings, steps: int) -> list[list[Any]]:
    (phase,) = phases_of(SPACE, chosen)
    return [networks_of_step(SPACE, chosen, phase, step) for step in range(steps)]


def test_a_single_path_is_one_network_uniform_over_genes() -> None:
    steps = drawn(settings(schedule="single_path"), 3600)
    assert {len(archs) for archs in steps} == {1}
    found = Counter(archs[0] for archs in steps)
    # A network of depth 1 stands for the six genotypes of the block that it leaves out.
    networks = {arch: 6 if arch["depth"] == 1 else 1 for arch in found}
    assert len(networks) == SPACE.size
    assert sum(networks.values()) == 2 * 2 * 6 * 6
    expected = [3600 * genotypes / 144 for genotypes in networks.values()]
    assert stats.chisquare(list(found.values()), expected).pvalue > FALSE_ALARM


def test_a_fair_step_has_as_many_networks_as_the_choice_with_the_most_options() -> None:
    for archs in drawn(settings(schedule="fair"), 20):
        assert sorted(arch["block1.kernel"] for arch in archs) == [1, 3, 5]
        assert Counter(arch["depth"] for arch in archs).most_common(1)[0][1] == 2


def test_steps_and_seeds_draw_different_networks_and_a_step_always_the_same() -> None:
    for schedule in ("sandwich", "single_path", "fair"):
        first = drawn(settings(schedule=schedule), 30)
        assert drawn(settings(schedule=schedule), 30) == first
        assert drawn(settings(schedule=schedule, seed=1), 30) != first
        assert len({tuple(archs) for archs in first}) > 10


@pytest.mark.parametrize("schedule", ["sandwich", "single_path", "fair"])
def test_all_but_progressive_shrinking_have_one_phase(schedule: Any) -> None:
    (phase,) = phases_of(SPACE, settings(schedule=schedule))
    assert phase.epochs == 5


def test_a_phase_that_names_no_choice_is_refused() -> None:
    phases = (Phase(epochs=1, elastic=("kernel",)), Phase(epochs=1, elastic=("width",)))
    with pytest.raises(RecipeError, match=r"no choices named 'width'; it has \['depth', 'expand', 'kernel'"):
        phases_of(SPACE, settings(schedule="progressive", phases=phases))


def test_restricted_samples_are_canonical_and_uniform_over_the_genes_that_vary() -> None:
    codes = restricted_sample(SPACE, ("kernel",), 3000, np.random.default_rng(0))
    np.testing.assert_array_equal(codes, SPACE.canonical(codes))
    kernels = codes[:, [SPACE.positions["block1.kernel"], SPACE.positions["block2.kernel"]]]
    counts = np.bincount(kernels[:, 0] * 3 + kernels[:, 1], minlength=9)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM
    assert (codes[:, SPACE.positions["depth"]] == 1).all()
