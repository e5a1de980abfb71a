"""From a slice of the supernet to a plain PyTorch network, and back to the optimizer: what is active."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autocompress.elastic.layers import ElasticLayer, memory_format
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Statistics, Supernet, statistics_of
from autocompress.errors import SpaceError
from autocompress.network import build_network, module_name, user_model, whole_network
from autocompress.ops import Add
from autocompress.space import Architecture


@torch.no_grad()
def extract(supernet: Supernet, arch: Architecture, statistics: Statistics | None = None) -> nn.Sequential:
    """Copy one sub-network out of the supernet.

    Its outputs equal those of the slice bit for bit, at equal memory format (which is kept), dtype, threads
    and batch size.

    Args:
        supernet: Not changed.
        arch: The sub-network.
        statistics: From `recalibrate`. Without them the network is for training only: its running
            statistics are those of PyTorch's initialisation.

    Returns:
        A network of `torch.nn` modules and `autocompress.network.SqueezeExcite`, in evaluation mode with
        statistics, else in training mode; it takes images of the architecture's own resolution.

    Raises:
        SpaceError: The architecture is of another space, or the statistics are of another sub-network.
    """
    blocks = supernet.space.operations(supernet.space.encode([arch]))
    network = build_network(blocks, initialise=False)
    state: dict[str, Tensor] = {}
    channels_last = memory_format(supernet.parameters()) == torch.channels_last
    for name, layers in supernet.plan(arch):
        for position, (layer, op) in enumerate(layers):
            if layer is None or isinstance(op, Add):
                continue
            prefix = f"{module_name(name)}.{position}"
            sliced = layer.sliced(op)
            for key, tensor in sliced.items():
                last = channels_last and tensor.dim() == 4
                keep = torch.channels_last if last else torch.contiguous_format
                state[f"{prefix}.{key}"] = tensor.detach().clone(memory_format=keep)
            for norm, (key, width) in layer.norms(op).items():
                mean, variance = torch.zeros(width), torch.ones(width)
                if statistics is not None:
                    mean, variance = statistics_of(statistics, key, width)
                like = sliced[f"{norm}weight"]
                state[f"{prefix}.{norm}running_mean"] = mean.to(like, copy=True)
                state[f"{prefix}.{norm}running_var"] = variance.to(like, copy=True)
                state[f"{prefix}.{norm}num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    _fill(network, state)
    return network.train(statistics is None)


def inherited(
    supernet: Supernet, arch: Architecture, images: Iterable[Tensor], *, brought: bool = False
) -> nn.Module:
    """Copy one sub-network out of the supernet, with batch-norm statistics of its own.

    Args:
        supernet: Not changed.
        arch: The sub-network.
        images: Batches of training images for the statistics.
        brought: Whether the weights are of a model that somebody brought, and not trained since: where all of
            it is asked for it is then itself, with its own statistics.

    Returns:
        A network in evaluation mode, nothing of which is shared with the supernet.
    """
    model = user_model(supernet.space, supernet.space.encode([arch]))
    if brought and model and model.is_whole:
        return whole_network(supernet.space)
    return extract(supernet, arch, recalibrate(supernet, arch, images))


def _fill(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put every parameter and buffer in its place; `load_state_dict` would take longer than all else here."""
    filled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for prefix, module in network.named_modules():
        for name, empty in module._parameters.items():
            if empty is None:
                continue
            # Weights that two layers share have one name. (The empty one is kept, and so is its id.)
            if id(empty) not in filled:
                filled[id(empty)] = empty, nn.Parameter(state.pop(f"{prefix}.{name}"))
            module._parameters[name] = filled[id(empty)][1]
        for name in module._buffers:
            module._buffers[name] = state.pop(f"{prefix}.{name}")
    if state:
        raise SpaceError(f"the static network has no place for {', '.join(state)}")


def active_masks(supernet: Supernet, archs: Iterable[Architecture]) -> dict[str, Tensor]:
    """Return which entries of each parameter any of the architectures uses, by parameter name.

    Parameters that all of them leave out entirely are absent.
    """
    masks: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in supernet.named_parameters()}
    whole: set[ElasticLayer] = set()
    for arch in archs:
        for _, layers in supernet.plan(arch):
            for layer, op in layers:
                own = {} if layer is None else dict(layer.named_parameters())
                if layer is None or layer in whole or not own:
                    continue
                for key, mask in layer.active(op).items():
                    name = names[id(own[key])]
                    masks[name] = masks[name] | mask if name in masks else mask
                if all(bool(masks[names[id(parameter)]].all()) for parameter in own.values()):
                    whole.add(layer)
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


@contextmanager
def only_active(
    supernet: Supernet, optimizer: torch.optim.Optimizer, archs: Iterable[Architecture]
) -> Iterator[None]:
    """Keep an optimizer step from moving what no architecture used: weight decay and momentum would.

    Parameters without any gradient are the optimizer's own to skip. Of the others, the entries outside of
    every slice are put back after the step, their optimizer state too.

    Args:
        supernet: The supernet whose gradients were computed.
        optimizer: Its optimizer; `step` is called inside the context.
        archs: The architectures that took part in the gradient.
    """
    masks = active_masks(supernet, archs)
    kept: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
    for name, parameter in supernet.named_parameters():
        mask = masks.get(name)
        if parameter.grad is None or mask is None or bool(mask.all()):
            continue
        state = {
            key: value.clone()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
        kept.append((parameter, mask, parameter.detach().clone(), state))
    yield
    with torch.no_grad():
        for parameter, mask, before, state in kept:
            parameter.copy_(torch.where(mask, parameter, before))
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.copy_(torch.where(mask, value, state.get(key, torch.zeros_like(value))))
