"""Soft filter pruning: filters are zeroed after each epoch, and may come back in the next."""

from typing import Annotated, Any

import torch
from pydantic import Field

from autocompress.prune.importance_weights import l2
from autocompress.sparse.method import Hooks, Options, Work
from autocompress.sparse.units import clear, filters, lowest, parts, scored


class SoftOptions(Options):
    """Of `soft`."""

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the units of each group that is zeroed, rounded down."""


def soft(work: Work, options: SoftOptions) -> Hooks:
    """Zero the filters of the smallest norm after each epoch; they are trained on like the others.

    Where layers are tied, the norm is the mean of the layers' norms. While training goes on only filters are
    zeroed: a unit without its norm's shift as well would stand at the kink of its ReLU and get no gradient.
    After the last epoch everything of the chosen units is zeroed, so that removing them changes nothing; the
    paper leaves shifts out of its account.

    Source: He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018,
    algorithm 1.
    """
    own, whole = filters(work), parts(work)
    scored(work, l2)
    last = work.settings.epochs - 1

    def end_epoch(epoch: int) -> None:
        units = torch.tensor(list(lowest(work, scored(work, l2), options.rate)), dtype=torch.int64)
        clear(whole if epoch == last else own, units)
        if epoch == last:
            work.renew()

    def account() -> dict[str, Any]:
        return {"notes": [f"{options.rate:.0%} of the filters of each group, rounded down, are zero"]}

    return Hooks(end_epoch=end_epoch, account=account)
