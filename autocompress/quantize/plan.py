"""What of a model can be quantized: its layers, what is folded into them, and who reads what they give.

Read off the graph that `torch.export` makes, so that functions and modules in `forward()` are the same to it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn
from torch.fx import Node

from autocompress.errors import QuantizationError
from autocompress.ops import Conv2d, OpSpec
from autocompress.prune.graph import Graph, argument, function_name, only_user, place
from autocompress.prune.ops import Convolution
from autocompress.prune.trace import exported, followed
from autocompress.quantize.layer import KINDS
from autocompress.quantize.ops import at_bits

_LAYERS: Final = {"conv2d", "conv_transpose2d", "linear"}
_OTHERS: Final = {"conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d", "bilinear"}
"""Layers that are not quantized, but reported."""

_RECTIFIERS: Final = {"relu", "relu6"}
# These pass numbers on as they are.
_SAME: Final = {"dropout", "feature_dropout", "clone", "contiguous", "alias", "detach", "to", "identity"}
# Of these no output is negative if no input is.
_KEEP_SIGN: Final = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax",
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "cat", "add", "mul",
    "slice", "select", "upsample_nearest2d", "upsample_bilinear2d", "pad", "getitem", "split", "chunk",
}  # fmt: skip
# And of these never.
_POSITIVE: Final = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "abs", "square", "exp"}


@dataclass(frozen=True)
class Site:
    """A layer that can be quantized.

    Attributes:
        name: Of the module.
        ops: What it computes, with a bias for the batch norm, and the activation; several where `forward()`
            cuts images up.
        norm: The batch norm that is folded into it; empty if there is none.
        source: What it reads: layers that read the same tensor share the name of the first of them.
        positive: Whether what it reads is never negative.
        rectified: Whether ReLU or ReLU6, and nothing else, reads what it gives.
        reader: The source that what it, or its ReLU, gives is, if nothing but layers reads it; empty
            otherwise. Runtimes of integers hand numbers on to them as they are.
    """

    name: str
    ops: tuple[OpSpec, ...]
    norm: str
    source: str
    positive: bool
    rectified: bool
    reader: str

    def at(self, bits: tuple[int, int]) -> tuple[OpSpec, ...]:
        """Return what it runs at some bits of weights and inputs."""
        return tuple(at_bits(op, *bits) for op in self.ops)


@dataclass(frozen=True)
class Left:
    """A layer that stays in floating point.

    Attributes:
        layer: Its name.
        reason: Why.
        advice: What the user can do; may be empty.
    """

    layer: str
    reason: str
    advice: str = ""


@dataclass(frozen=True)
class Plan:
    """What of a model can be quantized.

    Attributes:
        sites: Layers, in the order in which they run.
        left: Layers that stay in floating point.
        others: Operations that cost something besides those of the sites.
        in_shape: Channels, height, width of the images.
        out_shape: Of an output, without the batch.
    """

    sites: tuple[Site, ...]
    left: tuple[Left, ...]
    others: tuple[OpSpec, ...]
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, ...]

    def site(self, name: str) -> Site:
        """Return the layer of a name."""
        return next(site for site in self.sites if site.name == name)


def make_plan(model: nn.Module, image: Tensor) -> Plan:
    """Look at a model, in evaluation mode.

    Args:
        model: Not changed.
        image: A batch of images that it takes, `(batch, channels, height, width)`.

    Raises:
        ConversionError: It cannot be exported.
        QuantizationError: Nothing of it can be quantized.
    """
    graph = exported(model, image)
    traced = followed(graph, image)
    found = _Finder(model, graph)
    ops: dict[str, list[OpSpec]] = defaultdict(list)
    others: list[OpSpec] = []
    for priced in traced.priced:
        if priced.name in found.layers:
            ops[priced.name].append(priced.op)
        else:
            others.append(priced.op)
    sites = tuple(found.site(name, tuple(ops[name])) for name in found.layers)
    if not sites:
        reasons = "; ".join(f"{left.layer}: {left.reason}" for left in found.left[:3])
        raise QuantizationError(
            f"no layer of {type(model).__name__} can be quantized: {reasons or 'it has no layers'}; layers "
            f"are modules of {', '.join(kind.__name__ for kind in KINDS)}"
        )
    return Plan(sites, tuple(found.left), tuple(others), traced.in_shape, traced.out_shape)


class _Finder:
    """One look at a graph.

    Attributes:
        layers: Names of the layers that can be quantized, each to its node.
        left: The other layers.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model, self._graph = model, graph
        self.left: list[Left] = []
        self._signs: dict[Node, bool] = {}
        calls: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if _name(node) in _LAYERS:
                if name := self._layer(node):
                    calls.setdefault(name, []).append(node)
            elif _name(node) in _OTHERS:
                self.left.append(Left(place(node), f"{_name(node)} is not quantized here"))
        for name, nodes in calls.items():
            if len(nodes) > 1:
                reason = f"it runs {len(nodes)} times in a pass, on inputs of different ranges"
                self.left.append(Left(name, reason, "give each call a layer of its own"))
        self.layers = {name: nodes[0] for name, nodes in calls.items() if len(nodes) == 1}
        self._called = set(self.layers.values())
        # What each tensor that layers read is called.
        self._sources: dict[Node, str] = {}
        for name, node in self.layers.items():
            self._sources.setdefault(_behind(node.all_input_nodes[0]), name)
        self._norms = Counter(norm for node in self._called if (norm := _norm_after(node, graph)))

    def _layer(self, node: Node) -> str:
        """Return the name of the layer that a node is; empty if it cannot be quantized."""
        weight: Any = argument(node, 1, "weight")
        stored = self._graph.stored.get(weight.name) if isinstance(weight, Node) else None
        if stored is None:
            self.left.append(
                Left(
                    place(node),
                    "its weights are computed, not stored",
                    "remove weight norm and other parametrizations before",
                )
            )
            return ""
        path, _, last = self._graph.first_names[stored].rpartition(".")
        module = self._model.get_submodule(path)
        if last != "weight" or type(module) not in KINDS:
            kind = "forward()" if last != "weight" or not path else f"{type(module).__name__}"
            self.left.append(
                Left(
                    path or stored,
                    f"{kind} calls {_name(node)} as a function with parameters of its own",
                    f"make it a module of {', '.join(k.__name__ for k in KINDS)}",
                )
            )
            return ""
        return path

    def site(self, name: str, ops: tuple[OpSpec, ...]) -> Site:
        """Describe a layer."""
        node = value = self.layers[name]
        norm = _norm_after(node, self._graph)
        # A batch norm of two layers, or one that runs elsewhere too, cannot be a part of this one.
        norm = norm if norm and self._norms[norm] == 1 and self._runs_once(norm) else ""
        if norm and (after := only_user(value)) is not None:
            value = after
        following = only_user(value)
        rectified = following is not None and _rectifies(following)
        if rectified and following is not None:
            value = following
        entering = node.all_input_nodes[0]
        source = self._sources[_behind(entering)]
        if norm:
            # What is left of the batch norm is a bias.
            ops = tuple(_with_bias(op) for op in ops)
        return Site(name, ops, norm, source, self._positive(entering), rectified, self._reader(value))

    def _runs_once(self, norm: str) -> bool:
        means = {name for name, stored in self._graph.stored.items() if stored == f"{norm}.running_mean"}
        return sum(len(node.users) for node in self._graph.nodes if node.name in means) == 1

    def _reader(self, value: Node) -> str:
        """Return what layers call a tensor, if nothing but layers reads it."""
        pending = [value]
        while pending:
            for user in pending.pop().users:
                if user.op == "call_function" and _name(user) in _SAME:
                    pending.append(user)
                elif user not in self._called:
                    return ""
        return self._sources.get(_behind(value), "")

    def _positive(self, node: Node) -> bool:
        """Return whether a tensor is never negative, by the operations that make it."""
        if node not in self._signs:
            self._signs[node] = False  # a loop does not arise; unknown is negative
            name = _name(node) if node.op == "call_function" else ""
            if name in _POSITIVE or _rectifies(node):
                self._signs[node] = True
            elif name in _SAME | _KEEP_SIGN and not _negative_numbers(node):
                self._signs[node] = all(self._positive(given) for given in node.all_input_nodes)
        return self._signs[node]


