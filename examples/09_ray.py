"""A supernet searched by several processes: Ray's workers share one copy of its weights.

python examples/09_ray.py           # three minutes on 2 cores
python examples/09_ray.py --smoke   # checks that it runs

The same network and the same scores come out as of one process that is asked in the same way; docs/ray.md
has what it takes to go on to a cluster.
"""

import sys
import time
from pathlib import Path

import torch

from autocompress import stages
from autocompress.distributed.ray_evaluator import RayEvaluator
from autocompress.engine import search
from autocompress.machine import cores
from autocompress.recipe import parse_recipe
from autocompress.run import Run, Shown
from strategies.evolution import AgingEvolution

smoke = "--smoke" in sys.argv
recipe = parse_recipe(
    {
        "data": {"source": "digits", "limit": 400 if smoke else None},
        "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny"}},
        "profile": {"measured": "nowhere"},
        "train": {"epochs": 1 if smoke else 10, "learning_rate": 0.2},
        "search": {"budget": {"macs": "50%"}},
        "threads": 1,
    }
)
run = Run(Path("runs/ray-smoke" if smoke else "runs/ray"), recipe)
supernet = stages.train(run, Shown(say=print))
limits = stages.constraints(run, Shown())
evaluator = stages.evaluator(run, supernet)
evaluations = 8 if smoke else 100

for workers in sorted({1, cores()}):
    with RayEvaluator(evaluator, workers=workers) as spread:
        start = time.perf_counter()
        strategy = AgingEvolution(limits, seed=0, population=20)
        result = search(strategy, limits, spread, evaluations=evaluations, asynchronous=True)
        seconds = time.perf_counter() - start
    best = result.best()
    accuracy = best.metrics["accuracy"]
    print(
        f"{workers} workers: {evaluations / seconds:.1f} networks a second, best {accuracy:.4f} on validation"
    )

torch.set_num_threads(1)  # as in a worker: sums of floats depend on it
again = evaluator(run.space.encode([best.architecture]))["accuracy"][0]
print(f"the same network in this process: {again:.4f}")
