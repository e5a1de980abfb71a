"""What the commands on a user's own model share: `shrink`, `quantize` and `sparsify`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autocompress.commands.console import open_run, whole
from autocompress.errors import RecipeError

if TYPE_CHECKING:
    from autocompress.recipe import Recipe
    from autocompress.space import SearchSpace
    from autocompress.training.data import DataSet

METRICS = {"latency": "latency_ms", "flops": "macs", "size": "size_bytes", "energy": "energy_mj"}
"""What options call costs."""


def data_of_option(text: str) -> dict[str, str]:
    """Read `digits`, or `cifar10=FOLDER`."""
    source, _, folder = text.partition("=")
    return {"source": source, **({"folder": folder} if folder else {})}


def limits_of_options(text: str) -> dict[str, str]:
    """Read `latency=60%,flops=50%`; `latency` stands for `latency_ms`."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise RecipeError(f"--budget takes metric=limit, such as latency=60% or flops=50%, got {part!r}")
        metric = METRICS.get(name, name)
        if metric in found:
            raise RecipeError(f"--budget limits {metric} twice, to {found[metric]} and {value}: give it once")
        found[metric] = value
    return found


def work_on(recipe: "Recipe", run: Path | None, account: "Callable[[SearchSpace], list[str]]") -> None:
    """Say what can be done to a model, refuse what cannot work, and do all stages of a run.

    Args:
        recipe: Of a space that is made of a user's model.
        run: Run directory; `None` stops before anything is done or written.
        account: Says in lines what of the model can be compressed, and what cannot.

    Raises:
        AutocompressError: Something is wrong.
    """
    from autocompress.run import load_recipe_data, make_space

    def shown(recipe: "Recipe", space: "SearchSpace", data: "DataSet") -> None:
        for line in account(space):
            typer.echo(line)
        _beforehand(recipe, space, data)

    if run is None:
        data = load_recipe_data(recipe)
        shown(recipe, make_space(recipe, lambda: data), data)
        return
    with open_run(run, recipe) as opened:
        shown(opened.recipe, opened.space, opened.data)
        whole(opened)


def _beforehand(recipe: "Recipe", space: "SearchSpace", data: "DataSet") -> None:
    """Refuse what cannot work before anything is measured, and print what the model scores as it was brought.

    Raises:
        AutocompressError: Task and data do not fit the model, it cannot be trained, or nothing fits a limit
            that needs no measuring.
    """
    from autocompress.latency.target import load_target
    from autocompress.prune.beforehand import report_of
    from autocompress.stages import check_trained, check_untimed
    from autocompress.training.check import check_regularisers, check_task
    from autocompress.training.task import load_task

    task = load_task(recipe.task)
    check_task(data, task, space)
    check_regularisers(data, recipe.finetune, space)
    check_trained(recipe, space)
    check_untimed(recipe, space, load_target(recipe.target.name, batch=recipe.target.batch))
    for line in report_of(space, data, task, trained=bool(space.settings.get("weights"))):
        typer.echo(line)
