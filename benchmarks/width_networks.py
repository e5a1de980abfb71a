"""ResNet-18-like and MobileNetV2-like networks for 32 px whose channel counts are choices, layer by layer.

The spaces price layers; the networks are built as plain PyTorch or as operations, since a shortcut with a
convolution of its own is no chain of operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops
from autocompress.space import Block, Choice, Option, SearchSpace

CLASSES, PIXELS = 10, 32
LEAST, MULTIPLE = 0.25, 8


def options(channels: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """Return the widths to choose from: every multiple, from a quarter to all of the channels."""
    return tuple(range(max(multiple, round(LEAST * channels / multiple) * multiple), channels + 1, multiple))


def _conv(shape: tuple[int, int, str, int], fixed_in: int, inputs: Option, outputs: Option = 0) -> Ops:
    size, kernel, activation, stride = shape
    if not outputs:  # the input is the image
        inputs, outputs = fixed_in, inputs
    return (
        Conv2d(int(inputs), int(outputs), size, size, kernel=kernel, stride=stride, activation=activation),
    )


def _depthwise(size: int, stride: int, channels: Option) -> Ops:
    width = int(channels)
    return (Conv2d(width, width, size, size, kernel=3, stride=stride, groups=width, activation="relu6"),)


def _add(size: int, channels: Option) -> Ops:
    return (Add(int(channels), size, size),)


def _head(size: int, channels: Option) -> Ops:
    return (GlobalAvgPool(int(channels), size, size), Linear(int(channels), CLASSES))


@dataclass(frozen=True)
class ResNetBlock:
    """One residual block: where it is, and the names of its choices."""

    name: str
    inputs: str
    inner: str
    outputs: str
    size: int
    stride: int

    @property
    def projects(self) -> bool:
        """Whether its shortcut has a convolution."""
        return self.inputs != self.outputs or self.stride > 1


def resnet18_blocks() -> list[ResNetBlock]:
    """Return the eight blocks of the small-image ResNet-18."""
    result, size, inputs = [], PIXELS, "stage1"
    for stage in range(1, 5):
        for index in (1, 2):
            stride = 2 if stage > 1 and index == 1 else 1
            name = f"stage{stage}.block{index}"
            result.append(ResNetBlock(name, inputs, f"{name}.inner", f"stage{stage}", size, stride))
            size, inputs = size // stride, f"stage{stage}"
    return result


def resnet18_space() -> SearchSpace:
    """Make the space: one width a stage, which its shortcuts share, and one inside each block."""
    widths = {1: 64, 2: 128, 3: 256, 4: 512}
    choices = [Choice(f"stage{s}", options(channels)) for s, channels in widths.items()]
    blocks = [Block("stem", ("stage1",), partial(_conv, (PIXELS, 3, "relu", 1), 3))]
    for block in resnet18_blocks():
        choices.append(Choice(block.inner, options(widths[int(block.outputs[-1])])))
        after = block.size // block.stride
        first = partial(_conv, (block.size, 3, "relu", block.stride), 0)
        second = partial(_conv, (after, 3, "none", 1), 0)
        blocks.append(Block(f"{block.name}.conv1", (block.inputs, block.inner), first))
        blocks.append(Block(f"{block.name}.conv2", (block.inner, block.outputs), second))
        if block.projects:
            shortcut = partial(_conv, (block.size, 1, "none", block.stride), 0)
            blocks.append(Block(f"{block.name}.shortcut", (block.inputs, block.outputs), shortcut))
        blocks.append(Block(f"{block.name}.add", (block.outputs,), partial(_add, after)))
    blocks.append(Block("head", ("stage4",), partial(_head, PIXELS // 8)))
    return SearchSpace("resnet18_widths", tuple(choices), tuple(blocks))


class _Residual(nn.Module):
    def __init__(self, block: ResNetBlock, width: dict[str, int]) -> None:
        super().__init__()
        inputs, inner, outputs = width[block.inputs], width[block.inner], width[block.outputs]
        self.conv1 = nn.Sequential(
            nn.Conv2d(inputs, inner, 3, block.stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.conv2 = nn.Sequential(nn.Conv2d(inner, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if block.projects:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, block.stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.shortcut(x)).relu()


def resnet18(space: SearchSpace, row: "np.ndarray") -> nn.Module:
    """Build the plain network of one row of codes."""
    width = {name: int(value) for name, value in space.decode(row[None])[0].settings}
    layers: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(3, width["stage1"], 3, 1, 1, bias=False), nn.BatchNorm2d(width["stage1"]), nn.ReLU()
        )
    ]
    layers += [_Residual(block, width) for block in resnet18_blocks()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width["stage4"], CLASSES)]
    return nn.Sequential(*layers).eval()


# Channels, repetitions and stride of the first block of each stage; strides made for 32 px.
MOBILENET_V2 = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


@dataclass(frozen=True)
class InvertedResidual:
    """One block of MobileNetV2: where it is, and the names of its choices."""

    name: str
    inputs: str
    middle: str
    outputs: str
    channels: int
    size: int
    stride: int


def mobilenet_v2_blocks() -> list[InvertedResidual]:
    """Return the blocks; the first has no expansion, so its middle is its input."""
    result, size, inputs, before = [], PIXELS, "stem", 32
    for stage, (channels, repetitions, stride) in enumerate(MOBILENET_V2, start=1):
        for index in range(1, repetitions + 1):
            name = f"stage{stage}.block{index}"
            middle = "stem" if stage == 1 else f"{name}.middle"
            step = stride if index == 1 else 1
            result.append(InvertedResidual(name, inputs, middle, f"stage{stage}", 6 * before, size, step))
            size, inputs, before = size // step, f"stage{stage}", channels
    return result


def mobilenet_v2_space() -> SearchSpace:
    """Make the space: the widths of stem, stages, the middle of each block, and the last convolution."""
    choices = [Choice("stem", options(32))]
    choices += [Choice(f"stage{s}", options(c)) for s, (c, _, _) in enumerate(MOBILENET_V2, start=1)]
    blocks = [Block("stem", ("stem",), partial(_conv, (PIXELS, 3, "relu6", 1), 3))]
    size = PIXELS
    for block in mobilenet_v2_blocks():
        after = block.size // block.stride
        if block.middle != "stem":
            choices.append(Choice(block.middle, options(block.channels)))
            expand = partial(_conv, (block.size, 1, "relu6", 1), 0)
            blocks.append(Block(f"{block.name}.expand", (block.inputs, block.middle), expand))
        blocks.append(
            Block(f"{block.name}.depthwise", (block.middle,), partial(_depthwise, block.size, block.stride))
        )
        project = partial(_conv, (after, 1, "none", 1), 0)
        blocks.append(Block(f"{block.name}.project", (block.middle, block.outputs), project))
        if block.inputs == block.outputs and block.stride == 1:
            blocks.append(Block(f"{block.name}.add", (block.outputs,), partial(_add, after)))
        size = after
    choices.append(Choice("last", options(1280, 32)))
    blocks.append(Block("last", ("stage7", "last"), partial(_conv, (size, 1, "relu6", 1), 0)))
    blocks.append(Block("head", ("last",), partial(_head, size)))
    return SearchSpace("mobilenet_v2_widths", tuple(choices), tuple(blocks))


def mobilenet_v2_chain(space: SearchSpace, row: "np.ndarray") -> list[tuple[str, Ops]]:
    """Return the network of one row of codes as blocks with their shortcuts, layers of a block together."""
    grouped: dict[str, list[Ops]] = {}
    for name, ops in space.operations(row):
        owner = ".".join(name.split(".")[:2]) if name.startswith("stage") else name
        grouped.setdefault(owner, []).append(ops)
    return [(name, tuple(op for ops in parts for op in ops)) for name, parts in grouped.items()]


def random_rows(space: SearchSpace, count: int, seed: int) -> "np.ndarray":
    """Draw width assignments, each width uniformly among its options."""
    return space.sample(count, np.random.default_rng(seed))


Rows = Sequence["np.ndarray"]
