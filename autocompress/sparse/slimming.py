"""Network slimming: an L1 penalty on the scales of batch norm."""

from typing import Annotated, Any

import torch
from pydantic import Field

from autocompress.sparse.method import Hooks, Options, Work
from autocompress.sparse.units import Entries, scales
from autocompress.training.loop import learning_rate

SMALL = 0.01
"""Of the largest scale of the network: what lies below is counted as small."""


class SlimmingOptions(Options):
    """Of `slimming`."""

    strength: Annotated[float, Field(gt=0)] = 1e-4
    """Of the penalty (lambda)."""


def slimming(work: Work, options: SlimmingOptions) -> Hooks:
    """Add `strength * sum |scale|` to the loss, over scales of channels that can be removed.

    Nothing becomes exactly zero by a subgradient; scales that training does not need become small, and fall
    first when a criterion such as `bn_scale` ranks channels.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    section 3, equation 1, with g the absolute value and its subgradient (0 at 0). The gradient that is
    clipped is that of the whole loss.
    """
    trained = [(one, (one.labels > 0).to(one.tensor.dtype)) for one in scales(work, "slimming")]

    def gradients() -> None:
        for one, own in trained:
            if one.tensor.grad is not None:
                one.tensor.grad.add_(torch.sign(one.tensor.detach()) * own, alpha=options.strength)

    def account() -> dict[str, Any]:
        entries = [one for one, _ in trained]
        far = reach(work, options.strength, work.settings.momentum)
        return {"reach": far, "scales": account_of(entries), "notes": left_out(work, entries)}

    return Hooks(gradients=gradients, finish=work.renew, account=account)


def reach(work: Work, strength: float, momentum: float) -> float:
    """Return how far a penalty can move a scale in the whole training: strength and epochs have to fit.

    It is `strength` times the sum of the learning rates, over `1 - momentum`; with SGD, not with AdamW.
    """
    settings = work.settings
    steps = range(settings.epochs * work.steps)
    rates = sum(learning_rate(settings, step, work.steps, settings.epochs) for step in steps)
    return strength * rates / max(1 - momentum, 1e-12)


def left_out(work: Work, trained: list[Entries]) -> list[str]:
    """Return, as a note or none, the groups of which no channel has a scale that is trained."""
    known = {unit for one in trained for unit in one.labels.tolist()}
    names = [group.name for group in work.source.groups if not known & set(group.units.tolist())]
    return [f"not made sparse, for lack of batch norm: {', '.join(names)}"] if names else []


def account_of(trained: list[Entries]) -> list[dict[str, Any]]:
    """Return for each batch norm how many scales of removable channels are zero, and how many small."""
    values = [one.tensor.detach().abs()[one.labels > 0] for one in trained]
    largest = max(float(each.max()) for each in values)
    return [
        {
            "name": one.name,
            "scales": len(each),
            "zero": int((each == 0).sum()),
            "small": int((each < SMALL * largest).sum()),
            "mean": float(each.mean()),
        }
        for one, each in zip(trained, values, strict=True)
    ]
