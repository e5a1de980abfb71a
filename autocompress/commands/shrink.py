"""`autocompress shrink`: a user's own model made narrower under a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.commands.console import DataOption, RunOption, SetOption, WeightsOption, stage, with_changes
from autocompress.commands.model import METRICS, data_of_option, limits_of_options, work_on
from autocompress.cost import METRIC_UNITS
from autocompress.errors import RecipeError
from autocompress.plugins import load_strategy

if TYPE_CHECKING:
    from autocompress.recipe import Recipe
    from autocompress.space import SearchSpace

# Strategies that find their network without evaluations need no more than the baselines and themselves.
EVALUATIONS, ALL_EVALUATIONS = 100, 1_000_000
# What an agent plans its warm-up and noise for.
LEARNING = {"amc": 200}
UNTRAINED_EPOCHS, GRADIENT_EPOCHS, TRAINED_RATE = 30, 10, 0.02
BUDGET, MINIMISED = "latency=60%", "latency"
ALIGNED_BY_TARGET = "target"
SHOWN_GROUPS = 60


def shrink_recipe(
    model: str,
    *,
    weights: Path | None,
    data: str,
    target: str,
    budget: str | None,
    tolerance: float | None,
    minimise: str,
    strategy: str,
    importance: str,
    align: int,
    ignore: list[str],
    epochs: int,
    changes: list[str] | None,
) -> "Recipe":
    """Return the recipe that a call of the command stands for; a budget or a tolerance is given, or both.

    Raises:
        RecipeError: It is not valid.
    """
    from autocompress.recipe import absolute_model, parse_recipe, with_absolute_paths

    limits = (
        {}
        if budget is None and tolerance is not None
        else limits_of_options(BUDGET if budget is None else budget)
    )
    metric = METRICS.get(minimise, minimise)
    if tolerance is None and minimise != MINIMISED:
        raise RecipeError(
            f"--minimise {minimise} belongs to --tolerance: a budget says itself what is limited"
        )
    if tolerance is not None and not 0 < tolerance < 100:
        raise RecipeError(f"--tolerance takes points above 0 and below 100, such as 1.0, got {tolerance:g}")
    if metric not in METRIC_UNITS:
        allowed = ", ".join([*METRICS, *METRIC_UNITS])
        raise RecipeError(f"--minimise takes one of {allowed}, got {minimise!r}")

    payload: dict[str, Any] = {
        "data": data_of_option(data),
        "space": {
            "name": "channels",
            "arguments": {
                "model": absolute_model(model, Path.cwd()),
                "importance": importance,
                "align": align,
                **({"weights": str(weights.resolve())} if weights else {}),
                **({"ignore": ignore} if ignore else {}),
            },
        },
        "target": {"name": target},
        "profile": {"widths": "grid"},
        "train": {
            "epochs": _training_epochs(strategy, trained=weights is not None),
            # What was trained is trained on, not anew.
            **({"learning_rate": TRAINED_RATE} if weights else {}),
        },
        "search": {
            **({"budget": limits} if limits else {}),
            "strategy": strategy,
            "evaluations": _evaluations(strategy),
        },
        "finetune": {"epochs": epochs},
    }
    if tolerance is not None:
        # Points of a metric that is a share of 1.
        payload["tolerance"] = {"drop": tolerance / 100, "metric": metric}
    recipe = parse_recipe(with_changes(payload, changes), "what the options of shrink say")
    return with_absolute_paths(recipe, Path.cwd())


def _evaluations(strategy: str) -> int:
    """Return how many networks are evaluated at most: those that go beyond the budget end by themselves."""
    if getattr(load_strategy(strategy), "beyond_budget", False):
        return ALL_EVALUATIONS
    return LEARNING.get(strategy, EVALUATIONS)


def _training_epochs(strategy: str, *, trained: bool) -> int:
    """Return for how long slices are trained before, or with a strategy by gradients in, the search.

    Weights that were trained stay as they are where the strategy lets them; others have to be trained first.
    """
    if not trained:
        return UNTRAINED_EPOCHS
    return GRADIENT_EPOCHS if hasattr(load_strategy(strategy), "architecture_step") else 0


def _alignment(text: str, target: str, run: Path, *, measured: bool) -> int:
    """Return of how many channels widths are multiples; for `target`, measured once a run.

    Args:
        text: A number, or `target`.
        target: Name of the target.
        run: Of the run; where it exists, its recipe says what was measured.
        measured: Whether the target may be measured; otherwise 1 stands for it.

    Raises:
        RecipeError: It is neither.
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text != ALIGNED_BY_TARGET:
        raise RecipeError(f"--align takes a number of channels >= 1, or {ALIGNED_BY_TARGET}, got {text!r}")
    if (run / "recipe.yaml").exists():
        from autocompress.recipe import load_recipe

        return int(load_recipe(run / "recipe.yaml").space.arguments.get("align", 1))
    if not measured:
        return 1
    from autocompress.latency.steps import learn_steps, probe_steps, steps_of
    from autocompress.latency.target import load_target

    with stage("steps of the target") as progress:
        probed = probe_steps(load_target(target), progress=lambda done, total: progress(done, total))
    step = steps_of(learn_steps({key: row.median_ms for key, row in probed.items()}))["out"]
    typer.echo(f"{target} computes {step} channels at once: widths are multiples of {step}")
    return step


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
    weights: WeightsOption = None,
    data: DataOption = "digits",
    target: Annotated[str, typer.Option(help="What it runs on; see `autocompress list targets`.")] = (
        "onnxruntime-cpu"
    ),
    budget: Annotated[
        str | None,
        typer.Option(help="latency=60%, flops=50%, params=1M, several by commas; by default latency=60%."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget, or besides one: the least cost that loses at most so many points of "
            "validation accuracy after finetuning, as 1.0."
        ),
    ] = None,
    minimise: Annotated[str, typer.Option(help="Which cost is made small with --tolerance.")] = MINIMISED,
    strategy: Annotated[
        str, typer.Option(help="How widths are found; see `autocompress list strategies`.")
    ] = "sensitivity",
    importance: Annotated[
        str, typer.Option(help="Which channels matter: l1, bn_scale, fpgm, ...")
    ] = "taylor",
    align: Annotated[
        str,
        typer.Option(
            help="Widths are multiples of so many channels; `target` measures how many it computes at once."
        ),
    ] = "1",
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
    recipe = shrink_recipe(
        model,
        weights=weights,
        data=data,
        target=target,
        budget=budget,
        tolerance=tolerance,
        minimise=minimise,
        strategy=strategy,
        importance=importance,
        align=_alignment(align, target, run, measured=not dry_run),
        ignore=ignore or [],
        epochs=epochs,
        changes=set_,
    )
    work_on(recipe, None if dry_run else run, lambda space: [*account(space), *_hint(recipe)])


def _hint(recipe: "Recipe") -> list[str]:
    """Return what somebody should know who limits other costs than latency, in lines."""
    limited = {*recipe.search.budget, *([recipe.tolerance.metric] if recipe.tolerance else [])}
    if "latency_ms" in limited or recipe.space.arguments.get("align", 1) != 1:
        return []
    return [
        "note: a network with fewer MACs need not be faster: devices compute some channels at once, and a "
        "width between two steps can cost more than the next one; `--align target` keeps to the steps, and a "
        "budget on latency knows them"
    ]
