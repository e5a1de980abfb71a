"""What strategies cost of themselves: time a candidate, and the memory of a million free evaluations.

    python benchmarks/strategy_overhead.py [--quick]

Space: MobileNetV3 with 46 choices, at most 60 % (or 30 %) of the largest network's MACs. Each strategy is
asked and told without the engine, in batches of 100 and one network at a time; scores are a sum over genes.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import Figure, parser, report, use_one_core

from autocompress.budget import Budget, Constraints
from autocompress.cost import Values, operation_cost
from autocompress.engine import search
from autocompress.plugins import load_strategy
from autocompress.space import Codes, SearchSpace
from autocompress.trial import Batch, Outcome
from search_spaces.mobilenet_v3 import mobilenet_v3

BUDGET = "macs=60%"
TIGHT_BUDGET = "macs=30%"
"""What one genotype in 700 fits."""
# Promised, in milliseconds a candidate.
LIMITS_MS = {"random": 0.05, "evolution": 0.05, "elitist": 0.05, "reinforce": 2.0, "reinforce (LSTM)": 2.0}
STRATEGIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "random": ("random", {}, 2000),
    "evolution": ("evolution", {}, 2000),
    "elitist": ("elitist", {}, 2000),
    "nsga2": ("nsga2", {}, 2000),
    "reinforce": ("reinforce", {}, 500),
    "reinforce (LSTM)": ("reinforce", {"policy": "lstm"}, 300),
    "tpe": ("tpe", {}, 60),
    "predictor": ("predictor", {}, 60),
}


class Sum:
    """A free evaluator: a weighted sum of the genes."""

    paid = False

    def __init__(self, space: SearchSpace) -> None:
        """Draw the weights."""
        self._weights = np.random.default_rng(0).normal(size=len(space.choices))

    def __call__(self, codes: Codes) -> dict[str, Values]:
        """Return the scores."""
        return {"accuracy": codes @ self._weights}


def limited(budget: str = BUDGET) -> Constraints:
    """Return the problem."""
    space = mobilenet_v3()
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


def overhead_ms(constraints: Constraints, name: str, at_once: int, count: int) -> float:
    """Return the milliseconds of processor time that a strategy takes for one candidate."""
    plugin, options, _ = STRATEGIES[name]
    strategy = load_strategy(plugin)(constraints, seed=0, **options)
    evaluate = Sum(constraints.space)
    spent = asked = 0.0
    while asked < count:
        start = time.process_time()
        codes = strategy.ask(at_once)
        spent += time.process_time() - start
        measured = np.full(len(codes), Outcome.MEASURED, dtype=np.int8)
        batch = Batch(codes, constraints.price(codes), evaluate(codes), measured)
        start = time.process_time()
        strategy.tell(batch)
        spent += time.process_time() - start
        asked += len(codes)
    return 1e3 * spent / asked


def resident_mb() -> float:
    """Return the resident memory now; the peak that the kernel keeps is inherited from the parent process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def million(name: str, evaluations: int) -> dict[str, float]:
    """Search a free evaluator in this process; return seconds and how much the memory grew, in MB."""
    constraints = limited()
    evaluate = Sum(constraints.space)
    make = partial(load_strategy(STRATEGIES[name][0]), constraints, seed=0)
    search(make(), constraints, evaluate, evaluations=1000)
    before = most = resident_mb()
    start = time.perf_counter()
    history = Path("history.bin")

    def watch(done: int, total: int, note: str = "") -> None:
        nonlocal most
        if done % 10_000 == 0:
            most = max(most, resident_mb())

    result = search(make(), constraints, evaluate, evaluations=evaluations, history=history, progress=watch)
    assert result.scored == evaluations
    assert not result.trials
    size = history.stat().st_size
    history.unlink()
    grown = max(most, resident_mb()) - before
    return {"seconds": time.perf_counter() - start, "grown_mb": grown, "stream_mb": size / 1e6}


def main() -> None:
    """Time every strategy, and run a million free evaluations of two."""
    options = parser(__doc__ or "").parse_args()
    use_one_core()
    figures = []
    budgets = {BUDGET: list(STRATEGIES), TIGHT_BUDGET: ["random", "evolution", "elitist"]}
    for budget, name in ((budget, name) for budget, names in budgets.items() for name in names):
        constraints, count = limited(budget), STRATEGIES[name][2]
        for at_once in (100, 1):
            least = min(count, 40 if options.quick else count)
            repeats = 1 if options.quick else 3
            taken = sorted(overhead_ms(constraints, name, at_once, least) for _ in range(repeats))
            middle, limit = taken[len(taken) // 2], LIMITS_MS.get(name) if at_once == 100 else None
            target = "" if limit is None else f"<= {limit:g}"
            reached = None if limit is None else middle <= limit
            title = f"{name}, {budget}, {at_once} at once"
            figures.append(Figure(title, middle, "ms a candidate", taken[0], taken[-1], target, reached))
    count = 20_000 if options.quick else 1_000_000
    for name in ("random", "evolution"):
        command = [sys.executable, __file__, "--million", name, str(count)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        title = f"{count:,} free evaluations by {name}"
        figures.append(Figure(f"{title}, memory grown", found["grown_mb"], "MB", 0.0, found["grown_mb"]))
        figures.append(Figure(f"{title}, stream", found["stream_mb"], "MB", 0.0, found["stream_mb"]))
        figures.append(Figure(f"{title}, time", found["seconds"], "s", 0.0, found["seconds"]))
    report("strategy_overhead", figures, settings={"space": "mobilenet_v3"}, options=options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--million"]:
        print(json.dumps(million(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
