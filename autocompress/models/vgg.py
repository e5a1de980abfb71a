"""VGG-16 with batch norm, for ImageNet with the parameter names of torchvision, and for images of 32 pixels.

Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
table 1, column D; batch norm after every convolution as in torchvision's `vgg16_bn`. Of 32 pixels the last
pooling leaves one, on which papers on pruning put fewer than the three linear layers: two in Li et al.,
"Pruning Filters for Efficient ConvNets", ICLR 2017, section 4.1; one in the code of Liu et al., "Learning
Efficient Convolutional Networks through Network Slimming", ICCV 2017, and here.
"""

from typing import Final

from torch import Tensor, nn

from autocompress.models.arguments import check_counts

STAGES: Final = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Channels in multiples of the first stage's, and number of convolutions; a stage ends in a pooling."""

HIDDEN: Final = 4096
"""Outputs of the first two linear layers for ImageNet."""


class VGG(nn.Module):
    """Convolutions with poolings, and a classifier of their map.

    Args:
        features: From images to a map.
        side: Height and width to which the map is averaged before the classifier.
        classifier: From `(batch, channels * side * side)` to logits.
    """

    def __init__(self, features: nn.Sequential, side: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = classifier
        for module in self.modules():
            # As torchvision: He et al., ICCV 2015, section 2.2, "backward propagation case".
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(batch, in_channels, height, width)`, sides at least 32, to `(batch, classes)`."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def vgg16_bn(classes: int = 1000, in_channels: int = 3) -> VGG:
    """Make VGG-16 with batch norm: 138 M parameters, 15.5 G MACs at 224 pixels.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    check_counts({"classes": classes, "in_channels": in_channels})
    side = 7
    classifier = nn.Sequential(
        nn.Linear(512 * side * side, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, classes),
    )
    # torchvision's convolutions have biases, which the batch norm after them cancels.
    return VGG(_features(in_channels, width=64, bias=True), side, classifier)


def vgg16_bn_cifar(classes: int = 10, in_channels: int = 3, width: int = 64) -> VGG:
    """Make the 13 convolutions of VGG-16 and one linear layer: 14.7 M parameters, 313 M MACs at 32 pixels.

    Args:
        classes: Outputs.
        in_channels: Of the images.
        width: Channels of the first stage; the last has eight times as many.

    Raises:
        SpaceError: An argument is no integer of at least 1.
    """
    check_counts({"classes": classes, "in_channels": in_channels, "width": width})
    last = STAGES[-1][0] * width
    return VGG(_features(in_channels, width, bias=False), 1, nn.Linear(last, classes))


def _features(in_channels: int, width: int, *, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = in_channels
    for multiple, repeats in STAGES:
        for _ in range(repeats):
            conv = nn.Conv2d(channels, multiple * width, 3, padding=1, bias=bias)
            layers += [conv, nn.BatchNorm2d(multiple * width), nn.ReLU(inplace=True)]
            channels = multiple * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
