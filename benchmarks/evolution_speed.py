"""Figure 2: candidates a second of elitist evolution with a 400x3 predictor and a latency table.

python benchmarks/evolution_speed.py [--quick] [--output FILE]
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
from latency_tables import once_for_all_space, price_of
from record import Figure, parser, rate, report, timed, use_one_core

from autocompress.budget import Budget, Constraints
from autocompress.cost import Price, Values, compile_cost, operation_cost
from autocompress.engine import search
from autocompress.errors import InfeasibleBudgetError
from autocompress.evaluation.predictor import FittedPredictor, fit
from autocompress.evaluator import Evaluator
from autocompress.space import Codes
from strategies.evolution import ElitistEvolution

TARGET_PER_SECOND = 50_000
INFEASIBLE_MS = 10
POPULATION, GENERATIONS = 100, 50
METRIC = "predicted_accuracy"


class Recording:
    """An evaluator that remembers which rows it was given."""

    def __init__(self, predictor: FittedPredictor) -> None:
        self.paid = False
        self.predictor = predictor
        self.rows: list[Codes] = []

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Predict, and keep the rows."""
        self.rows.append(codes)
        return self.predictor(codes)


def evolve(constraints: Constraints, evaluator: Evaluator, *, seed: int, evaluations: int) -> None:
    """Search as a user does."""
    strategy = ElitistEvolution(constraints, seed=seed, objective=METRIC, population=POPULATION)
    search(strategy, constraints, evaluator, evaluations=evaluations, objective=METRIC, batch=POPULATION)


def one_at_a_time(
    constraints: Constraints, price: Price, predictor: FittedPredictor, candidates: int
) -> None:
    """Evolve as the once-for-all finder does: each candidate built and priced alone, rejected until it fits.

    The predictor still scores a generation at once, as there.
    """
    space, rng = constraints.space, np.random.default_rng(0)
    limit = constraints.limits["latency_ms"]

    def until_it_fits(propose: Callable[[], Codes]) -> Codes:
        while True:
            row = propose()
            if sum(price(ops) for _, ops in space.operations(row)) <= limit:
                return row

    population = [until_it_fits(lambda: space.sample(1, rng)) for _ in range(POPULATION)]
    scores = predictor(np.vstack(population))[METRIC]
    for _ in range(candidates // POPULATION - 1):
        best = np.argsort(-scores)[: POPULATION // 4]
        parents = [population[index] for index in best]

        def pick(parents: list[Codes] = parents) -> Codes:
            return parents[int(rng.integers(len(parents)))]

        children = [until_it_fits(lambda: space.mutate(pick(), rng)) for _ in range(POPULATION // 2)]
        children += [
            until_it_fits(lambda: space.crossover(pick(), pick(), rng)) for _ in range(POPULATION // 2)
        ]
        population = parents + children
        scores = np.concatenate([scores[best], predictor(np.vstack(children))[METRIC]])


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "", repeats=15).parse_args()
    use_one_core()
    space = once_for_all_space()
    price, source = price_of(space)
    latency = compile_cost(space, price, "latency_ms")
    macs = operation_cost(space, "macs")

    # What the predictor predicts does not matter for the speed, only that it has an optimum to find.
    rng = np.random.default_rng(0)
    samples = space.sample(200 if options.quick else 1000, rng)
    truth = 60 + 3 * np.log(macs.of(samples) / 1e8) + rng.normal(0, 0.1, len(samples))
    predictor = fit(space, samples, truth, kind="mlp", epochs=2 if options.quick else 20, metric=METRIC)

    generations = 4 if options.quick else GENERATIONS
    evaluations = POPULATION * generations
    figures: list[Figure] = []
    settings: dict[str, object] = {}
    for share in ("60%", "30%"):
        constraints = Budget.of({"latency_ms": share}).resolve(space, [latency])
        seeds = iter(range(1, options.repeats + 2))

        def run(constraints: Constraints = constraints, seeds=seeds) -> None:  # type: ignore[no-untyped-def]
            strategy = ElitistEvolution(
                constraints, seed=next(seeds), objective=METRIC, population=POPULATION
            )
            search(
                strategy, constraints, predictor, evaluations=evaluations, objective=METRIC, batch=POPULATION
            )

        seconds = timed(run, repeats=options.repeats)
        name = f"evolution, latency <= {share} of the largest"
        figures.append(rate(name, evaluations, seconds, "candidates/s", at_least=TARGET_PER_SECOND))
        per_processor = evaluations / seconds.processor_median
        figures.append(
            Figure("  by processor time", per_processor, "candidates/s", per_processor, per_processor)
        )

        recording = Recording(predictor)
        evolve(constraints, recording, seed=1, evaluations=evaluations)
        rows = np.vstack(recording.rows)
        twice = len(rows) - len(np.unique(rows, axis=0))
        over = int((~constraints.feasible(rows)).sum())
        figures.append(Figure("  evaluated twice", twice, "rows", twice, twice, "0", twice == 0))
        figures.append(Figure("  evaluated over the budget", over, "rows", over, over, "0", over == 0))
        best = float(predictor(rows)[METRIC].max())
        random = float(predictor(constraints.sample(evaluations, rng))[METRIC].max())
        settings[f"best prediction at {share}"] = f"{best:.3f}; of as many random networks {random:.3f}"

    half = Budget.of({"latency_ms": "60%"}).resolve(space, [latency])
    slow_candidates = 100 if options.quick else 300
    slow = timed(
        lambda: one_at_a_time(half, price, predictor, slow_candidates), repeats=1 if options.quick else 3
    )
    figures.append(rate("baseline: one candidate at a time", slow_candidates, slow, "candidates/s"))
    ratio = figures[0].value / figures[-1].value
    figures.append(Figure("ratio to the baseline", ratio, "x", ratio, ratio))
    figures += infeasible(options.repeats)

    settings |= {
        "space": f"{space.name}, width 1.2, 17 resolutions, {len(space.choices)} choices",
        "latency table": source,
        "population x generations": f"{POPULATION} x {generations}",
        "predictor": "400-400-400-1, ReLU, 32-bit floats",
        "candidate": "asked, repaired, deduplicated, priced, predicted, told: autocompress.engine.search",
        "repeats": options.repeats,
        "threads": 1,
    }
    report("evolution_speed", figures, settings=settings, options=options)


def infeasible(repeats: int) -> list[Figure]:
    """Time the refusal of impossible budgets, each on costs compiled anew: nothing is in a cache."""
    figures = []
    for limits in ({"latency_ms": 0.001}, {"latency_ms": 0.001, "macs": 1000.0}):
        milliseconds = []
        for _ in range(repeats):
            space = once_for_all_space()
            price, _ = price_of(space)
            costs = [compile_cost(space, price, "latency_ms"), operation_cost(space, "macs")]
            start = time.perf_counter()
            try:
                Budget.of(limits).resolve(space, costs)
            except InfeasibleBudgetError:
                milliseconds.append(1e3 * (time.perf_counter() - start))
        median, least, greatest = float(np.median(milliseconds)), min(milliseconds), max(milliseconds)
        name = f"impossible {' and '.join(limits)} refused in"
        # Of several limits the nearest feasible budget is an integer programme: no promise on its time.
        promised = len(limits) == 1
        target, reached = (f"< {INFEASIBLE_MS} ms", median < INFEASIBLE_MS) if promised else ("", None)
        figures.append(Figure(name, median, "ms", least, greatest, target, reached))
    return figures


if __name__ == "__main__":
    main()
