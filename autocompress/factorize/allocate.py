"""Ranks of all layers at once under a budget: a multiple-choice knapsack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from autocompress import knapsack
from autocompress.errors import FactorizationError, InfeasibleBudgetError
from autocompress.factorize.methods import Method, Rank
from autocompress.factorize.plan import Offer, Plan

Metric = Literal["macs", "params"]


@dataclass(frozen=True)
class Allocation:
    """A method and a rank for each layer that does not stay as it is.

    Attributes:
        settings: Name of a layer to its method and rank, as `factorize` takes them.
        macs: Of the whole model then.
        params: Likewise.
        loss: Sum over layers of the squared relative error, times the weight of the layer.
        proven: Whether no other choice of offers that fits has a smaller loss.
    """

    settings: Mapping[str, tuple[Method, Rank]]
    macs: int
    params: int
    loss: float
    proven: bool


def ranks_under(
    plan: Plan, budget_share: float, metric: Metric = "macs", *, weighted: bool = True
) -> Allocation:
    """Choose among the offers of a plan, and the layers as they are, those of least error under a budget.

    The error is the sum over layers of the squared relative error of an offer, times the output energy of the
    layer as a part of that of all layers. Without images in the plan, errors are those of weights, and all
    layers count the same. Layers before a batch norm are an odd case: their energy says nothing about how
    much they matter, so `weighted=False` may serve better.

    The sum takes layers to act independently; measure the model.

    Args:
        plan: See `make_plan`.
        budget_share: In (0, 1], of the MACs or parameters of the whole model: what may be left.
        metric: What is limited.
        weighted: Whether energies count.

    Raises:
        InfeasibleBudgetError: No offers fit; it has the least that is possible.
        FactorizationError: An argument is out of range, or the plan has no offers.
    """
    if metric not in get_args(Metric):
        raise FactorizationError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    if (
        isinstance(budget_share, bool)
        or not isinstance(budget_share, int | float)
        or not 0 < budget_share <= 1
    ):
        raise FactorizationError(f"budget_share must be a number in (0, 1], got {budget_share!r}")
    if not plan.sites:
        reasons = "; ".join(f"{left.layer}: {left.reason}" for left in plan.left[:3])
        raise FactorizationError(f"no layer can be factorized: {reasons or 'the model has none'}")
    weights = _weights(plan, weighted=weighted)
    whole = plan.macs if metric == "macs" else plan.params
    # Of each layer: as it is, then its offers; costs are what is saved, below zero.
    options: list[tuple[Offer | None, ...]] = [(None, *site.offers) for site in plan.sites]
    saved = [
        np.array([0 if o is None else getattr(o, metric) - getattr(site, metric) for o in own], dtype=float)
        for site, own in zip(plan.sites, options, strict=True)
    ]
    losses = [
        np.array([0.0 if offer is None else weight * offer.error**2 for offer in own])
        for weight, own in zip(weights, options, strict=True)
    ]
    # Labels want costs of at least nothing.
    least = [float(own.min()) for own in saved]
    room = math.floor(budget_share * whole) - whole - sum(least)
    costs = [own - low for own, low in zip(saved, least, strict=True)]
    codes, _, proven = knapsack.search(losses, costs, room, math.inf)
    if codes is None:
        nearest = whole + sum(least)
        raise InfeasibleBudgetError(
            f"{budget_share:g} of {whole} {metric} cannot be reached by the offers of this plan: the least "
            f"is {nearest:.0f}, a share of {nearest / whole:.4f}; more ranks or other methods may have less",
            {metric: nearest},
        )
    chosen = [own[code] for own, code in zip(options, codes, strict=True)]
    pairs = list(zip(plan.sites, chosen, strict=True))
    return Allocation(
        {site.name: (offer.method, offer.rank) for site, offer in pairs if offer is not None},
        plan.macs + sum(offer.macs - site.macs for site, offer in pairs if offer is not None),
        plan.params + sum(offer.params - site.params for site, offer in pairs if offer is not None),
        float(sum(loss[code] for loss, code in zip(losses, codes, strict=True))),
        proven,
    )


def _weights(plan: Plan, *, weighted: bool) -> list[float]:
    energies = [site.energy for site in plan.sites]
    known = [energy for energy in energies if energy is not None]
    total = sum(known)
    if not weighted or len(known) < len(energies) or not total:
        return [1.0] * len(energies)
    return [energy / total for energy in known]
