"""Residual networks for images of 32 pixels.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Where the shape
changes the shortcut is a 1x1 convolution and batch norm (option B of section 3.3); the paper's own networks
for CIFAR pad with zeros there (option A), which has no parameters.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.models.arguments import check_counts


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Of the input.
        channels: Of the output, and between the convolutions.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, h, w)` to `(batch, channels, h / stride, w / stride)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A 3x3 convolution, three stages of blocks, the mean of the map, a linear layer.

    Args:
        blocks: A stage (n); the network has `6 * blocks + 2` layers with weights, shortcuts not counted.
        classes: Outputs.
        in_channels: Of the images.
        width: Channels of the first stage.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """

    def __init__(self, blocks: int, classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        check_counts({"blocks": blocks, "classes": classes, "in_channels": in_channels, "width": width})
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al., ICCV 2015, section 2.2: "backward propagation case".
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)` to logits `(batch, classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet20(classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNetCifar:
    """Make ResNet-20: 0.27 M parameters, 41 M MACs at 32 pixels.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    return ResNetCifar(3, classes, in_channels, width)


def resnet56(classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNetCifar:
    """Make ResNet-56: 0.86 M parameters, 126 M MACs at 32 pixels.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    return ResNetCifar(9, classes, in_channels, width)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))
