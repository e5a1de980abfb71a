"""Which channels of a PyTorch model hang together, read off its exported graph.

The graph is run once with labels instead of numbers (`labels.py`): operations that only move channels
about (`moves.py`) are run on the labels as they are, convolutions and linear layers make new ones. What is
not understood keeps its channels, and is reported.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from autocompress.errors import ConversionError
from autocompress.prune.elementwise import combined
from autocompress.prune.graph import Graph, argument, export, function_name, place, shape_of
from autocompress.prune.label_tensor import axes_of, compact, resized, values
from autocompress.prune.labels import FIXED, Labels, Reason
from autocompress.prune.ledger import Ledger, unlabelled
from autocompress.prune.moves import MOVES, cuts_channels, moved
from autocompress.prune.pricing import Priced
from autocompress.prune.weighted import LAYERS, other_layer


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
        unused: Parameters that are not read in evaluation mode.
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
    unused: tuple[str, ...]
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


def trace(model: nn.Module, image: Tensor) -> Trace:
    """Follow the channels of a model.

    Args:
        model: Not changed; looked at in evaluation mode.
        image: A batch of images it takes, `(batch, channels, height, width)`; their values do not matter.

    Raises:
        ConversionError: The model cannot be exported, or returns something else than one tensor.
    """
    return followed(exported(model, image), image)


def exported(model: nn.Module, image: Tensor) -> Graph:
    """Return the graph of a model, which is not changed, in evaluation mode.

    Raises:
        ConversionError: It cannot be exported, or returns something else than one tensor.
    """
    if image.dim() != 4 or not len(image):
        raise ConversionError(
            f"images must be (batch, channels, height, width), with at least one in the batch, got shape "
            f"{tuple(image.shape)}"
        )
    # A copy that shares its tensors: forward() may leave something behind in its attributes.
    tensors = [*model.parameters(), *model.buffers()]
    still = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    return export(still, image)


def followed(graph: Graph, image: Tensor) -> Trace:
    """Follow the channels of the graph of a model, made with these images."""
    return _Tracer(graph, image).run()


class _Tracer:
    """One run over a graph."""

    def __init__(self, graph: Graph, image: Tensor) -> None:
        self.image = image
        self.ledger = Ledger(graph, len(image))
        self.is_cut = False

    def run(self) -> Trace:
        """Follow all nodes in order."""
        ledger, graph = self.ledger, self.ledger.graph
        for node in graph.nodes:
            if node.op == "placeholder" and node.name not in graph.stored:
                ledger.labels[node] = unlabelled(node)
            elif node.op == "call_function" and function_name(node) not in _CHECKS:
                # What works in place has the same name with an underscore behind it.
                name = function_name(node)
                name = name if name.startswith("_") else name.removesuffix("_")
                found = self._labels(node, name)
                ledger.labels[node] = self._unknown(node, name) if found is None else found
        (output,) = graph.nodes[-1].all_input_nodes
        ledger.unions.fix(values(ledger.held(output)), Reason("it is an output of the model"))
        ledger.pricer.rest()
        roots = ledger.unions.roots
        units = {name: roots(labels) for name, labels in ledger.made.items()}
        slices = {n: {axis: roots(v) for axis, v in axes.items()} for n, axes in ledger.slices.items()}
        priced = tuple(
            Priced(p.name, p.op, {f: roots(v) for f, v in p.widths.items()}) for p in ledger.pricer.found
        )
        channels, height, width = self.image.shape[1:]
        raw = Trace(
            units, units, {}, slices, frozenset(ledger.reads), priced, self.is_cut, graph.unused,
            (channels, height, width), shape_of(output)[1:],
        )  # fmt: skip
        return raw.without(ledger.unions.stays)

    def _labels(self, node: Node, name: str) -> Any:
        """Return the labels of what a node gives; `None` if it does what is not followed."""
        held, source = self.ledger.held, node.args[0] if node.args else None
        if name in LAYERS:
            return LAYERS[name](self.ledger, node)
        if name == "getitem":
            return held(source)[node.args[1]]
        if name in _SAME and (len(node.all_input_nodes) == 1 or name == "type_as"):
            return held(source)
        if name in _ELEMENTWISE or (name in ("max", "min") and len(node.all_input_nodes) > 1):
            return self._elementwise(node, name)
        if name in MOVES:
            self.is_cut |= cuts_channels(node, held)
            return moved(node, held, self.ledger.unions)
        if name in _SPATIAL:
            return self._pool(node, _SPATIAL[name])
        if name in _REDUCES:
            return self._reduce(node, _REDUCES[name])
        if name in _ALONG and self._free(node, [argument(node, 1, "dim")]):
            return held(source)
        return None

    def _unknown(self, node: Node, name: str) -> Any:
        """Keep all channels that enter, and those that leave."""
        reason = Reason(
            f"{name} in {place(node)} is an operation that pruning does not follow",
            "a 1x1 convolution before it would set the layers above free",
        )
        if name in _NORMS:
            reason = Reason(
                f"{_NORMS[name]} in {place(node)} computes its statistics over several channels together",
                "batch norm, which looks at each channel alone, can be narrowed",
            )
        elif name in ("conv2d", "conv_transpose2d", "linear"):
            reason = Reason(
                f"the weights of {place(node)} are computed, not stored",
                "remove weight norm and other parametrizations before",
            )
        for given in node.all_input_nodes:
            held = self.ledger.held(given)
            for part in held if isinstance(held, list) else [held]:
                if isinstance(part, Tensor):
                    self.ledger.unions.fix(values(part), reason)
        other_layer(self.ledger, node, reason)
        self.ledger.pricer.unknown(node)
        return unlabelled(node)

    def _elementwise(self, node: Node, name: str) -> Tensor | None:
        ledger, shape = self.ledger, shape_of(node)
        matrices = [one for one in node.all_input_nodes if ledger.is_matrix(one)]
        given = [ledger.held(one) for one in node.all_input_nodes if one not in matrices]
        labels = combined(given, shape, node, ledger.unions)
        if labels is None:
            return None
        for one in matrices:
            self._along(one, labels, node)
        maps = [one for one in node.all_input_nodes if shape_of(one) == shape and len(shape) == 4]
        if name == "add" and len(maps) == 2 and 1 in axes_of(labels):
            ledger.pricer.addition(node, ledger.channels(labels, 1, node))
        return labels

    def _along(self, parameter: Node, labels: Tensor, node: Node) -> None:
        """Slice a parameter of several axes, such as a position embedding, along that of the channels."""
        name = self.ledger.graph.stored[parameter.name]
        held, shape = axes_of(labels), shape_of(parameter)
        axis = held[0] - (labels.dim() - len(shape)) if held else -1
        if len(held) > 1:
            text = f"{name} is combined with channels that are mixed with positions"
            self.ledger.unions.fix(values(labels), Reason(text))
        elif axis >= 0 and shape[axis] > 1:
            self.ledger.slice(name, axis, self.ledger.channels(labels, held[0], node))

    def _pool(self, node: Node, sizes: int) -> Any:
        labels, after = self.ledger.held(node.args[0]), node.meta["val"]
        several = isinstance(after, tuple | list)
        if any(axis >= labels.dim() - sizes for axis in axes_of(labels)):
            return None
        found = resized(labels, (after[0] if several else after).shape)
        if found is not None and not several:
            self.ledger.pricer.pool(node, self.ledger.channels(labels, 1, node))
        return [found] * len(after) if several else found

    def _reduce(self, node: Node, at: int) -> Any:
        labels, after = self.ledger.held(node.args[0]), node.meta["val"]
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
            self.ledger.pricer.pool(node, self.ledger.channels(labels, 1, node))
        return compact(first.reshape(after.shape))

    def _free(self, node: Node, axes: Sequence[Any]) -> bool:
        """Return whether no axis of these holds channels."""
        labels = self.ledger.held(node.args[0])
        return not {axis % labels.dim() for axis in axes} & set(axes_of(labels))
