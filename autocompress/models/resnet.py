"""Residual networks for ImageNet, with the parameter names of torchvision: its state dicts load.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; where the shape changes
the shortcut is a 1x1 convolution and batch norm (option B of section 3.3). Bottlenecks stride in their 3x3
convolution, not in the first 1x1 as in the paper ("v1.5"; Goyal et al., "Accurate, Large Minibatch SGD",
2017, section 5.1).
"""

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.models.arguments import check_counts

WIDTHS: Final = (64, 128, 256, 512)
"""Channels of the 3x3 convolutions, by stage."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Of the input.
        width: Channels of the output, and between the convolutions.
        stride: Of the first convolution and of the shortcut.
    """

    expansion: Final = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, h, w)` to `(batch, width, h / stride, w / stride)`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and a shortcut.

    Args:
        in_channels: Of the input.
        width: Channels of the 3x3 convolution; the output has four times as many.
        stride: Of the 3x3 convolution and of the shortcut.
    """

    expansion: Final = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, h, w)` to `(batch, 4 * width, h / stride, w / stride)`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """A stem that quarters the side of the image, four stages of blocks, the mean of the map, a linear layer.

    Args:
        block: Kind of the blocks.
        depths: Blocks of the four stages.
        classes: Outputs.
        in_channels: Of the images.

    Raises:
        SpaceError: An argument is no integer of at least 1, or there are not four depths.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(depths) != len(WIDTHS):
            raise SpaceError(f"depths must be {len(WIDTHS)} numbers, one a stage, got {depths!r}")
        check_counts({"classes": classes, "in_channels": in_channels})
        check_counts({f"depths[{stage}]": depth for stage, depth in enumerate(depths)})
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        outs = [block.expansion * width for width in WIDTHS]
        self.layer1 = _stage(block, WIDTHS[0], WIDTHS[0], depths[0], stride=1)
        self.layer2 = _stage(block, outs[0], WIDTHS[1], depths[1], stride=2)
        self.layer3 = _stage(block, outs[1], WIDTHS[2], depths[2], stride=2)
        self.layer4 = _stage(block, outs[2], WIDTHS[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outs[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As torchvision: He et al., ICCV 2015, section 2.2, "backward propagation case".
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)` to logits `(batch, classes)`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Make ResNet-18: 11.7 M parameters, 1.81 G MACs at 224 pixels.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, in_channels)


def resnet50(classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Make ResNet-50: 25.6 M parameters, 4.09 G MACs at 224 pixels.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, in_channels)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(block.expansion * width, width, 1) for _ in range(depth - 1)))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
