"""Layers with weights: which channels they read, and which they make."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from autocompress.prune.graph import argument, arguments, function_name, module_name, shape_of
from autocompress.prune.label_tensor import axes_of, rows, spread
from autocompress.prune.labels import FIXED, Labels, Reason
from autocompress.prune.ledger import Ledger

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def convolution(ledger: Ledger, node: Node) -> Tensor | None:
    """Follow `conv2d` or `conv_transpose2d`; the weights of the latter are `(in, out / groups, ...)`."""
    transposed = function_name(node) == "conv_transpose2d"
    given = arguments(node, *(_TRANSPOSED if transposed else _CONVOLUTION))
    weight, bias = ledger.stored(given["weight"]), ledger.stored(given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    name, groups = ledger.layer(weight), int(given.get("groups", 1))
    entering = ledger.channels(ledger.held(given["input"]), 1, node)
    shape = ledger.graph.tensors[weight].shape
    out = shape[1] * groups if transposed else shape[0]
    if groups > 1 and groups == len(entering):
        leaving: Labels = entering.repeat(out // groups)
        ledger.slice(weight, 0, entering if transposed else leaving)
    else:
        # As many channels have to stay in each group.
        blocks = entering.reshape(groups, -1)
        text = f"{name} is a grouped convolution, and another of its groups reads channels that have to stay"
        ledger.unions.join(blocks[:1].repeat(groups, axis=0), blocks, Reason(text))
        made = ledger.leaving(weight, int(transposed), out // groups)
        leaving = np.tile(made, groups)
        ledger.slice(weight, int(transposed), made if transposed else leaving)
        ledger.slice(weight, int(not transposed), entering if transposed else blocks[0])
        ledger.reads.add((ledger.graph.first_names[weight], int(not transposed)))
        ledger.made.setdefault(name, leaving)
    if bias is not None:
        ledger.slice(bias, 0, leaving)
    ledger.pricer.convolution(node, name, given, entering, leaving)
    return spread(leaving, 1, shape_of(node))


def linear(ledger: Ledger, node: Node) -> Tensor | None:
    """Follow `linear`, along the last axis."""
    given = arguments(node, "input", "weight", "bias")
    weight, bias = ledger.stored(given["weight"]), ledger.stored(given.get("bias"))
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    labels, name = ledger.held(given["input"]), ledger.layer(weight)
    last, out = labels.dim() - 1, ledger.graph.tensors[weight].shape[0]
    held = axes_of(labels)
    if len(held) == 1 and held != [last]:
        ledger.stuck(name, out, Reason("it makes positions of a map, not channels"))
        ledger.pricer.mixing(node, name, rows(labels, held[0])[:, 0])
        mixed: Tensor = labels.narrow(-1, 0, 1).expand(shape_of(node))
        return mixed
    entering = ledger.channels(labels, last, node)
    leaving = ledger.leaving(weight, 0, out)
    ledger.made.setdefault(name, leaving)
    ledger.slice(weight, 0, leaving)
    ledger.slice(weight, 1, entering)
    ledger.reads.add((ledger.graph.first_names[weight], 1))
    if bias is not None:
        ledger.slice(bias, 0, leaving)
    ledger.pricer.linear(node, name, entering, leaving)
    return spread(leaving, last, shape_of(node))


def norm(ledger: Ledger, node: Node) -> Tensor | None:
    """Follow batch norm and instance norm: both look at each channel alone."""
    labels: Tensor = ledger.held(node.args[0])
    held, computes_statistics = axes_of(labels), bool(node.args[5])
    if computes_statistics and set(held) - {1}:
        return None
    channels = np.full(labels.shape[1], FIXED, dtype=np.int64)
    if 1 in held:
        channels = ledger.channels(labels, 1, node)
        for name in filter(None, map(ledger.stored, node.args[1:5])):
            ledger.slice(name, 0, channels)
    if function_name(node) == "batch_norm":
        ledger.pricer.norm(node, module_name(node) or node.name, channels)
    return labels


def prelu(ledger: Ledger, node: Node) -> Tensor | None:
    """Follow PReLU, with one slope for each channel or for all."""
    labels: Tensor = ledger.held(node.args[0])
    name = ledger.stored(node.args[1])
    if name is None:
        return None
    if ledger.graph.tensors[name].numel() > 1 and 1 in axes_of(labels):
        ledger.slice(name, 0, ledger.channels(labels, 1, node))
    return labels


def other_layer(ledger: Ledger, node: Node, reason: Reason) -> None:
    """Note a layer that is not followed, if it is one: it makes channels that have to stay."""
    name = function_name(node)
    if name not in _AXES:
        return
    weight = ledger.stored(argument(node, 1, "weight"))
    layer = (ledger.layer(weight) if weight else module_name(node)) or node.name
    ledger.stuck(layer, shape_of(node)[_AXES[name]], reason)


LAYERS: dict[str, Callable[[Ledger, Node], Any]] = {
    "conv2d": convolution,
    "conv_transpose2d": convolution,
    "linear": linear,
    "batch_norm": norm,
    "instance_norm": norm,
    "prelu": prelu,
}
"""Name of a function to what follows it; that returns `None` if it is used in a way that is not followed."""

# Axis of the output along which layers make channels.
_AXES = {
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "linear": -1,
}
