"""One supernet, two targets: the best network for each, and what it would cost on the other.

python examples/03_two_targets.py [--smoke]
"""

import sys
from pathlib import Path

from autocompress import stages
from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.engine import search
from autocompress.latency.profile import profile
from autocompress.latency.target import load_target
from autocompress.recipe import parse_recipe
from autocompress.run import Run, Shown
from strategies.evolution import AgingEvolution

smoke = "--smoke" in sys.argv
recipe = parse_recipe(
    {
        "space": {"arguments": {"preset": "tiny", "resolutions": [24] if smoke else [24, 28, 32]}},
        "train": {"epochs": 1 if smoke else 20, "learning_rate": 0.2},
    }
)
run = Run(Path("runs/two_targets"), recipe)
supernet = stages.train(run, Shown(say=print))
evaluator = stages.evaluator(run, supernet)
rounds = 4 if smoke else 60
TARGETS = {name: load_target(name) for name in ("onnxruntime-cpu", "pytorch-cpu")}
costs = {
    name: profile(
        run.space,
        target,
        folder=run.folder / name,
        networks=8 if smoke else 40,
        min_rounds=min(rounds, 24),
        max_rounds=rounds,
    ).cost(run.space)
    for name, target in TARGETS.items()
}
for name in TARGETS:
    budget = Budget.parse("macs=60%" if smoke else "latency_ms=60%").resolve(
        run.space, [costs[name], operation_cost(run.space, "macs")]
    )
    strategy = AgingEvolution(budget, seed=0, population=4 if smoke else 20)
    result = search(strategy, budget, evaluator, evaluations=6 if smoke else 60)
    best = result.best()
    row = run.space.encode([best.architecture])
    latencies = {other: f"{float(cost.of(row)[0]):.3f} ms" for other, cost in costs.items()}
    print(f"best for {name}: accuracy {best.metrics['accuracy']:.4f}, predicted latency {latencies}")
