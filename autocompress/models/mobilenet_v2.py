"""MobileNetV2, for ImageNet with the parameter names of torchvision, and for images of 32 pixels.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2; rounding
of channel counts, dropout and first weights as in torchvision, whose state dicts load.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import SpaceError
from autocompress.models.arguments import check_counts
from autocompress.ops import make_divisible

STEM, LAST = 32, 1280
"""Channels of the first and of the last convolution; the last is never made narrower (section 4)."""

STAGES: Final = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion (t), channels (c) and blocks (n)."""

IMAGENET_STRIDES: Final = (2, 1, 2, 2, 2, 1, 2, 1)
"""Of the stem and of the first block of each stage (s)."""

CIFAR_STRIDES: Final = (1, 1, 1, 2, 2, 1, 2, 1)
"""Without the first two halvings: the last map of 32 pixels has 4 then, not 1; that of 224 has 7."""


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project without activation; a residual connection where shapes allow.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the depthwise convolution.
        expansion: Channels of the depthwise convolution in multiples of the input's; 1 expands nothing.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        expand = [] if expansion == 1 else [_conv(in_channels, hidden, 1)]
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *expand,
            _conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, h, w)` to `(batch, out_channels, h / stride, w / stride)`."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, a 1x1 convolution, the mean of the map, a linear layer.

    Args:
        classes: Outputs.
        in_channels: Of the images.
        width: Factor on every channel count, which is then rounded to a multiple of 8.
        strides: Of the stem and of the first block of each stage.

    Raises:
        SpaceError: A count is no integer of at least 1, the width no finite number above 0, or there are not
            eight strides of 1 or 2.
    """

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        strides: Sequence[int] = IMAGENET_STRIDES,
    ) -> None:
        super().__init__()
        check_counts({"classes": classes, "in_channels": in_channels})
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
            raise SpaceError(f"width must be a finite number > 0, got {width!r}")
        if len(strides) != 1 + len(STAGES) or not set(strides) <= {1, 2}:
            raise SpaceError(f"strides must be {1 + len(STAGES)} numbers, each 1 or 2, got {strides!r}")
        channels = make_divisible(STEM * width)
        features: list[nn.Module] = [_conv(in_channels, channels, 3, strides[0])]
        for (expansion, unscaled, repeats), first_stride in zip(STAGES, strides[1:], strict=True):
            out_channels = make_divisible(unscaled * width)
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        last = make_divisible(LAST * max(1.0, width))
        features.append(_conv(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As torchvision, in which the fan-out of a depthwise convolution is that of all channels.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)` to logits `(batch, classes)`."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


def mobilenet_v2(classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> MobileNetV2:
    """Make MobileNetV2: at width 1 it has 3.5 M parameters, 301 M MACs at 224 pixels.

    Raises:
        SpaceError: A count is no integer of at least 1, or the width no finite number above 0.
    """
    return MobileNetV2(classes, in_channels, width)


def mobilenet_v2_cifar(classes: int = 10, in_channels: int = 3, width: float = 1.0) -> MobileNetV2:
    """Make MobileNetV2 with the strides of `CIFAR_STRIDES`, for images of 32 pixels.

    Raises:
        SpaceError: A count is no integer of at least 1, or the width no finite number above 0.
    """
    return MobileNetV2(classes, in_channels, width, CIFAR_STRIDES)


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )
