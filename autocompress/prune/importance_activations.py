"""Importance of channels by what they hold on images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from autocompress.prune.labels import Labels
from autocompress.prune.layers import entering, layer_of, leaving, names_of, run
from autocompress.prune.scores import Given, Scores, Tally

ACTIVATIONS: Final = frozenset({
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "silu", "gelu",
    "hardswish", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_", "leaky_relu", "leaky_relu_", "elu",
    "elu_", "celu", "celu_", "selu", "selu_", "mish", "softplus", "prelu", "rrelu", "threshold", "hardshrink",
})  # fmt: skip
"""Functions of PyTorch after which channels are looked at."""

KEEPING: Final = ACTIVATIONS | {
    "batch_norm", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum", "dropout",
    "dropout_", "dropout2d", "feature_dropout", "clone", "contiguous",
}  # fmt: skip
"""Functions of PyTorch whose result has the channels of the argument of its shape."""


def apoz(given: Given) -> Scores:
    """Take the share of activations that are not zero: one less the average percentage of zeros (APoZ).

    Activations are looked at where they are made, before pooling; those of a group whose channels meet no
    activation, as in linear bottlenecks, where convolutions and linear layers read them. Of several such
    places it is the mean.

    Source: Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures", 2016, equation 1.
    """
    return _means(given, lambda x: x != 0)


def activation(given: Given) -> Scores:
    """Take the mean magnitude of a channel's activations, where `apoz` looks.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR
    2017, section 2.2 ("Activation"); the magnitude, for activations that can be negative.
    """
    return _means(given, torch.abs)


def _means(given: Given, measure: Callable[[Tensor], Tensor]) -> Scores:
    source = given.source
    names = names_of(source.model)
    made, read = Tally(source), Tally(source)
    # Tensors that are still alive: the axis of their channels, and the labels of these.
    known: Any = WeakIdKeyDictionary()

    def look(tally: Tally, x: Tensor, axis: int, labels: Labels) -> None:
        # Means over positions, so that images and places count the same whatever their size.
        means = (
            measure(x).movedim(axis, 1).flatten(2).double().mean(2) if x.dim() > 2 else measure(x).double()
        )
        tally.add(labels, means.sum(0).cpu().numpy(), len(x))

    def see(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        name = getattr(function, "__name__", "")
        found = layer_of(names, function, args, kwargs)
        if found is not None and found[0].weight in layers:
            layer, x = found
            look(read, x, layer.axis, entering(source, layer))
            known[output] = (layer.axis, leaving(source, layer))
        elif name in KEEPING and isinstance(output, Tensor):
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.shape == output.shape and x in known:
                    known[output] = known[x]
            if name in ACTIVATIONS and output in known:
                look(made, output, *known[output])

    layers = {layer.weight for layer in given.structure.layers}
    for images, _ in given.batches():
        run(source.model, images, see)
    return {**read.means(), **made.means()}
