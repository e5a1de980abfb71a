"""Operations on several tensors element by element: which of their channels meet."""

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from autocompress.prune.graph import function_name, place
from autocompress.prune.label_tensor import axes_of, values
from autocompress.prune.labels import FIXED, Reason, Unions


def combined(given: Sequence[Tensor], shape: Sequence[int], node: Node, unions: Unions) -> Tensor | None:
    """Return the labels of what tensors give together; channels that meet become the same.

    Args:
        given: Labels of each, which are broadcast to one shape.
        shape: Of the result.
        node: The operation.
        unions: Where labels are joined.

    Returns:
        Labels of that shape; `None` if channels of one tensor meet those of another along another axis, as in
        an outer product.
    """
    result: Tensor | None = None
    for labels in given:
        aligned = labels.reshape((1,) * (len(shape) - labels.dim()) + tuple(labels.shape))
        result = aligned if result is None else _met(result, aligned, node, unions)
        if result is None:
            return None
    return None if result is None else result.expand(tuple(shape))


def _met(one: Tensor, other: Tensor, node: Node, unions: Unions) -> Tensor | None:
    if len(axes_of(one)) < len(axes_of(other)):
        one, other = other, one
    held, among = axes_of(one), axes_of(other)
    shape = [max(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
    if not set(among) <= set(held):
        return None
    if held and not among:
        _meet_one(one, other, node, unions)
        return one.expand(shape)
    for axis in range(len(shape)):
        if axis not in held:
            one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    unions.join(one.numpy(), other.expand(one.shape).numpy(), _joined(node))
    return one.expand(shape)


def _meet_one(one: Tensor, other: Tensor, node: Node, unions: Unions) -> None:
    """Let channels meet one label: that of what has no channels, or of a single channel for all of them."""
    (label,) = values(other)
    if label != FIXED:
        text = f"{function_name(node)} in {place(node)} uses it for several channels"
        unions.fix(values(other), Reason(text))
    elif any(other.shape[axis] == one.shape[axis] for axis in axes_of(one)):
        unions.fix(values(one), _joined(node))


def _joined(node: Node) -> Reason:
    return Reason(
        f"{function_name(node)} in {place(node)} combines its channels with the image, with constants, or "
        "with others that have to stay",
        "a 1x1 convolution between them would set its channels free",
    )
