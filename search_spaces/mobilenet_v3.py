"""The once-for-all MobileNetV3 family: elastic kernel, expansion, depth and input resolution.

Source: Cai et al., Once-for-All, ICLR 2020 (space of 7371^5 networks at each resolution); Howard et al.,
MobileNetV3, ICCV 2019 (the layers). `tests/golden` holds published sub-networks that this file reproduces
to the last parameter and multiply-accumulate.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from autocompress.errors import SpaceError
from autocompress.ops import (
    Activation,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    Ops,
    SqueezeExcite,
    make_divisible,
)
from autocompress.space import Block, Choice, Option, SearchSpace

STAGE_CHANNELS = (24, 40, 80, 112, 160)
STAGE_ATTENTION = (False, True, False, True, True)
STAGE_ACTIVATIONS: tuple[Activation, ...] = ("relu", "relu", "hard_swish", "hard_swish", "hard_swish")
STEM_CHANNELS, EXPANDED_CHANNELS, FEATURES = 16, 960, 1280

Geometry = Literal["imagenet", "small"]


@dataclass(frozen=True)
class _Layout:
    """Where the network halves the image: strides of the stem and of the first block of each stage."""

    stem_stride: int
    stage_strides: tuple[int, ...]
    resolutions: tuple[int, ...]


LAYOUTS: dict[Geometry, _Layout] = {
    "imagenet": _Layout(2, (2, 2, 2, 1, 2), (224,)),
    # 32 px end as 4x4, as 224 px end as 7x7.
    "small": _Layout(1, (2, 2, 1, 1, 2), (32,)),
}


def mobilenet_v3(
    *,
    preset: Literal["", "tiny"] = "",
    width: float | None = None,
    geometry: Geometry = "imagenet",
    resolutions: tuple[int, ...] | list[int] = (),
    kernels: tuple[int, ...] | list[int] = (),
    expands: tuple[float, ...] | list[float] = (3, 4, 6),
    depths: tuple[int, ...] | list[int] = (2, 3, 4),
    in_channels: int = 3,
    classes: int = 1000,
) -> SearchSpace:
    """Make the space.

    Args:
        preset: `"tiny"` is made for demonstrations and benchmarks on a CPU: small-image geometry, width
            0.25, a stem of stride 2, resolutions 24, 28 and 32, kernels 3 and 5 (most of its feature maps
            have 4x4 pixels, and PyTorch's CPU gradient of a 7x7 depthwise kernel takes ten times a 3x3's).
            Other arguments that are given still hold.
        width: Multiplies every channel count, 1 by default; rounded to multiples of 8.
        geometry: `"imagenet"` halves the image five times, `"small"`, for 28 to 32 pixels, three times.
        resolutions: Input sizes in pixels to choose from, ascending; empty means the geometry's own.
        kernels: Sizes of the depthwise convolutions to choose from, odd, ascending; empty means 3, 5, 7.
        expands: Ratios of middle to input channels of a block to choose from, ascending.
        depths: Blocks a stage to choose from, ascending.
        in_channels: Channels of the images.
        classes: Classes of the data.

    Raises:
        SpaceError: An argument is out of its range.
    """
    if preset not in ("", "tiny"):
        raise SpaceError(f"preset must be 'tiny' or empty, got {preset!r}")
    if geometry not in LAYOUTS:
        raise SpaceError(f"geometry must be one of {', '.join(LAYOUTS)}, got {geometry!r}")
    lists = {"resolutions": resolutions, "kernels": kernels, "expands": expands, "depths": depths}
    for name, values in lists.items():
        if not isinstance(values, tuple | list) or not all(isinstance(v, int | float) for v in values):
            raise SpaceError(f"{name} must be a list of numbers such as [3, 5], got {values!r}")
    layout = LAYOUTS[geometry]
    if preset == "tiny":
        layout = _Layout(2, LAYOUTS["small"].stage_strides, (24, 28, 32))
        width = 0.25 if width is None else width
        kernels = kernels or (3, 5)
    kernels = tuple(kernels) or (3, 5, 7)
    width = 1.0 if width is None else width
    for name, values in {"kernels": kernels, "expands": expands, "depths": depths}.items():
        if not values or list(values) != sorted(set(values)) or min(values) < 1:
            raise SpaceError(f"{name} must be ascending, without repetition, at least 1, got {tuple(values)}")
    if any(kernel % 2 == 0 for kernel in kernels):
        raise SpaceError(f"kernels must be odd, got {tuple(kernels)}")
    if not 0 < width < float("inf"):
        raise SpaceError(f"width must be positive and finite, got {width}")
    for name, count in {"in_channels": in_channels, "classes": classes}.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {count!r}")
    resolutions = tuple(resolutions) or layout.resolutions
    if list(resolutions) != sorted(set(resolutions)) or min(resolutions) < 8:
        raise SpaceError(f"resolutions must be ascending, at least 8, got {resolutions}")

    # Shared choices first: bounds on prefixes then need small tables only.
    choices = [Choice("resolution", resolutions)]
    choices += [Choice(f"stage{s}.depth", tuple(depths)) for s in range(1, len(STAGE_CHANNELS) + 1)]
    stem = make_divisible(STEM_CHANNELS * width)
    blocks = [
        Block("stem", ("resolution",), partial(_stem, in_channels, stem, layout.stem_stride)),
        Block("first", ("resolution",), partial(_first_block, stem, layout.stem_stride)),
    ]
    channels, strides = stem, [layout.stem_stride]
    for stage, base in enumerate(STAGE_CHANNELS, start=1):
        out = make_divisible(base * width)
        stride = layout.stage_strides[stage - 1]
        for index in range(1, max(depths) + 1):
            prefix = f"stage{stage}.block{index}"
            deeper = tuple(depth for depth in depths if depth >= index)
            condition = () if deeper == tuple(depths) else ((f"stage{stage}.depth", deeper),)
            choices.append(Choice(f"{prefix}.kernel", tuple(kernels), active_when=condition))
            choices.append(Choice(f"{prefix}.expand", tuple(expands), active_when=condition))
            names = ("resolution", f"stage{stage}.depth", f"{prefix}.kernel", f"{prefix}.expand")
            first_of_stage = index == 1
            operations = partial(
                _inverted_residual,
                index,
                channels if first_of_stage else out,
                out,
                stride if first_of_stage else 1,
                tuple(strides) if first_of_stage else (*strides, stride),
                STAGE_ATTENTION[stage - 1],
                STAGE_ACTIVATIONS[stage - 1],
            )
            blocks.append(Block(prefix, names, operations))
        channels = out
        strides.append(stride)
    expanded, features = make_divisible(EXPANDED_CHANNELS * width), make_divisible(FEATURES * width)
    head = partial(_head, channels, expanded, features, classes, tuple(strides))
    blocks.append(Block("head", ("resolution",), head))
    settings = {
        "preset": preset,
        "width": width,
        "geometry": geometry,
        "resolutions": list(resolutions),
        "kernels": list(kernels),
        "expands": list(expands),
        "depths": list(depths),
        "in_channels": in_channels,
        "classes": classes,
    }
    return SearchSpace("mobilenet_v3", tuple(choices), tuple(blocks), settings=settings)


def _size(resolution: int, strides: tuple[int, ...]) -> int:
    """Pixels that are left of an image side after convolutions of odd kernel with these strides."""
    for stride in strides:
        resolution = (resolution - 1) // stride + 1
    return resolution


def _stem(in_channels: int, channels: int, stride: int, resolution: Option) -> Ops:
    """Build the first convolution."""
    size = int(resolution)
    return (Conv2d(in_channels, channels, size, size, kernel=3, stride=stride, activation="hard_swish"),)


def _first_block(channels: int, stem_stride: int, resolution: Option) -> Ops:
    """Build the first block, which is fixed: kernel 3, no expansion, residual."""
    size = _size(int(resolution), (stem_stride,))
    return (
        Conv2d(channels, channels, size, size, kernel=3, groups=channels, activation="relu"),
        Conv2d(channels, channels, size, size),
        Add(channels, size, size),
    )


def _inverted_residual(
    index: int,
    in_channels: int,
    out_channels: int,
    stride: int,
    strides_before: tuple[int, ...],
    attention: bool,
    activation: Activation,
    resolution: Option,
    depth: Option,
    kernel: Option,
    expand: Option,
) -> Ops:
    """Build the `index`-th block of a stage: expand, depthwise, attention, project, add."""
    if index > int(depth):
        return ()
    size = _size(int(resolution), strides_before)
    after = _size(size, (stride,))
    middle = make_divisible(round(in_channels * float(expand)))
    ops: list[Conv2d | SqueezeExcite | Add] = [
        Conv2d(in_channels, middle, size, size, activation=activation),
        Conv2d(
            middle,
            middle,
            size,
            size,
            kernel=int(kernel),
            stride=stride,
            groups=middle,
            activation=activation,
        ),
    ]
    if attention:
        ops.append(SqueezeExcite(middle, after, after, make_divisible(middle // 4)))
    ops.append(Conv2d(middle, out_channels, after, after))
    if stride == 1 and in_channels == out_channels:
        ops.append(Add(out_channels, after, after))
    return tuple(ops)


def _head(
    in_channels: int,
    expanded: int,
    features: int,
    classes: int,
    strides: tuple[int, ...],
    resolution: Option,
) -> Ops:
    """Build the last expansion, pooling, the feature mix and the classifier."""
    size = _size(int(resolution), strides)
    return (
        Conv2d(in_channels, expanded, size, size, activation="hard_swish"),
        GlobalAvgPool(expanded, size, size),
        Conv2d(expanded, features, 1, 1, norm=False, activation="hard_swish"),
        Linear(features, classes),
    )
