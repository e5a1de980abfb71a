"""A differentiable search on the bundled digits: train weights and architecture, derive a cell.

    python examples/05_differentiable.py            # a minute
    python examples/05_differentiable.py --smoke    # checks that it runs

The cell has six edges between four nodes, each of five operations (the NAS-Bench-201 cell). DARTS moves the
probability of each operation by gradients, on other images than the weights; the budget is part of its loss.
"""

import sys
from typing import cast

import torch

from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.differentiable import Differentiable
from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.mixture import Mixture
from autocompress.elastic.recalibrate import recalibrate
from autocompress.network import build_network
from autocompress.recipe import FinetuneSettings, TaskSettings, TrainSettings
from autocompress.training.bilevel import train_relaxed
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.task import load_task
from search_spaces.nas_bench_201 import CHOICES, arch_str, nas_bench_201
from strategies.darts import Darts

smoke = "--smoke" in sys.argv
torch.set_num_threads(1)
data = load_data("digits", limit=300 if smoke else None)
task = load_task(TaskSettings())
space = nas_bench_201(channels=8, cells=1, resolution=8, in_channels=1)
constraints = Budget.parse("macs=50%").resolve(space, [operation_cost(space, "macs")])

# Search: weights and probabilities --------------------------------------------------------------------------

strategy = Darts(constraints, seed=0, learning_rate=0.01)
supernet = space.supernet()
settings = TrainSettings(epochs=2 if smoke else 30, learning_rate=0.1, batch_size=32)
train_relaxed(supernet, cast(Differentiable, strategy), data, task, settings, seed=0)

# Derive: the most probable cell that keeps the budget, priced again -----------------------------------------

codes = strategy.ask(1)
(cell,) = space.decode(codes)
price = float(constraints.price(codes)["macs"][0])
limit = constraints.limits["macs"]
mixture = strategy.notes["relaxation"]["expected_costs"]["macs"]
print(f"cell: {arch_str(cell)}")
print(f"{price:,.0f} MACs of {limit:,.0f} allowed; the mixture has {mixture:,.0f} in expectation")

# Train it: its slice of the mixture is worth little, and no search may say otherwise ------------------------

sliced = extract(supernet, cell, recalibrate(supernet, cell, calibration_batches(data, 512)))
before = evaluate(sliced, data.validation, task.score).mean
network = build_network(space.operations(codes))
after = finetune(
    network,
    data,
    task,
    FinetuneSettings(epochs=2 if smoke else 20, learning_rate=0.1, batch_size=64),
    resolution=(8, 8),
    teacher=Mixture(supernet, space.decode(strategy.start)[0], strategy.mixture()),
    teacher_resolution=(8, 8),
)
print(f"validation accuracy: {before:.3f} with weights of the mixture, {after.mean:.3f} trained anew")

# Draw -------------------------------------------------------------------------------------------------------

probabilities = strategy.notes["relaxation"]["probabilities"]
for choice in CHOICES:
    source, target = choice.split("_")[1:]
    operation = str(cell[choice])
    bars = " ".join(
        f"{'▁▂▃▄▅▆▇█'[min(7, int(8 * p))]}{name[:8]}" for name, p in probabilities[choice].items()
    )
    print(f"node {source} ──{operation:─^16}─▶ node {target}    {bars}")
