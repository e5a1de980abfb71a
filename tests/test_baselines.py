"""Uniform scaling, by hand on small spaces and against slow second implementations."""

import numpy as np
import pytest
from hypothesis import given
from small_spaces import spaces

from autocompress.baselines import (
    bit_networks,
    compound_networks,
    random_networks,
    relative_networks,
    uniform_candidates,
)
from autocompress.budget import Constraints
from autocompress.cost import OPERATION_METRICS, operation_cost
from autocompress.space import Choice, Codes, Option, SearchSpace
from autocompress.testing.toys import toy_constraints, toy_space
from search_spaces.mobilenet_v3 import mobilenet_v3
from search_spaces.nas_bench_201 import nas_bench_201


def choices(**options: tuple[Option, ...]) -> SearchSpace:
    return SearchSpace("s", tuple(Choice(n.replace("__", "."), o) for n, o in options.items()), ())


def settings_of(space: SearchSpace, codes: Codes) -> list[tuple[Option, ...]]:
    return [tuple(option for _, option in arch.settings) for arch in space.decode(codes)]


def test_bits_of_inputs_are_scaled_apart_from_those_of_weights() -> None:
    space = choices(a__weight=(2, 4, 8), a__input=(4, 8), b__weight=(2, 4, 8), b__input=(4, 8))
    families = [settings_of(space, family) for family in bit_networks(space)]
    assert families == [[(w, a, w, a) for w in (8, 4, 2)] for a in (8, 4)]
    assert not bit_networks(choices(a=(1, 2), b=(1, 2)))


# The same relative setting ---------------------------------------------------------------------------------


def test_a_relative_setting_rounds_to_options_of_every_choice() -> None:
    """Settings 1 and 3/4, 1/2, 1/4, 0 by hand; at 3/4 both choices round to their largest."""
    space = choices(a=(1, 2, 3), b=(10, 20))
    assert settings_of(space, relative_networks(space)) == [(3, 20), (2, 20), (2, 10), (1, 10)]


def test_options_at_the_same_share_change_together() -> None:
    """Four options change at 1/6, 1/2, 5/6, two options at 1/2 too, three options at 1/4 and 3/4."""
    space = choices(a=(1, 2, 3, 4), b=(10, 20), c=(5, 6, 7))
    expected = [(4, 20, 7), (3, 20, 7), (3, 20, 6), (2, 10, 6), (2, 10, 5), (1, 10, 5)]
    assert settings_of(space, relative_networks(space)) == expected


def test_a_choice_of_one_option_stays_at_it() -> None:
    space = choices(a=(7,), b=(1, 2))
    assert settings_of(space, relative_networks(space)) == [(7, 2), (7, 1)]
    assert settings_of(choices(a=(7,)), relative_networks(choices(a=(7,)))) == [(7,)]


