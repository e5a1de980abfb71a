"""`autocompress table ...`: look into latency tables, check them, learn steps, import other people's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from autocompress.commands.console import (
    RecipeArgument,
    RunOption,
    SetOption,
    new_recipe,
    on_screen,
    open_run,
    read_recipe,
    stage,
)
from autocompress.errors import RecipeError, TableError

if TYPE_CHECKING:
    from autocompress.latency.steps import Staircase
    from autocompress.latency.table import LatencyTable
    from autocompress.latency.target import Target

table_commands = typer.Typer(help="Latency tables: show, check, steps, import.", no_args_is_help=True)

TableArgument = Annotated[Path, typer.Argument(help="A latency table, such as runs/run/latency_table.json.")]
Format = Literal["bundle", "ofa", "csv"]
SHOWN_STAIRCASES = 40
AXES = {"in": "in channels", "out": "out channels", "channels": "channels of depthwise and elementwise"}


@table_commands.command()
def show(table: TableArgument) -> None:
    """Say what a table holds, where it is from and how far it can be trusted."""
    from autocompress.describe import describe_table
    from autocompress.latency.table import LatencyTable

    found = LatencyTable.load(table)
    typer.echo(describe_table(found))
    if unknown := _unknown_rows(found):
        typer.echo(
            f"{len(unknown)} rows are not of operations that autocompress knows, such as {unknown[0]!r}: "
            "they price only a space with operations of these keys"
        )
    target, report = found.target, found.error_report
    typer.echo(
        f"target: {target.name}: {target.runtime or 'not measured here'}, {target.device}, "
        f"{target.number_format}, {target.threads} threads, batch {target.batch}"
    )
    for key, value in found.provenance.items():
        typer.echo(f"{key}: {value}")
    if report is not None:
        for granularity, forms in ((report.granularity, report.forms), ("the other", report.other_forms)):
            for form, figures in forms.items():
                typer.echo(
                    f"priced by {granularity}, {form}: bias {figures.bias_percent:+.2f} %, MAPE "
                    f"{figures.mape_percent:.2f} %, greatest {figures.max_error_percent:.1f} %, within 5 % "
                    f"{figures.within_5_percent:.0f} %, within 10 % {figures.within_10_percent:.0f} %"
                )
        typer.echo(
            "error on other networks by number of networks fitted to: "
            + ", ".join(f"{count}: {error:.2f} %" for count, error in report.learning_curve)
        )
        typer.echo(
            f"drift of the machine {report.drift_percent or 0:.1f} %, discarded as disturbed "
            f"{report.disturbed_percent:.1f} % of samples, {report.unstable_rows} rows less certain than "
            "asked"
        )
    if found.width_report is not None:
        typer.echo(_describe_widths(found))


def _unknown_rows(table: "LatencyTable") -> list[str]:
    """Return the keys of the rows that are no blocks of known operations, shortened."""
    from autocompress.latency.keys import parse_block

    unknown = []
    for key in table.rows:
        try:
            parse_block(key)
        except TableError:
            unknown.append(key[:60])
    return unknown


def _describe_widths(table: "LatencyTable") -> str:
    report = table.width_report
    assert report is not None  # noqa: S101  (its caller looked)
    return (
        f"widths: {report.measured_rows} rows measured for {report.priced_rows} operations in "
        f"{report.families} layers of different shape, {report.seconds_per_layer:.1f} s a layer; "
        f"{report.held_out_rows} operations off the grid are {report.held_out.mape_percent:.1f} % off, "
        f"{report.held_out.within_10_percent:.0f} % of them within 10 %"
    )


@table_commands.command()
def check(
    recipe: RecipeArgument = None,
    run: RunOption = Path("runs/run"),
    set_: SetOption = None,
    networks: Annotated[int, typer.Option(help="Whole networks to measure.")] = 100,
) -> None:
    """Measure whole networks that the run's table was not fitted to, and say where it errs; JSON and plot."""
    from autocompress import stages
    from autocompress.latency.check import check_table, save_check

    with open_run(run, read_recipe(recipe, set_, run)) as opened:
        settings = opened.recipe.profile
        with opened.locked():
            table = stages.profile(opened, on_screen())
            with stage(f"check {table.target.name}") as progress:
                found = check_table(
                    table,
                    opened.space,
                    folder=opened.folder,
                    networks=networks,
                    profile_seed=settings.seed,
                    tolerance=settings.tolerance,
                    min_rounds=settings.min_rounds,
                    max_rounds=settings.max_rounds,
                    progress=lambda done, total: progress(done, total),
                )
            path = opened.path("latency_check.json")
            save_check(found, path, title=f"{table.target.name}, {opened.space.name}")
        for said, figures in (
            ("raw sums of rows", found.raw),
            ("predictions", found.figures),
            (f"predictions at the speed of now (x{found.machine_factor:.3f})", found.figures_at_that_speed),
        ):
            typer.echo(
                f"{said}: {len(found.networks)} networks, bias {figures.bias_percent:+.1f} %, MAPE "
                f"{figures.mape_percent:.2f} %, within 5 % {figures.within_5_percent:.0f} %, within 10 % "
                f"{figures.within_10_percent:.0f} %, Spearman {figures.spearman or 0:.3f}, Kendall "
                f"{figures.kendall or 0:.3f}"
            )
        typer.echo(f"repeat noise {found.repeat_noise_percent:.1f} %")
        for network in found.worst:
            error = 100 * (found.machine_factor * network.predicted_ms / network.measured_ms - 1)
            largest = sorted(network.blocks, key=lambda block: -block.predicted_ms)[:3]
            shares = ", ".join(f"{block.name} {block.predicted_ms:.3f}" for block in largest)
            typer.echo(
                f"worst: {error:+.1f} %  predicted {found.machine_factor * network.predicted_ms:.3f} ms, "
                f"measured {network.measured_ms:.3f} ms; greatest blocks (ms): {shares}  "
                f"{network.architecture}"
            )
        typer.echo(f"written to {path} and {path.with_suffix('.svg')}")


