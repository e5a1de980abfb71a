"""Which layers of a user's model can be replaced, found by running a copy of it once.

A replacement is called like the layer, and has no weight of its own name. So layers that the model reads
other than by calling them have to stay.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.errors import FactorizationError
from autocompress.factorize.layers import refusal
from autocompress.factorize.methods import Geometry, Pair, geometry_of

Inputs = Tensor | tuple[Tensor, ...]
"""What the model is called with."""

# Layers that are reported where they stay, by the name of their class or of one it is made of.
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Call:
    """One run of a layer.

    Attributes:
        count: Images; of a linear layer vectors.
        size: Height and width of its images; of a linear layer (1, 1).
    """

    count: int
    size: Pair


@dataclass(frozen=True)
class Candidate:
    """A layer that can be replaced.

    Attributes:
        name: The first of the module in the model; empty if it is the model.
        kind: Name of its class.
        geometry: Its shape.
        calls: Its runs on the example.
        bias: Numbers of its bias.
    """

    name: str
    kind: str
    geometry: Geometry
    calls: tuple[Call, ...]
    bias: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all runs; a bias counts nothing."""
        sizes = ((call.count, self.geometry.out_size(call.size)) for call in self.calls)
        return self.geometry.weights * sum(count * height * width for count, (height, width) in sizes)

    @property
    def params(self) -> int:
        """Weights and bias."""
        return self.geometry.weights + self.bias


@dataclass(frozen=True)
class Left:
    """A layer that stays as it is.

    Attributes:
        layer: Its name.
        reason: Why.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What one run showed.

    Attributes:
        candidates: Layers that can be replaced, in the order of the model.
        left: Those that cannot.
    """

    candidates: tuple[Candidate, ...]
    left: tuple[Left, ...]


def find(model: nn.Module, example: Inputs) -> Found:
    """Look at the layers of a model.

    Args:
        model: Not changed; a copy that shares its weights runs in evaluation mode.
        example: What the model is called with, such as one image.

    Raises:
        FactorizationError: It is no module, or cannot be copied or run.
    """
    still = quiet_copy(model)
    names = {module: name for name, module in still.named_modules()}
    known: dict[nn.Module, str] = {
        module: name for module, name in names.items() if isinstance(module, _LAYERS)
    }
    owners = Counter(
        id(parameter)
        for module in names
        for parameter in module._parameters.values()
        if parameter is not None
    )
    fused = _fused(still)
    watch = _watched(still, [module for module in known if not refusal(module)], example)
    candidates: list[Candidate] = []
    left: list[Left] = []
    for module, name in known.items():
        parameters = [p for p in module._parameters.values() if p is not None]
        reason = refusal(module)
        if not reason and module in fused:
            reason = f"it is a part of {fused[module]}, which reads its weights in kernels of its own"
        elif not reason and any(owners[id(parameter)] > 1 for parameter in parameters):
            reason = "it shares a parameter with another module"
        elif not reason and module in watch.foreign:
            reason = "its weights are read elsewhere than in its own forward()"
        elif not reason and module not in watch.calls:
            reason = "it does not run in evaluation mode on the example"
        if reason:
            left.append(Left(name, reason))
            continue
        bias = module._parameters.get("bias")
        candidates.append(
            Candidate(
                name,
                type(module).__name__,
                geometry_of(module),
                tuple(watch.calls[module]),
                0 if bias is None else bias.numel(),
            )
        )
    return Found(tuple(candidates), tuple(left))


def quiet_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that shares all tensors, to run and to hang hooks on.

    Raises:
        FactorizationError: It is no module, has lazy parameters or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise FactorizationError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    return deep_copy(model, {id(tensor): tensor for tensor in tensors}).eval()


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model.

    Raises:
        FactorizationError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise FactorizationError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}; tensors that were "
            "computed must not be attributes of it"
        ) from error


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model without gradients.

    Raises:
        FactorizationError: It cannot run on these inputs.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    for one in given:
        if not isinstance(one, Tensor):
            raise FactorizationError(f"inputs must be a tensor or a tuple of them, got {type(one).__name__}")
    try:
        with torch.no_grad():
            return model(*given)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, one.shape)) or "a number" for one in given)
        raise FactorizationError(
            f"{type(model).__name__} cannot run on inputs of {shapes}: {type(error).__name__}: {error}"
        ) from error


def _fused(model: nn.Module) -> Mapping[nn.Module, str]:
    """Return modules inside PyTorch's own ones, such as its transformers, with the name of that class."""
    return {
        inner: type(outer).__name__
        for outer in model.modules()
        if type(outer).__module__.startswith("torch.nn.") and not isinstance(outer, _CONTAINERS)
        for inner in outer.modules()
        if inner is not outer
    }


class _Watch(TorchFunctionMode):
    """Sees which parameters are used while none of their own modules runs."""

    def __init__(self, owners: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.owners = owners
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.running: list[nn.Module] = []
        self.foreign: set[nn.Module] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors([*args, *(kwargs or {}).values()]):
            owner = self.owners.get(id(tensor))
            if owner is not None and (not self.running or self.running[-1] is not owner):
                self.foreign.add(owner)
        return func(*args, **(kwargs or {}))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _watched(model: nn.Module, layers: Sequence[nn.Module], example: Inputs) -> _Watch:
    """Run a model once and see what these layers are given, and who reads their weights."""
    watch = _Watch({id(p): layer for layer in layers for p in layer._parameters.values() if p is not None})

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        geometry = geometry_of(layer)
        # Asked of a tensor, the shape of an input that is a weight would count as a use of it.
        shape = tuple(given.shape)
        size: Pair = (1, 1) if isinstance(layer, nn.Linear) else (shape[-2], shape[-1])
        numbers = geometry.in_channels * size[0] * size[1]
        watch.calls[layer].append(Call(given.numel() // numbers, size))
        watch.running.append(layer)

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.running.pop()

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with watch:
            called(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return watch
