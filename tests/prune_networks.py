"""Small networks with channels to remove; what the tests of autocompress.prune share."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.prune.source import Source

Batch = tuple[Tensor, Tensor]


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move batch norm away from its ones and zeros, and biases from theirs; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scale = module.weight[0].numel() ** -0.5
            nn.init.normal_(module.weight, std=1.5 * scale, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            nn.init.normal_(module.running_mean, std=0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


def chain(seed: int = 0) -> nn.Sequential:
    """Norm after two of three convolutions, bias in the one without, pooling, and a classifier."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 5, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    shake(model, seed)
    return model


class Added(nn.Module):
    """Two convolutions whose sum two others read: one group of two layers and two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 3, 1)
        self.other = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.left(x) + self.right(x))
        out: Tensor = (self.one(x) + self.other(x)).mean((2, 3))
        return out


class Dense(nn.Module):
    """What comes before is concatenated, normed, read: batch norm before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.grow = nn.Conv2d(4, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(9)
        self.head = nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(F.relu(x))], 1)
        out: Tensor = self.head(F.relu(self.bn(x))).mean((2, 3))
        return out


class Own(nn.Module):
    """Weights that no module of PyTorch holds, a layer that runs twice, padding by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        self.twice = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding="same"))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Grouped(nn.Module):
    """A reader with two groups, behind a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.halves = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.depthwise(F.relu6(self.expand(x)))))
        out: Tensor = self.fc(F.relu(self.halves(x)).mean((2, 3)))
        return out


def source_of(model: nn.Module, side: int = 8) -> Source:
    return Source(model, torch.zeros(2, 3, side, side))


@functools.cache
def chained() -> Source:
    """The chain, traced once; not to be changed."""
    return source_of(chain())


def batches(count: int = 2, size: int = 6, side: int = 8, seed: int = 0) -> list[Batch]:
    """Images and classes below 3."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % 3) for _ in range(count)
    ]
