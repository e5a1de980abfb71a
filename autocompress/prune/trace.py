"""Which channels of a PyTorch model hang together, read off its exported graph.

The graph is run once with labels instead of numbers (`labels.py`): operations that only move channels
about (`moves.py`) are run on the labels as they are, convolutions and linear layers make new ones. What is
not understood keeps its channels, and is reported.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree

from autocompress.errors import ConversionError
from autocompress.prune.elementwise import combined
from autocompress.prune.graph import (
    Graph,
    argument,
    arguments,
    export,
    function_name,
    module_name,
    place,
    shape_of,
)
from autocompress.prune.label_tensor import axes_of, compact, fixed, resized, rows, spread, values
from autocompress.prune.labels import FIXED, Labels, Reason, Unions
from autocompress.prune.moves import MOVES, cuts_channels, moved
from autocompress.prune.pricing import Priced, Pricer


@dataclass(frozen=True)
class Trace:
    """What a model does with its channels.

    Attributes:
        made: Name of each layer that makes channels, in order, to their labels.
        units: The same, with the labels that channels would have if none had to stay.
        stays: The labels of `units` that have to stay, with the reason.
        slices: Name of a parameter or buffer to its axes that hold channels, with their labels.
        reads: Those axes of parameters along which a layer reads its input.
        priced: The operations that cost something, in order.
        is_cut: Whether some operation takes a part of the channels by its position, or puts zeros between.
        in_shape: Channels, height, width of the images.
        out_shape: Of an output, without the batch.
    """

    made: Mapping[str, Labels]
    units: Mapping[str, Labels]
    stays: Mapping[int, Reason]
    slices: Mapping[str, Mapping[int, Labels]]
    reads: frozenset[tuple[str, int]]
    priced: tuple[Priced, ...]
    is_cut: bool
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, ...]

    def without(self, reasons: Mapping[int, Reason]) -> "Trace":
        """Return the same with more units that have to stay."""
        stays = {**reasons, **self.stays}
        gone = np.fromiter(stays, dtype=np.int64, count=len(stays))

        def left(labels: Labels) -> Labels:
            return np.where(np.isin(labels, gone), FIXED, labels)

        return dataclasses.replace(
            self,
            stays=stays,
            made={name: left(labels) for name, labels in self.made.items()},
            slices={n: {axis: left(v) for axis, v in axes.items()} for n, axes in self.slices.items()},
            priced=tuple(
                Priced(p.name, p.op, {f: left(v) for f, v in p.widths.items()}) for p in self.priced
            ),
        )


# Of these the output has the labels of the only tensor among the inputs.
_SAME = {
    "relu", "relu6", "silu", "gelu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "elu",
    "tanh", "mish", "softplus", "softsign", "log_sigmoid", "hardshrink", "softshrink", "tanhshrink", "rrelu",
    "celu", "selu", "threshold", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
    "clone", "contiguous", "detach", "alias", "to", "type_as", "_to_copy", "lift_fresh_copy", "neg", "exp",
    "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "abs", "sign", "sin", "cos", "floor", "ceil",
    "round", "erf", "reciprocal", "logical_not", "bitwise_not",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow", "where", "addcmul", "addcdiv", "lerp",
    "clamp", "clamp_min", "clamp_max", "gt", "ge", "lt", "le", "eq", "ne", "fmod", "remainder", "atan2",
    "logical_and", "logical_or", "masked_fill", "xlogy",
}  # fmt: skip
# These act on each channel alone and change the size of the map; so many last axes are sizes.
_SPATIAL = {
    "max_pool1d": 1, "avg_pool1d": 1, "adaptive_avg_pool1d": 1, "adaptive_max_pool1d": 1,
    "max_pool2d": 2, "avg_pool2d": 2, "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 2,
    "max_pool2d_with_indices": 2, "upsample_nearest2d": 2, "_upsample_nearest_exact2d": 2,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "_upsample_bilinear2d_aa": 2, "grid_sampler": 2,
}  # fmt: skip
# The argument that says which axes disappear.
_REDUCES = {
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "logsumexp": 1, "prod": 1, "max": 1,
    "min": 1, "argmax": 1, "linalg_vector_norm": 2,
}  # fmt: skip
_ALONG = {"softmax", "log_softmax", "cumsum"}
# These give nothing that is used.
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}
_NORMS = {
    "group_norm": "group norm",
    "layer_norm": "layer norm",
    "rms_norm": "RMS norm",
    "native_layer_norm": "layer norm",
}
# Axis of the weight that makes channels; of all of these the output has them along axis 1.
_OTHER_LAYERS = {"conv1d": 0, "conv3d": 0, "conv_transpose1d": 1, "conv_transpose3d": 1}
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding")


def trace(model: nn.Module, image: Tensor) -> Trace:
    """Follow the channels of a model.

    Args:
        model: Not changed; looked at in evaluation mode.
        image: A batch of images it takes, `(batch, channels, height, width)`; their values do not matter.

    Raises:
        ConversionError: The model cannot be exported, or returns something else than one tensor.
    """
    if image.dim() != 4 or not len(image):
        raise ConversionError(
            f"images must be (batch, channels, height, width), with at least one in the batch, got shape "
            f"{tuple(image.shape)}"
        )
    # A copy that shares its tensors: forward() may leave something behind in its attributes.
    tensors = [*model.parameters(), *model.buffers()]
    still = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    return _Tracer(export(still, image), image).run()


class _Tracer:
    """One run over a graph."""

    def __init__(self, graph: Graph, image: Tensor) -> None:
        self.graph, self.image = graph, image
        self.unions = Unions()
        self.labels: dict[Node, Any] = {}
        self.made: dict[str, Labels] = {}
        self.slices: dict[str, dict[int, Labels]] = {}
        self.reads: set[tuple[str, int]] = set()
        self.is_cut = False
        self.pricer = Pricer(graph, self.slices, len(image))

    def run(self) -> Trace:
        """Follow all nodes in order."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name not in self.graph.stored:
                self.labels[node] = _unlabelled(node)
            elif node.op == "call_function" and function_name(node) not in _CHECKS:
                self._call(node)
        (output,) = self.graph.nodes[-1].all_input_nodes
        self.unions.fix(values(self._held(output)), Reason("it is an output of the model"))
        self.pricer.rest()
        roots = self.unions.roots
        units = {name: roots(labels) for name, labels in self.made.items()}
        slices = {n: {axis: roots(v) for axis, v in axes.items()} for n, axes in self.slices.items()}
        priced = tuple(
            Priced(p.name, p.op, {f: roots(v) for f, v in p.widths.items()}) for p in self.pricer.found
        )
        channels, height, width = self.image.shape[1:]
        raw = Trace(
            units, units, {}, slices, frozenset(self.reads), priced, self.is_cut,
            (channels, height, width), shape_of(output)[1:],
        )  # fmt: skip
        return raw.without(self.unions.stays)

    def _call(self, node: Node) -> None:
        name = function_name(node)
        # What works in place has the same name with an underscore behind it.
        name = name if name.startswith("_") else name.removesuffix("_")
        inputs = [given for given in node.all_input_nodes if self._held(given) is not None]
        layers: dict[str, Callable[[Node], None]] = {
            "conv2d": self._convolution,
            "conv_transpose2d": self._convolution,
            "linear": self._linear,
            "batch_norm": self._norm,
            "instance_norm": self._norm,
            "prelu": self._prelu,
        }
        found: Any = None
        if name in layers:
            layers[name](node)
            return
        if name == "getitem":
            found = self.labels[node.all_input_nodes[0]][node.args[1]]
        elif name in _SAME and (len(node.all_input_nodes) == 1 or name == "type_as"):
            found = self._held(node.args[0])
        elif name in _ELEMENTWISE:
            found = self._elementwise(node, name)
        elif name in MOVES:
            found = moved(node, self._held, self.unions)
            self.is_cut |= cuts_channels(node, self._held)
        elif name in _SPATIAL:
            found = self._pool(node, _SPATIAL[name])
        elif name in _REDUCES:
            found = self._reduce(node, _REDUCES[name])
        elif name in _ALONG and self._free(node, [argument(node, 1, "dim")]):
            found = self._held(node.all_input_nodes[0])
        if found is None:
            self._unknown(node, name, inputs)
        else:
            self.labels[node] = found

    # Layers ------------------------------------------------------------------------------------------

    def _convolution(self, node: Node) -> None:
        transposed = function_name(node) == "conv_transpose2d"
        rest = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        given = arguments(node, *_CONVOLUTION, *rest)
        weight, bias = self._stored(given["weight"]), self._stored(given.get("bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            self._unknown(node, function_name(node), node.all_input_nodes)
            return
        name, groups = self._layer(weight), int(given.get("groups", 1))
        entering = self._channels(self._held(given["input"]), 1, node)
        shape = self.graph.tensors[weight].shape
        out = shape[1] * groups if transposed else shape[0]
        if groups > 1 and groups == len(entering):
            leaving = entering.repeat(out // groups)
            self._slice(weight, 0, entering if transposed else leaving)
        else:
            # As many channels have to stay in each group.
            blocks = entering.reshape(groups, -1)
            self.unions.join(blocks[:1].repeat(groups, axis=0), blocks, _grouped(name))
            made = self._leaving(name, weight, int(transposed), out // groups)
            leaving = np.tile(made, groups)
            self._slice(weight, int(transposed), made if transposed else leaving)
            self._slice(weight, int(not transposed), entering if transposed else blocks[0])
            self.reads.add((self.graph.first_names[weight], int(not transposed)))
            self.made.setdefault(name, leaving)
        if bias is not None:
            self._slice(bias, 0, leaving)
        self.labels[node] = spread(leaving, 1, shape_of(node))
        self.pricer.convolution(node, name, given, entering, leaving)

    def _linear(self, node: Node) -> None:
        source, bias = node.args[0], argument(node, 2, "bias")
        weight = self._stored(node.args[1])
        if weight is None or not isinstance(source, Node) or (bias is not None and not self._stored(bias)):
            self._unknown(node, "linear", node.all_input_nodes)
            return
        name, labels, last = self._layer(weight), self._held(source), len(shape_of(source)) - 1
        held = axes_of(labels)
        if len(held) == 1 and held != [last]:
            self._mixing(node, name, labels, held[0])
            return
        entering = self._channels(labels, last, node)
        leaving = self._leaving(name, weight, 0, self.graph.tensors[weight].shape[0])
        self.made.setdefault(name, leaving)
        self._slice(weight, 0, leaving)
        self._slice(weight, 1, entering)
        self.reads.add((self.graph.first_names[weight], 1))
        if bias is not None:
            self._slice(self.graph.stored[bias.name], 0, leaving)
        self.labels[node] = spread(leaving, last, shape_of(node))
        self.pricer.linear(node, name, entering, leaving)

    def _mixing(self, node: Node, name: str, labels: Tensor, axis: int) -> None:
        """Treat a linear layer along another axis than that of channels: it makes positions of them."""
        self._stuck(node, name, Reason("it makes positions of a map, not channels"))
        self.labels[node] = labels.narrow(-1, 0, 1).expand(shape_of(node))
        self.pricer.mixing(node, name, rows(labels, axis)[:, 0])

    def _leaving(self, name: str, weight: str, axis: int, count: int) -> Labels:
        """Return the labels of what a layer makes; of weights that are used twice, the same ones."""
        known = self.slices.get(self.graph.first_names[weight], {}).get(axis)
        return self.unions.fresh(count) if known is None else known[:count]

    def _norm(self, node: Node) -> None:
        """Treat batch norm and instance norm: both look at each channel alone."""
        labels = self._held(node.args[0])
        name = module_name(node) or node.name
        channels = np.full(labels.shape[1], FIXED, dtype=np.int64)
        if 1 in axes_of(labels):
            channels = self._channels(labels, 1, node)
            for at in range(1, 5):
                stored = self._stored(node.args[at])
                if stored is not None:
                    self._slice(stored, 0, channels)
        self.labels[node] = labels
        if function_name(node) == "batch_norm":
            self.pricer.norm(node, name, channels)

    def _prelu(self, node: Node) -> None:
        labels, name = self._held(node.args[0]), self._stored(node.args[1])
        if name is None:
            self._unknown(node, "prelu", node.all_input_nodes)
            return
        if self.graph.tensors[name].numel() > 1 and 1 in axes_of(labels):
            self._slice(name, 0, self._channels(labels, 1, node))
        self.labels[node] = labels

    def _unknown(self, node: Node, name: str, inputs: Sequence[Node]) -> None:
        """Keep all channels that enter."""
        text = f"{name} in {place(node)} is an operation that pruning does not follow"
        advice = "a 1x1 convolution before it would set the layers above free"
        if name in _NORMS:
            text = f"{_NORMS[name]} in {place(node)} computes its statistics over several channels together"
            advice = "batch norm, which looks at each channel alone, can be narrowed"
        elif name in ("conv2d", "conv_transpose2d", "linear"):
            text = f"the weights of {place(node)} are computed, not stored"
            advice = "remove weight norm and other parametrizations before"
        for given in inputs:
            held = self._held(given)
            for part in held if isinstance(held, list) else [held]:
                if isinstance(part, Tensor):
                    self.unions.fix(values(part), Reason(text, advice))
        if name in (*_OTHER_LAYERS, "conv2d", "conv_transpose2d", "linear"):
            weight = self._stored(node.args[1])
            layer = (self._layer(weight) if weight else module_name(node)) or node.name
            self._stuck(node, layer, Reason(text, advice))
        self.labels[node] = _unlabelled(node)
        self.pricer.unknown(node)

    def _stuck(self, node: Node, name: str, reason: Reason) -> None:
        """Note a layer whose channels have to stay."""
        axis = -1 if function_name(node) == "linear" else 1
        self.made.setdefault(name, self.unions.fresh(shape_of(node)[axis]))
        self.unions.fix(self.made[name], reason)

    # Other operations --------------------------------------------------------------------------------

    def _elementwise(self, node: Node, name: str) -> Tensor | None:
        shape = shape_of(node)
        given = [self._held(one) for one in node.all_input_nodes if not self._is_matrix(one)]
        labels = combined(given, shape, node, self.unions)
        if labels is None:
            return None
        for one in node.all_input_nodes:
            if self._is_matrix(one):
                self._along(one, labels, node)
        maps = [one for one in node.all_input_nodes if shape_of(one) == shape and len(shape) == 4]
        if name == "add" and len(maps) == 2 and 1 in axes_of(labels):
            self.pricer.addition(node, self._channels(labels, 1, node))
        return labels

    def _along(self, parameter: Node, labels: Tensor, node: Node) -> None:
        """Slice a parameter of several axes, such as a position embedding, along that of the channels."""
        name = self.graph.stored[parameter.name]
        held, shape = axes_of(labels), shape_of(parameter)
        axis = held[0] - (labels.dim() - len(shape)) if held else -1
        if len(held) > 1:
            text = f"{name} is combined with channels that are mixed with positions"
            self.unions.fix(values(labels), Reason(text))
        elif axis >= 0 and shape[axis] > 1:
            self._slice(name, axis, self._channels(labels, held[0], node))

    def _pool(self, node: Node, sizes: int) -> Any:
        labels = self._held(node.args[0])
        after = node.meta["val"]
        shape = tuple((after[0] if isinstance(after, tuple | list) else after).shape)
        if any(axis >= labels.dim() - sizes for axis in axes_of(labels)):
            return None
        found = resized(labels, shape)
        if found is not None and not isinstance(after, tuple | list):
            self.pricer.pool(node, self._channels(labels, 1, node))
        return [found] * len(after) if isinstance(after, tuple | list) else found

    def _reduce(self, node: Node, at: int) -> Any:
        labels, after = self._held(node.args[0]), node.meta["val"]
        given: Any = argument(node, at, "dim")
        listed = [given] if isinstance(given, int) else list(given or range(labels.dim()))
        if not self._free(node, listed):
            return None
        first = labels
        for axis in {axis % labels.dim() for axis in listed}:
            first = first.narrow(axis, 0, 1)
        if isinstance(after, tuple | list):
            return [compact(first.reshape(part.shape)) for part in after]
        if 1 in axes_of(labels):
            self.pricer.pool(node, self._channels(labels, 1, node))
        return compact(first.reshape(after.shape))

    def _free(self, node: Node, axes: Sequence[Any]) -> bool:
        """Return whether no axis of these holds channels."""
        labels = self._held(node.args[0])
        return not {axis % labels.dim() for axis in axes} & set(axes_of(labels))

    # Bookkeeping -------------------------------------------------------------------------------------

    def _held(self, node: Any) -> Any:
        """Return the labels of what a node gives; a stored vector gets some when it is first asked for."""
        if node not in self.labels and node.name in self.graph.stored:
            shape = shape_of(node)
            axes = [axis for axis, size in enumerate(shape) if size > 1]
            self.labels[node] = fixed(shape)
            if len(axes) == 1:
                own = self.unions.fresh(shape[axes[0]])
                self._slice(self.graph.stored[node.name], axes[0], own)
                self.labels[node] = spread(own, axes[0], shape)
        return self.labels.get(node)

    def _stored(self, value: Any) -> str | None:
        """Return the name of a parameter or buffer that is an input of the graph."""
        return self.graph.stored.get(value.name) if isinstance(value, Node) else None

    def _layer(self, weight: str) -> str:
        """Return the name of a layer: that of its module, or of its weight in a module that has several."""
        return self.graph.first_names[weight].removesuffix(".weight")

    def _is_matrix(self, node: Node) -> bool:
        return self._stored(node) is not None and sum(size > 1 for size in shape_of(node)) > 1

    def _channels(self, labels: Tensor, axis: int, node: Node) -> Labels:
        """Return the labels along one axis; those that meet at one position of it become the same."""
        table = rows(labels, axis)
        if table.shape[1] > 1:
            text = f"{place(node)} reads what channels and positions have been mixed into"
            self.unions.join(table[:, :1].repeat(table.shape[1], axis=1), table, Reason(text))
        return table[:, 0].copy()

    def _slice(self, name: str, axis: int, labels: Labels) -> None:
        """Note that an axis of a parameter holds channels; of a parameter used twice they are the same."""
        axes = self.slices.setdefault(self.graph.first_names[name], {})
        known = axes.setdefault(axis, labels)
        if known is not labels:
            self.unions.join(known, labels, Reason(f"{name} is also used with channels that have to stay"))


def _unlabelled(node: Node) -> Any:
    return _pytree.tree_map_only(torch.Tensor, lambda part: fixed(part.shape), node.meta.get("val"))


def _grouped(name: str) -> Reason:
    return Reason(
        f"{name} is a grouped convolution, and another of its groups has channels that have to stay"
    )