@given(spaces())
def test_relative_networks_are_all_that_one_setting_for_every_choice_gives(space: SearchSpace) -> None:
    """Second implementation: many settings, rounded half up in whole numbers."""
    steps = 24  # a multiple of twice the options less one, so that halves are hit exactly
    rows = [
        [(2 * step * (int(count) - 1) + steps) // (2 * steps) for count in space.counts]
        for step in range(steps, -1, -1)
    ]
    expected = list(dict.fromkeys(tuple(row) for row in space.canonical(np.array(rows)).tolist()))
    assert [tuple(row) for row in relative_networks(space).tolist()] == expected


def test_relative_networks_go_from_the_largest_to_the_smallest() -> None:
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    codes = relative_networks(space)
    assert (codes[0] == space.largest()).all()
    assert (codes[-1] == space.smallest()).all()
    macs = operation_cost(space, "macs").of(codes)
    assert (np.diff(macs) < 0).all()


# Compound scaling ------------------------------------------------------------------------------------------


def test_compound_scaling_passes_the_networks_of_its_closed_form() -> None:
    """Depth is 4 * 1.2^-p and passes 3.5 and 2.5 at p = 0.73 and 2.58; resolution is 32 * 1.15^-p and
    passes 30 and 26 at p = 0.46 and 1.49."""
    space = choices(stage1__depth=(2, 3, 4), resolution=(24, 28, 32))
    assert settings_of(space, compound_networks(space)) == [(4, 32), (4, 28), (3, 28), (3, 24), (2, 24)]


def test_depth_shrinks_before_resolution_and_that_before_width() -> None:
    """11 * 1.2^-p passes 9 at p = 1.10, 32 * 1.15^-p passes 27 at 1.22, and 1.1^-p passes 0.88 at 1.34."""
    space = choices(depth=(7, 11), resolution=(22, 32), width=(0.76, 1.0))
    expected = [(11, 32, 1.0), (7, 32, 1.0), (7, 22, 1.0), (7, 22, 0.76)]
    assert settings_of(space, compound_networks(space)) == expected


def test_width_and_expansion_shrink_by_a_tenth_a_step() -> None:
    """1 * 1.1^-p passes 0.875 at p = 1.40 and 6 * 1.1^-p passes 5 at p = 1.91."""
    space = choices(width=(0.75, 1.0), block__expand=(4, 6))
    assert settings_of(space, compound_networks(space)) == [(1.0, 6), (0.75, 6), (0.75, 4)]


def test_choices_of_other_kinds_are_the_same_setting_everywhere() -> None:
    space = choices(a__kernel=(3, 5), b__kernel=(3, 5), depth=(1, 2))
    expected = [(5, 5, 2), (5, 5, 1), (3, 3, 2), (3, 3, 1)]
    assert settings_of(space, compound_networks(space)) == expected


@pytest.mark.parametrize("space", [choices(a__kernel=(3, 5)), choices(depth=("few", "many"), kernel=(3, 5))])
def test_a_space_without_numbers_to_scale_has_no_compound_networks(space: SearchSpace) -> None:
    assert compound_networks(space).shape == (0, len(space.choices))


def test_compound_networks_of_a_real_space_are_distinct_canonical_and_shrink() -> None:
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    codes = compound_networks(space)
    assert (codes == space.canonical(codes)).all()
    assert len(np.unique(codes, axis=0)) == len(codes)
    assert (codes[0] == space.largest()).all()
    assert (codes.sum(axis=1) < codes[0].sum())[1:].all()
    for row in codes:
        kernels = {row[p] for p, c in enumerate(space.choices) if c.name.endswith("kernel")}
        # A kernel of a block that is not there counts as the smallest.
        assert len(kernels) == 1 or kernels == {0, max(kernels)}


# What fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [3, 10, 33, 60, 95, 100])
def test_every_uniform_candidate_fits_and_the_fullest_of_each_way_is_there(percent: int) -> None:
    constraints = toy_constraints(f"macs={percent}%")
    candidates = uniform_candidates(constraints)
    assert len(candidates) > 0
    assert constraints.feasible(candidates).all()
    assert len(np.unique(candidates, axis=0)) == len(candidates)
    macs = constraints.costs["macs"]
    for networks in (relative_networks(constraints.space), compound_networks(constraints.space)):
        fullest = max(macs.of(networks[constraints.feasible(networks)]))
        assert fullest in macs.of(candidates)


def test_with_several_limits_the_fullest_is_nearest_to_any_of_them() -> None:
    constraints = toy_constraints("macs=40%,params=50%", blocks=3)
    candidates = uniform_candidates(constraints)
    assert constraints.feasible(candidates).all()
    networks = relative_networks(constraints.space)
    fitting = networks[constraints.feasible(networks)]
    use = np.max(
        [constraints.costs[m].of(fitting) / limit for m, limit in constraints.limits.items()], axis=0
    )
    assert fitting[use.argmax()].tolist() in candidates.tolist()


def test_where_nothing_fits_there_is_no_candidate() -> None:
    space = toy_space(2)
    costs = {metric: operation_cost(space, metric) for metric in OPERATION_METRICS}
    constraints = Constraints(space, costs, {"macs": costs["macs"].minimum * 0.99})
    assert uniform_candidates(constraints).shape == (0, len(space.choices))


def test_without_limits_the_largest_network_is_the_candidate() -> None:
    space = toy_space(2)
    constraints = Constraints(space, {"macs": operation_cost(space, "macs")}, {})
    assert space.largest()[0].tolist() in uniform_candidates(constraints).tolist()


def test_random_networks_are_draws_that_are_not_cut_in_two() -> None:
    space = nas_bench_201(channels=2, cells=1, resolution=8, operations=("none", "nor_conv_1x1"))
    macs = operation_cost(space, "macs")
    limits = Constraints(space, {"macs": macs}, {"macs": 0.9 * macs.maximum})
    plain = limits.sample(40, np.random.default_rng(0))
    drawn = random_networks(limits, 40, np.random.default_rng(0), at_least=0.0)
    whole = np.array([space.connected(row) for row in plain])
    assert 0 < whole.sum() < 40
    np.testing.assert_array_equal(drawn[whole], plain[whole])
    assert all(space.connected(row) for row in drawn)
    assert limits.feasible(drawn).all()


def test_random_networks_of_a_space_that_is_cut_in_two_are_drawn_all_the_same() -> None:
    space = nas_bench_201(channels=2, cells=1, resolution=8, operations=("none",))
    drawn = random_networks(Constraints(space, {}, {}), 3, np.random.default_rng(0), at_least=0.9)
    np.testing.assert_array_equal(drawn, np.zeros((3, 6)))
