"""Steps of devices are learned exactly from exact times, and mostly from noisy ones."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.latency.steps import (
    CANDIDATES,
    MIN_WIDTHS,
    Staircase,
    learn_steps,
    probe_operations,
    steps_of,
)
from autocompress.latency.widths import Axis, family_of, widths_of
from autocompress.ops import Add, Conv2d, Linear, OpSpec

CONV = Conv2d(64, 64, 16, 16, kernel=3)
PROBED = range(32, 97, 4)
SEEDS = 200


def rows(widths: Iterable[int], law: Callable[[int], float]) -> dict[str, float]:
    """Times of convolutions that differ in output channels only."""
    return {replace(CONV, out_channels=width).key: law(width) for width in widths}


def learned(widths: Iterable[int], law: Callable[[int], float]) -> Staircase:
    (found,) = learn_steps(rows(widths, law))
    return found


def stairs(step: int) -> Callable[[int], float]:
    return lambda width: 20.0 + step * math.ceil(width / step)


rises = st.lists(st.floats(0.01, 10), min_size=30, max_size=30)


@given(st.sampled_from([(4, 1), (4, 2), (8, 2), (8, 4), (16, 4), (32, 4), (32, 8)]), rises)
def test_the_step_of_an_exact_staircase_is_found_however_high_its_steps_are(
    stepped: tuple[int, int], rise: list[float]
) -> None:
    step, by = stepped
    heights = np.cumsum(rise)
    found = learned(range(32, 97, by), lambda width: float(heights[math.ceil(width / step)]))
    assert found.step == step
    assert found.errors_percent[found.step] == 0
    assert found.errors_percent[1] > 0


@given(st.floats(0.01, 100), st.floats(0, 10))
def test_a_straight_line_has_no_steps(slope: float, overhead: float) -> None:
    assert learned(PROBED, lambda width: overhead + slope * width).step == 1


@given(st.floats(0.3, 3), st.floats(0, 100))
def test_a_power_of_the_width_has_no_steps(exponent: float, overhead: float) -> None:
    assert learned(PROBED, lambda width: overhead + width**exponent).step == 1


def test_a_flat_line_has_no_steps() -> None:
    """An operation that is overhead only would do for any."""
    found = learned(PROBED, lambda width: 0.3)
    assert (found.step, found.flat, found.errors_percent[1]) == (1, True, 0)


def count_right(law: Callable[[int], float], step: int) -> int:
    """In how many of 200 runs 2 % noise does not hide the step."""

    def noisy(seed: int) -> Staircase:
        rng = np.random.default_rng(seed)
        return learned(PROBED, lambda width: law(width) * (1 + 0.02 * rng.standard_normal()))

    return sum(noisy(seed).step == step for seed in range(SEEDS))


# The seeds are fixed: these cannot fail by chance, only if what is learned changes.


@pytest.mark.parametrize(("step", "share"), [(16, 0.95), (32, 0.9)])
def test_noise_of_two_percent_seldom_hides_steps(step: int, share: float) -> None:
    assert count_right(stairs(step), step) >= share * SEEDS


def test_noise_of_two_percent_makes_no_steps_of_a_straight_line() -> None:
    assert count_right(lambda width: 20.0 + width, 1) >= 0.95 * SEEDS


def test_noise_of_two_percent_makes_no_steps_of_a_flat_line() -> None:
    assert count_right(lambda width: 1.0, 1) >= 0.98 * SEEDS


def test_a_staircase_says_what_it_is_of() -> None:
    found = learned(PROBED, stairs(16))
    assert found.family == family_of(CONV)
    assert found.axis == "out"
    assert found.fixed == (64,)
    assert found.widths == tuple(PROBED)
    assert found.median_ms == tuple(map(stairs(16), PROBED))


def test_errors_are_those_of_the_definition() -> None:
    """Two widths a step, 10 % apart; the next step takes twice as long."""
    times = dict(zip(range(36, 68, 4), [10.0, 11.0, 20.0, 22.0, 40.0, 44.0, 80.0, 88.0], strict=True))
    found = learned(times, times.__getitem__)
    assert found.step == 8
    # 11 for 10, and 10 for 11.
    assert found.errors_percent[found.step] == pytest.approx(100 * (1 / 10 + 1 / 11) / 2)
    # 15 for 11 and 16.5 for 20, and so on.
    assert found.errors_percent[1] == pytest.approx(100 * (4 / 11 + 3.5 / 20) / 2)


def test_widths_are_ordered_and_lines_kept_apart() -> None:
    widths = [*PROBED][::-1]
    probes = rows(widths, stairs(16))
    probes |= {replace(CONV, in_channels=w, kernel=1).key: stairs(8)(w) for w in widths}
    probes |= {replace(CONV, in_channels=w, out_channels=w, groups=w).key: stairs(32)(w) for w in widths}
    probes |= {Linear(16, w).key: stairs(4)(w) for w in range(64, 32, -1)}
    found = {(line.axis, line.fixed, line.step): line.widths for line in learn_steps(probes)}
    assert found == {
        ("out", (64,), 16): tuple(PROBED),
        ("in", (64,), 8): tuple(PROBED),
        ("channels", (), 32): tuple(PROBED),
        ("out", (16,), 4): tuple(range(33, 65)),
    }


def test_too_few_widths_say_nothing() -> None:
    widths = range(4, 4 * MIN_WIDTHS + 1, 4)
    assert len(learn_steps(rows(widths, stairs(8)))) == 1
    assert learn_steps(rows(widths[1:], stairs(8))) == []
    assert learn_steps({}) == []


def test_one_pair_of_widths_on_a_step_says_nothing_of_it() -> None:
    """The pair differs little; neighbours, far apart on a curve, predict each other badly."""
    widths = [16, 32, 48, 64, 80, 96, 112, 127, 128]
    assert learned(widths, lambda width: float(width**3)).step == 1


def test_blocks_and_operations_of_a_users_own_say_nothing() -> None:
    known = rows(PROBED, stairs(16))
    others = {f"{key} > {Add(8, 2, 2).key}": 1.0 for key in known}
    others |= {key.replace("Conv2d", "Own"): 1.0 for key in known}
    others |= {"anything": 1.0, "": 1.0}
    assert learn_steps(others) == []
    assert learn_steps({**others, **known}) == learn_steps(known)


def test_rows_that_took_no_time_say_nothing() -> None:
    """A table may have them; nothing can be off by a share of zero."""
    known = rows(PROBED, stairs(16))
    assert learn_steps(dict.fromkeys(known, 0.0)) == []
    assert learn_steps({**known, replace(CONV, out_channels=50).key: 0.0}) == learn_steps(known)


def line(axis: Axis, step: int, *, noise: float = 0.5, flat: bool = False) -> Staircase:
    """A staircase whose noise is 0.5 % on its steps and the finer ones, and ten times that on others."""
    even = {1: noise if step == 1 else 10 * noise}
    errors = {s: noise if 1 < s <= step else 10 * noise for s in CANDIDATES[1:]}
    return Staircase("", axis, (), (), (), step, flat, even | errors)


@pytest.mark.parametrize(
    ("lines", "step"),
    [
        ([line("out", 16), line("out", 16, noise=2)], 16),
        # What explains both, and not the mean of their steps.
        ([line("out", 8), line("out", 16)], 8),
        # A clear line beats one that is all noise.
        ([line("out", 16), line("out", 1, noise=0.1)], 16),
        ([line("out", 16), line("out", 1, flat=True), line("out", 1, flat=True)], 16),
        ([line("out", 1, flat=True)], 1),
        ([line("out", 64)], 64),
    ],
)
def test_the_step_of_an_axis_explains_its_lines_together(lines: list[Staircase], step: int) -> None:
    assert steps_of(lines) == {"in": 1, "out": step, "channels": 1}


def test_axes_do_not_decide_for_each_other() -> None:
    found = steps_of([line("in", 8), line("out", 16), line("channels", 4)])
    assert found == {"in": 8, "out": 16, "channels": 4}
    assert steps_of([]) == {"in": 1, "out": 1, "channels": 1}


def test_probes_are_few_different_and_enough_for_every_axis() -> None:
    ops = probe_operations()
    keys = [op.key for op in ops]
    # Two dense convolutions with two widths, one depthwise, 17 widths; (64, 64) belongs to both widths.
    assert len(set(keys)) == len(keys) == 2 * (17 + 16) + 17
    # Seconds to measure: none takes as many MACs as two of the largest dense convolution.
    assert max(op.macs for op in ops) <= 9 * 64 * 96 * 16 * 16

    def law(op: OpSpec) -> float:
        return math.prod(16 * math.ceil(width / 16) for width in widths_of(op))

    found = learn_steps({op.key: law(op) for op in ops})
    assert len(found) == 5
    assert steps_of(found) == {"in": 16, "out": 16, "channels": 16}
