"""Statistics of comparisons against closed forms, enumeration and simulated strategies of known quality."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from autocompress.compare.cells import Cell
from autocompress.compare.statistics import (
    SIGNIFICANT,
    Pair,
    curves,
    curves_over_seconds,
    early_ends,
    holm,
    interval_of_mean,
    pairs,
    seeds_needed,
    standings,
    trainings,
    verdicts,
)


def cell(label: str, seed: int, *scores: float | None, seconds: float = 1.0, strategy_s: float = 0.0) -> Cell:
    return Cell(label, seed, scores, (seconds,) * len(scores), strategy_s, best="{}")


def test_a_curve_is_the_best_so_far_and_failures_do_not_count() -> None:
    found = cell("a", 0, None, 3.0, 1.0, None, 4.0).curve(7)
    np.testing.assert_array_equal(found, [np.nan, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0])
    np.testing.assert_array_equal(cell("a", 0, 1.0, 2.0, 3.0).curve(2), [1.0, 2.0])


def test_standings_are_sorted_by_mean_and_count_failed_searches() -> None:
    failed = Cell("b", 1, (), (), 0.0, "", error="StrategyError: no")
    found = standings([cell("a", 0, 1.0), cell("a", 1, 3.0), cell("b", 0, 5.0), failed], 1, optimum=6.0)
    assert [(s.label, s.mean, s.median, s.regret, s.failed) for s in found] == [
        ("b", 5.0, 5.0, 1.0, 1),
        ("a", 2.0, 2.0, 4.0, 0),
    ]
    assert found[1].spread == pytest.approx(np.sqrt(2))
    assert found[0].interval == (5.0, 5.0)


def test_a_strategy_whose_searches_all_failed_is_last_and_without_a_score() -> None:
    found = standings([Cell("bad", 0, (), (), 0.0, "", error="no"), cell("a", 0, 1.0)], 1)
    assert [s.label for s in found] == ["a", "bad"]
    assert (found[1].finals, found[1].failed) == ((), 1)
    assert "bad: 1 of 1 searches failed, the first with: no" in verdicts(found, pairs(found))


def test_random_search_that_failed_is_said_to_have_failed_not_to_be_absent() -> None:
    failed = [Cell("random", seed, (), (), 0.0, "", error=f"reason {seed}") for seed in range(2)]
    found = standings([cell("a", 0, 1.0), cell("a", 1, 1.0), *failed], 1)
    assert verdicts(found, pairs(found)) == [
        "random: 2 of 2 searches failed, the first with: reason 0",
        "every search of 'random' failed: nobody can say whether any is worth it",
    ]


def test_of_single_scores_no_test_is_possible() -> None:
    found = standings([cell("a", 0, 2.0), cell("random", 0, 1.5)], 1)
    assert pairs(found) == []
    assert verdicts(found, []) == [
        "a: no test against random search is possible with a single score (median +0.5)",
        "with 1 seed and 1 pair the test cannot show any difference; it can from 4 seeds on",
    ]


def test_a_strategy_with_one_score_left_is_not_tested_but_others_are() -> None:
    failed = [Cell("a", seed, (), (), 0.0, "", error="no") for seed in range(1, 5)]
    scores = [cell(label, seed, value) for label, value in (("b", 3.0), ("random", 1.0)) for seed in range(5)]
    found = standings([cell("a", 0, 2.0), *failed, *scores], 1)
    (pair,) = pairs(found)
    assert {pair.first, pair.second} == {"b", "random"}
    assert pair.corrected == pair.p
    assert verdicts(found, [pair]) == [
        "a: 4 of 5 searches failed, the first with: no",
        "b: better than random search (median +2, p = 0.00794 after correction)",
        "a: no test against random search is possible with a single score (median +1)",
    ]


def test_searches_that_ended_early_are_said_to_have() -> None:
    failed = Cell("a", 3, (), (), 0.0, "", error="no")
    cells = [cell("a", 0, 1.0), cell("a", 1, 1.0, 2.0), cell("a", 2, 1.0, 2.0, 3.0), failed]
    assert early_ends(cells, 3) == [
        "a: 2 of 4 searches ended after 1 to 2 of 3 evaluations, with nothing new to propose"
    ]
    assert early_ends(cells[2:], 3) == []


def test_a_difference_of_nothing_has_no_sign_of_its_own() -> None:
    cells = [cell(label, seed, 1.0) for label in ("random", "a") for seed in range(4)]
    found = standings(cells, 1)
    assert "(median +0, p = 1 after correction)" in verdicts(found, pairs(found))[0]


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = interval_of_mean(rng.normal(size=40))
        covered += low <= 0 <= high
    # Of 200 at 95 %: below 178 with probability 2e-4 (percentile intervals of 40 cover about 94 %).
    assert 178 <= covered < 200


def test_curves_have_the_mean_and_an_interval_around_it() -> None:
    found = curves([cell("a", 0, 1.0, 2.0), cell("a", 1, 3.0, 2.0)], 2)["a"]
    np.testing.assert_array_equal(found[0], [2.0, 2.5])
    assert (found[1] <= found[0]).all()
    assert (found[0] <= found[2]).all()
    assert (found[1][0], found[2][0]) == (1.0, 3.0)


def test_curves_over_seconds_count_evaluations_and_the_strategy() -> None:
    """Scores 1, 2, 3 after 2, 4, 6 seconds: one of the evaluation, one of the strategy each."""
    axis, mean = curves_over_seconds([cell("a", 0, 1.0, 2.0, 3.0, seconds=1.0, strategy_s=3.0)], 5)["a"]
    np.testing.assert_allclose(axis, [2, 3, 4, 5, 6])
    np.testing.assert_array_equal(mean, [1.0, 1.0, 2.0, 2.0, 3.0])


def test_a_training_comes_before_all_evaluations_and_is_among_the_seconds_of_the_strategy() -> None:
    """Ten seconds of training, then a score every two."""
    trained = [Cell("a", seed, (1.0, 2.0), (1.0, 1.0), 12.0, "{}", training_s=10.0) for seed in range(2)]
    axis, mean = curves_over_seconds([*trained], 3)["a"]
    np.testing.assert_allclose(axis, [12, 13, 14])
    np.testing.assert_array_equal(mean, [1.0, 1.0, 2.0])
    found = standings([*trained, cell("b", 0, 1.0)], 2)
    assert [(standing.label, standing.strategy_s, standing.training_s) for standing in found] == [
        ("a", 6.0, 10.0),
        ("b", 0.0, 0.0),
    ]
    (said,) = trainings(found, "")
    assert said.startswith(
        "a: trained together with a supernet of its own, 10.0 s a search, which are in its "
    )
    assert trainings(found, "before") == [said, "before"]
    assert trainings(found[1:], "before") == []


def test_holm_corrects_as_worked_by_hand() -> None:
    """0.01 * 4, then 0.03 * 3 and 0.04 * 2 raised to it; 0.5 stays."""
    assert holm([0.04, 0.01, 0.5, 0.03]) == pytest.approx([0.09, 0.04, 0.5, 0.09])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_pairs_have_the_p_of_enumerated_ranks() -> None:
    one, other = (1.0, 2.0, 5.0), (3.0, 4.0, 6.0)
    cells = [cell("a", i, v) for i, v in enumerate(one)] + [cell("b", i, v) for i, v in enumerate(other)]
    (pair,) = pairs(standings(cells, 1))

    def wins(order: tuple[float, ...]) -> int:
        return sum(x > y for x in order[:3] for y in order[3:])

    seen = wins(one + other)
    extreme = [abs(wins(order) - 4.5) >= abs(seen - 4.5) for order in permutations(one + other)]
    assert pair.p == pytest.approx(np.mean(extreme))
    assert (pair.first, pair.second, pair.difference) == ("b", "a", 2.0)


def test_equal_scores_have_no_difference() -> None:
    (pair,) = pairs(standings([cell(label, seed, 1.0) for label in "ab" for seed in range(5)], 1))
    assert (pair.p, pair.difference) == (1.0, 0.0)


@pytest.mark.parametrize("comparisons", [1, 6, 21])
def test_from_so_many_seeds_on_a_difference_can_be_shown(comparisons: int) -> None:
    count = seeds_needed(comparisons)

    def least(n: int) -> float:
        return comparisons * float(mannwhitneyu(np.arange(n), n + np.arange(n)).pvalue)

    assert least(count) <= SIGNIFICANT < least(count - 1)


def test_verdicts_call_better_worse_and_alike_by_their_names() -> None:
    rng = np.random.default_rng(0)
    values = {
        "random": rng.normal(0, 1, 30),
        "better": rng.normal(4, 1, 30),
        "alike": rng.normal(0, 1, 30),
        "worse": rng.normal(-4, 1, 30),
    }
    cells = [cell(label, i, v) for label, found in values.items() for i, v in enumerate(found)]
    found = standings(cells, 1)
    said = verdicts(found, pairs(found))
    assert [line.split(" (")[0] for line in sorted(said)] == [
        "alike: no better than random search can be shown",
        "better: better than random search",
        "worse: WORSE than random search",
    ]


def test_too_few_seeds_are_said_to_be_too_few() -> None:
    cells = [cell(label, seed, float(label == "a")) for label in ("a", "random") for seed in range(3)]
    found = standings(cells, 1)
    said = verdicts(found, pairs(found))
    assert said[0].startswith("a: no better than random search can be shown")
    assert said[1] == "with 3 seeds and 1 pair the test cannot show any difference; it can from 4 seeds on"


def test_without_random_search_nothing_can_be_said() -> None:
    found = standings([cell("a", 0, 1.0), cell("b", 0, 2.0)], 1)
    compared = [Pair("a", "b", -1.0, 1.0, 1.0)]
    assert verdicts(found, compared) == [
        "without 'random' among the strategies nobody can say whether any is worth it"
    ]
