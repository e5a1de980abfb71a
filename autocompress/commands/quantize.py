"""`autocompress quantize`: a user's own model in fewer bits under a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from autocompress.commands.console import DataOption, RunOption, SetOption, WeightsOption, with_changes
from autocompress.commands.model import data_of_option, limits_of_options, work_on
from autocompress.errors import PluginError, RecipeError

if TYPE_CHECKING:
    from autocompress.latency.target import Target
    from autocompress.recipe import Recipe
    from autocompress.space import SearchSpace

# What HAQ's agent plans for; the others take what they need of it.
EVALUATIONS: Final = {"haq": 600, "haq-compat": 600}
MOST_EVALUATIONS, ALL_EVALUATIONS = 200, 1_000_000
MEASURED_BUDGET, OTHER_BUDGET, WIDE_BUDGET = "latency=50%", "size=50%", "size=75%"
SHOWN: Final = 60

STRATEGIES: Final[dict[str, dict[str, Any]]] = {
    "exact": {"strategy": "sensitivity"},
    "hawq": {"strategy": "importance", "options": {"method": "exact"}},
}
"""Names that stand for a strategy and its options: the proven optimum of measured sensitivities, and of those
that the Hessian gives."""


def quantize_recipe(
    model: str,
    *,
    weights: Path | None,
    data: str,
    target: str,
    table: Path | None,
    budget: str | None,
    strategy: str,
    widths: str | None,
    calibration: int,
    gradient: str,
    rounding: str,
    epochs: int,
    changes: list[str] | None,
) -> "Recipe":
    """Return the recipe that a call of the command stands for.

    Raises:
        RecipeError: It is not valid.
    """
    from autocompress.latency.target import load_target
    from autocompress.plugins import load_strategy
    from autocompress.quantize.schemes import legal_widths
    from autocompress.recipe import absolute_model, parse_recipe, with_absolute_paths

    if table is not None and not table.is_file():
        raise RecipeError(f"--table must be a latency table, or BitFusion's CSV: there is no file {table}")
    where = load_target(target)
    measured = _measured(where, table)
    asked = None if widths is None else _widths(widths)
    _, legal = legal_widths(where, asked)
    default = MEASURED_BUDGET
    if measured == "nowhere":
        # Biases have 32 bits: half of the size takes less than half of the bits.
        weights_bits = [w for w, _ in legal]
        default = OTHER_BUDGET if 2 * min(weights_bits) < max(weights_bits) else WIDE_BUDGET
    # Where there is one pair of widths, there is nothing to save and nothing to choose.
    limits = limits_of_options(budget or (default if len(legal) > 1 else "size=100%"))
    search: dict[str, Any] = STRATEGIES.get(strategy, {"strategy": strategy})
    try:
        beyond = getattr(load_strategy(search["strategy"]), "beyond_budget", False)
    except PluginError as error:
        raise PluginError(f"{error}; quantize also has {', '.join(STRATEGIES)}") from None
    payload: dict[str, Any] = {
        "data": data_of_option(data),
        "space": {
            "name": "bits",
            "arguments": {
                "model": absolute_model(model, Path.cwd()),
                "calibration_images": calibration,
                "gradient": gradient,
                **({"weights": str(weights.resolve())} if weights else {}),
                **({"widths": asked} if asked else {}),
                **({"worth": "hawq"} if strategy == "hawq" else {}),
            },
        },
        "target": {"name": target},
        "profile": {"measured": measured, **({"table": str(table)} if table else {})},
        "train": {"epochs": 0},
        "search": {
            "budget": limits,
            "evaluations": ALL_EVALUATIONS if beyond else EVALUATIONS.get(strategy, MOST_EVALUATIONS),
            **search,
        },
        "quantize": {"rounding": rounding},
        "finetune": {"epochs": epochs, "learning_rate": 0.01},
    }
    recipe = parse_recipe(with_changes(payload, changes), "what the options of quantize say")
    return with_absolute_paths(recipe, Path.cwd())


def _measured(target: "Target", table: Path | None) -> str:
    if table is not None:
        return "elsewhere"
    return "here" if target.runtime else "nowhere"


def _widths(text: str) -> list[int | list[int]]:
    """Read `4,8` or `4/8,8/8`."""
    found: list[int | list[int]] = []
    for part in text.split(","):
        numbers = part.strip().split("/")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise RecipeError(
                f"--widths takes bits such as 4,8, or weights/activations such as 4/8, got {text!r}"
            )
        found.append(int(numbers[0]) if len(numbers) == 1 else [int(number) for number in numbers])
    return found


def account(space: "SearchSpace") -> list[str]:
    """Return in lines what of a model can be quantized, and what cannot, with the reason."""
    from autocompress.quantize.network import quantized_network_of

    source = quantized_network_of(space).source
    sites = source.plan.sites
    pairs = ", ".join(f"{w}/{a}" for w, a in source.widths[:8])
    norms = sum(bool(site.norm) for site in sites)
    asked = space.settings.get("calibration_images", source.calibrated_on)
    more = f" and {len(source.widths) - 8} more" if len(source.widths) > 8 else ""
    lines = [
        f"{type(source.model).__name__}: {len(sites)} layers can be quantized, at bits of weights/inputs "
        f"{pairs}{more} (32 is floating point)"
        + (f"; {norms} batch norm{'s are' if norms > 1 else ' is'} folded" if norms else ""),
        f"ranges are those of {source.calibrated_on} training images"
        + (f": there are no {asked}" if source.calibrated_on < asked else ""),
    ]
    if rest := sum(op.macs for op in source.plan.others):
        every = rest + sum(op.macs for site in sites for op in site.ops)
        lines.append(
            f"operations that are no such layers, as products of attention, stay in floating point: "
            f"{rest / every:.1%} of the multiply-accumulates"
        )
    for left in source.plan.left[:SHOWN]:
        advice = f"; {left.advice}" if left.advice else ""
        lines.append(f"  {left.layer} stays in floating point: {left.reason}{advice}")
    return lines


def quantize(
    model: Annotated[str, typer.Argument(help="Your model: file.py:factory or module:factory.")],
    weights: WeightsOption = None,
    data: DataOption = "digits",
    target: Annotated[
        str, typer.Option(help="What it runs on, and its legal bits; see `autocompress list targets`.")
    ] = "onnxruntime-cpu",
    table: Annotated[
        Path | None,
        typer.Option(help="Latencies of that target from elsewhere: a latency table, or BitFusion's CSV."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="latency=50%, size=500k, bops=30%, energy=1, several by commas; by default latency=50%, "
            "or size=50% (size=75% where the least bits are half of the most) if no latency is known."
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="exact, hawq, haq, greedy, or any of `autocompress list strategies`.")
    ] = "exact",
    widths: Annotated[
        str | None, typer.Option(help="Bits to choose from, of those the target runs: 4,8.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Training images that ranges are found on.")] = 512,
    gradient: Annotated[str, typer.Option(help="How finetuning learns scales: lsq, pact or fixed.")] = "lsq",
    rounding: Annotated[
        str, typer.Option(help="Of weights, before finetuning: nearest, adaround or brecq.")
    ] = "nearest",
    epochs: Annotated[int, typer.Option(help="Of finetuning with distillation.")] = 5,
    run: RunOption = Path("runs/quantize"),
    set_: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what can be quantized and what cannot; write nothing.")
    ] = False,
) -> None:
    """Quantize your own network: bits for each layer under a budget, measured and exported as integers.

    Batch norm is folded, ranges are found on training images, the device is measured at each precision; a
    strategy finds the bits of each layer; the network is finetuned, taught by yours in floating point,
    exported as ONNX with QuantizeLinear and DequantizeLinear, and measured. Your model is never changed. The
    run can be resumed: `autocompress resume RUN`.
    """
    recipe = quantize_recipe(
        model,
        weights=weights,
        data=data,
        target=target,
        table=table,
        budget=budget,
        strategy=strategy,
        widths=widths,
        calibration=calibration,
        gradient=gradient,
        rounding=rounding,
        epochs=epochs,
        changes=set_,
    )
    work_on(recipe, None if dry_run else run, account)
