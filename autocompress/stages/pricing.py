"""What networks cost: the target, its latency table, and every other cost."""

from contextlib import suppress
from functools import partial

from autocompress.cost import OPERATION_METRICS, Cost, Price, compile_cost, operation_cost
from autocompress.describe import describe_table
from autocompress.errors import CostError, TableError
from autocompress.latency import energy
from autocompress.latency.correction import Correction
from autocompress.latency.energy import EnergyModel
from autocompress.latency.profile import profile as profile_space
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import Target, load_target
from autocompress.peak_memory import ELEMENT_BYTES, peak_activation_cost
from autocompress.quantize.estimate import bitfusion_table
from autocompress.recipe import Recipe
from autocompress.run import Run, Shown
from autocompress.space import SearchSpace

LATENCY = "latency_ms"
TABLE = "latency_table.json"
PUBLISHED = (".csv", ".csv.gz")


def target(run: Run) -> Target:
    """Return the target of the run: the recipe's, or that of a table from elsewhere."""
    if run.recipe.profile.measured == "elsewhere":
        return _table_from_elsewhere(run).target
    settings = run.recipe.target
    return load_target(settings.name, threads=settings.threads, batch=settings.batch)


def profile(run: Run, shown: Shown) -> LatencyTable:
    """Measure the space on the target, or read what was measured; a table without rows where nothing is."""
    path = run.path(TABLE)
    if run.recipe.profile.measured == "nowhere":
        return LatencyTable(target(run), {}, Correction(), None, {"device": {}})
    if run.recipe.profile.measured == "elsewhere":
        table = _table_from_elsewhere(run)
        if not path.exists():
            # Before it is taken: a block without a row is an error here, not after training.
            table.cost(run.space)
            table.save(path)
            shown.say(f"{describe_table(table)}; of another device: nothing is measured here")
            if estimated := table.provenance.get("estimated"):
                shown.say(
                    f"{len(estimated)} of its {len(table.rows)} rows are estimates by a model fitted to the "
                    "published ones; its mean error for shapes that were held out: "
                    + ", ".join(f"{k} {v} %" for k, v in table.provenance["error of estimates, %"].items())
                )
        return table
    if path.exists():
        table = LatencyTable.load(path)
        table.check_target(target(run))
        return table
    settings = run.recipe.profile
    given = None if settings.table is None else LatencyTable.load(settings.table)
    with shown.stage(f"profile {target(run).name}") as progress:
        table = profile_space(
            run.space,
            target(run),
            folder=run.folder,
            networks=settings.networks,
            seed=settings.seed,
            granularity=settings.granularity,
            tolerance=settings.tolerance,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            widths=settings.widths,
            knots=settings.knots,
            table=given,
            progress=lambda done, total: progress(done, total),
        )
    shown.say(describe_table(table))
    return table


def _table_from_elsewhere(run: Run) -> LatencyTable:
    """Read the table of another device: the run's copy, or the file it is taken from."""
    path = run.path(TABLE)
    return LatencyTable.load(path) if path.exists() else given_table(run.recipe, run.space)


def given_table(recipe: Recipe, space: SearchSpace) -> LatencyTable:
    """Read the table of another device that a recipe names.

    Raises:
        TableError: It names none, or what it names is none.
    """
    given = recipe.profile.table
    if given is None:
        raise TableError("profile.measured: elsewhere needs profile.table")
    if given.name.endswith(PUBLISHED):
        # The tables of an accelerator are of shapes and bits: which rows a space needs is seen here.
        settings = recipe.target
        where = load_target(settings.name, threads=settings.threads, batch=settings.batch)
        return bitfusion_table(given, space, where)
    return LatencyTable.load(given)


def costs(run: Run, shown: Shown) -> list[Cost]:
    """Return every cost of the run: MACs, parameters, bytes, bit operations, activations, energy, latency."""
    table = profile(run, shown)
    timed = [] if run.recipe.profile.measured == "nowhere" else [table.cost(run.space)]
    return [*untimed_costs(run.space, target(run)), *timed]


def untimed_costs(space: SearchSpace, target: Target) -> list[Cost]:
    """Return the costs that need no latency table.

    Activations and energy are those of the target's batch and number format; energy is an analytic estimate
    of 45 nm hardware with 1 MiB of SRAM (`autocompress.latency.energy`), good for comparing networks. Where a
    cell has too many settings to look at all (DARTS), there is no peak of activations: it is no sum of parts.
    """
    element_bytes = ELEMENT_BYTES[target.number_format]
    peak: list[Cost] = []
    with suppress(CostError):
        peak.append(peak_activation_cost(space, element_bytes=element_bytes, batch=target.batch))
    return [
        *(operation_cost(space, metric) for metric in OPERATION_METRICS),
        *peak,
        compile_cost(space, energy_price(target), energy.METRIC),
    ]


def energy_price(target: Target) -> Price:
    """Return what prices the energy of operations, at the target's batch and number format."""
    bits = 8 * ELEMENT_BYTES[target.number_format]
    return partial(EnergyModel().price, batch=target.batch, weight_bits=bits, activation_bits=bits)


def price_of(run: Run, shown: Shown, metric: str) -> Price:
    """Return what prices some operations in a metric, as far as operations have it each for itself.

    Raises:
        CostError: They do not.
    """
    if metric == LATENCY:
        return profile(run, shown).price
    if metric == energy.METRIC:
        return energy_price(target(run))
    if metric not in OPERATION_METRICS:
        raise CostError(f"operations have no {metric} of their own")
    return lambda ops: sum(getattr(op, metric) for op in ops)
