"""Small supernets, plain networks and data sets, each run in milliseconds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.elastic.supernet import Supernet
from autocompress.space import Architecture, Option, SearchSpace
from autocompress.training.data import DataSet, Images


def shaken(space: SearchSpace, *, seed: int = 1, scale: float = 0.1) -> Supernet:
    """A supernet away from its initialisation, whose zeros and ones hide errors."""
    supernet = space.supernet()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return supernet


def arch_of(space: SearchSpace, **settings: Option) -> Architecture:
    """Keys have `_` for `.`; what is not given is the largest."""
    given = {choice.name: choice.options[-1] for choice in space.choices}
    return space.architecture(given | {name.replace("_", "."): option for name, option in settings.items()})


def images(batch: int = 4, side: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


class Unread(Dataset[Any]):
    """A test part that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("the test part was counted")

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the test part was read")


def small_data(
    count: int = 64, *, side: int = 12, labels: Callable[[Tensor], Tensor] | None = None
) -> DataSet:
    """Three classes of 3-channel images: each brightens one channel. A quarter more is held out.

    Args:
        count: Training images.
        side: Pixels.
        labels: Makes other labels out of the classes, such as numbers to regress.
    """
    generator = torch.Generator().manual_seed(5)
    total = count + count // 4
    classes = torch.arange(total) % 3
    pixels = torch.randint(0, 128, (total, 3, side, side), generator=generator)
    pixels[torch.arange(total), classes] += 64
    marks = classes if labels is None else labels(classes)
    mean, std = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)
    bytes_ = pixels.to(torch.uint8)
    train = Images(bytes_[:count], marks[:count], mean, std, flip=True)
    validation = Images(bytes_[count:], marks[count:], mean, std, flip=True)
    return DataSet("small", train, validation, Unread(), 3, (3, side, side), mean, std, True, f"{total:016x}")


def small_network(classes: int = 3, *, width: int = 6, seed: int = 0) -> nn.Sequential:
    """A convolution with batch norm, and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, classes),
        )


def weights(network: nn.Module) -> dict[str, Tensor]:
    """What is in the network now, as copies."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit, for every name of the first."""
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