def _with_bias(op: OpSpec) -> OpSpec:
    return replace(op, norm=False, bias=True) if isinstance(op, Conv2d | Convolution) else op


def _name(node: Node) -> str:
    name = function_name(node)
    return name if name.startswith("_") else name.removesuffix("_")


def _rectifies(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return _name(node) in _RECTIFIERS or (
        _name(node) in ("hardtanh", "clamp") and tuple(node.args[1:]) == (0.0, 6.0)
    )


def _negative_numbers(node: Node) -> bool:
    """Return whether a number among the arguments could make a result negative."""
    return any(isinstance(value, int | float) and value < 0 for value in node.args) and _name(node) in (
        "add",
        "mul",
        "pad",
    )


def _behind(node: Node) -> Node:
    """Return what makes a tensor, past what passes it on as it is."""
    while node.op == "call_function" and _name(node) in _SAME:
        node = node.all_input_nodes[0]
    return node


def _norm_after(node: Node, graph: Graph) -> str:
    """Return the name of the batch norm that alone reads what a layer gives; empty if there is none."""
    after = only_user(node)
    if after is None or _name(after) != "batch_norm":
        return ""
    mean: Any = argument(after, 3, "running_mean")
    stored = graph.stored.get(mean.name, "") if isinstance(mean, Node) else ""
    return stored.removesuffix(".running_mean") if stored.endswith(".running_mean") else ""


def sources_of(plan: Plan) -> Mapping[str, tuple[Site, ...]]:
    """Return the layers that read each tensor, by the name of the tensor."""
    found: dict[str, list[Site]] = {}
    for site in plan.sites:
        found.setdefault(site.source, []).append(site)
    return {source: tuple(sites) for source, sites in found.items()}
