"""Play and Prune: filters are pruned for good as long as accuracy stays within a tolerance."""

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from autocompress.errors import RecipeError
from autocompress.prune.importance_weights import l1
from autocompress.recipe import Positive
from autocompress.sparse.method import Hooks, Options, Work
from autocompress.sparse.units import clear, filters, lowest, parts, scored

# Sums of shares of images may differ in the last bit.
ROUNDING = 1e-9


class PlayAndPruneOptions(Options):
    """Of `play-and-prune`."""

    tolerance: Annotated[float, Field(ge=0, lt=100)] = 1.0
    """Points of accuracy on the validation part that may be lost (epsilon)."""
    alpha: Annotated[float, Field(gt=0, le=50)] = 10.0
    """Percent of the filters left in a layer that are candidates in an epoch; at least one is."""
    strength: Annotated[float, Field(ge=0)] = 1e-3
    """Of the L1 penalty on candidates (lambda), a point of accuracy above the tolerance."""
    threshold: Annotated[float, Field(gt=0)] = 1.0
    """Size below which a candidate is pruned, in parts of its group's mean, a point of accuracy above it."""
    patience: Positive = 3
    """Epochs below the tolerance after which it counts as lost."""


def play_and_prune(work: Work, options: PlayAndPruneOptions) -> Hooks:
    """Penalise the smallest filters of each layer, prune those that become small, and let accuracy rule both.

    An epoch: the `alpha` percent smallest filters of each group by their L1 sum get an L1 penalty; after it,
    those below a threshold are pruned: everything of the unit is zero from there on. Penalty and threshold
    are proportional to accuracy minus (accuracy before - tolerance), and zero below that: then the network is
    trained to recover. It ends after `patience` epochs below, and returns the last weights that were within
    the tolerance on the validation part, at worst those that it began with.

    Source: Singh et al., "Play and Prune: Adaptive Filter Pruning for Deep Model Compression", IJCAI 2019,
    sections 3.2 and 3.3. Sizes are compared with the mean of the group, so that one threshold serves layers
    of all sizes; the paper leaves the scale of its threshold open.
    """
    own, whole = filters(work), parts(work)
    scored(work, l1)
    state = work.state

    def begin() -> None:
        before = state["before"]
        if not 0 <= before["mean"] <= 1:
            raise RecipeError(
                f"play-and-prune needs a metric between 0 and 1, such as accuracy, got {before['mean']:.4g}"
            )
        state["gone"] = state["watched"] = torch.zeros(0, dtype=torch.int64)
        state["below"], state["history"] = 0, []
        keep(0, before["mean"])
        control(before["mean"])

    def keep(epoch: int, accuracy: float) -> None:
        weights = copy.deepcopy(work.network.state_dict())
        state["kept"] = {"epoch": epoch, "mean": accuracy, "gone": len(state["gone"]), "weights": weights}

    def control(accuracy: float) -> None:
        found = controlled(accuracy, state["before"]["mean"], options)
        state["strength"], state["threshold"] = found

    def begin_epoch(_: int) -> None:
        share, gone = options.alpha / 100, state["gone"].tolist()
        candidates = lowest(work, scored(work, l1), share, gone=gone, at_least=1)
        state["watched"] = _units(candidates if state["threshold"] > 0 else ())

    def gradients() -> None:
        for one in own:
            if one.tensor.grad is not None and state["strength"] > 0:
                at = one.of(state["watched"])
                push = torch.sign(one.tensor.detach().index_select(0, at))
                one.tensor.grad.index_add_(0, at, push, alpha=state["strength"])

    def after_step(_: float) -> None:
        if len(state["gone"]):
            clear(whole, state["gone"])

    def end_epoch(epoch: int) -> None:
        small = _small(work, state["watched"], state["gone"], state["threshold"])
        state["gone"] = _units([*state["gone"].tolist(), *small])
        clear(whole, state["gone"])
        work.renew()
        accuracy = work.score().mean
        within = accuracy >= state["before"]["mean"] - options.tolerance / 100 - ROUNDING
        state["below"] = 0 if within else state["below"] + 1
        kept = state["kept"]
        if within and (len(state["gone"]), accuracy) >= (kept["gone"], kept["mean"]):
            keep(epoch + 1, accuracy)
        control(accuracy)
        if state["below"] >= options.patience:
            state["ended"] = True
        state["history"].append([epoch + 1, accuracy, len(state["gone"])])

    def finish() -> None:
        work.network.load_state_dict(state["kept"]["weights"])

    def account() -> dict[str, Any]:
        return account_of(state, options)

    return Hooks(begin, begin_epoch, gradients, after_step, end_epoch, finish, account)


def controlled(accuracy: float, before: float, options: PlayAndPruneOptions) -> tuple[float, float]:
    """Return penalty and threshold: proportional to the points above the tolerance, zero below."""
    points = max(0.0, 100 * (accuracy - before) + options.tolerance)
    return options.strength * points, options.threshold * points


def account_of(state: dict[str, Any], options: PlayAndPruneOptions) -> dict[str, Any]:
    """Return what was pruned in which epoch, and what came back."""
    kept, tried = state["kept"], len(state["gone"])
    notes = []
    if not kept["gone"]:
        notes.append(
            f"nothing could be pruned within {options.tolerance:g} points: these are the weights of "
            + (f"epoch {kept['epoch']}, unpruned" if kept["epoch"] else "before the training")
        )
    elif tried > kept["gone"]:
        notes.append(
            f"{tried} units were pruned, and accuracy did not come back: rolled back to the {kept['gone']} "
            f"of epoch {kept['epoch']}"
        )
    keys = ("epoch", "accuracy", "pruned_units")
    history = [dict(zip(keys, row, strict=True)) for row in state["history"]]
    return {"tolerance": options.tolerance, "kept_epoch": kept["epoch"], "history": history, "notes": notes}


def _small(work: Work, watched: Tensor, gone: Tensor, threshold: float) -> list[int]:
    """Return the watched units that are below the threshold, in parts of the mean of their group's others."""
    candidates, removed = set(watched.tolist()), set(gone.tolist())
    found = []
    scores = scored(work, l1)
    for group in work.source.groups:
        sizes = {
            unit: size
            for unit, size in zip(group.units.tolist(), scores[group.name].tolist(), strict=True)
            if unit not in removed
        }
        mean = sum(sizes.values()) / len(sizes)
        found += [unit for unit, size in sizes.items() if unit in candidates and size < threshold * mean]
    return found


def _units(units: Any) -> Tensor:
    return torch.tensor(sorted(units), dtype=torch.int64)
