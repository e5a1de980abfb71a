"""A small residual network with data, and sparse trainings of it in a second; what these tests share."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from small_networks import small_data
from torch import Tensor, nn

from autocompress.recipe import TaskSettings
from autocompress.sparse.method import Work
from autocompress.sparse.methods import options_of
from autocompress.sparse.recipe import SparseTraining
from autocompress.sparse.train import Sparsified, sparsify
from autocompress.training.evaluate import Scored
from autocompress.training.task import load_task

DATA = small_data(64)
TASK = load_task(TaskSettings())


class Small(nn.Module):
    """Two layers tied by an addition, a layer with a bias and no norm, and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 10, 3, 1, 1), nn.BatchNorm2d(10)
        self.conv4 = nn.Conv2d(10, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.silu(self.bn3(self.conv3(x)))
        return self.fc(torch.sigmoid(self.conv4(x)).mean((2, 3)))


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small()


def training(**changes: Any) -> SparseTraining:
    given: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.05,
        "shift": 1,
        "precision": "fp32",
        "memory_format": "contiguous",
    }
    return SparseTraining(**given | changes)


def trained(
    method: str,
    model: nn.Module | None = None,
    *,
    options: dict[str, Any] | None = None,
    settings: SparseTraining | None = None,
    checkpoint: Path | None = None,
    **given: Any,
) -> Sparsified:
    return sparsify(
        small() if model is None else model,
        DATA,
        TASK,
        settings or training(),
        method=method,
        options=options_of(method, options or {}),
        checkpoint=checkpoint,
        **given,
    )


def work_on(network: nn.Module, side: int = 12, channels: int = 3, **changes: Any) -> Work:
    """What a method is started with, without any training."""
    given: dict[str, Any] = {
        "network": network.eval(),
        "image": torch.zeros(1, channels, side, side),
        "settings": training(),
        "steps": 4,
        "score": lambda: Scored(0.9, 0.01, 16),
        "renew": lambda: None,
    }
    return Work(**given | changes)
