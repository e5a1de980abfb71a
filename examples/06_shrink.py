"""Your own trained network made narrower, from Python: here a ResNet-20 on the bundled digits.

    python examples/06_shrink.py            # two minutes
    python examples/06_shrink.py --smoke    # checks that it runs

The network is any `torch.nn.Module` of yours. Which channels hang together is read off its graph; importance
says which stay, a strategy how many of each group; the result is a module of the same class with fewer
channels. Uniform and random widths stand beside it, finetuned in the same way.
"""

import sys

import numpy as np
import torch

from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.distill.finetune import finetune
from autocompress.models.resnet_cifar import resnet20
from autocompress.prune.importance import comparable, importance
from autocompress.prune.reconstruct import reconstruct
from autocompress.prune.source import Source
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.space import Codes
from autocompress.training.data import batches, load_data
from autocompress.training.evaluate import evaluate
from autocompress.training.task import load_task
from search_spaces.channels import channel_space
from strategies.peel import PeelStyle

smoke = "--smoke" in sys.argv
torch.set_num_threads(1)
data = load_data("digits", limit=300 if smoke else None)
task = load_task(TaskSettings())
size = data.in_shape[1:]

# The network that you bring ---------------------------------------------------------------------------------

torch.manual_seed(0)
model = resnet20(classes=10, in_channels=1, width=8)
trained = finetune(
    model,
    data,
    task,
    FinetuneSettings(epochs=1 if smoke else 10, learning_rate=0.1, batch_size=32),
    resolution=size,
)

# What can be narrowed, and what cannot ----------------------------------------------------------------------

source = Source(model, torch.zeros(1, *data.in_shape))
for group in source.groups[:3]:
    print(f"{group.name}: {len(group)} channels, made by {', '.join(group.layers)}")
print(f"... {len(source.groups)} groups in all")
for kept in source.kept:
    print(f"{kept.layer} keeps {kept.channels} channels: {kept.reason}")

# Which channels stay, and how many --------------------------------------------------------------------------

some = [next(iter(batches(data.train, 128, seed=0)))]
scores = importance(source, "taylor", batches=some, loss=task.training_loss(0.0))
space = channel_space(source, scores=comparable(scores, "taylor"))
source = source.ranked(scores)
limits = Budget.parse("macs=40%").resolve(
    space, [operation_cost(space, "macs"), operation_cost(space, "params")]
)
found: dict[str, Codes] = {
    "PEEL-style": PeelStyle(limits, seed=0).ask(1),
    "uniform": uniform_candidates(limits)[:1],
    "random": limits.sample(1, np.random.default_rng(0), at_least=0.9),
}

# Remove them, fit the weights to the original's outputs, finetune with it as teacher ----------------------

print(f"the network: validation accuracy {trained.mean:.3f}, {limits.costs['macs'].maximum:,.0f} MACs")
settings = FinetuneSettings(epochs=1 if smoke else 3, learning_rate=0.02, batch_size=32)
for name, codes in found.items():
    (widths,) = space.decode(codes)
    kept_units = tuple(int(widths[choice.name]) for choice in space.choices)
    narrow = source.narrowed(kept_units)
    reconstruct(source, kept_units, narrow, some)
    before = evaluate(narrow, data.validation, task.score).mean
    after = finetune(narrow, data, task, settings, resolution=size, teacher=model).mean
    prices = {metric: float(values[0]) for metric, values in limits.price(codes).items()}
    print(
        f"{name}: {prices['macs']:,.0f} MACs, {prices['params']:,.0f} parameters; validation accuracy "
        f"{before:.3f}, finetuned {after:.3f}"
    )
