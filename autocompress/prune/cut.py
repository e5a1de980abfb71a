"""Copies of a model with some entries of its tensors: the tensors are cut, everything else is as it was."""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Cut = tuple[str, int, Tensor]
"""Name of a parameter or buffer, one of its axes, and the positions along it that are kept."""


def copied(model: nn.Module, made: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a copy of a model with other tensors; those that several modules share stay shared.

    Hooks, attributes and flags are as in the model, and so is whether a parameter takes gradients.

    Args:
        model: Not changed.
        made: Is given the first name of each parameter and buffer, and it; returns what takes its place.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    memo: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        new = made(name, tensor.detach())
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
    return copy.deepcopy(model, memo)


def narrowed(model: nn.Module, cuts: Iterable[Cut], *, meta: bool = False) -> nn.Module:
    """Return a copy of a model that is left with the kept entries of its tensors.

    Args:
        model: Not changed.
        cuts: What is kept of the tensors that are cut.
        meta: Whether the copy is without values, on the meta device.
    """
    kept = by_name(cuts)

    def made(name: str, tensor: Tensor) -> Tensor:
        axes = kept.get(name, {})
        if meta:
            shape = [len(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape)]
            return torch.empty(shape, dtype=tensor.dtype, device="meta")
        cut = tensor
        for axis, positions in sorted(axes.items()):
            cut = cut.index_select(axis, positions.to(tensor.device))
        if cut is tensor:
            return tensor.clone()
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if last and not tensor.is_contiguous():
            return cut.contiguous(memory_format=torch.channels_last)
        return cut

    found = copied(model, made)
    for module in found.modules():
        _restate(module)
    return found


def masked(model: nn.Module, cuts: Iterable[Cut]) -> nn.Module:
    """Return a copy of a model in which the entries that are not kept are zero; other tensors are shared."""
    kept = by_name(cuts)

    def made(name: str, tensor: Tensor) -> Tensor:
        if name not in kept:
            return tensor
        new = tensor.clone()
        for axis, positions in kept[name].items():
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[positions] = False
            new.index_fill_(axis, gone.nonzero().flatten().to(tensor.device), 0.0)
        return new

    return copied(model, made)


def by_name(cuts: Iterable[Cut]) -> Mapping[str, Mapping[int, Tensor]]:
    """Return the kept positions by name and axis."""
    kept: dict[str, dict[int, Tensor]] = {}
    for name, axis, positions in cuts:
        kept.setdefault(name, {})[axis] = positions
    return kept


def _restate(module: nn.Module) -> None:
    """Make a module say the widths that its tensors have."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Conv2d) and weight is not None:
        out, per_group = weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = out // (module.out_channels // module.in_channels)
        module.in_channels, module.out_channels = per_group * module.groups, out
    elif isinstance(module, nn.ConvTranspose2d) and weight is not None:
        entering, per_group = weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = entering
        module.in_channels, module.out_channels = entering, per_group * module.groups
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for tensor in (weight, module._buffers.get("running_mean")):
            if tensor is not None:
                module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU) and weight is not None:
        module.num_parameters = len(weight)
