"""Unstructured pruning by magnitude, in rounds: train, remove small weights, retrain the rest."""

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.errors import ConversionError, RecipeError
from autocompress.recipe import Positive
from autocompress.sparse import csr
from autocompress.sparse.method import Hooks, Options, Work


class MagnitudeOptions(Options):
    """Of `magnitude`."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Share of the weights that is zero in the end."""
    rounds: Positive = 3
    """Each removes as many more, and retrains for its share of the epochs."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each layer has its own threshold, and the same share of zeros, or one threshold is for all."""


def magnitude(work: Work, options: MagnitudeOptions) -> Hooks:
    """Set the smallest weights of convolutions and linear layers to zero, for good, round by round.

    Round r of R begins with a share `sparsity * r / R` of zeros, then trains the weights that are left; the
    first step of the three, training, is what the model brings. Biases and norms are left alone.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015,
    section 3. There a threshold is a multiple of a layer's standard deviation, chosen by hand; here it
    follows from the share.
    """
    weights = weights_of(work)
    epochs, rounds = work.settings.epochs, options.rounds
    if rounds > epochs:
        raise RecipeError(
            f"options.rounds ({rounds}) must not exceed train.epochs ({epochs}): each takes one at least"
        )
    begins = {number * epochs // rounds: number + 1 for number in range(rounds)}

    def begin() -> None:
        work.state["gone"] = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}

    def begin_epoch(epoch: int) -> None:
        if epoch in begins:
            share = options.sparsity * begins[epoch] / rounds
            work.state["gone"] = masks(weights, work.state["gone"], share, scope=options.scope)
            apply()

    def gradients() -> None:
        for name, gone in work.state["gone"].items():
            if (grad := weights[name].grad) is not None:
                grad.masked_fill_(gone, 0.0)

    def apply(_: float = 0.0) -> None:
        with torch.no_grad():
            for name, gone in work.state["gone"].items():
                weights[name].masked_fill_(gone, 0.0)

    def account() -> dict[str, Any]:
        return csr.account_of(weights)

    return Hooks(begin, begin_epoch, gradients, apply, finish=work.renew, account=account)


def weights_of(work: Work) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, but for those that are ignored.

    Raises:
        ConversionError: There is none, or a pattern names none.
    """
    found: dict[str, Tensor] = {}
    names = {id(tensor): name for name, tensor in work.network.named_parameters()}
    for name, module in work.network.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and id(module.weight) in names:
            found[name] = module.weight
    for pattern in work.ignore:
        ignored = [name for name in found if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not ignored:
            raise ConversionError(
                f"ignore has {pattern!r}, which is none of {', '.join(found) or 'no layers'}"
            )
        found = {name: weight for name, weight in found.items() if name not in ignored}
    if not found:
        raise ConversionError(
            f"{type(work.network).__name__} has no convolution or linear layer whose weights can be removed"
        )
    # A weight that several modules share is one.
    return {names[id(weight)]: weight for weight in found.values()}


def masks(
    weights: dict[str, Tensor], gone: dict[str, Tensor], share: float, *, scope: str
) -> dict[str, Tensor]:
    """Return which weights are removed; those that are gone already are among them.

    Args:
        weights: By name.
        gone: Which of them were removed before.
        share: Of all weights; the number is rounded to the nearest.
        scope: `layer` or `global`.
    """
    sizes = {name: weight.detach().abs().masked_fill(gone[name], -1.0) for name, weight in weights.items()}
    if scope == "layer":
        return {name: _smallest(size.flatten(), share).view(size.shape) for name, size in sizes.items()}
    smallest = _smallest(torch.cat([size.flatten() for size in sizes.values()]), share)
    parts = torch.split(smallest, [size.numel() for size in sizes.values()])
    return {name: part.view(size.shape) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _smallest(sizes: Tensor, share: float) -> Tensor:
    """Return which of some numbers are the smallest; of equal ones the first."""
    found = torch.zeros_like(sizes, dtype=torch.bool)
    found[torch.argsort(sizes, stable=True)[: round(share * len(sizes))]] = True
    return found
