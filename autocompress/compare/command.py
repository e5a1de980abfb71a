"""`autocompress compare`: several strategies and seeds on one problem."""

from pathlib import Path
from typing import Annotated

import typer

from autocompress.commands.console import stage
from autocompress.errors import RecipeError, StrategyError

DEFAULT_STRATEGIES = "random,evolution,elitist,nsga2,reinforce,tpe,predictor"


def compare(
    run: Annotated[
        Path | None, typer.Option("--run", help="A run whose supernet is trained: the problem is its search.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="With --run: limits such as latency_ms=60%; those of its recipe by default.")
    ] = "",
    problem: Annotated[
        str, typer.Option(help="Instead of --run: module:function that returns a Problem.")
    ] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An argument of the function: --set channels=16.")
    ] = None,
    strategies: Annotated[
        str,
        typer.Option(
            help="Names, or module:attribute of your own, separated by commas; options behind colons: "
            "evolution:population=20 or my_module:MySearch:rate=0.1."
        ),
    ] = DEFAULT_STRATEGIES,
    seeds: Annotated[int, typer.Option(help="Searches of each strategy.")] = 5,
    evaluations: Annotated[int, typer.Option(help="Networks that each search evaluates.")] = 100,
    jobs: Annotated[int | None, typer.Option(help="Searches at a time; by default one a core.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; RUN/compare by default.")
    ] = None,
) -> None:
    """Compare search strategies on the same space, budget, evaluator and seeds.

    Differentiable strategies train a supernet of their own; what they derive is scored like all other
    networks.

    Finished searches are kept: the same command goes on where it was stopped, and more strategies or seeds
    can be added to it. Failed searches are run again.
    """
    from autocompress.commands.console import with_changes
    from autocompress.compare.cells import make_strategy, run_cells
    from autocompress.compare.problem import ProblemSource, parse_contestant
    from autocompress.compare.show import claim, extent, write_comparison
    from autocompress.machine import cores

    if (run is None) == (not problem):
        raise RecipeError("compare needs either --run, a trained run, or --problem module:function")
    for name, value in (
        ("seeds", seeds),
        ("evaluations", evaluations),
        ("jobs", 1 if jobs is None else jobs),
    ):
        if value < 1:
            raise RecipeError(f"--{name} must be 1 or more, got {value}")
    if run is not None:
        if set_:
            raise RecipeError("--set changes arguments of --problem; a run has its recipe")
        source = ProblemSource(
            "autocompress.compare.supernet:supernet_problem", {"folder": str(run.resolve()), "budget": budget}
        )
    else:
        if budget:
            raise RecipeError("--budget belongs to --run; a --problem has limits of its own")
        source = ProblemSource(problem, with_changes({}, set_))
    contestants = [parse_contestant(text) for text in strategies.split(",") if text.strip()]
    if len({contestant.label for contestant in contestants}) < max(2, len(contestants)):
        raise RecipeError(f"compare needs two different strategies at least, got {strategies!r}")
    folder = output or (run / "compare" if run is not None else Path("runs") / "compare")
    made = source.make()
    for contestant in contestants:
        make_strategy(
            made, contestant, seed=0
        )  # one that cannot be made is refused before others are paid for
    claim(
        folder,
        {
            "problem": {"factory": source.factory, "arguments": dict(source.arguments)},
            "identity": dict(made.identity),
            "limits": dict(made.constraints.limits),
            "evaluations": evaluations,
        },
    )
    at_once = min(jobs or cores(), seeds * len(contestants))
    typer.echo(f"{made.name}: {seeds * len(contestants)} searches, {at_once} at a time")
    with stage(f"compare {len(contestants)} strategies on {made.name}") as progress:
        cells = run_cells(
            source, contestants, range(seeds), evaluations, folder, jobs=at_once,
            threads=max(1, cores() // at_once) if at_once > 1 else 0, progress=progress,
        )  # fmt: skip
    found, said = write_comparison(folder, made, cells, evaluations)
    typer.echo(f"{made.name}: best {made.objective} of {extent(cells, evaluations)}")
    for standing in found:
        if standing.finals:
            regret = "" if standing.regret is None else f", regret {standing.regret:.4f}"
            low, high = standing.interval
            typer.echo(
                f"  {standing.label}: {standing.mean:.4f} ({low:.4f} to {high:.4f}), median "
                f"{standing.median:.4f}{regret}, {1e3 * standing.strategy_s:.2f} ms of its own a network"
            )
    for line in said:
        typer.echo(line)
    typer.echo(f"written to {folder / 'report.md'}, results.json, evaluations.svg, seconds.svg")
    if all(cell.error for cell in cells):
        raise StrategyError(
            f"all {len(cells)} searches failed, the first with: {cells[0].error}; {folder / 'report.md'} has "
            "all reasons, and the same command runs them again"
        )
