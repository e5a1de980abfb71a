"""Training of the supernet, alone or together with a differentiable strategy."""

from collections.abc import Mapping
from typing import Any, cast

import torch

from autocompress.atomic import write_json
from autocompress.budget import Constraints
from autocompress.describe import describe_relaxation
from autocompress.differentiable import Differentiable
from autocompress.elastic.supernet import Supernet
from autocompress.errors import StorageError
from autocompress.recipe import FinetuneSettings
from autocompress.run import Run, Shown, is_differentiable
from autocompress.stages.checking import check, check_trained
from autocompress.stages.limits import proposer, try_out
from autocompress.stages.pricing import target
from autocompress.training.bilevel import train_relaxed
from autocompress.training.checkpoint import load_checkpoint
from autocompress.training.speed import choose_threads, largest_step
from autocompress.training.supernet import supernet_identity, train_supernet

THREADS = "threads.json"
CHECKPOINT, TRAINING = "supernet.pt", "training.json"


def set_threads(run: Run) -> None:
    """Use the recipe's threads for training and search; by default what steps of the largest network say.

    The number is kept: sums of floats depend on it, and a resumed run ends as one that was not stopped.
    """
    threads = run.recipe.threads
    if threads is None:
        if not run.path(THREADS).exists():
            step = largest_step(run.space, run.data, run.recipe.train)
            write_json(run.path(THREADS), {"threads": choose_threads(step)})
        threads = int(run.read(THREADS)["threads"])
    torch.set_num_threads(threads)


def train(run: Run, shown: Shown) -> Supernet:
    """Train the supernet, from its checkpoint if there is one, or read the trained one."""
    if is_differentiable(run.recipe):
        return train_together(run, shown)[0]
    set_threads(run)
    supernet = run.supernet_space.supernet()
    path, report = run.path(CHECKPOINT), run.path(TRAINING)
    if report.exists():
        content = load_checkpoint(path, supernet_identity(supernet, run.data, run.recipe.train))
        supernet.load_state_dict(content["model"])
        if chosen_formats(run).get("memory_format") == "channels_last":
            supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return supernet.eval()
    check(run)
    check_trained(run.recipe, run.space)
    with shown.stage("train the supernet") as progress:
        position = train_supernet(
            supernet, run.data, run.task, run.recipe.train, checkpoint=path, progress=progress
        )
    write_json(report, vars(position))
    last = {name: score for _, name, score in position.scores}
    scores = ", ".join(f"{name} {score:.4f}" for name, score in last.items())
    if scores:
        shown.say(f"supernet: validation {run.task.metric} {scores} ({position.choices['precision']})")
    return supernet.eval()


def train_together(run: Run, shown: Shown) -> tuple[Supernet, Constraints, Differentiable]:
    """Train the supernet and a differentiable strategy, from their checkpoint if there is one.

    Returns:
        The supernet, the budget, and the strategy, ready to be asked.
    """
    check(run)
    if not run.path(TRAINING).exists():
        try_out(run.recipe, run.space, target(run), run.task.metric)
    limits, proposing = proposer(run, shown)
    strategy = cast(Differentiable, proposing)
    set_threads(run)
    supernet, settings, report = run.supernet_space.supernet(), run.recipe.search, run.path(TRAINING)
    with shown.stage(f"train the supernet and {settings.strategy}") as progress:
        position = train_relaxed(
            supernet,
            strategy,
            run.data,
            run.task,
            run.recipe.train,
            seed=settings.seed,
            identity={
                "strategy": settings.strategy,
                "options": dict(settings.options),
                "limits": dict(limits.limits),
                "seed": settings.seed,
            },
            smaller=run.smaller,
            checkpoint=run.path(CHECKPOINT),
            progress=progress,
            say=shown.say,
        )
    if not report.exists():
        write_json(report, vars(position))
        shown.say(
            f"{settings.strategy}: loss {position.losses[-1]:.4f}; {describe_relaxation(strategy.notes)}"
        )
    return supernet.eval(), limits, strategy


def chosen_formats(run: Run) -> Mapping[str, Any]:
    """Return the formats the supernet was trained in."""
    content = run.read(TRAINING)
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, dict):
        path = run.path(TRAINING)
        raise StorageError(f"{path} is damaged; remove it, and training makes it again from its checkpoint")
    return choices


def with_formats(settings: FinetuneSettings, chosen: Mapping[str, Any]) -> FinetuneSettings:
    """Return the settings with the formats that were chosen in place of `auto`."""
    updates = {name: value for name, value in chosen.items() if getattr(settings, name) == "auto"}
    return settings.model_copy(update=updates)
