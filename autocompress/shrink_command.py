"""`autocompress shrink`: a user's own model made narrower under a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.console import RunOption, SetOption, whole, with_changes
from autocompress.errors import RecipeError

if TYPE_CHECKING:
    from autocompress.recipe import Recipe
    from autocompress.space import SearchSpace

# Strategies that find their network without evaluations need no more than the baselines and themselves.
EVALUATIONS = 100
SHOWN_GROUPS = 60


def shrink_recipe(
    model: str,
    *,
    weights: Path | None,
    data: str,
    target: str,
    budget: str,
    strategy: str,
    importance: str,
    ignore: list[str],
    epochs: int,
    changes: list[str] | None,
) -> "Recipe":
    """Return the recipe that a call of the command stands for.

    Raises:
        RecipeError: It is not valid.
    """
    from autocompress.recipe import parse_recipe, with_absolute_paths

    path, _, factory = model.rpartition(":")
    where = f"{Path(path).resolve()}:{factory}" if path.endswith(".py") else model
    source, _, folder = data.partition("=")
    payload: dict[str, Any] = {
        "data": {"source": source, **({"folder": folder} if folder else {})},
        "space": {
            "name": "channels",
            "arguments": {
                "model": where,
                "importance": importance,
                **({"weights": str(weights.resolve())} if weights else {}),
                **({"ignore": ignore} if ignore else {}),
            },
        },
        "target": {"name": target},
        "profile": {"widths": "grid"},
        # Weights that were trained stay as they are; others have to be trained first.
        "train": {"epochs": 0 if weights else 30},
        "search": {
            "budget": _budget(budget),
            "strategy": strategy,
            "evaluations": EVALUATIONS,
        },
        "finetune": {"epochs": epochs},
    }
    recipe = parse_recipe(with_changes(payload, changes), "what the options of shrink say")
    return with_absolute_paths(recipe, Path.cwd())


def _budget(text: str) -> dict[str, str]:
    """Read `latency=60%,flops=50%`; `latency` stands for `latency_ms`."""
    found = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise RecipeError(f"--budget takes metric=limit, such as latency=60% or flops=50%, got {part!r}")
        found[{"latency": "latency_ms", "flops": "macs"}.get(name, name)] = value
    return found


def account(space: "SearchSpace") -> list[str]:
    """Return in lines what of a model can be narrowed, and what cannot, with the reason."""
    from autocompress.prune.network import source_of

    source = source_of(space)
    units = sum(len(group) for group in source.groups)
    lines = [
        f"{type(source.model).__name__}: {len(source.groups)} groups of channels can be narrowed, "
        f"{units} units in all"
    ]
    for group in source.groups[:SHOWN_GROUPS]:
        tied = list(group.layers)[1:]
        with_ = f", together with {', '.join(tied)}" if tied else ""
        lines.append(f"  {group.name}: {len(group)}{with_}")
    if len(source.groups) > SHOWN_GROUPS:
        lines.append(f"  and {len(source.groups) - SHOWN_GROUPS} more")
    for kept in source.kept:
        advice = f"; {kept.advice}" if kept.advice else ""
        lines.append(f"  {kept.layer} keeps {kept.channels} channels: {kept.reason}{advice}")
    return lines


def shrink(
    model: Annotated[str, typer.Argument(help="Your model: file.py:factory or module:factory.")],
    weights: Annotated[
        Path | None, typer.Option(help="Its trained weights: a state dict, safetensors or torch.save.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="digits, cifar10=FOLDER, fashion_mnist=FOLDER, folder=FOLDER, module:function."),
    ] = "digits",
    target: Annotated[str, typer.Option(help="What it runs on; see `autocompress list targets`.")] = (
        "onnxruntime-cpu"
    ),
    budget: Annotated[str, typer.Option(help="latency=60%, flops=50%, params=1M, several by commas.")] = (
        "latency=60%"
    ),
    strategy: Annotated[
        str, typer.Option(help="How widths are found; see `autocompress list strategies`.")
    ] = ("peel"),
    importance: Annotated[str, typer.Option(help="Which channels matter: l1, bn_scale, fpgm, ...")] = "l2",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers that keep their channels; patterns such as head.*")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of finetuning with distillation.")] = 10,
    run: RunOption = Path("runs/shrink"),
    set_: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what can be narrowed and what cannot; write nothing.")
    ] = False,
) -> None:
    """Make your own network narrower: a plain, smaller, faster PyTorch network under a budget.

    The model is traced, channels that must be cut together are found, and the device is measured over their
    widths; a strategy finds the widths; the narrow network is finetuned, taught by yours, exported and
    measured. Your model is never changed. The run can be resumed: `autocompress resume RUN`.
    """
    from autocompress.run import Run, load_recipe_data, make_space

    recipe = shrink_recipe(
        model,
        weights=weights,
        data=data,
        target=target,
        budget=budget,
        strategy=strategy,
        importance=importance,
        ignore=ignore or [],
        epochs=epochs,
        changes=set_,
    )
    if dry_run:
        show(make_space(recipe, lambda: load_recipe_data(recipe)))
        return
    opened = Run(run, recipe)
    show(opened.space)
    whole(opened)


def show(space: "SearchSpace") -> None:
    """Print what can be narrowed and what cannot."""
    for line in account(space):
        typer.echo(line)
