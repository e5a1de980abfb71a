"""A search space of your own, with a layer of your own: supernet, costs, latency and search come for free.

python examples/02_own_search_space.py [--smoke]
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.engine import search
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.latency.profile import profile
from autocompress.latency.target import load_target
from autocompress.ops import Conv2d, GlobalAvgPool, Linear, Ops, OpSpec, Shape
from autocompress.recipe import TaskSettings, TrainSettings
from autocompress.space import Block, Choice, Option, SearchSpace
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches
from autocompress.training.supernet import train_supernet
from autocompress.training.task import load_task
from strategies.random_search import RandomSearch


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `(batch, channels, height, width)`."""
        return x * self.factor


@dataclass(frozen=True)
class ChannelScale(OpSpec):
    """The layer as an operation: what a space, a cost and a table must know of it."""

    channels: int
    size: int

    @property
    def in_shape(self) -> Shape:
        """Channels, height, width."""
        return self.channels, self.size, self.size

    @property
    def out_shape(self) -> Shape:
        """As the input."""
        return self.in_shape

    @property
    def macs(self) -> int:
        """One multiplication an element; not counted, as for batch norm."""
        return 0

    @property
    def params(self) -> int:
        """One factor a channel."""
        return self.channels

    def module(self) -> nn.Module:
        """Build the layer; the supernet slices its parameters to the channels that run."""
        return Scale(self.channels)


def stage(before: int, size: int, stride: int, index: int, depth: Option, width: Option) -> Ops:
    """Two convolutions, the second only where the depth says so."""
    if index > int(depth):
        return ()
    channels, after = int(width), size // stride
    return (
        Conv2d(before or channels, channels, size, size, kernel=3, stride=stride, activation="relu"),
        ChannelScale(channels, after),
    )


def head(width: Option) -> Ops:
    """Average and classify."""
    return (GlobalAvgPool(int(width), 8, 8), Linear(int(width), 10))


space = SearchSpace(
    "scaled_cnn",
    choices=(Choice("depth", (1, 2)), Choice("width", (8, 16, 24))),
    blocks=(
        Block("first", ("depth", "width"), partial(stage, 1, 32, 4, 1)),
        Block("second", ("depth", "width"), partial(stage, 0, 8, 1, 2)),
        Block("head", ("width",), head),
    ),
)

smoke = "--smoke" in sys.argv
data, task = load_data("digits", validation=0.2), load_task(TaskSettings())
supernet = space.supernet()
train_supernet(supernet, data, task, TrainSettings(epochs=1 if smoke else 20, learning_rate=0.1))
table = profile(
    space,
    load_target(),
    folder=Path("runs/own_space"),
    networks=6,
    min_rounds=4 if smoke else 24,
    max_rounds=4 if smoke else 60,
)
costs = [operation_cost(space, "macs"), table.cost(space)]
constraints = Budget.parse("macs=80%").resolve(space, costs)
evaluator = SupernetEvaluator(supernet.eval(), data, task, calibration_batches(data, 512))
result = search(RandomSearch(constraints, seed=0), constraints, evaluator, evaluations=space.size)
print(f"{space.size} networks, {len(result.trials)} within the budget; Pareto front:")
for trial in result.pareto():
    print(dict(trial.architecture.settings), trial.metrics["accuracy"], f"{trial.costs['latency_ms']:.3f} ms")
