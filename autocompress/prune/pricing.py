"""What the nodes of a model's graph cost: operations as data, and which of their widths channels decide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from autocompress.ops import Activation, Add, Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec
from autocompress.prune.graph import Graph, argument, function_name, only_user, pair, shape_of
from autocompress.prune.labels import Labels
from autocompress.prune.ops import BatchNorm, Convolution, Parameters, Product

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class Priced:
    """An operation of the model at full width.

    Attributes:
        name: Of the module, or of the node of the graph.
        op: What runs.
        widths: Fields of the operation that count channels, with the labels of those channels.
    """

    name: str
    op: OpSpec
    widths: Mapping[str, Labels]


class Pricer:
    """Collects the operations of one graph; each method is told of a node, in the order of the graph.

    Args:
        graph: The graph.
        slices: Name of a parameter to its axes that hold channels; filled while nodes are told.
        batch: Images in the batch that the graph was made for.

    Attributes:
        found: The operations so far.
    """

    def __init__(self, graph: Graph, slices: Mapping[str, Mapping[int, Labels]], batch: int) -> None:
        self.found: list[Priced] = []
        self._graph, self._slices, self._batch = graph, slices, batch
        self._counted: set[str] = set()
        self._again: list[str] = []
        self._absorbed: set[Node] = set()

    def convolution(
        self, node: Node, name: str, given: Mapping[str, Any], entering: Labels, leaving: Labels
    ) -> None:
        """Price `conv2d` or `conv_transpose2d`, with the batch norm and the activation that follow."""
        transposed = function_name(node) == "conv_transpose2d"
        weight = self._graph.tensors[self._graph.stored[given["weight"].name]]
        groups, kernel = int(given.get("groups", 1)), pair(tuple(weight.shape[2:]))
        stride, dilation = pair(given.get("stride", 1)), pair(given.get("dilation", 1))
        height, width = shape_of(given["input"])[2:]
        padding: Any = given.get("padding", 0)
        if isinstance(padding, str):
            both = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            # Of an odd number the last row and column are on one side only: they count as part of the image.
            height, width = height + both[0] % 2, width + both[1] % 2
            padding = [total // 2 for total in both]
        norm, activation = self._followers(node)
        has_bias = given.get("bias") is not None
        common: dict[str, Any] = {"bias": has_bias, "norm": norm, "activation": activation, "groups": groups}
        shape = len(entering), len(leaving), height, width
        square = kernel[0] == kernel[1] and stride[0] == stride[1] and dilation == (1, 1)
        op: OpSpec
        if square and not transposed and pair(padding) == (kernel[0] // 2,) * 2:
            op = Conv2d(*shape, kernel=kernel[0], stride=stride[0], **common)
        else:
            if transposed:
                common |= {"transposed": True, "output_padding": pair(given.get("output_padding", 0))}
            op = Convolution(*shape, kernel, stride, pair(padding), dilation, **common)
        widths = {"in_channels": entering, "out_channels": leaving}
        if groups > 1:
            widths["groups"] = entering if groups == len(entering) else np.zeros(groups, dtype=np.int64)
        # Images that forward() cuts into several, or puts into one batch.
        parameters = [given["weight"], given.get("bias"), *self._scale_and_shift(only_user(node))]
        for _ in range(max(1, shape_of(given["input"])[0] // self._batch)):
            self.found.append(Priced(name, op, widths))
            self._count(parameters)

    def linear(self, node: Node, name: str, entering: Labels, leaving: Labels) -> None:
        """Price `linear`; at several positions it is a 1x1 convolution."""
        weight, bias = cast(Node, node.args[1]), argument(node, 2, "bias")
        positions = math.prod(shape_of(node)[:-1]) // self._batch
        features = len(entering), len(leaving)
        if positions <= 1:
            op: OpSpec = Linear(*features, bias=bias is not None)
            self.found.append(Priced(name, op, {"in_features": entering, "out_features": leaving}))
        else:
            op = Conv2d(*features, positions, 1, bias=bias is not None, norm=False)
            self.found.append(Priced(name, op, {"in_channels": entering, "out_channels": leaving}))
        self._count([weight, bias])

    def mixing(self, node: Node, name: str, channels: Labels) -> None:
        """Price `linear` along positions, once for each channel."""
        each = math.prod(shape_of(node)) * shape_of(node.args[0])[-1] // self._batch // len(channels)
        self.found.append(Priced(name, Product(each, len(channels)), {"channels": channels}))

    def norm(self, node: Node, name: str, channels: Labels) -> None:
        """Price `batch_norm`, unless it is part of the convolution before it."""
        if node in self._absorbed:
            return
        shape, parameters = shape_of(node), self._scale_and_shift(node)
        sides = (shape[2], shape[3]) if len(shape) == 4 else (math.prod(shape[2:]), 1)
        op = BatchNorm(len(channels), *sides, affine=bool(parameters))
        self.found.append(Priced(name, op, {"channels": channels}))
        self._count(parameters)

    def pool(self, node: Node, channels: Labels) -> None:
        """Price poolings and means of maps that a space can have; others cost nothing."""
        before, after = shape_of(node.args[0]), shape_of(node)
        name = function_name(node)
        if len(before) != 4:
            return
        if name in ("mean", "adaptive_avg_pool2d") and math.prod(after) == math.prod(after[:2]):
            pooled = GlobalAvgPool(*before[1:])
            self.found.append(Priced(node.name, pooled, {"channels": channels}))
        elif name == "max_pool2d":
            kernel = pair(node.args[1])
            stride = pair(argument(node, 2, "stride") or kernel)
            if kernel[0] == kernel[1] and stride[0] == stride[1]:
                op = MaxPool(*before[1:], kernel=kernel[0], stride=stride[0])
                if op.out_shape[1:] == after[2:]:
                    self.found.append(Priced(node.name, op, {"channels": channels}))

    def addition(self, node: Node, channels: Labels) -> None:
        """Price the addition of two maps."""
        self.found.append(Priced(node.name, Add(*shape_of(node)[1:]), {"channels": channels}))

    def unknown(self, node: Node) -> None:
        """Price the matrix products of what is not followed: its channels stay, so it always costs that."""

        def empty(given: Node) -> Any:
            return _pytree.tree_map_only(
                torch.Tensor,
                lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
                given.meta["val"],
            )

        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), empty)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cast(Any, node.target)(*args, **kwargs)
        macs = counter.get_total_flops() // 2 // self._batch
        if macs:
            self.found.append(Priced(node.name, Product(macs), {}))

    def rest(self) -> None:
        """Count the parameters that no operation has, and each of the others only once."""
        for name in self._again:
            self._parameters(name, -1)
        for name in dict.fromkeys(self._graph.first_names.values()):
            if name not in self._counted and isinstance(self._graph.tensors[name], nn.Parameter):
                self._parameters(name, 1)

    def _followers(self, node: Node) -> tuple[bool, Activation]:
        """Return whether batch norm comes next, and which activation; both are then part of the operation."""
        following = only_user(node)
        norm = bool(self._scale_and_shift(following))
        if norm and following is not None:
            self._absorbed.add(following)
            following = only_user(following)
        if following is None:
            return norm, "none"
        name = function_name(following).removesuffix("_")
        if name == "hardtanh" and tuple(following.args[1:]) == (0.0, 6.0):
            return norm, "relu6"
        return norm, _ACTIVATIONS.get(name, "none")

    def _scale_and_shift(self, node: Node | None) -> list[Node]:
        """Return the two parameters of a batch norm, if it is one and has them."""
        if node is None or function_name(node) != "batch_norm":
            return []
        found = (argument(node, 1, "weight"), argument(node, 2, "bias"))
        stored = [one for one in found if isinstance(one, Node) and one.name in self._graph.stored]
        return stored if len(stored) == 2 else []

    def _count(self, nodes: Sequence[Node | None]) -> None:
        """Note that an operation has these parameters."""
        for node in nodes:
            if node is None:
                continue
            first = self._graph.first_names[self._graph.stored[node.name]]
            if first in self._counted:
                self._again.append(first)
            self._counted.add(first)

    def _parameters(self, name: str, sign: int) -> None:
        """Count the elements of one parameter."""
        tensor, axes = self._graph.tensors[name], self._slices.get(name, {})
        fixed = math.prod(size for axis, size in enumerate(tensor.shape) if axis not in axes)
        fields = dict(zip(("channels", "others"), axes.values(), strict=False))
        counts = {field: len(labels) for field, labels in fields.items()}
        self.found.append(Priced(name, Parameters(each=sign * fixed, **counts), fields))
