"""A trained layer as several smaller ones, in plain PyTorch: what trains, exports and is counted like any."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import skip_init as _skip_init
from torch.nn.utils.parametrize import is_parametrized

from autocompress.errors import FactorizationError
from autocompress.factorize.decompose import check_rank as check_number
from autocompress.factorize.methods import (
    Geometry,
    Method,
    Part,
    Rank,
    applicable,
    check_rank,
    decomposed,
    full_rank,
    geometry_of,
    parts,
    rank_at_energy,
)

Layer = nn.Conv2d | nn.Linear

KINDS = (nn.Conv2d, nn.Linear)
"""Exactly these: a class of the user's own may compute something else."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

skip_init: Any = _skip_init  # untyped in torch


def refusal(layer: nn.Module) -> str:
    """Return why a layer cannot be factorized; empty if it can."""
    kind = type(layer).__name__
    if is_parametrized(layer):
        return "it has parametrizations: remove them before (torch.nn.utils.parametrize)"
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
        return "it has no shape yet: run the model once before"
    if type(layer) not in KINDS:
        return f"{kind} is neither nn.Conv2d nor nn.Linear, and may compute something else"
    if "forward" in vars(layer):
        return "its forward() was replaced"
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        return "it has hooks, which would be lost: remove them before (weight norm and masks are some)"
    others = [*layer._buffers, *layer._modules, *(set(layer._parameters) - {"weight", "bias"})]
    weight = layer._parameters.get("weight")
    if others or weight is None:
        return "it holds other tensors or modules than weight and bias" if others else "it has no weight"
    if weight.is_meta or not weight.is_floating_point():
        return f"its weight has no values in floating point ({weight.dtype} on {weight.device})"
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        return f"it has {groups} groups: each is a small layer already, and low ranks save little there"
    if not weight.numel() or not bool(weight.isfinite().all()):
        return "its weight is empty, or holds nan or infinity"
    return ""


def kernel_of(layer: nn.Module) -> Tensor:
    """Return the weight as a kernel `(out, in, height, width)`; that of a linear layer has one point."""
    weight = layer.get_parameter("weight").detach()
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def factorized(
    layer: nn.Module, method: Method, rank: Rank | None = None, *, energy: float | None = None
) -> nn.Sequential:
    """Return a sequence of layers that computes nearly what a layer does, at lower rank.

    - `"svd"`: a linear layer becomes two (`reduce`, `expand`), a convolution one with `rank` outputs and a
      1x1 convolution (Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016, section 3.1,
      without its non-linear part).
    - `"spatial"`: a column and a row (`vertical`, `horizontal`), see `spatial_factors`.
    - `"depthwise"`: see `depthwise_separable`; `rank` is the multiplier.
    - `"tucker"`: 1x1, a smaller core, 1x1 (`reduce`, `core`, `expand`), see `tucker_factors`; `rank` is the
      pair of channels that enter and leave the core.
    - `"cp"`: 1x1, column and row of each channel, 1x1 (`reduce`, `vertical`, `horizontal`, `expand`), see
      `cp_factors` for when it does not go well.

    Stride, padding (its mode too) and dilation are those of the layer; the bias is on the last part. At full
    rank the sequence computes the same as the layer, but for rounding.

    Args:
        layer: `nn.Linear` or `nn.Conv2d` without groups; not changed.
        method: A linear layer and a 1x1 convolution have "svd" alone, kernels of one line no "spatial", "cp".
        rank: See `full_rank` for the greatest.
        energy: Instead of the rank: the least that keeps this share of the squared norm of the weights, in
            (0, 1]. Not for "cp".

    Raises:
        FactorizationError: The layer cannot be factorized, or not so; or not one of rank and energy is given.
    """
    geometry = check_layer(layer, method)
    if (rank is None) == (energy is None):
        raise FactorizationError(f"give either a rank or an energy, got rank {rank!r} and energy {energy!r}")
    kernel = kernel_of(layer)
    if energy is not None:
        rank = rank_at_energy(kernel, method, energy)
    known = check_rank(geometry, method, rank)
    return assembled(layer, parts(geometry, method, known), decomposed(kernel, method)(known))


def check_layer(layer: nn.Module, method: Method) -> Geometry:
    """Return the shape of a layer that can be factorized by a method.

    Raises:
        FactorizationError: It cannot.
    """
    reason = refusal(layer)
    if reason:
        raise FactorizationError(f"{type(layer).__name__} cannot be factorized: {reason}")
    geometry = geometry_of(layer)
    full_rank(geometry, method)
    if method not in applicable(geometry):
        size = "x".join(map(str, geometry.kernel))
        raise FactorizationError(
            f"{method} does not apply to {type(layer).__name__} with a {size} kernel: take "
            f"{' or '.join(applicable(geometry))}"
        )
    return geometry


def assembled(layer: nn.Module, found: tuple[Part, ...], kernels: tuple[Tensor, ...]) -> nn.Sequential:
    """Return the parts with these kernels, and the bias of the layer on the last.

    Type, device, `requires_grad` and mode are those of the layer.
    """
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    made: OrderedDict[str, nn.Module] = OrderedDict()
    for part, kernel in zip(found, kernels, strict=True):
        last = part is found[-1] and bias is not None
        made[part.name] = one = _empty(layer, part.geometry, bias=last)
        own = one.get_parameter("weight")
        with torch.no_grad():
            own.copy_(kernel.reshape(own.shape))
            if last and bias is not None:
                one.get_parameter("bias").copy_(bias)
        own.requires_grad_(weight.requires_grad)
        if last and bias is not None:
            one.get_parameter("bias").requires_grad_(bias.requires_grad)
    return nn.Sequential(made).train(layer.training)