@table_commands.command()
def steps(
    table: Annotated[Path | None, typer.Argument(help="A latency table; its own rows are looked at.")] = None,
    target: Annotated[
        str, typer.Option(help="Without a table: measure probe convolutions on this target, seconds.")
    ] = "onnxruntime-cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of that target.")] = None,
    round_: Annotated[
        str, typer.Option("--round", help="Channel choices to round to the steps, as 24,40,72.")
    ] = "",
) -> None:
    """Find how many channels cost the same on a device, and round channel choices to that."""
    from autocompress.latency.steps import learn_steps, probe_steps, steps_of
    from autocompress.latency.table import LatencyTable
    from autocompress.latency.target import load_target
    from autocompress.latency.widths import rounded_widths

    widths = _channel_counts(round_) if round_ else []
    if table is not None:
        row_ms = LatencyTable.load(table).row_ms
    else:
        with stage("steps") as progress:
            probed = probe_steps(
                load_target(target, threads=threads), progress=lambda done, total: progress(done, total)
            )
        row_ms = {key: row.median_ms for key, row in probed.items()}
    found = learn_steps(row_ms)
    if not found:
        raise RecipeError(
            f"{table} has no operation at 8 widths or more with all else equal: measure a grid of widths, or "
            "leave the table out to measure probes"
        )
    for staircase in found[:SHOWN_STAIRCASES]:
        typer.echo(_describe_staircase(staircase))
    if len(found) > SHOWN_STAIRCASES:
        typer.echo(f"... and {len(found) - SHOWN_STAIRCASES} more")
    best = steps_of(found)
    typer.echo("steps: " + ", ".join(f"{axis} {step}" for axis, step in best.items()))
    if widths:
        rounded = rounded_widths(widths, best["out"])
        typer.echo(
            f"rounded to steps of {best['out']}, never wider than {max(widths)}: "
            f"{','.join(map(str, rounded))}"
        )


def _channel_counts(text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        raise RecipeError(f"--round takes channel counts such as 24,40,72, got {text!r}") from None
    if min(widths) < 1:
        raise RecipeError(f"--round takes channel counts >= 1, got {text!r}")
    return widths


def _describe_staircase(found: "Staircase") -> str:
    return (
        f"{AXES[found.axis]} in steps of {found.step} (error {found.errors_percent[found.step]:.1f} %, "
        f"between neighbours {found.errors_percent[1]:.1f} %), {found.widths[0]} to {found.widths[-1]}: "
        f"{found.family}"
    )


@table_commands.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="What was measured elsewhere.")],
    output: Annotated[Path, typer.Option("--output", help="The latency table to write.")],
    format_: Annotated[Format, typer.Option("--format", help="Of the source.")] = "bundle",
    bundle: Annotated[
        Path | None, typer.Option(help="bundle: the zip file whose runner wrote the source.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="ofa: names the space whose blocks are priced.")] = None,
    set_: SetOption = None,
    device: Annotated[str, typer.Option(help="ofa, csv: what the times were measured on, for people.")] = "",
    batch: Annotated[int, typer.Option(help="ofa, csv: images at once.")] = 1,
    threads: Annotated[int, typer.Option(help="ofa, csv: threads.")] = 1,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Price widths between those of the table; marked.")
    ] = False,
) -> None:
    """Make a latency table of what another device or another project measured."""
    from autocompress.describe import describe_table
    from autocompress.latency.bundle import import_samples
    from autocompress.latency.foreign.ofa import block_table, read_ofa
    from autocompress.latency.foreign.plain_csv import read_plain_csv
    from autocompress.latency.foreign.rows import latency_table

    if output.resolve() == source.resolve():
        raise RecipeError(f"--output {output} is the source itself: name another file")
    if (format_ == "bundle") != (bundle is not None):
        raise RecipeError("--bundle device.zip belongs to --format bundle, which needs it")
    if recipe is not None and format_ != "ofa":
        raise RecipeError("a recipe is for --format ofa: it names the space whose blocks are priced")
    if bundle is not None:
        table = import_samples(source, bundle)
    else:
        if not device:
            raise RecipeError("--device says what the times were measured on, as --device 'Samsung Note10'")
        if format_ == "ofa":
            from autocompress.run import make_space

            space = make_space(new_recipe(recipe, set_), _no_data)
            rows = block_table(space, read_ofa(source))
        else:
            rows = read_plain_csv(source)
        where = _foreign_target(device, threads, batch)
        table = latency_table(rows, where, source=str(source), device={"name": device})
    if interpolate:
        table = table.interpolated()
        families = len(table.grid.knots) if table.grid else 0
        typer.echo(
            f"{families} kinds of operations have rows for every combination of some widths and are "
            "interpolated between them; rows of whole blocks never are"
        )
    table.save(output)
    typer.echo(describe_table(table))
    typer.echo(f"written to {output}")


def _no_data() -> NoReturn:
    raise RecipeError(
        "no data tells the space its channels and classes: say them, as --set space.arguments.in_channels=3 "
        "--set space.arguments.classes=1000"
    )


def _foreign_target(device: str, threads: int, batch: int) -> "Target":
    from autocompress.latency.target import Target

    return Target(device, "", threads, batch, device="other", description="imported")
