"""Elastic layers: full-size weights, of which an operation uses a slice.

Each layer serves one place in a block, for every setting the space allows there. What runs is always given
by an `OpSpec`; a layer holds no notion of what is active. Channels are prefixes, kernels centre crops, each
smaller kernel through its learned transform (Cai et al., Once-for-All, ICLR 2020, section 3.3).
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.errors import SpaceError
from autocompress.ops import ACTIVATIONS, Conv2d, GlobalAvgPool, Linear, MaxPool, OpSpec, SqueezeExcite

NORM_EPS = 1e-5

MAX_STATICS = 256
"""Modules without values that a layer keeps for operations it has run: a cell may have thousands."""


class Normalise(Protocol):
    """Batch norm as a function; whoever gives it decides the statistics."""

    def __call__(self, name: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
        """Normalise `(batch, channels, ...)`.

        Args:
            name: Of the layer.
            x: What comes in.
            weight: Scale, `(channels,)`.
            bias: Shift, `(channels,)`.
            eps: What is added to the variance.
        """
        ...


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


class ElasticLayer(nn.Module):
    """One place in a block.

    Attributes:
        name: Block and place; the key of its batch-norm statistics.
    """

    def __init__(self, name: str) -> None:
        """Name the layer."""
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, op: OpSpec, normalise: Normalise) -> Tensor:
        """Run one operation on `(batch, *op.in_shape)`."""
        raise NotImplementedError

    def sliced(self, op: OpSpec, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the parameters of the static module of an operation, by their name there.

        Args:
            op: The operation.
            parameters: What to slice instead of the layer's own parameters, by name.
        """
        raise NotImplementedError

    def norms(self, op: OpSpec) -> dict[str, tuple[str, int]]:
        """Return the batch norms of the static module of an operation.

        Returns:
            What the names of its tensors there start with (`"bn."`), to the key of its statistics and its
            channels.
        """
        return {}

    def active(self, op: OpSpec) -> dict[str, Tensor]:
        """Return which entries of each parameter an operation uses, as boolean masks by parameter name."""
        # Slices of ones have a positive derivative exactly where they read.
        ones = {name: torch.ones_like(p, requires_grad=True) for name, p in self.named_parameters()}
        with torch.enable_grad():
            slices = list(self.sliced(op, ones).values())
            if not slices:
                return {name: torch.zeros_like(one, dtype=torch.bool) for name, one in ones.items()}
            if {id(one) for one in ones.values()} == {id(tensor) for tensor in slices}:
                return {name: torch.ones_like(one, dtype=torch.bool) for name, one in ones.items()}
            total = torch.stack([tensor.sum() for tensor in slices]).sum()
            gradients = torch.autograd.grad(total, list(ones.values()), allow_unused=True)
        return {
            name: torch.zeros_like(one, dtype=torch.bool) if gradient is None else gradient > 0
            for (name, one), gradient in zip(ones.items(), gradients, strict=True)
        }


def _prefix(tensor: Tensor, *sizes: int) -> Tensor:
    """Return the leading entries along each axis; the tensor itself where it has just that size."""
    for axis, size in enumerate(sizes):
        if tensor.shape[axis] != size:
            tensor = tensor.narrow(axis, 0, size)
    return tensor


