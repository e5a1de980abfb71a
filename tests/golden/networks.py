"""Well-known networks as lists of operations, written from the tables of their papers.

Nothing here comes from autocompress but the operations themselves: their prices are compared with published
figures in `tests/golden/published_networks.json`.
"""

from autocompress.ops import (
    Activation,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    OpSpec,
    make_divisible,
)

Operations = list[OpSpec]


def mobilenet_v2(width: float, resolution: int = 224) -> Operations:
    """Table 2 of Sandler et al., CVPR 2018; the last convolution is not made narrower than 1280."""
    size = resolution // 2
    channels = make_divisible(32 * width)
    ops: Operations = [Conv2d(3, channels, resolution, resolution, 3, 2, activation="relu6")]
    for expansion, out, repeats, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(repeats):
            stride = first_stride if index == 0 else 1
            ops += inverted_residual(channels, make_divisible(out * width), size, expansion, stride)
            channels, size = make_divisible(out * width), size // stride
    last = make_divisible(1280 * max(1.0, width))
    return [
        *ops,
        Conv2d(channels, last, size, size, activation="relu6"),
        GlobalAvgPool(last, size, size),
        Linear(last, 1000),
    ]


def inverted_residual(channels: int, out: int, size: int, expansion: int, stride: int) -> Operations:
    """Expand, depthwise, project without activation; residual where shapes allow."""
    middle, after = channels * expansion, size // stride
    ops: Operations = [] if expansion == 1 else [Conv2d(channels, middle, size, size, activation="relu6")]
    ops += [
        Conv2d(middle, middle, size, size, 3, stride, middle, activation="relu6"),
        Conv2d(middle, out, after, after),
    ]
    if stride == 1 and channels == out:
        ops.append(Add(out, after, after))
    return ops


def resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> Operations:
    """Table 1 of He et al., CVPR 2016, projection shortcuts where shapes change (option B).

    Bottlenecks stride in their 3x3 convolution, as the published 4.089 G MACs do ("v1.5"); with the stride
    in the first 1x1, as in the paper, it would be 3.8 G.
    """
    ops: Operations = [Conv2d(3, 64, 224, 224, 7, 2, activation="relu"), MaxPool(64, 112, 112, 3, 2)]
    channels, size = 64, 56
    for stage, repeats in enumerate(blocks):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        for index in range(repeats):
            stride = 2 if stage > 0 and index == 0 else 1
            after = size // stride
            if channels != out:
                ops.append(Conv2d(channels, out, size, size, 1, stride))
            if bottleneck:
                ops += [
                    Conv2d(channels, width, size, size, activation="relu"),
                    Conv2d(width, width, size, size, 3, stride, activation="relu"),
                    Conv2d(width, out, after, after),
                ]
            else:
                ops += [
                    Conv2d(channels, width, size, size, 3, stride, activation="relu"),
                    Conv2d(width, width, after, after, 3),
                ]
            ops.append(Add(out, after, after))
            channels, size = out, after
    return [*ops, GlobalAvgPool(channels, size, size), Linear(channels, 1000)]


def vgg16() -> Operations:
    """Configuration D of Simonyan & Zisserman, ICLR 2015: no batch norm, convolutions with bias."""
    ops: Operations = []
    channels, size = 3, 224
    for out, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            ops.append(Conv2d(channels, out, size, size, 3, bias=True, norm=False, activation="relu"))
            channels = out
        ops.append(MaxPool(out, size, size))
        size //= 2
    relu: Activation = "relu"
    return [
        *ops,
        Linear(512 * 7 * 7, 4096, activation=relu),
        Linear(4096, 4096, activation=relu),
        Linear(4096, 1000),
    ]


NETWORKS = {
    "mobilenet_v2 1.0": lambda: mobilenet_v2(1.0),
    "mobilenet_v2 0.75": lambda: mobilenet_v2(0.75),
    "mobilenet_v2 0.5": lambda: mobilenet_v2(0.5),
    "mobilenet_v2 0.35": lambda: mobilenet_v2(0.35),
    "resnet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "resnet-18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "vgg-16": vgg16,
}
