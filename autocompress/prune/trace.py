"""Which channels of a PyTorch model hang together, read off its exported graph.

The graph is run once with labels instead of numbers (`labels.py`): operations that only move channels
about (views, concatenations, chunks) are run on the labels as they are, convolutions and linear layers make
new ones. What is not understood keeps its channels, and is reported.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from autocompress.errors import ConversionError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec
from autocompress.prune.labels import FIXED, Labels, Unions
from autocompress.prune.ops import BatchNorm, Convolution, Parameters


@dataclass(frozen=True)
class Kept:
    """Channels that have to stay, and why.

    Attributes:
        layer: Name of the module that makes them.
        channels: How many of its channels.
        reason: What stands against it.
        advice: What the user can do.
    """

    layer: str
    channels: int
    reason: str
    advice: str


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


@dataclass(frozen=True)
class Trace:
    """What a model does with its channels.

    Attributes:
        made: Name of each layer that makes channels, in order, to their labels.
        slices: Name of a parameter or buffer to its axes that hold channels, with their labels.
        priced: The operations that cost something, in order.
        kept: What has to stay.
        in_shape: Channels, height, width of the images.
        out_shape: Of an output, without the batch.
    """

    made: Mapping[str, Labels]
    slices: Mapping[str, Mapping[int, Labels]]
    priced: tuple[Priced, ...]
    kept: tuple[Kept, ...]
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, ...]


# Of these the output has the labels of the only tensor among the inputs.
_SAME = {
    "relu", "relu_", "relu6", "relu6_", "silu", "silu_", "gelu", "sigmoid", "sigmoid_", "hardsigmoid",
    "hardsigmoid_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_",
    "elu", "elu_", "tanh", "tanh_", "mish", "mish_", "softplus", "dropout", "dropout_",
    "feature_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "neg", "exp", "sqrt",
    "rsqrt", "abs", "clamp", "clamp_", "clamp_min", "pow", "threshold", "lift_fresh_copy", "rrelu",
    "celu", "selu", "hardshrink",
}  # fmt: skip
# These act on each channel alone and change the size of the image.
_SPATIAL = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "lp_pool2d",
}  # fmt: skip
# These move channels about: they are run on the labels.
_MOVES = {
    "view", "reshape", "flatten", "permute", "transpose", "cat", "chunk", "split", "split_with_sizes",
    "slice", "select", "unsqueeze", "squeeze", "expand", "unbind", "stack", "pixel_shuffle",
    "_unsafe_view", "unflatten", "numpy_T", "t", "movedim", "narrow", "channel_shuffle",
}  # fmt: skip
_PAIRS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum"}
_REDUCES = {"mean", "sum", "amax", "amin"}
_ACTIVATIONS = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6", "silu": "silu", "silu_": "silu",
    "hardswish": "hard_swish", "hardswish_": "hard_swish", "hardsigmoid": "hard_sigmoid",
    "hardsigmoid_": "hard_sigmoid", "sigmoid": "sigmoid",
}  # fmt: skip


def trace(model: nn.Module, image: Tensor) -> Trace:
    """Follow the channels of a model.

    Args:
        model: Not changed; looked at in evaluation mode.
        image: A batch of images it takes, `(batch, channels, height, width)`; their values do not matter.

    Raises:
        ConversionError: The model cannot be exported (`torch.export` says why), or does not run.
    """
    if image.dim() != 4:
        raise ConversionError(
            f"images must be (batch, channels, height, width), got shape {tuple(image.shape)}"
        )
    still = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(still, (image,), strict=False)
    except Exception as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be traced by torch.export: {type(error).__name__}: "
            f"{next(iter(str(error).strip().splitlines()), '')}; control flow that depends on values has to "
            "go, or be moved out of the network"
        ) from error
    return _Tracer(still, program).run(image)


class _Tracer:
    """One run over a graph."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.nodes: list[Node] = list(program.graph.nodes)
        self.unions = Unions()
        self.labels: dict[Node, Any] = {}
        signature = program.graph_signature
        self.stored: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
        }
        self.tensors: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        same: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            same.setdefault(id(tensor), name)
        self.first_name = {name: same[id(tensor)] for name, tensor in self.tensors.items()}
        self.made: dict[str, Labels] = {}
        self.slices: dict[str, dict[int, Labels]] = {}
        self.priced: list[Priced] = []
        self.reasons: list[tuple[Labels, str, str]] = []
        self.counted: set[str] = set()
        self.absorbed: set[Node] = set()

    def run(self, image: Tensor) -> Trace:
        """Follow all nodes in order."""
        for node in self.nodes:
            if node.op == "placeholder":
                if node.name not in self.stored:
                    self.labels[node] = torch.zeros((), dtype=torch.long).expand(_shape(node))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for output in _tensors(node):
                    self._fix(self.labels[output], "it is an output of the model", "")
        outputs = [_shape(n) for n in _tensors(self.nodes[-1])]
        if len(outputs) != 1:
            raise ConversionError(f"the model must return one tensor, got {len(outputs)}")
        self._rest()
        roots = self.unions.roots
        return Trace(
            {name: roots(labels) for name, labels in self.made.items()},
            {
                name: {axis: roots(labels) for axis, labels in axes.items()}
                for name, axes in self.slices.items()
            },
            tuple(Priced(p.name, p.op, {f: roots(v) for f, v in p.widths.items()}) for p in self.priced),
            self._kept(),
            (image.shape[1], image.shape[2], image.shape[3]),
            tuple(outputs[0][1:]),
        )

    # What nodes do -----------------------------------------------------------------------------------

    def _call(self, node: Node) -> None:
        name = _name(node)
        inputs = [n for n in _tensors(node) if n in self.labels]
        if name == "getitem":
            source = self.labels[_args(node)[0]]
            self.labels[node] = source[_args(node)[1]] if isinstance(source, tuple | list) else source
        elif name == "conv2d":
            self._convolution(node)
        elif name == "linear":
            self._linear(node)
        elif name == "batch_norm":
            self._batch_norm(node)
        elif name == "prelu":
            self._scaled(node, inputs[0], _args(node)[1])
        elif name in _SAME and len(inputs) == 1:
            self.labels[node] = self.labels[inputs[0]]
        elif name in _SPATIAL and len(inputs) == 1:
            self._pool(node, name, inputs[0])
        elif name == "pad" and len(inputs) == 1 and len(_args(node)[1]) <= 4:
            self.labels[node] = _resized(self.labels[inputs[0]], _shape(node))
        elif name in _MOVES:
            self._move(node, name)
        elif name in _PAIRS:
            self._pair(node, name, inputs)
        elif name in _REDUCES and len(inputs) == 1:
            self._reduce(node, inputs[0])
        else:
            self._unknown(node, name, inputs)

    def _unknown(self, node: Node, name: str, inputs: Sequence[Node]) -> None:
        for tensor in inputs:
            self._fix(
                self.labels[tensor],
                f"{name} in {_module(node) or 'the model'} is an operation that pruning does not follow",
                "put the layer on the list of those to ignore, or write it with convolutions",
            )
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            self.labels[node] = torch.zeros((), dtype=torch.long).expand(value.shape)
        elif isinstance(value, tuple | list):
            self.labels[node] = [
                torch.zeros((), dtype=torch.long).expand(part.shape) if isinstance(part, Tensor) else part
                for part in value
            ]

    def _convolution(self, node: Node) -> None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, _args(node), strict=False)) | dict(node.kwargs)
        weight_name, bias_name = self._stored(given["weight"]), self._stored(given.get("bias"))
        source = self.labels[given["input"]]
        groups = int(given.get("groups", 1))
        entering = self._channels(source, 1, node)
        if weight_name is None:
            self._unknown(node, "a convolution with computed weights", [given["input"]])
            return
        weight = self.tensors[weight_name]
        out, per_group = weight.shape[0], weight.shape[1]
        owner = _module(node) or weight_name.rpartition(".")[0]
        depthwise = groups == len(entering) and groups > 1
        if depthwise:
            leaving = np.repeat(entering, out // groups)
            self._slice(weight_name, 0, leaving)
        elif groups == 1:
            leaving = self._leaving(owner, weight_name, out)
            self._slice(weight_name, 1, entering)
        else:
            # As many channels have to stay in each group.
            blocks = entering.reshape(groups, per_group)
            for block in blocks[1:]:
                self.unions.join(blocks[0], block)
            leaving = self._leaving(owner, weight_name, out)
            made = leaving.reshape(groups, -1)
            for block in made[1:]:
                self.unions.join(made[0], block)
            self._slice(weight_name, 1, blocks[0])
        if bias_name is not None:
            self._slice(bias_name, 0, leaving)
        self.labels[node] = _spread(leaving, 1, _shape(node))
        self._price_convolution(node, owner, given, entering, leaving, bias_name is not None)

    def _price_convolution(
        self, node: Node, owner: str, given: Mapping[str, Any], entering: Labels, leaving: Labels, bias: bool
    ) -> None:
        weight = self.tensors[str(self._stored(given["weight"]))]
        groups, kernel = int(given.get("groups", 1)), _two(tuple(weight.shape[2:]))
        stride, dilation = _two(given.get("stride", 1)), _two(given.get("dilation", 1))
        padding = given.get("padding", 0)
        height, width = _shape(given["input"])[2:]
        if isinstance(padding, str):
            same = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
            padding = same if padding == "same" else (0, 0)
        padding = _two(padding)
        norm, activation = self._followers(node)
        square = len({*kernel}) == len({*stride}) == 1
        usual = square and dilation == (1, 1) and padding == (kernel[0] // 2,) * 2
        widths = {"in_channels": entering, "out_channels": leaving}
        if groups > 1:
            widths["groups"] = entering if groups == len(entering) else np.zeros(groups, dtype=np.int64)
        common: dict[str, Any] = {"bias": bias, "norm": norm, "activation": activation, "groups": groups}
        shape = (len(entering), len(leaving), height, width)
        op: OpSpec
        if usual:
            op = Conv2d(*shape, kernel=kernel[0], stride=stride[0], **common)
        else:
            op = Convolution(*shape, kernel, stride, padding, dilation, **common)
        self.priced.append(Priced(owner, op, widths))
        self._count([self._stored(given["weight"]), self._stored(given.get("bias"))])

    def _followers(self, node: Node) -> tuple[bool, str]:
        """Return whether batch norm comes next, and which activation; both are then part of the operation."""
        following = _only_user(node)
        norm = following is not None and _name(following) == "batch_norm"
        if norm and following is not None:
            weight, bias = (self._stored(_args(following)[at]) for at in (1, 2))
            norm = weight is not None and bias is not None
            if norm:
                self.absorbed.add(following)
                self._count([weight, bias])
                following = _only_user(following)
        activation = "none"
        if following is not None:
            activation = _ACTIVATIONS.get(_name(following), "none")
            if _name(following) in ("hardtanh", "hardtanh_") and tuple(_args(following)[1:]) == (0.0, 6.0):
                activation = "relu6"
        return norm, activation

    def _linear(self, node: Node) -> None:
        source, weight_name = _args(node)[0], self._stored(_args(node)[1])
        bias_name = self._stored(_args(node)[2]) if len(_args(node)) > 2 else None
        if weight_name is None or not isinstance(source, Node):
            self._unknown(
                node, "a linear layer with computed weights", [n for n in _tensors(node) if n in self.labels]
            )
            return
        shape = _shape(source)
        entering = self._channels(self.labels[source], len(shape) - 1, node)
        out = self.tensors[weight_name].shape[0]
        owner = _module(node) or weight_name.rpartition(".")[0]
        leaving = self._leaving(owner, weight_name, out)
        self._slice(weight_name, 1, entering)
        if bias_name is not None:
            self._slice(bias_name, 0, leaving)
        self.labels[node] = _spread(leaving, len(shape) - 1, _shape(node))
        positions = math.prod(shape[1:-1])
        if positions == 1:
            op: OpSpec = Linear(len(entering), out, bias=bias_name is not None)
            self.priced.append(Priced(owner, op, {"in_features": entering, "out_features": leaving}))
        else:
            op = Conv2d(len(entering), out, positions, 1, bias=bias_name is not None, norm=False)
            self.priced.append(Priced(owner, op, {"in_channels": entering, "out_channels": leaving}))
        self._count([weight_name, bias_name])

    def _leaving(self, owner: str, weight_name: str, count: int) -> Labels:
        """Return the labels of what a layer makes; of a layer that is used twice, the same ones."""
        first = self.first_name[weight_name]
        if 0 in self.slices.get(first, {}):
            return self.slices[first][0]
        labels = self.unions.fresh(count)
        self._slice(weight_name, 0, labels)
        self.made[owner] = labels
        return labels

    def _batch_norm(self, node: Node) -> None:
        source = _args(node)[0]
        if not isinstance(source, Node):
            return
        labels = self.labels[source]
        channels = self._channels(labels, 1, node)
        for at in (1, 2, 3, 4):
            name = self._stored(_args(node)[at])
            if name is not None:
                self._slice(name, 0, channels)
        self.labels[node] = labels
        if node not in self.absorbed:
            names = [name for at in (1, 2) if (name := self._stored(_args(node)[at]))]
            shape = _shape(node)
            size = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
            op = BatchNorm(len(channels), *size, affine=bool(names))
            self.priced.append(Priced(_module(node) or node.name, op, {"channels": channels}))
            self._count(names)

    def _scaled(self, node: Node, source: Node, parameter: Any) -> None:
        """One number a channel, along axis 1."""
        name = self._stored(parameter)
        labels = self.labels[source]
        if name is not None and self.tensors[name].numel() > 1:
            self._slice(name, 0, self._channels(labels, 1, node))
        self.labels[node] = labels

    def _pool(self, node: Node, name: str, source: Node) -> None:
        before, after = _shape(source), _shape(node)
        labels = self.labels[source]
        self.labels[node] = _resized(labels, after)
        if len(before) != 4:
            return
        channels = self._channels(labels, 1, node)
        if name == "adaptive_avg_pool2d" and after[2:] == (1, 1):
            self.priced.append(Priced(node.name, GlobalAvgPool(*before[1:]), {"channels": channels}))
        elif name == "max_pool2d":
            kernel, stride = (
                _two(_args(node)[1]),
                _two(_args(node)[2] if len(_args(node)) > 2 else _args(node)[1]),
            )
            if kernel[0] == kernel[1] and stride[0] == stride[1]:
                op = MaxPool(*before[1:], kernel=kernel[0], stride=stride[0])
                if op.out_shape[1:] == after[2:]:
                    self.priced.append(Priced(node.name, op, {"channels": channels}))

    def _move(self, node: Node, name: str) -> None:
        """Run the operation on the labels; parts of equal size are kept equal."""
        args = torch.fx.map_arg(_args(node), lambda n: self.labels.get(n, n))
        kwargs = torch.fx.map_arg(dict(node.kwargs), lambda n: self.labels.get(n, n))
        try:
            found = cast(Any, node.target)(*args, **kwargs)
        except Exception:  # noqa: BLE001  (whatever it is, its channels stay)
            self._unknown(node, name, [n for n in _tensors(node) if n in self.labels])
            return
        self.labels[node] = found
        if name in ("chunk", "split", "split_with_sizes"):
            parts = [part.contiguous().numpy().reshape(-1) for part in found]
            if len({tuple(part.shape) for part in found}) == 1:
                for part in parts[1:]:
                    self.unions.join(parts[0], part)
            else:
                self._fix(
                    args[0], f"{name} in {_module(node) or 'the model'} makes parts of unequal size", ""
                )

    def _pair(self, node: Node, name: str, inputs: Sequence[Node]) -> None:
        shape = _shape(node)
        parameters = [found for arg in _args(node) if (found := self._stored(arg)) is not None]
        if not inputs:
            self.labels[node] = torch.zeros((), dtype=torch.long).expand(shape)
            return
        whole = next((n for n in inputs if _shape(n) == shape), inputs[0])
        self.labels[node] = self.labels[whole].expand(shape)
        for parameter in parameters:
            self._along(parameter, self.labels[node], node)
        if len(inputs) == 2:
            aligned = _aligned(*(self.labels[n] for n in inputs))
            if aligned is not None:
                self.unions.join(*(labels.reshape(-1).tolist() for labels in aligned))
            if name in ("add", "add_") and len(shape) == 4 and _shape(inputs[0]) == _shape(inputs[1]):
                channels = self._channels(self.labels[node], 1, node)
                self.priced.append(Priced(node.name, Add(*shape[1:]), {"channels": channels}))

    def _count(self, names: Sequence[str | None]) -> None:
        """Note that an operation has these parameters; those of a module that is used again count once."""
        for name in names:
            if name is None:
                continue
            if self.first_name[name] in self.counted:
                self._parameters(name, -1)
            self.counted.add(self.first_name[name])

    def _parameters(self, name: str, sign: int) -> None:
        """Count the elements of one parameter."""
        tensor, axes = self.tensors[name], self.slices.get(self.first_name[name], {})
        fixed = math.prod(size for axis, size in enumerate(tensor.shape) if axis not in axes)
        fields = dict(zip(("channels", "others"), axes.values(), strict=False))
        counts = {field: len(labels) for field, labels in fields.items()}
        self.priced.append(Priced(name, Parameters(each=sign * fixed, **counts), fields))

    def _along(self, parameter: str, labels: Tensor, node: Node) -> None:
        """Slice a parameter that is multiplied with or added to channels, axis by axis."""
        tensor = self.tensors[parameter]
        for axis in range(tensor.dim()):
            if tensor.shape[axis] > 1:
                at = labels.dim() - tensor.dim() + axis
                self._slice(parameter, axis, self._channels(labels, at, node))

    def _reduce(self, node: Node, source: Node) -> None:
        labels, shape = self.labels[source], _shape(node)
        axes: Any = _args(node)[1] if len(_args(node)) > 1 else node.kwargs.get("dim")
        listed = [axes] if isinstance(axes, int) else list(axes or range(labels.dim()))
        first = labels
        for axis in sorted({int(axis) % labels.dim() for axis in listed}):
            if bool((labels != labels.select(axis, 0).unsqueeze(axis)).any()):
                self._unknown(node, f"{_name(node)} over channels", [source])
                return
            first = first.narrow(axis, 0, 1)
        self.labels[node] = first.reshape(shape)
        if len(_shape(source)) == 4 and math.prod(shape) == math.prod(shape[:2]):
            channels = self._channels(labels, 1, node)
            self.priced.append(Priced(node.name, GlobalAvgPool(*_shape(source)[1:]), {"channels": channels}))

    # Bookkeeping -------------------------------------------------------------------------------------

    def _stored(self, value: Any) -> str | None:
        """Return the name of a parameter or buffer that is an input of the graph."""
        return self.stored.get(value.name) if isinstance(value, Node) else None

    def _channels(self, labels: Tensor, axis: int, node: Node) -> Labels:
        """Return the labels along one axis; where they differ along others too, they have to stay."""
        found = labels
        for other in range(labels.dim()):
            if other != axis:
                if labels.stride(other) and bool((found != found.narrow(other, 0, 1)).any()):
                    self._fix(
                        labels,
                        f"channels are mixed with positions before {_module(node) or node.name}",
                        "put the layer before it on the list of those to ignore",
                    )
                    return np.zeros(labels.shape[axis], dtype=np.int64)
                found = found.narrow(other, 0, 1)
        return np.array(found.reshape(-1).numpy(), dtype=np.int64)

    def _slice(self, name: str, axis: int, labels: Labels) -> None:
        """Note that an axis of a parameter holds channels; of a parameter used twice they are the same."""
        axes = self.slices.setdefault(self.first_name[name], {})
        if axis in axes:
            self.unions.join(axes[axis], labels)
        axes.setdefault(axis, labels)

    def _fix(self, labels: Any, reason: str, advice: str) -> None:
        for part in labels if isinstance(labels, tuple | list) else [labels]:
            flat = np.unique(part.contiguous().numpy())
            self.reasons.append((flat, reason, advice))
            self.unions.fix(flat)

    def _rest(self) -> None:
        """Count the parameters that no operation above has."""
        for name, first in self.first_name.items():
            if name == first and first not in self.counted and isinstance(self.tensors[name], nn.Parameter):
                self._parameters(name, 1)

    def _kept(self) -> tuple[Kept, ...]:
        """Say for each layer why channels of it have to stay."""
        found = []
        for name, labels in self.made.items():
            fixed = self.unions.roots(labels) == FIXED
            if not fixed.any():
                continue
            reason, advice = next(
                ((why, what) for members, why, what in self.reasons if np.intersect1d(members, labels).size),
                ("it is tied to channels that have to stay", ""),
            )
            found.append(Kept(name, int(fixed.sum()), reason, advice))
        return tuple(found)


def _name(node: Node) -> str:
    """Return the name of what a node calls, without its overload: `conv2d`, `getitem`."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return getattr(packet or target, "__name__", str(target)).removeprefix("aten.")


def _module(node: Node) -> str:
    """Return the name of the innermost module that a node ran in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _tensors(node: Node) -> list[Node]:
    return list(node.all_input_nodes)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _two(value: Any) -> tuple[int, int]:
    listed = [value] if isinstance(value, int) else list(value)
    return (int(listed[0]), int(listed[-1]))


def _spread(labels: Labels, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Return labels of one axis for a whole tensor, without copies."""
    view = [1] * len(shape)
    view[axis] = len(labels)
    return torch.from_numpy(labels).view(view).expand(shape)


def _resized(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the labels of an image of another size."""
    return labels[..., :1, :1].expand(shape)


def _aligned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the labels that meet when two tensors are combined; `None` if one channel meets many."""
    rank = max(first.dim(), second.dim())
    one, two = (t.reshape((1,) * (rank - t.dim()) + tuple(t.shape)) for t in (first, second))
    for axis in range(rank):
        if one.shape[axis] == two.shape[axis] and (one.stride(axis) or two.stride(axis)):
            continue
        for labels in (one, two):
            if bool((labels != labels.narrow(axis, 0, 1)).any()):
                return None
        one, two = one.narrow(axis, 0, 1), two.narrow(axis, 0, 1)
    return one, two
