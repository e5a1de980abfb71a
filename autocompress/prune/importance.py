"""Which channels matter: criteria that give each unit of each group a score.

Scores say which units of a group are kept, not which group is made narrower: that is what is searched for.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from autocompress.errors import ConversionError
from autocompress.prune import importance_activations as activations
from autocompress.prune import importance_loss as derivatives
from autocompress.prune import importance_readers as readers
from autocompress.prune import importance_weights as weights
from autocompress.prune.layers import structure
from autocompress.prune.scores import Batch, Given, Loss, Scores
from autocompress.prune.source import Source


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        scores: The function; its docstring says what it computes and where it comes from.
        batches: Whether it looks at images.
        loss: Whether it takes derivatives of a loss, for images and their targets.
    """

    scores: Callable[[Given], Scores]
    batches: bool = False
    loss: bool = False


CRITERIA: Final[dict[str, Criterion]] = {
    "random": Criterion(weights.random),
    "first": Criterion(weights.first),
    "l1": Criterion(weights.l1),
    "l2": Criterion(weights.l2),
    "group_l2": Criterion(weights.group_l2),
    "bn_scale": Criterion(weights.bn_scale),
    "fpgm": Criterion(weights.fpgm),
    "similarity": Criterion(weights.similarity),
    "taylor": Criterion(derivatives.taylor, batches=True, loss=True),
    "obd": Criterion(derivatives.obd, batches=True, loss=True),
    "apoz": Criterion(activations.apoz, batches=True),
    "activation": Criterion(activations.activation, batches=True),
    "thinet": Criterion(readers.thinet, batches=True),
    "lasso": Criterion(readers.lasso, batches=True),
}
"""Name of each criterion."""

COMPARABLE: Final = ("bn_scale", "taylor", "obd")
"""Criteria whose numbers mean the same in every layer."""


def importance(
    source: Source,
    criterion: str,
    *,
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Scores:
    """Score the units of each group of a model.

    Groups that a criterion says nothing of are scored by `group_l2`: of transposed convolutions, of layers
    that run inside of fused functions, and the like.

    Args:
        source: The model; run in evaluation mode, not changed, and left without gradients.
        criterion: One of `CRITERIA`.
        batches: Images and targets, for criteria that look at images; gone through once.
        loss: Of outputs and targets, the mean over the batch, for criteria that take its derivatives.
        seed: Of what the criterion draws.

    Returns:
        Name of a group to one number a unit, in the order of the group's units: what `Source.ranked` takes.
        More matters more. Numbers of different groups need not be comparable.

    Raises:
        ConversionError: There is no such criterion, it lacks batches or the loss, the loss has no derivative,
            or a score is not finite.
        DataError: There is no batch, or one is no pair.
    """
    if criterion not in CRITERIA:
        (nearest,) = difflib.get_close_matches(criterion, CRITERIA, n=1, cutoff=0.0)
        raise ConversionError(
            f"there is no criterion {criterion!r}; did you mean {nearest!r}? There are {', '.join(CRITERIA)}"
        )
    chosen = CRITERIA[criterion]
    for name, needed, value in (("batches", chosen.batches, batches), ("loss", chosen.loss, loss)):
        if needed and value is None:
            raise ConversionError(f"criterion {criterion!r} needs {name}")
    given = Given(source, structure(source), batches, loss, seed)
    found = chosen.scores(given)
    if any(group.name not in found for group in source.groups):
        found = {**weights.group_l2(given), **found}
    for group in source.groups:
        bad = np.flatnonzero(~np.isfinite(found[group.name]))
        if len(bad):
            raise ConversionError(
                f"criterion {criterion!r} gives {found[group.name][bad[0]]} for unit {bad[0]} of group "
                f"{group.name!r}: is there nan or infinity in the images, or in the model's outputs for them?"
            )
    return {group.name: found[group.name] for group in source.groups}


def comparable(scores: Scores, criterion: str) -> Scores:
    """Return scores that can be compared between groups.

    Derivatives of the loss and scales of norms are of one kind throughout the network. Other numbers depend
    on the sizes of filters, or are places in an order: they are divided by the mean of their group.

    Source: the normalisation of Fang et al., "DepGraph", CVPR 2023 (Torch-Pruning's default).
    """
    if criterion in COMPARABLE:
        return scores
    return {name: values / max(float(values.mean()), 1e-12) for name, values in scores.items()}
