"""The convolutions and linear layers that a model runs, seen at the calls of PyTorch's functions.

Calls are watched, not modules: so the padding that a module does by itself, layers that run twice and weights
that a user's own module hands to `F.conv2d` are seen as what they are. What a fused function of PyTorch runs
inside itself is not seen (`F.multi_head_attention_forward`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from autocompress.prune.labels import Labels
from autocompress.prune.source import Source

Pair = tuple[int, int]
"""Height, width."""

See = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any], Any], None]
"""Is given a function of PyTorch, its arguments and its result, each time that one is called."""


@dataclass(frozen=True)
class Norm:
    """Batch norm in evaluation mode: names of its parameters and buffers.

    Attributes:
        scale: Gamma.
        shift: Beta.
        mean: The running mean.
        variance: The running variance.
        eps: Added to the variance.
    """

    scale: str
    shift: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer.

    Attributes:
        weight: Name of the parameter: `(out, in / groups, height, width)` or `(out, in)`.
        bias: Name of the parameter, if there is one.
        axis: Of the channels of input and output: 1 of a convolution, -1 of a linear layer.
        groups: Of the channels.
        kernel: Height and width.
        stride: Of the kernel's places.
        padding: Zeros at top and bottom, left and right; "same" puts an odd one at the bottom and right.
        dilation: Distance of the kernel's points.
        norm: The batch norm that reads the output, if one does.
    """

    weight: str
    bias: str | None
    axis: int
    groups: int = 1
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    norm: Norm | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The module's, where the weight is a module's own."""
        return self.weight.removesuffix(".weight")

    @property
    def filters(self) -> tuple[str, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        layers: In the order in which they run first.
        norms: In the order in which they run first.
        runs: Name of a layer's weight to how often it runs.
    """

    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]
    runs: Mapping[str, int]


def run(model: nn.Module, images: Tensor, see: See) -> Tensor:
    """Run a model without gradients and show each call of a function of PyTorch.

    Args:
        model: Not changed by this.
        images: `(batch, channels, height, width)`.
        see: Called after each function; its own calls are not shown.
    """
    with torch.no_grad(), _Watch(see):
        output: Tensor = model(images)
    return output


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the first name of each parameter and buffer, by the identity of the tensor."""
    return {id(tensor): name for name, tensor in tensors_of(model).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, each under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def layer_of(
    names: Mapping[int, str], function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Layer, Tensor] | None:
    """Return the layer that a call is, and its input; `None` if it is none with a weight of the model.

    Args:
        names: Those of `names_of`.
        function: What `run` shows.
        args: What `run` shows.
        kwargs: What `run` shows.
    """
    if function is F.conv2d:
        order: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    elif function is F.linear:
        order = ("input", "weight", "bias")
    else:
        return None
    given = dict(zip(order, args, strict=False)) | dict(kwargs)
    weight, padding = given["weight"], given.get("padding", 0)
    if id(weight) not in names:
        return None
    bias = names.get(id(given.get("bias")))
    if function is F.linear:
        return Layer(names[id(weight)], bias, -1), given["input"]
    layer = Layer(
        names[id(weight)],
        bias,
        1,
        given.get("groups", 1),
        _two(weight.shape[2:]),
        _two(given.get("stride", 1)),
        padding if isinstance(padding, str) else _two(padding),
        _two(given.get("dilation", 1)),
    )
    return layer, given["input"]


class _Watch(TorchFunctionMode):
    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.see(function, args, kwargs or {}, output)
        return output


def structure(source: Source) -> Structure:
    """Run a model on a black image and return what it is made of."""
    model, names = source.model, names_of(source.model)
    layers: dict[str, Layer] = {}
    norms: dict[str, Norm] = {}
    runs: Counter[str] = Counter()
    makers: Any = WeakIdKeyDictionary()  # outputs that are still alive to the layers that made them

    def see(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        found = layer_of(names, function, args, kwargs)
        if found is not None and 0 in source.trace.slices.get(found[0].weight, {}):
            layers.setdefault(found[0].weight, found[0])
            makers[output] = found[0].weight
            runs[found[0].weight] += 1
        elif function is F.batch_norm:
            order = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = dict(zip(order, args, strict=False)) | dict(kwargs)
            tensors = [
                names.get(id(given.get(key))) for key in ("weight", "bias", "running_mean", "running_var")
            ]
            scale, shift, mean, variance = tensors
            if scale is None or shift is None or mean is None or variance is None:
                return
            norm = Norm(scale, shift, mean, variance, given.get("eps", 1e-5))
            norms.setdefault(scale, norm)
            maker = makers.get(given["input"])
            if maker is not None and layers[maker].norm is None:
                layers[maker] = replace(layers[maker], norm=norm)

    like = next(model.parameters())
    run(model, torch.zeros(1, *source.trace.in_shape, dtype=like.dtype, device=like.device), see)
    return Structure(tuple(layers.values()), tuple(norms.values()), runs)


def is_depthwise(source: Source, layer: Layer) -> bool:
    """Say whether a layer passes channels on one by one: then it makes none of its own."""
    return layer.groups > 1 and 1 not in source.trace.slices[layer.weight]


def leaving(source: Source, layer: Layer) -> Labels:
    """Return the labels of the outputs of a layer, `(out,)`."""
    return source.trace.slices[layer.weight][0]


def entering(source: Source, layer: Layer) -> Labels:
    """Return the labels of the inputs of a layer, `(in,)`."""
    if is_depthwise(source, layer):
        labels = leaving(source, layer)
        return labels[:: len(labels) // layer.groups]
    return np.tile(source.trace.slices[layer.weight][1], layer.groups)


def _two(value: int | Sequence[int]) -> Pair:
    listed = [value] if isinstance(value, int) else list(value)
    return int(listed[0]), int(listed[-1])
