import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autocompress.budget import Constraints
from autocompress.errors import EvaluationError, InfeasibleBudgetError, RecipeError
from autocompress.space import Choice, Codes, SearchSpace
from autocompress.strategy import Strategy
from autocompress.testing.strategy import StrategyContract
from autocompress.testing.toys import every_network, toy_batch, toy_constraints, toy_score
from autocompress.trial import Batch, Outcome
from strategies.breeding import Breeding
from strategies.evolution import AgingEvolution, ElitistEvolution
from strategies.random_search import RandomSearch

Make = Callable[..., Strategy]
BOTH = pytest.mark.parametrize("make", [AgingEvolution, ElitistEvolution])


class TestAgingEvolution(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return AgingEvolution(constraints, seed=seed, population=12, sample_size=4)


class TestElitistEvolution(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return ElitistEvolution(constraints, seed=seed, population=12)


class TestElitistEvolutionThatMutatesOnly(StrategyContract):
    def make(self, constraints: Constraints, seed: int) -> Strategy:
        return ElitistEvolution(constraints, seed=seed, population=5, mutation_ratio=1.0, parent_ratio=0.0)


def told(constraints: Constraints, codes: Codes, values: list[float]) -> Batch:
    measured = np.full(len(codes), Outcome.MEASURED, dtype=np.int8)
    return Batch(codes, constraints.price(codes), {"accuracy": np.array(values)}, measured)


def distance(constraints: Constraints, one: Codes, other: Codes) -> int:
    """Genes that differ where both have an effect: 1 for a mutant of one gene, a change of depth included."""
    both = constraints.space.active(np.stack([one, other])).all(axis=0)
    return int((one != other)[both].sum())


def run(strategy: Strategy, constraints: Constraints, evaluations: int, n: int) -> float:
    best = -np.inf
    while evaluations > 0:
        codes = strategy.ask(min(n, evaluations))
        evaluations -= len(codes)
        strategy.tell(toy_batch(constraints, codes))
        best = max(best, float(toy_score(constraints.space, codes).max()))
    return best


@BOTH
def test_evolution_beats_random_search(make: Make) -> None:
    constraints = toy_constraints(blocks=10)
    wins = 0
    for seed in range(12):
        evolved = run(make(constraints, seed=seed, population=20), constraints, 200, 20)
        wins += evolved > run(RandomSearch(constraints, seed=seed), constraints, 200, 20)
    # If it were no better, P(>= 10 of 12) <= 0.019; ties count as losses.
    assert wins >= 10


@BOTH
@pytest.mark.parametrize("n", [1, 7, 100])
def test_whatever_the_size_of_the_asks_it_finds_the_best_network_of_a_small_space(make: Make, n: int) -> None:
    constraints = toy_constraints(blocks=6)
    networks = every_network(constraints.space)
    feasible = networks[constraints.feasible(networks)]
    best = toy_score(constraints.space, feasible).max()
    found = sum(
        run(make(constraints, seed=seed, population=20), constraints, 300, n) == best for seed in range(5)
    )
    # Random search finds it with probability 300 / 1806 = 0.17, so at least 4 of 5 times with 0.004.
    assert len(feasible) == 1806
    assert found >= 4


@BOTH
def test_the_largest_value_wins_not_the_smallest(make: Make) -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    # Forty contestants with repetition miss the best of four with probability (3/4)^40 = 1e-5.
    options = (
        {"sample_size": 40} if make is AgingEvolution else {"parent_ratio": 1 / 40, "mutation_ratio": 1.0}
    )
    strategy = make(constraints, seed=1, population=40, mutation_rate=0.0, deduplicate=False, **options)
    founders = strategy.ask(40)
    strategy.tell(told(constraints, founders, [0.1] * 20 + [0.9] + [0.2] * 19))
    children = strategy.ask(40)
    near = [distance(constraints, child, founders[20]) == 1 for child in children]
    assert all(near) if make is ElitistEvolution else np.mean(near) > 0.5


def test_the_oldest_dies_even_if_it_is_the_best() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    strategy = AgingEvolution(constraints, seed=2, population=1)
    walk = []
    for step in range(10):
        walk.append(strategy.ask(1))
        strategy.tell(told(constraints, walk[-1], [-float(step)]))
    # With one member every child comes from its predecessor, although each is worse than the one before.
    steps = [distance(constraints, child[0], parent[0]) for parent, child in itertools.pairwise(walk)]
    assert steps == [1] * 9
    assert max(distance(constraints, child[0], walk[0][0]) for child in walk) > 1


def test_an_elite_stays_until_it_is_beaten() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    strategy = ElitistEvolution(
        constraints, seed=3, population=4, mutation_ratio=1.0, mutation_rate=0.0, deduplicate=False
    )
    elite = strategy.ask(4)
    strategy.tell(told(constraints, elite, [1.0, 0.0, 0.0, 0.0]))
    for _ in range(3):
        children = strategy.ask(4)
        assert [distance(constraints, child, elite[0]) for child in children] == [1] * 4
        strategy.tell(told(constraints, children, [0.5, 0.6, 0.7, 0.8]))
    last = strategy.ask(4)
    strategy.tell(told(constraints, last, [1.1, 0.0, 0.0, 0.0]))
    assert [distance(constraints, child, last[0]) for child in strategy.ask(4)] == [1] * 4


def test_a_generation_can_be_asked_and_told_in_pieces() -> None:
    constraints = toy_constraints()
    whole = ElitistEvolution(constraints, seed=4, population=10)
    pieces = ElitistEvolution(constraints, seed=4, population=10)
    for _ in range(4):
        codes = whole.ask(1000)
        assert len(codes) == 10
        parts = [pieces.ask(3), pieces.ask(4)]
        pieces.tell(toy_batch(constraints, parts[0]))
        parts.append(pieces.ask(100))
        assert len(pieces.ask(5)) == 0, "nothing more until the generation was told"
        pieces.tell(toy_batch(constraints, parts[1]))
        assert len(pieces.ask(5)) == 0
        pieces.tell(toy_batch(constraints, parts[2]))
        whole.tell(toy_batch(constraints, codes))
        np.testing.assert_array_equal(np.vstack(parts), codes)


def test_aging_waits_for_a_sample_of_the_founders_only() -> None:
    constraints = toy_constraints()
    strategy = AgingEvolution(constraints, seed=5, population=8, sample_size=3)
    founders = strategy.ask(20)
    assert len(founders) == 8
    assert len(strategy.ask(2)) == 0
    strategy.tell(toy_batch(constraints, founders[:3]))
    assert len(strategy.ask(2)) == 2


@BOTH
def test_values_that_are_not_finite_have_no_children(make: Make) -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    options = {} if make is AgingEvolution else {"mutation_ratio": 1.0}
    strategy = make(constraints, seed=6, population=4, mutation_rate=0.0, **options)
    founders = strategy.ask(4)
    strategy.tell(told(constraints, founders, [np.nan, np.inf, 0.1, -np.inf]))
    assert [distance(constraints, child, founders[2]) for child in strategy.ask(4)] == [1] * 4


@BOTH
def test_under_a_tight_budget_generations_are_still_full(make: Make) -> None:
    constraints = toy_constraints("macs=8%", blocks=10)
    strategy = make(constraints, seed=7, population=20)
    rows = []
    for _ in range(10):
        rows.append(strategy.ask(20))
        strategy.tell(toy_batch(constraints, rows[-1]))
    assert len(np.unique(np.vstack(rows), axis=0)) == 200


def test_children_over_the_budget_keep_what_they_can() -> None:
    constraints = toy_constraints("macs=30%", blocks=10)
    space, rng = constraints.space, np.random.default_rng(0)
    parents = constraints.sample(500, rng)
    children = space.sample(500, rng)
    breeding = Breeding(constraints, rng, rate=0.1, deduplicate=True)
    repaired = breeding._repaired(children, parents)
    fits = constraints.feasible(children)
    assert 0.2 < fits.mean() < 0.8
    assert constraints.feasible(repaired).all()
    np.testing.assert_array_equal(repaired[fits], children[fits])
    np.testing.assert_array_equal(repaired, space.canonical(repaired))
    # Every gene is the parent's or the child's, or has no effect.
    from_either = (repaired == parents) | (repaired == children) | ~space.active(repaired)
    assert from_either.all()
    # They stop as soon as they fit: on average they use more of the budget than their parents.
    macs = constraints.costs["macs"]
    assert macs.of(repaired[~fits]).mean() > 1.1 * macs.of(parents[~fits]).mean()
    assert (repaired[~fits] != parents[~fits]).any(axis=1).mean() > 0.7


@BOTH
def test_without_deduplication_an_architecture_can_come_again(make: Make) -> None:
    constraints = toy_constraints(blocks=2)
    feasible = int(constraints.feasible(every_network(constraints.space)).sum())
    strategy = make(constraints, seed=8, population=8, deduplicate=False)
    asked = 0
    for _ in range(10):
        codes = strategy.ask(8)
        asked += len(codes)
        assert constraints.feasible(codes).all()
        strategy.tell(toy_batch(constraints, codes))
    assert asked == 80 > feasible


@BOTH
def test_a_metric_that_the_evaluator_does_not_give_is_an_error(make: Make) -> None:
    constraints = toy_constraints()
    strategy = make(constraints, seed=0, objective="f1")
    batch = toy_batch(constraints, strategy.ask(3))
    with pytest.raises(EvaluationError, match="maximises 'f1', but the evaluator gives accuracy"):
        strategy.tell(batch)


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 0}, "population must be an integer >= 1, got 0"),
        ({"population": 2.5}, r"population must be an integer >= 1, got 2\.5"),
        ({"mutation_rate": 1.5}, r"mutation_rate must be in 0\.\.1, got 1\.5"),
        ({"mutation_rate": float("nan")}, r"mutation_rate must be in 0\.\.1, got nan"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_options_are_checked_when_the_search_is_made(
    make: Make, options: dict[str, float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make(toy_constraints(), **{"seed": 0, **options})


def test_a_sample_is_at_most_the_population() -> None:
    with pytest.raises(RecipeError, match=r"sample_size must be in 1\.\.10, got 11"):
        AgingEvolution(toy_constraints(), seed=0, population=10, sample_size=11)


@pytest.mark.parametrize("option", ["parent_ratio", "mutation_ratio"])
def test_ratios_are_shares(option: str) -> None:
    with pytest.raises(RecipeError, match=rf"{option} must be in 0\.\.1, got -0\.1"):
        ElitistEvolution(toy_constraints(), seed=0, **{option: -0.1})  # type: ignore[arg-type]


@BOTH
def test_a_budget_that_nothing_fits_is_refused_when_the_search_is_made(make: Make) -> None:
    constraints = toy_constraints()
    with pytest.raises(InfeasibleBudgetError, match="nearest feasible budget"):
        make(Constraints(constraints.space, constraints.costs, {"macs": 1.0}), seed=0)


@BOTH
def test_founders_are_random_also_where_rows_were_told_before(make: Make) -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    warm, cold = (make(constraints, seed=9, population=30) for _ in range(2))
    warm.tell(told(constraints, constraints.space.largest(), [0.9]))
    np.testing.assert_array_equal(warm.ask(30), cold.ask(30))


@BOTH
def test_told_rows_are_not_asked_again(make: Make) -> None:
    tiny = toy_constraints(blocks=2)
    networks = every_network(tiny.space)
    feasible = networks[tiny.feasible(networks)]
    strategy = make(tiny, seed=9, population=6)
    strategy.tell(toy_batch(tiny, feasible[::2]))
    asked = []
    while len(rows := strategy.ask(6)):
        asked.append(rows)
        strategy.tell(toy_batch(tiny, rows))
    np.testing.assert_array_equal(np.unique(np.vstack(asked), axis=0), np.unique(feasible[1::2], axis=0))


@BOTH
def test_without_options_a_hundred_evaluations_are_no_random_search(make: Make) -> None:
    constraints = toy_constraints(blocks=10)
    wins = 0
    for seed in range(12):
        evolved = run(make(constraints, seed=seed), constraints, 100, 1)
        wins += evolved > run(RandomSearch(constraints, seed=seed), constraints, 100, 1)
    # If it were no better, P(>= 10 of 12) <= 0.019; ties count as losses.
    assert wins >= 10


def test_without_a_population_generations_grow_from_20_to_100() -> None:
    constraints = toy_constraints("macs=100%", blocks=12)
    strategy = ElitistEvolution(constraints, seed=10)
    told_rows = 0
    while told_rows < 1300:
        codes = strategy.ask(1000)
        assert len(codes) == min(100, max(20, told_rows // 10))
        told_rows += len(codes)
        strategy.tell(toy_batch(constraints, codes))
    # A quarter are parents: children of the best five only, then of the best twenty-five.
    assert len(codes) == 100
    assert len(strategy._best) == 25


def test_an_exhausted_neighbourhood_is_left_by_stronger_mutations_not_by_random_rows() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    space = constraints.space
    centre = space.largest()
    # The centre and all that is one gene away from it.
    genes = [(gene, option) for gene, count in enumerate(space.counts) for option in range(count)]
    around = np.repeat(centre, len(genes), axis=0)
    for row, (gene, option) in enumerate(genes):
        around[row, gene] = option
    around = np.unique(space.canonical(around), axis=0)
    apart = []
    for seed in range(10):
        strategy = AgingEvolution(constraints, seed=seed, population=1)
        strategy.tell(told(constraints, around, [0.0] * len(around)))
        founder = strategy.ask(1)
        strategy.tell(told(constraints, founder, [0.0]))
        strategy.tell(told(constraints, centre, [1.0]))
        apart.append(distance(constraints, strategy.ask(1)[0], centre[0]))
    assert min(apart) >= 2
    # Two or three of twelve genes; random rows are five away on average.
    assert np.mean(apart) < 3.5


def test_children_at_later_attempts_are_mutated_twice_as_strongly_up_to_half_of_the_genes() -> None:
    constraints = toy_constraints("macs=100%", blocks=10)
    space, rng = constraints.space, np.random.default_rng(0)
    breeding = Breeding(constraints, rng, rate=0.0)
    parents = np.repeat(space.largest(), 4000, axis=0)
    changed = [(breeding.mutants(parents, attempt) != parents)[:, 0].mean() for attempt in range(5)]
    # The resolution is one of twelve genes: it changes in 1 of 12 children, then with the rate. Five standard
    # deviations of 4,000 draws are 0.04; where nothing else changes, one has to.
    np.testing.assert_allclose(changed, [1 / 12, 2 / 12, 4 / 12, 1 / 2, 1 / 2], atol=0.04)
    assert changed[1] - changed[0] > 0.04


NAS_BENCH_201 = Path(__file__).parents[3] / "shared/data/nas_bench_201/accuracy.npz"


@pytest.mark.slow
@pytest.mark.skipif(not NAS_BENCH_201.exists(), reason=f"needs {NAS_BENCH_201}")
def test_on_nas_bench_201_it_does_what_regularized_evolution_is_known_to_do() -> None:
    """Issue 4: population 10, tournament 5, 100 evaluations of 12 epochs: test accuracy 94.08 +- .31."""
    table = np.load(NAS_BENCH_201)
    digits = 5 ** np.arange(6)
    row_of = np.argsort(table["ops"] @ digits)
    searched, reported = table["c10_val_12ep"], table["c10_test_200ep"]
    operations = ("none", "skip", "conv1", "conv3", "pool")
    edges = tuple(Choice(f"edge{edge}", operations, ordinal=False) for edge in range(6))
    constraints = Constraints(SearchSpace("cells", edges, ()), {}, {})
    accuracies = []
    for seed in range(200):
        strategy = AgingEvolution(constraints, seed=seed, population=10, sample_size=5)
        rows = []
        for _ in range(100):
            cell = strategy.ask(1)
            rows.append(int(row_of[cell[0] @ digits]))
            strategy.tell(told(constraints, cell, [float(searched[rows[-1]])]))
        accuracies.append(float(reported[max(rows, key=lambda row: float(searched[row]))]))
    # Four standard errors of a mean of 200.
    assert np.mean(accuracies) == pytest.approx(94.08, abs=4 * 0.31 / np.sqrt(200))
    assert np.std(accuracies) == pytest.approx(0.31, abs=0.08)


def test_options_make_the_evolution_of_metapruning() -> None:
    """25 mutants of the ten best of all so far, a tenth of the genes each, then 25 crossovers.

    Liu et al., MetaPruning, ICCV 2019, and its repository: population 50, 10 kept, mutation 0.1.
    """
    choices = tuple(Choice(f"width{index}", tuple(range(1, 32))) for index in range(35))
    space = SearchSpace("widths", choices, ())
    constraints = Constraints(space, {}, {})
    options = {"population": 50, "parent_ratio": 0.2, "mutation_ratio": 0.5, "mutation_rate": 0.1}
    strategy = ElitistEvolution(constraints, seed=0, **options)  # type: ignore[arg-type]
    rng, everything, values = np.random.default_rng(0), np.zeros((0, 35), dtype=np.int64), np.zeros(0)
    changes = []
    for generation in range(6):
        rows = strategy.ask(1000)
        assert len(rows) == 50
        if generation:
            best = everything[np.argsort(-values, kind="stable")[:10]]
            # All genes come from the ten; crossovers of one with itself (1 in 10) make room for more mutants.
            crossed = (rows[25:, None] == best).any(axis=1).all(axis=1)
            assert crossed.sum() >= 16
            assert crossed[: crossed.sum()].all()
            changes += (rows[:25, None] != best).sum(axis=2).min(axis=1).tolist()
        scores = rng.random(50)
        strategy.tell(told(constraints, rows, scores.tolist()))
        everything, values = np.vstack([everything, rows]), np.concatenate([values, scores])
    # A tenth of 35 genes, and one at least; five standard deviations of the mean of 125.
    assert abs(np.mean(changes) - 3.525) < 5 * np.sqrt(35 * 0.09 / 125)
    assert len(np.unique(everything, axis=0)) == 300
