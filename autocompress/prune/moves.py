"""Operations that only move channels about: they are run on the labels as they are.

Some cut channels into parts that have to stay equal (chunks, groups that are shuffled): there the labels of
the parts are joined. Whether a model then runs with fewer channels also depends on how its `forward()` writes
its sizes, as numbers or as `x.shape`; the graph does not tell these apart, a trial does (`trial.py`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node, map_arg

from autocompress.prune.graph import argument, function_name, place, shape_of
from autocompress.prune.label_tensor import axes_of, compact, concatenated, resized, rows, spread
from autocompress.prune.labels import FIXED, Reason, Unions

_SHAPES = {
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze",
    "unsqueeze",
}  # fmt: skip
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split"}
_OTHERS = {
    "permute", "transpose", "slice", "select", "expand", "expand_as", "unbind", "stack", "numpy_T", "t",
    "movedim", "narrow", "flip", "roll", "repeat", "swapaxes", "swapdims", "moveaxis", "mT",
}  # fmt: skip


def moved(node: Node, labels: Callable[[Node], Any], unions: Unions) -> Any:
    """Return the labels of what a node gives.

    Args:
        node: A call of a function of `MOVES`.
        labels: Gives those of the nodes before it.
        unions: Where labels that have to be the same are joined.

    Returns:
        Labels, a list of them for several parts; `None` if channels are moved in a way that is not followed.
    """
    name = function_name(node)
    source = node.args[0]
    if name == "cat":
        parts = [labels(part) for part in cast(Sequence[Node], source)]
        return compact(concatenated(parts, int(argument(node, 1, "dim", 0)), shape_of(node)))
    if name in _OTHERS:
        return _run(node, labels)
    given: Tensor = labels(cast(Node, source))
    if name in _SHAPES:
        _tie_split(given, shape_of(node), node, unions)
        return compact(given.reshape(shape_of(node)))
    if name in _PARTS:
        return _parts(node, given, int(argument(node, 2, "dim", 0)), labels, unions)
    return _SPECIALS[name](node, given, unions)


def cuts_channels(node: Node, labels: Callable[[Node], Any]) -> bool:
    """Return whether a call says positions of channels, as `x[:, :4]` does, or how many are added."""
    name = function_name(node)
    if name not in ("select", "slice", "narrow", "pad", "constant_pad_nd"):
        return False
    given: Tensor = labels(cast(Node, node.args[0]))
    if name == "select":
        return int(argument(node, 1, "dim", 0)) % given.dim() in axes_of(given)
    return any(given.shape[axis] != shape_of(node)[axis] for axis in axes_of(given))


def _run(node: Node, labels: Callable[[Node], Any]) -> Any:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), labels)
    found = cast(Any, node.target)(*args, **kwargs)
    return [compact(part) for part in found] if isinstance(found, tuple | list) else compact(found)


def _tie_split(given: Tensor, after: Sequence[int], node: Node, unions: Unions) -> None:
    """Join the rows where a view cuts channels into rows, `(n, c, h, w)` to `(n, g, c / g, h, w)`.

    As in ShuffleNet, the number of rows is taken as what stays. Without axes behind the channels it is a
    vector that becomes a map, of which later layers say what its channels are.
    """
    for axis in axes_of(given):
        before, size = math.prod(given.shape[:axis]), given.shape[axis]
        starts = [at for at in range(len(after)) if math.prod(after[:at]) == before and after[at] > 1]
        if not starts or axis == given.dim() - 1:
            continue
        inner = after[starts[0] + 1] if starts[0] + 1 < len(after) else 1
        if after[starts[0]] * inner == size and inner > 1:
            table = rows(given, axis)[:, 0].reshape(after[starts[0]], inner)
            unions.join(table[:1].repeat(len(table), axis=0), table, _unequal(node))


def _parts(
    node: Node, given: Tensor, axis: int, labels: Callable[[Node], Any], unions: Unions
) -> list[Tensor]:
    found: list[Tensor] = _run(node, labels)
    if axis % given.dim() in axes_of(given):
        sizes = {part.shape[axis] for part in found}
        for part in found:
            if len(sizes) > 1:
                unions.fix(rows(part, axis), _unequal(node))
            else:
                unions.join(*_both(found[0], part), _unequal(node))
    return found


def _both(first: Tensor, second: Tensor) -> tuple[Any, Any]:
    """Return the labels of two tensors of one shape, which meet element by element, without repetitions."""
    for axis in range(first.dim()):
        if axis not in axes_of(first) and axis not in axes_of(second):
            first, second = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
    return first.numpy(), second.numpy()


def _unequal(node: Node) -> Reason:
    return Reason(
        f"{function_name(node)} in {place(node)} cuts channels into parts of which some have to stay",
        "cut them into parts of equal size that are all narrow, or use one convolution for each part",
    )


def _shuffle(node: Node, given: Tensor, unions: Unions) -> Tensor | None:
    groups = int(cast(Any, node.args[1]))
    if 1 in axes_of(given):
        table = rows(given, 1)
        table = table.reshape(groups, -1, table.shape[1])
        unions.join(table[:1].repeat(groups, axis=0), table, _unequal(node))
    return compact(given.reshape(len(given), groups, -1, *given.shape[2:]).transpose(1, 2).flatten(1, 2))


def _pixel_shuffle(node: Node, given: Tensor, unions: Unions) -> Tensor | None:
    axis, area = given.dim() - 3, int(cast(Any, node.args[1])) ** 2
    if axes_of(given) != [axis]:
        return None if axes_of(given) else resized(given, shape_of(node))
    table = rows(given, axis)[:, 0].reshape(-1, area)
    unions.join(table[:, :1].repeat(area, axis=1), table, _unequal(node))
    return spread(table[:, 0].copy(), axis, shape_of(node))


def _pixel_unshuffle(node: Node, given: Tensor, unions: Unions) -> Tensor | None:
    axis, area = given.dim() - 3, int(cast(Any, node.args[1])) ** 2
    if axes_of(given) != [axis]:
        return None if axes_of(given) else resized(given, shape_of(node))
    return spread(rows(given, axis)[:, 0].repeat(area), axis, shape_of(node))


def _glu(node: Node, given: Tensor, unions: Unions) -> Tensor | None:
    first, second = given.chunk(2, int(argument(node, 1, "dim", -1)))
    unions.join(*_both(first, second), _unequal(node))
    return compact(first)


def _pad(node: Node, given: Tensor, unions: Unions) -> Tensor | None:
    """Pad maps; channels that are added (shortcuts of ResNets for CIFAR) are zeros that stay."""
    pads = cast(Sequence[int], node.args[1])
    last = given.dim() - 1
    held = [
        at for at in range(0, len(pads), 2) if any(pads[at : at + 2]) and last - at // 2 in axes_of(given)
    ]
    if held and argument(node, 2, "mode", "constant") not in ("constant", 0, 0.0):
        return None
    own = [side if at // 2 * 2 in held else 0 for at, side in enumerate(pads)]
    return resized(compact(F.pad(given, own, value=FIXED)) if held else given, shape_of(node))


_SPECIALS = {
    "channel_shuffle": _shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "glu": _glu,
    "pad": _pad,
    "constant_pad_nd": _pad,
}

MOVES = {"cat"} | _SHAPES | _PARTS | _OTHERS | _SPECIALS.keys()
"""Names of the functions that `moved` knows."""
