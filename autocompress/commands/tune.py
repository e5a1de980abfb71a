"""`autocompress tune`: whole compression policies, tuned on Ray Tune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autocompress.commands.console import SetOption, on_screen, with_changes

if TYPE_CHECKING:
    from autocompress.space import SearchSpace


def tune(
    recipe: Annotated[Path, typer.Argument(help="What is compressed, by which passes, under which budget.")],
    run: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/policy"),
    budget: Annotated[str | None, typer.Option(help="Limits such as latency_ms=60%,params=200k.")] = None,
    trials: Annotated[int | None, typer.Option(help="Policies that are tried.")] = None,
    workers: Annotated[int | None, typer.Option(help="Policies at a time, each in a process of Ray.")] = None,
    set_: SetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what may be chosen; try nothing."),
    ] = False,
) -> None:
    """Find the compression policy that loses least under a budget: prune, factorize, quantize, distill.

    Each policy is a list of passes; its costs are measured, what does not fit is not trained, and what falls
    behind is stopped early (ASHA). A run that was killed goes on where it was if the same command is given
    again. docs/policies.md has a recipe.
    """
    options = {"budget": budget, "trials": trials, "workers": workers}
    changes = [*(set_ or []), *(f"tune.{key}={value}" for key, value in options.items() if value is not None)]
    from autocompress.atomic import locked
    from autocompress.policy.recipe import parse_policy_recipe
    from autocompress.policy.run import begin, check, markdown, run_policies, space_of
    from autocompress.policy.trial import Job
    from autocompress.recipe import read_yaml

    parsed = parse_policy_recipe(with_changes(read_yaml(recipe), changes), recipe)
    space = space_of(parsed)
    if dry_run:
        check(Job(parsed, run))
        _say_choices(space)
        return
    with locked(run):
        report = run_policies(begin(run, parsed), on_screen())
    typer.echo(markdown(report))
    typer.echo(f"exported to {run / 'best'}")


def _say_choices(space: "SearchSpace") -> None:
    typer.echo(f"{space.size} policies:")
    for choice in space.choices:
        typer.echo(f"  {choice.name}: {', '.join(map(str, choice.options))}")
