"""`autocompress sparsify`: a user's own model trained so that it is easy to prune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.commands.console import DataOption, WeightsOption, on_screen, with_changes
from autocompress.commands.model import data_of_option

if TYPE_CHECKING:
    from autocompress.sparse.recipe import SparsifyRecipe

SHOWN_LAYERS = 60


def sparsify_recipe(
    model: str,
    *,
    weights: Path | None,
    data: str,
    method: str,
    epochs: int | None,
    tolerance: float | None,
    ignore: list[str],
    changes: list[str] | None,
) -> "SparsifyRecipe":
    """Return what a call of the command stands for, with absolute paths.

    Raises:
        RecipeError: It is not valid.
    """
    from autocompress.recipe import absolute_model, parsed
    from autocompress.sparse.methods import options_of
    from autocompress.sparse.recipe import SparsifyRecipe

    where = data_of_option(data)
    payload: dict[str, Any] = {
        "model": absolute_model(model, Path.cwd()),
        "data": {
            **where,
            **({"folder": str(Path(where["folder"]).expanduser().resolve())} if "folder" in where else {}),
        },
        "method": method,
        "ignore": ignore,
        **({"weights": str(weights.resolve())} if weights else {}),
        **({"train": {"epochs": epochs}} if epochs is not None else {}),
        **({"options": {"tolerance": tolerance}} if tolerance is not None else {}),
    }
    recipe = parsed(SparsifyRecipe, with_changes(payload, changes), "what the options of sparsify say")
    options_of(recipe.method, recipe.options)
    return recipe


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return what a report says, in lines."""
    validation = report["validation"]
    before, after = (validation[when] for when in ("before", "after"))
    lines = [
        f"{report['method']}: validation {validation['metric']} {before['mean']:.4f} before, "
        f"{after['mean']:.4f} after",
        f"{report['zeros']} of {report['weights']} weights are zero",
        *report.get("notes", ()),
    ]
    groups = [group for group in report.get("groups", ()) if group["zero"]]
    for group in groups[:SHOWN_LAYERS]:
        lines.append(f"  {group['name']}: {group['zero']} of {group['units']} units are zero")
    if len(groups) > SHOWN_LAYERS:
        lines.append(f"  and {len(groups) - SHOWN_LAYERS} more groups")
    return lines


def sparsify(
    model: Annotated[str, typer.Argument(help="Your model: file.py:factory or module:factory.")],
    weights: WeightsOption = None,
    data: DataOption = "digits",
    method: Annotated[
        str, typer.Option(help="slimming, magnitude, soft, play-and-prune or structure.")
    ] = "slimming",
    epochs: Annotated[int | None, typer.Option(help="Of training; 10 by default.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of play-and-prune: points of validation accuracy it may lose.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers whose channels are left alone; patterns such as head.*")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder that is written.")] = Path("runs/sparse"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: --set options.strength=1e-3."),
    ] = None,
) -> None:
    """Train your own network so that it is easy to prune, before `autocompress shrink`.

    Weights of your own parameter names are written to OUT/weights.safetensors, the account to
    OUT/sparsify.json. Your model and your files are never changed. A run that was stopped or killed goes on
    where it was if the same command is given again.
    """
    recipe = sparsify_recipe(
        model,
        weights=weights,
        data=data,
        method=method,
        epochs=epochs,
        tolerance=tolerance,
        ignore=ignore or [],
        changes=set_,
    )
    from autocompress.sparse.run import WEIGHTS, sparsify_folder

    for line in lines_of(sparsify_folder(out, recipe, on_screen())):
        typer.echo(line)
    typer.echo(f"written to {out / WEIGHTS}")