def _entries(tensor: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    """Return the named entries along some axes, laid out as the tensor is."""
    # By its strides: a 1x1 kernel counts as contiguous in both formats, and runs differently.
    last = tensor.dim() == 4 and tensor.stride()[1::2] == (1, tensor.shape[1])
    for axis, entries in axes.items():
        tensor = tensor.index_select(axis, torch.as_tensor(entries, device=tensor.device))
    return tensor.clone(memory_format=torch.channels_last) if last and axes else tensor


def memory_format(weights: Iterable[Tensor]) -> torch.memory_format:
    """Return the memory format of convolution weights: that of the first one that is only in one of both."""
    for weight in weights:
        last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        if last and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


class ElasticConv2d(ElasticLayer):
    """Convolution, batch norm and activation with elastic kernel, width, depthwise and groups.

    Args:
        name: Block and place.
        full: The operation with the largest shapes.
        kernels: Every kernel size that occurs.
        kernel_transform: Whether smaller kernels pass through a learned matrix, one a size, shared by all
            channels and initialised to the identity; otherwise they are plain centre crops.
    """

    def __init__(self, name: str, full: Conv2d, kernels: Sequence[int], *, kernel_transform: bool) -> None:
        """Make the parameters with He initialisation by fan-out."""
        super().__init__(name)
        self.full = full
        shape = (full.out_channels, full.in_channels // full.groups, full.kernel, full.kernel)
        fan_out = full.kernel**2 * full.out_channels // full.groups
        self.weight = nn.Parameter(torch.empty(shape).normal_(0, math.sqrt(2 / fan_out)))
        self.bias = nn.Parameter(torch.zeros(full.out_channels)) if full.bias else None
        self.norm_weight = nn.Parameter(torch.ones(full.out_channels)) if full.norm else None
        self.norm_bias = nn.Parameter(torch.zeros(full.out_channels)) if full.norm else None
        self.kernels = tuple(sorted(set(kernels), reverse=True))
        # The slice of the last operation that ran without gradients, and what it was cut from.
        self._kept: tuple[tuple[object, ...], tuple[Tensor, ...], Tensor] | None = None
        self.transforms = nn.ParameterDict(
            {str(kernel): nn.Parameter(torch.eye(kernel**2)) for kernel in self.kernels[1:]}
            if kernel_transform
            else {}
        )

    def _weight(self, op: Conv2d, weight: Tensor, transforms: Mapping[str, Tensor]) -> Tensor:
        full, inputs = self.full, op.in_channels // op.groups
        if 1 < op.groups == full.groups and not full.depthwise:
            # Each group keeps its own filters: prefixes inside the groups.
            grouped = weight.view(full.groups, -1, *weight.shape[1:])
            weight = grouped[:, : op.out_channels // op.groups, :inputs].flatten(0, 1)
        else:
            weight = _prefix(weight, op.out_channels, inputs)
        for kernel in self.kernels:
            if kernel < op.kernel:
                break
            margin = (weight.shape[-1] - kernel) // 2
            if margin:
                weight = weight[..., margin : margin + kernel, margin : margin + kernel]
                if str(kernel) in transforms:
                    mixed = F.linear(weight.flatten(2), transforms[str(kernel)])
                    weight = mixed.view(*mixed.shape[:2], kernel, kernel)
        return weight

    def _current_weight(self, op: Conv2d) -> Tensor:
        """Return the slice of the weights; without gradients it is kept until weights or slice change.

        Evaluation runs one sub-network over many batches; cutting its slices anew for each costs a tenth of
        a forward pass of one image.
        """
        transforms = cast(Mapping[str, Tensor], self.transforms)
        if torch.is_grad_enabled():
            return self._weight(op, self.weight, transforms)
        sources = (self.weight, *(transforms.values() if op.kernel < self.full.kernel else ()))
        stamp = (op, *((source.data_ptr(), source._version) for source in sources))
        kept = self._kept
        if kept is None or kept[0] != stamp:
            weight = self._weight(op, self.weight, transforms)
            # The sources are kept too, so that no other tensor comes to lie at their address.
            kept = (stamp, sources, weight.contiguous(memory_format=memory_format([self.weight])))
            self._kept = kept
        return kept[2]

    def forward(self, x: Tensor, op: OpSpec, normalise: Normalise) -> Tensor:
        """Map `(batch, in_channels, height, width)` to the operation's output shape."""
        op = cast(Conv2d, op)
        width = op.out_channels
        x = F.conv2d(
            x,
            self._current_weight(op),
            _prefix(self.bias, width) if self.bias is not None and op.bias else None,
            stride=op.stride,
            padding=op.kernel // 2,
            groups=op.groups,
        )
        if self.norm_weight is not None and self.norm_bias is not None and op.norm:
            x = normalise(self.name, x, _prefix(self.norm_weight, width), _prefix(self.norm_bias, width))
        return _ACTIVATE[op.activation](x)

    def sliced(self, op: OpSpec, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return `conv.weight`, `conv.bias`, `bn.weight` and `bn.bias`, as far as they exist."""
        op = cast(Conv2d, op)
        own = dict(self.named_parameters()) if parameters is None else parameters
        transforms = {str(k): own[f"transforms.{k}"] for k in self.kernels if f"transforms.{k}" in own}
        tensors = {"conv.weight": self._weight(op, own["weight"], transforms)}
        sources = {"conv.bias": "bias"} if op.bias else {}
        if op.norm:
            sources |= {"bn.weight": "norm_weight", "bn.bias": "norm_bias"}
        for target, source in sources.items():
            if source in own:
                tensors[target] = _prefix(own[source], op.out_channels)
        return tensors

    def norms(self, op: OpSpec) -> dict[str, tuple[str, int]]:
        """Return the one batch norm, if the operation has it."""
        op = cast(Conv2d, op)
        return {"bn.": (self.name, op.out_channels)} if op.norm and self.norm_weight is not None else {}


class ElasticLinear(ElasticLayer):
    """Linear layer on the flattened input, elastic in both widths."""

    def __init__(self, name: str, full: Linear) -> None:
        """Make the parameters; a classifier starts near zero."""
        super().__init__(name)
        self.weight = nn.Parameter(torch.empty(full.out_features, full.in_features).normal_(0, 0.01))
        self.bias = nn.Parameter(torch.zeros(full.out_features)) if full.bias else None

    def forward(self, x: Tensor, op: OpSpec, normalise: Normalise) -> Tensor:
        """Map `(batch, ...)` to `(batch, out_features)`."""
        op = cast(Linear, op)
        bias = _prefix(self.bias, op.out_features) if self.bias is not None and op.bias else None
        weight = _prefix(self.weight, op.out_features, op.in_features)
        return _ACTIVATE[op.activation](F.linear(x.flatten(1), weight, bias))

    def sliced(self, op: OpSpec, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return `linear.weight` and `linear.bias`."""
        op = cast(Linear, op)
        own = dict(self.named_parameters()) if parameters is None else parameters
        tensors = {"linear.weight": _prefix(own["weight"], op.out_features, op.in_features)}
        if "bias" in own and op.bias:
            tensors["linear.bias"] = _prefix(own["bias"], op.out_features)
        return tensors


class ElasticSqueezeExcite(ElasticLayer):
    """Squeeze-excite, elastic in channels and hidden width."""

    def __init__(self, name: str, full: SqueezeExcite) -> None:
        """Make the parameters with the initialisation of a 1x1 convolution."""
        super().__init__(name)
        self.full = full
        reduce, expand = nn.Conv2d(full.channels, full.hidden, 1), nn.Conv2d(full.hidden, full.channels, 1)
        self.reduce_weight, self.reduce_bias = reduce.weight, reduce.bias
        self.expand_weight, self.expand_bias = expand.weight, expand.bias

    def forward(self, x: Tensor, op: OpSpec, normalise: Normalise, hidden: Tensor | None = None) -> Tensor:
        """Map `(batch, channels, height, width)` to the same shape, hidden channels times gates `(hidden,)`.

        A hidden channel has a bias: it is not zero just because what it reads is.
        """
        op = cast(SqueezeExcite, op)
        tensors = self._sliced(op, self.reduce_weight, self.reduce_bias, self.expand_weight, self.expand_bias)
        scale = F.conv2d(x.mean((2, 3), keepdim=True), tensors[0], tensors[1]).relu()
        if hidden is not None:
            scale = scale * hidden.view(-1, 1, 1)
        return x * F.hardsigmoid(F.conv2d(scale, tensors[2], tensors[3]))

    @staticmethod
    def _sliced(op: SqueezeExcite, *tensors: Tensor | None) -> list[Tensor]:
        shapes = ((op.hidden, op.channels), (op.hidden,), (op.channels, op.hidden), (op.channels,))
        return [_prefix(cast(Tensor, t), *shape) for t, shape in zip(tensors, shapes, strict=True)]

    def sliced(self, op: OpSpec, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return weights and biases of `reduce` and `expand`."""
        own = dict(self.named_parameters()) if parameters is None else parameters
        names = ("reduce.weight", "reduce.bias", "expand.weight", "expand.bias")
        tensors = self._sliced(cast(SqueezeExcite, op), *(own[name.replace(".", "_")] for name in names))
        return dict(zip(names, tensors, strict=True))


class _SharedNorm(nn.Module):
    """Scale and shift of a batch norm; whoever runs the supernet decides the statistics."""

    def __init__(self, norm: nn.BatchNorm2d, key: str) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.key, self.eps = key, norm.eps
        self.normalise: Normalise | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(batch, channels, height, width)`."""
        return cast(Normalise, self.normalise)(self.key, x, self.weight, self.bias, self.eps)


class _Intercepted(TorchFunctionMode):
    """Lets a given function take the place of batch norm; notes what was normalised."""

    def __init__(self, instead: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.instead, self.seen = instead, list[Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.seen.append(args[0])
        return self.instead(args[0])


class _SharedVariant(_SharedNorm):
    """A batch norm of a class of its own, such as one with an activation in it: what else it does is kept."""

    def __init__(self, norm: nn.BatchNorm2d, key: str) -> None:
        super().__init__(norm, key)
        for name, child in norm.named_children():
            self.add_module(name, child)
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        # Not a child: its scale and shift are those of this module, by the names that they had.
        self.__dict__["_hidden"] = (norm,)

    def train(self, mode: bool = True) -> Self:
        """Switch the norm as well."""
        self.__dict__["_hidden"][0].training = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Run the norm's own forward; where it normalises, the given statistics are used."""
        with _Intercepted(super().forward):
            return cast(Tensor, self.__dict__["_hidden"][0](x))


def is_shared_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose statistics can be computed for each sub-network.

    One of a class of its own is, if it has no buffers but statistics, and normalises its input once.
    """
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return False
    if not (module.affine and module.track_running_stats):
        return False
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return True
    own = {"running_mean", "running_var", "num_batches_tracked"}
    if {name for name, _ in module.named_buffers()} - own:
        return False
    image = (2, 2) if isinstance(module, nn.BatchNorm2d) else ()
    x = torch.zeros(2, module.num_features, *image, device=module.weight.device, dtype=module.weight.dtype)
    watched = copy.deepcopy(module).eval()
    try:
        with torch.no_grad(), _Intercepted(lambda seen: seen) as intercepted:
            watched(x)
    except Exception:  # noqa: BLE001
        # Whatever its forward does with others than images, it is none that is known.
        return False
    return len(intercepted.seen) == 1 and intercepted.seen[0] is x


def _without_statistics(module: nn.Module, key: str) -> nn.Module:
    """Replace every batch norm inside, or the module itself; its statistics are called by its path."""
    if is_shared_norm(module):
        plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        return (_SharedNorm if plain else _SharedVariant)(cast(nn.BatchNorm2d, module), key)
    for name, child in list(module.named_children()):
        module.add_module(name, _without_statistics(child, f"{key}.{name}"))
    return module


class ElasticModule(ElasticLayer):
    """Any other operation: the parameters of one module, each sliced to the leading entries.

    Batch norms inside the module are run as those of `ElasticConv2d`: with the statistics of the very
    sub-network.

    Raises:
        SpaceError: The module has other buffers, whose slices would share statistics between sub-networks.
    """

    def __init__(self, name: str, kind: str, module: nn.Module) -> None:
        """Take the parameters of a module that holds those of every operation of this kind."""
        super().__init__(name)
        self.module = _without_statistics(module, name)
        if any(True for _ in self.module.buffers()):
            raise SpaceError(
                f"{name}: the module of {kind} has buffers, which slices cannot share; leave normalisation "
                "to Conv2d(norm=True) or to nn.BatchNorm2d with scale and shift, which are recalibrated for "
                "every sub-network"
            )
        self._statics: dict[OpSpec, tuple[nn.Module, dict[str, _SharedNorm]]] = {}

    def _static(self, op: OpSpec) -> tuple[nn.Module, dict[str, _SharedNorm]]:
        """Return the module of an operation, without values, and its batch norms by their path."""
        known = self._statics.get(op)
        if known is None:
            with torch.device("meta"):
                module = _without_statistics(op.module(), self.name)
            norms = {path: part for path, part in module.named_modules() if isinstance(part, _SharedNorm)}
            if len(self._statics) >= MAX_STATICS:
                self._statics.clear()
            known = self._statics[op] = (module, norms)
        return known

    def forward(self, x: Tensor, op: OpSpec, normalise: Normalise) -> Tensor:
        """Run the module of the operation on the sliced parameters."""
        static, norms = self._static(op)
        static.train(self.training)  # dropout and the like
        for norm in norms.values():
            norm.normalise = normalise
        try:
            result = torch.func.functional_call(static, self.sliced(op), (x,))
        finally:
            for norm in norms.values():
                norm.normalise = None
        return cast(Tensor, result)

    def parts(self, normalise: Normalise) -> "SharedParts":
        """Return the parameters of all operations, with batch norms that run as given."""
        return SharedParts(self.module, normalise)

    def sliced(self, op: OpSpec, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the entries of each parameter that the operation uses: leading ones, or those it names."""
        own = dict(self.named_parameters()) if parameters is None else parameters
        shapes = {name: p.shape for name, p in self._static(op)[0].named_parameters()}
        named = op.entries
        return {
            name: _entries(own[f"module.{name}"], named[name])
            if name in named
            else _prefix(own[f"module.{name}"], *shape)
            for name, shape in shapes.items()
        }

    def norms(self, op: OpSpec) -> dict[str, tuple[str, int]]:
        """Return the batch norms inside the module."""
        norms = self._static(op)[1]
        return {f"{path}." if path else "": (norm.key, len(norm.weight)) for path, norm in norms.items()}


class SharedParts:
    """What all operations of one kind at one place share, by its path; cells run their mixtures on it."""

    def __init__(self, module: nn.Module, normalise: Normalise) -> None:
        """Hold what `OpSpec.shared_module` made."""
        self._module, self._normalise = module, normalise

    def parameter(self, path: str) -> Tensor:
        """Return a whole parameter."""
        return self._module.get_parameter(path)

    def norm(self, path: str, x: Tensor) -> Tensor:
        """Run a batch norm on its leading channels, `(batch, channels, height, width)`."""
        norm = cast(_SharedNorm, self._module.get_submodule(path))
        width = x.shape[1]
        return self._normalise(norm.key, x, norm.weight[:width], norm.bias[:width], norm.eps)


def slot(position: int, op: OpSpec) -> str:
    """Return the name of a place in a block: operations of one kind at one position share weights."""
    kind = "depthwise" if isinstance(op, Conv2d) and op.depthwise else type(op).__name__.lower()
    return f"{position}_{kind}"


def elastic_layer(name: str, ops: Sequence[OpSpec], *, kernel_transform: bool) -> ElasticLayer:
    """Make the layer that serves all these operations.

    Args:
        name: Block and place.
        ops: Every operation that occurs at the place, all of one kind.
        kernel_transform: See `ElasticConv2d`.

    Raises:
        SpaceError: No operation has the largest size in every dimension, so none holds all slices.
    """
    shared = ops[0].shared_module(ops)
    if shared is not None:
        return ElasticModule(name, type(ops[0]).__name__, shared)
    full = max(ops, key=lambda op: op.params)
    for op in ops:
        if not _contains(_extents(full), _extents(op)):
            raise SpaceError(f"{name}: {full.key} is the largest operation but does not contain {op.key}")
    if isinstance(full, Conv2d):
        kernels = [cast(Conv2d, op).kernel for op in ops]
        if len({kernel % 2 for kernel in kernels}) > 1:
            raise SpaceError(
                f"{name}: odd and even kernels have no common centre, got {sorted(set(kernels))}"
            )
        return ElasticConv2d(name, full, kernels, kernel_transform=kernel_transform)
    if isinstance(full, Linear):
        return ElasticLinear(name, full)
    if isinstance(full, SqueezeExcite):
        return ElasticSqueezeExcite(name, full)
    return ElasticModule(name, type(full).__name__, full.module())


def _contains(mine: list[tuple[int, ...]], its: list[tuple[int, ...]]) -> bool:
    return len(mine) == len(its) and all(
        len(one) == len(other) and all(a >= b for a, b in zip(one, other, strict=True))
        for one, other in zip(mine, its, strict=True)
    )


def _extents(op: OpSpec) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of an operation."""
    match op:
        case Conv2d():
            return [(op.out_channels, op.in_channels // op.groups, op.kernel, int(op.bias), int(op.norm))]
        case Linear():
            return [(op.out_features, op.in_features, int(op.bias))]
        case SqueezeExcite():
            return [(op.channels, op.hidden)]
        case GlobalAvgPool() | MaxPool():
            return []
        case _:
            with torch.device("meta"):
                return [tuple(parameter.shape) for parameter in op.module().parameters()]


if set(_ACTIVATE) != set(ACTIVATIONS):
    raise SpaceError(f"activations differ: {sorted(set(_ACTIVATE) ^ set(ACTIVATIONS))}")
