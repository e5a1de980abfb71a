"""The command line: thin over `autocompress.stages`; every command works on a run directory."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.commands.console import (
    RecipeArgument,
    RunOption,
    SetOption,
    echo_unless,
    new_recipe,
    on_screen,
    open_run,
    read_recipe,
    stage,
    whole,
    with_changes,
)
from autocompress.commands.quantize import quantize
from autocompress.commands.shrink import shrink
from autocompress.commands.sparsify import sparsify
from autocompress.commands.table import table_commands
from autocompress.commands.tune import tune
from autocompress.compare.command import compare
from autocompress.errors import AutocompressError, RecipeError

if TYPE_CHECKING:
    from autocompress.latency.target import Target
    from autocompress.recipe import Recipe

app = typer.Typer(
    help="Find the best network that fits a budget on your device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(table_commands, name="table")
app.command()(compare)
app.command()(shrink)
app.command()(quantize)
app.command()(sparsify)
app.command()(tune)

# What makes CPU training up to twice as fast: threads that spin for some 10 us before they sleep (to wake one
# takes longer than most operations of a small network; to spin for long, the default, holds up other
# programs), and an allocator that keeps the memory of activations instead of returning it at each step.
PROCESS_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "3000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
RESTARTED = "AUTOCOMPRESS_RESTARTED"
# How typer ends on Ctrl-C.
INTERRUPTED = 130

DEMO: dict[str, Any] = {
    "data": {"source": "digits"},
    "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny"}},
    "train": {"epochs": 15, "learning_rate": 0.2, "batch_size": 128},
    "search": {
        "budget": {"latency_ms": "60%"},
        "evaluations": 60,
    },
    "finetune": {"epochs": 12, "learning_rate": 0.03},
}

DryOption = Annotated[bool, typer.Option("--dry-run", help="Forecast time and memory; write nothing.")]


def main() -> None:
    """Run the command line; errors of autocompress are printed without a traceback."""
    if sys.platform == "linux" and RESTARTED not in os.environ:
        # The allocator and OpenMP read their settings when a process starts, so it has to start again.
        environment = {**PROCESS_ENVIRONMENT, **os.environ, RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "autocompress.cli", *sys.argv[1:]], environment)
    # `module:function` in a recipe means the user's own files, as it would for `python -m`.
    sys.path.insert(0, os.getcwd())
    try:
        app(prog_name="autocompress")  # not the module that it was started again as
    except AutocompressError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            again = (
                "the same command"
                if sys.argv[1:2] in (["compare"], ["sparsify"], ["tune"])
                else "`autocompress resume RUN`"
            )
            typer.secho(f"stopped; continue with {again}", fg="yellow", err=True)
        raise


@app.command()
def demo(
    run: RunOption = Path("runs/demo"),
    set_: SetOption = None,
    dry_run: DryOption = False,
) -> None:
    """Run everything on the bundled digits: measure, train, search, finetune, export, compare."""
    import copy

    from autocompress.recipe import parse_recipe

    recipe = parse_recipe(with_changes(copy.deepcopy(DEMO), set_), "the demo's recipe")
    if dry_run:
        _forecast(recipe)
        return
    with open_run(run, recipe) as opened:
        whole(opened)


@app.command("run")
def run_(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    run: Annotated[Path | None, typer.Option("--run", help="Run directory; runs/NAME of the recipe.")] = None,
    set_: SetOption = None,
    dry_run: DryOption = False,
) -> None:
    """Run every stage of a recipe, from the data to the comparison."""
    parsed = read_recipe(recipe, set_)
    if dry_run:
        _forecast(parsed)
        return
    with open_run(run or Path("runs") / recipe.stem, parsed) as opened:
        whole(opened)


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Continue a run that was stopped or killed, at any stage."""
    with open_run(run, None) as opened:
        whole(opened)


