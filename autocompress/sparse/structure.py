"""Sparse structure selection: scaling factors of units, by an accelerated proximal gradient method."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from autocompress.errors import ConversionError
from autocompress.sparse.method import Hooks, Options, Work
from autocompress.sparse.slimming import account_of, left_out, reach
from autocompress.sparse.units import Entries, clear, filters, parts, scales


class StructureOptions(Options):
    """Of `structure`."""

    strength: Annotated[float, Field(gt=0)] = 1e-4
    """Of the penalty on factors (gamma)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the factors (mu)."""


def structure(work: Work, options: StructureOptions) -> Hooks:
    """Train factors of units under an L1 penalty such that many are exactly zero.

    The factors take proximal steps `s = shrink(f' - rate * gradient, rate * strength)`, then look ahead,
    `f' = s + momentum * (s - s before)`; what the network computes with in training is f', and s in the end.
    Other weights are trained by the optimizer. In the end everything of a unit whose factor is zero is
    zeroed, the shift of its batch norm included, so that removing it changes nothing.

    Source: Huang & Wang, "Data-Driven Sparse Structure Selection for Deep Neural Networks", ECCV 2018,
    equations 8 to 12. Departures: the scale of batch norm is the factor, as a factor before it would be
    undone by it and one after it would be its multiple; tied layers have a scale each, and these shrink
    together, by the Euclidean norm of a unit's scales; factors start where the scales are, not at 1; blocks
    and groups of branches, which the paper removes whole, are left alone.
    """
    ruled = ruled_units(work)
    trained = [_only(one, ruled) for one in scales(work, "structure")]
    trained = [one for one in trained if one.labels.any()]
    whole = parts(work)
    gradients_of: dict[str, Tensor] = {}

    def begin() -> None:
        work.state["factors"] = {one.name: one.tensor.detach().clone() for one in trained}

    def gradients() -> None:
        for one in trained:
            grad = one.tensor.grad
            gradients_of[one.name] = torch.zeros_like(one.tensor) if grad is None else grad
            one.tensor.grad = None  # the optimizer leaves it alone

    def after_step(rate: float) -> None:
        ahead = [one.tensor.detach() - rate * gradients_of[one.name] for one in trained]
        labels = [one.labels for one in trained]
        factors = work.state["factors"]
        with torch.no_grad():
            for one, new in zip(trained, shrunk(ahead, labels, rate * options.strength), strict=True):
                one.tensor.copy_(new + options.momentum * (new - factors[one.name]))
                factors[one.name] = new

    def finish() -> None:
        with torch.no_grad():
            for one in trained:
                one.tensor.copy_(work.state["factors"][one.name])
        alive = {unit for one in trained for unit in one.labels[one.tensor.detach() != 0].tolist()}
        clear(whole, torch.tensor(sorted(set(ruled.tolist()) - alive), dtype=torch.int64))
        work.renew()

    def account() -> dict[str, Any]:
        far = reach(work, options.strength, options.momentum)
        return {"reach": far, "scales": account_of(trained), "notes": left_out(work, trained)}

    return Hooks(begin, gradients=gradients, after_step=after_step, finish=finish, account=account)


def ruled_units(work: Work) -> Tensor:
    """Return the units of which each layer that makes them is followed by a batch norm of its own.

    Raises:
        ConversionError: There is none.
    """
    names = {one.name for one in scales(work, "structure")}
    norms = {layer.weight: layer.norm for layer in work.structure.layers}
    free: set[int] = set()
    made: set[int] = set()
    for one in filters(work):
        norm = norms[one.name]
        made |= set(one.labels.tolist())
        if norm is None or norm.scale not in names:
            free |= set(one.labels.tolist())
    found = sorted(made - free - {0})
    if not found:
        raise ConversionError(
            f"method 'structure' needs channels all of whose layers are followed by batch norm, and "
            f"{type(work.network).__name__} has none; methods without batch norm are soft, play-and-prune "
            "and magnitude"
        )
    return torch.tensor(found, dtype=torch.int64)


def shrunk(values: list[Tensor], labels: list[Tensor], by: float) -> list[Tensor]:
    """Return values nearer to zero by so much: the Euclidean norm of those with one label, together.

    It is the proximal map of `by * sum of norms`; of a label that stands once, the soft threshold
    `sign(v) * max(|v| - by, 0)`. Values with label 0 stay.
    """
    size = 1 + max(int(each.max()) for each in labels)
    squares = torch.zeros(size, dtype=values[0].dtype)
    for value, label in zip(values, labels, strict=True):
        squares.index_add_(0, label, value * value)
    norms = squares.sqrt()
    left = torch.where(norms > by, 1 - by / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    left[0] = 1.0
    return [value * left[label] for value, label in zip(values, labels, strict=True)]


def _only(one: Entries, units: Tensor) -> Entries:
    return Entries(one.name, one.tensor, one.axis, one.labels * torch.isin(one.labels, units))