def _empty(layer: nn.Module, geometry: Geometry, *, bias: bool) -> nn.Module:
    """Make a part without drawing random numbers for its weights."""
    weight = layer.get_parameter("weight")
    options = {"bias": bias, "dtype": weight.dtype, "device": weight.device}
    if isinstance(layer, nn.Linear):
        linear: nn.Linear = skip_init(nn.Linear, geometry.in_channels, geometry.out_channels, **options)
        return linear
    padded = geometry.padding not in ((0, 0), "valid")
    conv: nn.Conv2d = skip_init(
        nn.Conv2d,
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        padding_mode=getattr(layer, "padding_mode", "zeros") if padded else "zeros",
        **options,
    )
    return conv


def depthwise_separable(layer: nn.Conv2d, multiplier: int = 1) -> nn.Sequential:
    """Return a depthwise and a pointwise convolution nearest to a convolution (`depthwise`, `pointwise`).

    With a multiplier of 1, the cost at stride 1 is 1 / out + 1 / points of the kernel of that of the layer
    (Howard et al., "MobileNets", arXiv 2017, section 3.1). The weights are the best of that shape, see
    `depthwise_factors`; still, the error is mostly so great that the network has to be trained on.

    Args:
        layer: Without groups; not changed.
        multiplier: Kernels of each input channel.

    Raises:
        FactorizationError: The layer cannot be factorized, or the multiplier is out of range.
    """
    return factorized(layer, "depthwise", multiplier)


class Fire(nn.Module):
    """Squeeze by a 1x1 convolution and ReLU, expand by a 1x1 and a larger one side by side.

    What is returned is before the last ReLU, as the convolution that it replaces is before its own.

    Source: Iandola et al., "SqueezeNet", arXiv 2016, section 3.2.

    Args:
        squeeze: 1x1.
        expand_point: 1x1, at the stride of the layer that is replaced.
        expand_square: With its kernel.
    """

    def __init__(self, squeeze: nn.Conv2d, expand_point: nn.Conv2d, expand_square: nn.Conv2d) -> None:
        """Hold the three convolutions."""
        super().__init__()
        self.squeeze, self.expand_point, self.expand_square = squeeze, expand_point, expand_square

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in, height, width)` to `(batch, out, ...)`: first the 1x1, then the larger one."""
        x = torch.relu(self.squeeze(x))
        return torch.cat([self.expand_point(x), self.expand_square(x)], 1)


def fire(layer: nn.Conv2d, squeeze: int, *, share: float = 0.5, seed: int = 0) -> Fire:
    """Return a fire module of the shape of a convolution with random weights: it has to be trained.

    Between squeeze and expand is a ReLU, so that nothing of the layer's weights is a good start; only its
    bias is taken over.

    Args:
        layer: Without groups, of a kernel that leaves the size of images as it is but for the stride; not
            changed.
        squeeze: Channels of the 1x1 convolution that all go through. SqueezeNet has an eighth of the outputs.
        share: Of the outputs that come from the larger kernel, in (0, 1); a half in SqueezeNet.
        seed: Of the random weights.

    Raises:
        FactorizationError: The layer is none of these, or a number is out of range.
    """
    geometry = check_layer(layer, "svd")
    check_number("squeeze", squeeze, geometry.in_channels)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise FactorizationError(f"share must be a number between 0 and 1, got {share!r}")
    square = round(geometry.out_channels * share)
    if geometry.points == 1 or not 0 < square < geometry.out_channels:
        raise FactorizationError(
            "a fire module needs a kernel larger than 1x1, and outputs for both sides; got "
            f"{'x'.join(map(str, geometry.kernel))} and {square} of {geometry.out_channels} for the larger"
        )
    reach = tuple(d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True))
    if geometry.padding != "same" and _twice(geometry) != reach:
        raise FactorizationError(
            f"the padding of the layer must be half of what its kernel reaches, {reach} in all, or both "
            f"sides have images of different sizes; got {geometry.padding}"
        )
    bias = layer.bias is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Fire(
            nn.Conv2d(geometry.in_channels, squeeze, 1, bias=bias),
            nn.Conv2d(squeeze, geometry.out_channels - square, 1, stride=geometry.stride, bias=bias),
            nn.Conv2d(
                squeeze,
                square,
                geometry.kernel,
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
                padding_mode=layer.padding_mode,
                bias=bias,
            ),
        )
    made = made.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    if layer.bias is not None and made.expand_point.bias is not None and made.expand_square.bias is not None:
        with torch.no_grad():
            made.expand_point.bias.copy_(layer.bias[: geometry.out_channels - square])
            made.expand_square.bias.copy_(layer.bias[geometry.out_channels - square :])
    return made


def _twice(geometry: Geometry) -> tuple[int, ...]:
    padding = geometry.padding
    return (0, 0) if isinstance(padding, str) else (2 * padding[0], 2 * padding[1])