@app.command()
def profile(
    recipe: RecipeArgument = None,
    run: RunOption = Path("runs/run"),
    set_: SetOption = None,
    space: Annotated[
        str | None, typer.Option(help="Without a recipe: the search space; its arguments by --set.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Name or JSON file; see `autocompress list targets`.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the target.")] = None,
    batch: Annotated[int | None, typer.Option(help="Of the target.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="A table to add missing rows to; those it has are not measured.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: write what another device has to measure, as a zip file."),
    ] = None,
) -> None:
    """Measure the blocks of the space on the target: the latency table and its error report."""
    from autocompress import stages
    from autocompress.describe import describe_table

    options = {
        "space.name": space,
        "target.name": target,
        "target.threads": threads,
        "target.batch": batch,
        "profile.table": None if table is None else str(table.resolve()),
    }
    changes = [*(set_ or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    fresh = recipe is None and not (run / "recipe.yaml").exists()
    parsed = new_recipe(None, changes) if fresh and space else read_recipe(recipe, changes, run)
    if bundle is not None:
        if table is not None:
            raise RecipeError("--bundle measures everything on the other device; --table has no part in it")
        _bundle(bundle, parsed or read_recipe(run / "recipe.yaml", None))
        return
    with open_run(run, parsed) as opened:
        said: list[str] = []
        with opened.locked():
            echo_unless(said, describe_table(stages.profile(opened, on_screen(said))))
        typer.echo(f"written to {opened.path(stages.TABLE)}")


def _bundle(path: Path, recipe: "Recipe | None") -> None:
    from autocompress.latency.bundle import write_bundle
    from autocompress.latency.target import load_target
    from autocompress.run import load_recipe_data, make_space

    if recipe is None:
        raise RecipeError("profile --bundle needs a recipe, a run that exists, or --space")
    where, settings = recipe.target, recipe.profile
    with stage(f"bundle {where.name}") as progress:
        written = write_bundle(
            path,
            make_space(recipe, lambda: load_recipe_data(recipe)),
            load_target(where.name, threads=where.threads, batch=where.batch),
            networks=settings.networks,
            seed=settings.seed,
            granularity=settings.granularity,
            tolerance=settings.tolerance,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            progress=lambda done, total: progress(done, total),
        )
    typer.echo(f"{written}")
    typer.echo(
        f"copy {path} to the device and run `python3 {path.name}` there (it needs numpy and onnxruntime); "
        f"then here `autocompress table import samples.jsonl --bundle {path} --output table.json`"
    )


@app.command()
def train(
    recipe: RecipeArgument = None,
    run: RunOption = Path("runs/run"),
    set_: SetOption = None,
    dry_run: DryOption = False,
) -> None:
    """Train the supernet."""
    from autocompress import stages
    from autocompress.recipe import load_recipe

    parsed = read_recipe(recipe, set_, run)
    if dry_run:
        _forecast(parsed or load_recipe(run / "recipe.yaml"))
        return
    with open_run(run, parsed) as opened:
        with opened.locked():
            stages.train(opened, on_screen())
        typer.echo(f"written to {opened.path(stages.CHECKPOINT)}")


@app.command()
def search(
    recipe: RecipeArgument = None,
    run: RunOption = Path("runs/run"),
    set_: SetOption = None,
    strategy: Annotated[
        str | None, typer.Option(help="See `autocompress list strategies`; its options by --set.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Limits such as latency_ms=60%,params=2M.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Networks that are evaluated.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that evaluate, by Ray.")] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Probability with which measured latencies shall hold the budget, as 0.95."),
    ] = None,
) -> None:
    """Search the supernet under the budget; runs the stages before it if they are missing.

    A supernet is searched as often as you like: with other settings (--budget, --strategy, ...) the last
    search is put aside, and with its settings it is there again.
    """
    from autocompress import stages
    from autocompress.describe import describe_costs

    options = {
        "strategy": strategy,
        "budget": budget,
        "evaluations": evaluations,
        "workers": workers,
        "confidence": confidence,
    }
    changes = [*(set_ or []), *(f"search.{k}={v}" for k, v in options.items() if v is not None)]
    parsed = read_recipe(recipe, changes, run)
    if strategy is not None and not any(change.startswith("search.options") for change in changes):
        written = read_recipe(recipe or run / "recipe.yaml", None)
        if written is not None and written.search.options and written.search.strategy != strategy:
            typer.echo(f"options of {written.search.strategy} are left out: {written.search.options}")
            parsed = read_recipe(recipe, [*changes, "search.options={}"], run)
    with open_run(run, parsed) as opened:
        with opened.locked():
            result = stages.search(opened, on_screen())
            metrics = list(result.limits)
            front = result.pareto(metrics)
        typer.echo(f"Pareto front of {result.objective} and {', '.join(metrics)}, {len(front)} networks:")
        for trial in front:
            score = trial.metrics[result.objective]
            typer.echo(f"  {score:.4f}  {describe_costs(trial.costs)}  {trial.architecture.key}")


@app.command()
def select(
    run: RunOption = Path("runs/run"),
    budget: Annotated[
        list[str] | None, typer.Option(help="Best network within, as latency_ms=2.5,macs=60%.")
    ] = None,
    cheapest: Annotated[str, typer.Option(help="Network of least cost in this metric...")] = "",
    within: Annotated[
        float | None, typer.Option(help="...that loses at most this much of the best score (default 0.01).")
    ] = None,
) -> None:
    """Choose a network from a finished search; finetune, export and resume then work on it."""
    from autocompress import stages
    from autocompress.budget import Budget
    from autocompress.describe import describe_costs

    if budget and cheapest:
        raise RecipeError("select takes --budget or --cheapest, not both")
    if within is not None and not cheapest:
        raise RecipeError("--within belongs to --cheapest METRIC")
    asked = Budget.parse(",".join(budget)) if budget else None
    with open_run(run, None) as opened:
        with opened.locked():
            trial = stages.select(
                opened,
                on_screen(),
                budget=asked,
                cheapest=cheapest,
                within=0.01 if within is None else within,
            )
        score = trial.metrics[opened.task.metric]
        typer.echo(f"selected {trial.architecture.key}: {score:.4f}, {describe_costs(trial.costs)}")


@app.command()
def finetune(
    run: RunOption = Path("runs/run"),
    distill: Annotated[
        str | None, typer.Option(help="Losses of distillation, as kd+at, or none; docs/distillation.md.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Finetune the selected network with distillation from the largest one."""
    from autocompress import stages

    changes = [*([f"finetune.distill={distill}"] if distill is not None else []), *(set_ or [])]
    with open_run(run, read_recipe(None, changes, run)) as opened:
        with opened.locked():
            arch = stages.selected(opened, on_screen())
            _, scored = stages.finetune(opened, on_screen(), arch)
        typer.echo(f"{arch.key}: validation {opened.task.metric} {scored.mean:.4f}")


@app.command()
def export(run: RunOption = Path("runs/run")) -> None:
    """Export the selected network: ONNX, torch.export, and safetensors with its own loader."""
    from autocompress import stages

    with open_run(run, None) as opened:
        said: list[str] = []
        with opened.locked():
            echo_unless(said, f"exported to {stages.export(opened, on_screen(said))}")


@app.command()
def count(
    network: Annotated[str, typer.Argument(help="model.py:factory or module:factory; this runs that code.")],
    input_: Annotated[list[str], typer.Option("--input", help="Shape of an input, as 1x3x224x224.")],
    dtype: Annotated[str, typer.Option(help="Of the inputs, as float32, or int64 for tokens.")] = "float32",
    depth: Annotated[int, typer.Option(help="Levels of modules in the table.")] = 1,
) -> None:
    """Count the MACs and parameters of any PyTorch network, by PyTorch's counter and by thop."""
    import torch

    from autocompress.count import count as count_module
    from autocompress.count import load_module, parse_shape

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise RecipeError(f"--dtype must be a PyTorch dtype such as float32 or int64, got {dtype!r}")
    inputs = [torch.zeros(parse_shape(text), dtype=kind) for text in input_]
    found = count_module(load_module(network), *inputs)
    for name, macs in found.by_module.items():
        if macs and name.count(".") < depth:
            typer.echo(f"{macs / 1e6:14.3f} M MACs  {name}")
    typer.echo(f"{found.macs / 1e6:14.3f} M MACs  in all, for inputs of {', '.join(input_)}")
    typer.echo(f"{found.params / 1e6:14.3f} M parameters")
    if found.thop_macs is None:
        typer.echo(f"thop could not run on this network: {found.thop_error}")
    else:
        typer.echo(f"{found.thop_macs / 1e6:14.3f} M MACs  by thop")
    if found.doubtful:
        typer.echo(
            "warning: the two differ by more than 2 %. thop also counts batch norm, pooling and upsampling, "
            "and does not see functions, attention and layers that it has no rule for."
        )
    if found.device == "cpu":
        typer.echo("warning: counted on the CPU, where layers fused into one kernel (LSTM) count nothing.")


@app.command("list")
def list_(what: Annotated[str, typer.Argument(help="spaces, strategies or targets")]) -> None:
    """List what can be named in a recipe."""
    from autocompress.latency.target import targets
    from autocompress.plugins import SPACES, STRATEGIES, available

    if what == "spaces":
        lines = [f"{name}  {value}" for name, value in available(SPACES).items()]
    elif what == "strategies":
        lines = [f"{name}  {value}" for name, value in available(STRATEGIES).items()]
    elif what == "targets":
        lines = [_target_line(found) for found in targets().values()]
    else:
        raise RecipeError(f"list takes spaces, strategies or targets, got {what!r}")
    typer.echo("\n".join(lines))


def _target_line(target: "Target") -> str:
    """Describe a target: how it is measured, or what bit widths it has if it cannot be."""
    widths = ", ".join(str(bits) for bits in target.bit_widths) or "none"
    how = f"{target.runtime}, {target.device}, {target.number_format}" if target.runtime else "capabilities"
    return f"{target.name}  {how}; integer bits: {widths}; {target.description}"


def _forecast(recipe: "Recipe | None") -> None:
    from autocompress.forecast import forecast

    if recipe is None:
        raise RecipeError("--dry-run needs a recipe")
    for line in forecast(recipe):
        typer.echo(line)


if __name__ == "__main__":
    main()
