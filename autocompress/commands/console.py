"""What commands share: bars and lines on the screen, and recipes from files and options."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.errors import AutocompressError, RecipeError

if TYPE_CHECKING:
    from autocompress.progress import Progress
    from autocompress.recipe import Recipe
    from autocompress.run import Run, Shown

RunOption = Annotated[Path, typer.Option("--run", help="The run directory.")]
RecipeArgument = Annotated[Path | None, typer.Argument(help="Recipe; may be left out if the run exists.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="Its trained weights: a state dict, safetensors or torch.save."),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="digits, cifar10=FOLDER, fashion_mnist=FOLDER, folder=FOLDER, module:function."
    ),
]
SECONDS_A_LINE = 20.0
"""Between lines of progress where there is no terminal."""
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key of the recipe: --set search.seed=1.")
]


@contextmanager
def open_run(folder: Path, recipe: "Recipe | None") -> "Iterator[Run]":
    """Open or start a run, and say what its new settings put aside.

    Where they turn out not to work, the run has its former ones again, with all that they made.

    Raises:
        AutocompressError: Something is wrong.
    """
    from autocompress.run import Run

    if recipe is not None and (folder / "result.json").exists():
        from autocompress.stages import check_change

        check_change(folder, recipe)
    run = Run(folder, recipe)
    for changed, place in run.aside.items():
        typer.echo(f"settings of {changed} changed: what it made before is kept in {place}")
    try:
        yield run
    except AutocompressError:
        if run.former is not None:
            Run(folder, run.former)
            typer.echo(f"{folder} has its former settings again", err=True)
        raise


def whole(run: "Run") -> None:
    """Run every stage, show the comparison, and write it as `report.md`."""
    if run.recipe.tolerance is None:
        _compare(run)
        return
    from autocompress import tolerance
    from autocompress.atomic import write_text

    with run.locked():
        chosen = tolerance.smallest(run, on_screen())
        _compare(chosen)
        tried = tolerance.table(run)
        compared = chosen.path("report.md").read_text(encoding="utf-8")
        write_text(run.path("report.md"), f"{compared}\n## Budgets that were tried\n\n{tried}")
    typer.echo(f"the smallest within the tolerance is in {chosen.folder}")


def _compare(run: "Run") -> None:
    from rich.console import Console
    from rich.table import Table

    from autocompress.atomic import write_text
    from autocompress.report.comparison import report
    from autocompress.report.show import markdown, notes, table

    with run.locked():
        content = report(run, on_screen())
        write_text(run.path("report.md"), markdown(content))
    headers, rows = table(content)
    shown = Table(*headers)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    for note in notes(content):
        typer.echo(note)


@contextmanager
def stage(title: str) -> Iterator["Progress"]:
    """Show a bar with the time left on a terminal; elsewhere, such as in a log, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance


def _lines(title: str) -> "Progress":
    """Return progress that writes a line to stderr whenever `SECONDS_A_LINE` went by."""
    started = last = time.monotonic()

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_A_LINE:
            return
        last = now
        said = [f"{title}: {done} of {total}", f"{now - started:.0f} s", *([note] if note else [])]
        typer.echo(", ".join(said), err=True)

    return advance


def on_screen(said: list[str] | None = None) -> "Shown":
    """Show stages on the screen; what they say is also added to `said`."""
    from autocompress.run import Shown

    def say(text: str) -> None:
        typer.echo(text)
        if said is not None:
            said.append(text)

    return Shown(stage=stage, say=say)


def echo_unless(said: list[str], text: str) -> None:
    """Show a line that was not shown before."""
    if text not in said:
        typer.echo(text)


def with_changes(payload: Any, changes: list[str] | None) -> Any:
    """Apply `key.path=value` to a recipe as it was read; values are YAML."""
    import yaml

    payload = {} if payload is None else payload
    for change in changes or []:
        path, equals, text = change.partition("=")
        if not equals:
            raise RecipeError(f"--set takes key.path=value, got {change!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {path}: {text!r} is no YAML: {error}") from None
        parent = payload
        *parents, last = path.split(".")
        for key in parents:
            parent = parent.setdefault(key, {})
            if not isinstance(parent, dict):
                raise RecipeError(f"--set {path}: {key} holds a value, not keys")
        parent[last] = value
    return payload


def new_recipe(path: Path | None, changes: list[str] | None) -> "Recipe":
    """Read a recipe with its changes; without a path, the changes are all that it says."""
    from autocompress.recipe import parse_recipe

    found = None if path is None else read_recipe(path, changes)
    return found or parse_recipe(with_changes({}, changes), "what the options say")


def read_recipe(path: Path | None, changes: list[str] | None, run: Path | None = None) -> "Recipe | None":
    """Read a recipe with its changes; without a path, changes are of the recipe of the run."""
    from autocompress.recipe import load_recipe, parse_recipe

    if path is None:
        if not changes:
            return None
        if run is None or not (run / "recipe.yaml").exists():
            raise RecipeError(f"--set changes a recipe: name one, or a run that exists (not {run})")
        path = run / "recipe.yaml"
    if not changes:
        return load_recipe(path)
    original = load_recipe(path)
    return parse_recipe(
        with_changes(original.model_dump(mode="json", exclude_unset=True), changes), f"recipe {path}"
    )
