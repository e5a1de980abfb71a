"""Importance of channels by derivatives of the loss."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from autocompress.errors import ConversionError
from autocompress.prune.labels import Labels
from autocompress.prune.layers import Layer, is_depthwise, leaving
from autocompress.prune.scores import Given, Scores, over_units

Tensors = Mapping[str, Tensor]
"""Parameters by name, or the loss's derivatives with respect to them."""


def taylor(given: Given) -> Scores:
    """Take the magnitude of the loss's first-order change when a channel becomes zero, mean over the batches.

    The change is the sum of parameter times derivative, over scale and shift of each batch norm that a unit's
    channels go through; in a group with a unit that goes through none, over filter and bias of each layer
    that makes its channels. Batch norm uses its running statistics.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3 (first
    order, on batch norm); they square the change, which leaves the order on one batch.
    """
    norms = [
        (given.source.trace.slices[norm.scale][0], (norm.scale, norm.shift)) for norm in given.structure.norms
    ]
    makers = [(leaving(given.source, layer), layer.filters) for layer in _makers(given)]
    totals = {names: torch.zeros(len(labels)).double() for labels, names in norms + makers}
    count = 0
    for values, derivatives in _derivatives(given, each=False):
        count += 1
        for names, total in totals.items():
            change = _by_channel([values[name].double() * derivatives[name].double() for name in names])
            total += change.abs().cpu()

    def scores(parts: Sequence[tuple[Labels, tuple[str, ...]]]) -> Scores:
        return over_units(given.source, [(o, (totals[names] / count).numpy()) for o, names in parts])

    return {**scores(makers), **scores(norms)}


def obd(given: Given) -> Scores:
    """Sum `h u^2 / 2` over the weights u of a filter and its bias, h on the diagonal of the loss's Hessian.

    In the place of h stands the mean of the squared derivative of the loss of each image (the diagonal of the
    empirical Fisher matrix): the second derivative itself can be negative away from a minimum. One image is
    run at a time.

    Source: LeCun et al., "Optimal Brain Damage", NIPS 1989, section 2; Theis et al., "Faster Gaze Prediction
    with Dense Networks and Fisher Pruning", 2018, section 2.
    """
    makers = _makers(given)
    totals = {layer.weight: torch.zeros(len(leaving(given.source, layer))).double() for layer in makers}
    count = 0
    for values, derivatives in _derivatives(given, each=True):
        count += 1
        for layer in makers:
            terms = [(values[name].double() * derivatives[name].double()) ** 2 for name in layer.filters]
            totals[layer.weight] += _by_channel(terms).cpu()
    return over_units(
        given.source,
        [(leaving(given.source, layer), (totals[layer.weight] / (2 * count)).numpy()) for layer in makers],
    )


def _makers(given: Given) -> list[Layer]:
    return [layer for layer in given.structure.layers if not is_depthwise(given.source, layer)]


def _by_channel(terms: Sequence[Tensor]) -> Tensor:
    """Sum tensors over all but their first axis, and over the tensors."""
    return torch.stack([term.reshape(len(term), -1).sum(1) for term in terms]).sum(0)


def _derivatives(given: Given, *, each: bool) -> Iterator[tuple[Tensors, Tensors]]:
    """Yield all parameters and the loss's derivatives.

    The parameters are stand-ins that share the model's memory: it is given no gradients, and may be frozen.

    Args:
        given: The model, its batches and the loss.
        each: Of one image after the other, not of batches.

    Raises:
        ConversionError: The loss is no number, or has no derivative.
    """
    model, loss = given.source.model, given.loss
    if loss is None:
        raise ConversionError("derivatives need a loss")
    stand_ins = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    values = {name: value.detach() for name, value in stand_ins.items()}
    for images, targets in given.batches():
        size = 1 if each else len(images)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                found = loss(functional_call(model, stand_ins, (images[part],)), targets[part])
                if found.numel() != 1 or not found.requires_grad:
                    raise ConversionError(
                        "the loss must be one number with a derivative, the mean over the batch; got shape "
                        f"{tuple(found.shape)}, {'with' if found.requires_grad else 'without'} a derivative"
                    )
                gradients = torch.autograd.grad(
                    found.sum(), list(stand_ins.values()), allow_unused=True, materialize_grads=True
                )
            yield values, dict(zip(stand_ins, gradients, strict=True))
