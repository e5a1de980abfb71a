"""Figure 5: seconds to the proven optimum of 53 layers x 49 bit pairs, under one budget and under five.

The latency table of the single budget is HAQ's (MobileNetV2, batch 16) where ../shared is there, and made up
without it. Everything else is made up, from a seed. Bit widths: weights and activations of a layer err by
4^-bits, costs follow random sizes of the layer times bits; latency and energy differ by random factors too.
Random tables: value and costs of an option share a random part and have one of their own.

Limits are a fraction of the way from the least to the greatest cost, each; then some of five bind. To have
all bind, limits are also taken around the costs of one network that is best at random prices of the costs.

Every solver runs on one thread, so that processor seconds are what it takes on a core of its own; they are
held against the targets, since other work on the machine multiplies the seconds on the wall.

python benchmarks/exact.py [--quick]    # goes on where it was stopped
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, SHARED, environment, use_one_core

from autocompress.atomic import write_json, write_text
from autocompress.budget import Constraints
from autocompress.cost import AdditiveCost, Factor, Values
from autocompress.exact import separable, solve
from autocompress.space import Choice, SearchSpace

HAQ = SHARED / "tables" / "haq_mobilenetv2_batch16_latency.npy"
LAYERS, BITS = 53, tuple(range(2, 9))
PAIRS = tuple(f"w{weights}a{activations}" for weights in BITS for activations in BITS)
SPACE = SearchSpace("bit_pairs", tuple(Choice(f"layer{i}", PAIRS) for i in range(LAYERS)), ())
METRICS = ("latency_ms", "energy_mj", "size_bytes", "bops", "activation_bytes")
FRACTIONS = (0.2, 0.4, 0.6, 0.8)
TARGETS_S = {"one": 1.0, "five": 10.0}
TIME_LIMIT_S = 600.0

Tables = dict[str, Values]
Costs = dict[str, AdditiveCost]
Limits = Callable[[int, float, AdditiveCost, Costs], dict[str, float]]


def bit_widths(seed: int) -> tuple[Values, Tables]:
    """Return sensitivities and five costs of layers of random sizes, each `(53, 49)`."""
    rng = np.random.default_rng(seed)
    weights, activations = (axis.ravel() for axis in np.meshgrid(BITS, BITS, indexing="ij"))

    def sizes(scale: float, spread: float) -> Values:
        return scale * np.exp(rng.normal(scale=spread, size=(LAYERS, 1)))

    def noisy(table: Values) -> Values:
        return table * np.exp(rng.normal(scale=0.1, size=table.shape))

    sensitivity = sizes(1.0, 1.5) * 4.0**-weights + sizes(1.0, 1.5) * 4.0**-activations
    size, bops = sizes(4e4, 1.0) * weights / 8, sizes(5e6, 1.0) * weights * activations
    activation = sizes(1e5, 1.0) * activations / 8
    latency = noisy(1e-8 * bops) + 1e-7 * (size + activation)
    energy = noisy(2e-10 * bops + 1e-8 * size + 5e-9 * activation)
    return sensitivity, dict(zip(METRICS, (latency, energy, size, bops, activation), strict=True))


def random_tables(seed: int) -> tuple[Values, Tables]:
    """Return values and five costs without structure: dearer options are better, by and large."""
    rng = np.random.default_rng(seed)
    shared = rng.random((LAYERS, len(PAIRS)))
    value, *costs = (0.7 * shared + 0.3 * rng.random(shared.shape) for _ in range(1 + len(METRICS)))
    return 1.0 - value, dict(zip(METRICS, costs, strict=True))


def haq(seed: int) -> tuple[Values, Tables]:
    """Return sensitivities, and the published latency table, or a made-up one without it."""
    sensitivity, costs = bit_widths(seed)
    latency = costs["latency_ms"]
    if HAQ.exists():
        latency = np.load(HAQ)[:, BITS[0] - 1 :, BITS[0] - 1 :].reshape(LAYERS, -1).astype(np.float64)
    return sensitivity, {"latency_ms": latency}


def fractions_of(seed: int, fraction: float, value: AdditiveCost, costs: Costs) -> dict[str, float]:
    """Return limits at that fraction of the way from the least to the greatest cost, for each."""
    return {m: cost.minimum + fraction * (cost.maximum - cost.minimum) for m, cost in costs.items()}


def around_a_network(seed: int, fraction: float, value: AdditiveCost, costs: Costs) -> dict[str, float]:
    """Return limits within 1 % of the costs of a network that is best at random prices, dear enough."""
    rng = np.random.default_rng(seed)
    prices = {m: rng.uniform(0.5, 1.5) / (cost.maximum - cost.minimum) for m, cost in costs.items()}
    wanted = fractions_of(seed, fraction, value, costs)
    for multiple in np.geomspace(1e-6, 1e6, 200):
        factors = [
            value.factors,
            *(cost.scaled(multiple * prices[m], 0.0).factors for m, cost in costs.items()),
        ]
        charged = AdditiveCost("charged", value.counts, 0.0, tuple(_summed(factors)))
        reached = {m: float(cost.of(charged.argmin())[0]) for m, cost in costs.items()}
        if statistics.fmean(reached[m] / wanted[m] for m in costs) <= 1:
            break
    return {m: cost * rng.uniform(0.99, 1.01) for m, cost in reached.items()}


def _summed(factors: list[tuple[Factor, ...]]) -> list[Factor]:
    return [Factor(same[0].positions, sum(f.values for f in same)) for same in zip(*factors, strict=True)]


PROBLEMS: dict[str, tuple[Callable[[int], tuple[Values, Tables]], Limits, str]] = {
    "one budget, dynamic programming": (haq, fractions_of, "dp"),
    "one budget, integer programming": (haq, fractions_of, "milp"),
    "five budgets, bit widths": (bit_widths, fractions_of, "auto"),
    "five budgets that bind, bit widths": (bit_widths, around_a_network, "auto"),
    "five budgets that bind, bit widths, integer programming": (bit_widths, around_a_network, "milp"),
    "five budgets, random tables": (random_tables, fractions_of, "auto"),
}


def constrained(name: str, seed: int, fraction: float) -> tuple[AdditiveCost, Constraints]:
    """Return value and limits of one problem."""
    tables_of, limits_of, _ = PROBLEMS[name]
    sensitivity, tables = tables_of(seed)
    costs = {metric: separable(SPACE, list(table), metric) for metric, table in tables.items()}
    value = separable(SPACE, list(sensitivity), "sensitivity")
    return value, Constraints(SPACE, costs, limits_of(seed, fraction, value, costs))


def run(name: str, seed: int, fraction: float) -> dict[str, Any]:
    """Solve one problem."""
    value, constraints = constrained(name, seed, fraction)
    method: Any = PROBLEMS[name][2]
    processor = time.process_time()
    optimum = solve(value, constraints, sense="minimize", method=method, time_limit_s=TIME_LIMIT_S)
    processor = time.process_time() - processor
    assert constraints.feasible(optimum.codes)[0]
    used = {
        m: float(constraints.costs[m].of(optimum.codes)[0]) / limit for m, limit in constraints.limits.items()
    }
    return {
        "processor_seconds": processor,
        "wall_seconds": optimum.seconds,
        "value": optimum.value,
        "bound": optimum.bound,
        "gap": optimum.gap,
        "proven": optimum.proven,
        "method": optimum.method,
        "used_of_limits": used,
    }


def main() -> None:
    """Solve what is missing, write after every problem, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and fraction: checks that it runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "exact.json")
    options = parser.parse_args()
    use_one_core()
    results: dict[str, Any] = {}
    if options.output.exists() and not options.quick:
        results = json.loads(options.output.read_text())["results"]
    for name in PROBLEMS:
        for seed in range(1 if options.quick else options.seeds):
            for fraction in FRACTIONS[1:2] if options.quick else FRACTIONS:
                key = f"{name}, seed {seed}, {fraction:.0%}"
                if key not in results:
                    results[key] = run(name, seed, fraction)
                    if not options.quick:
                        write_json(options.output, payload(results))
                found = results[key]
                print(
                    f"{key}: {found['processor_seconds']:.2f} s, gap {found['gap']:.1e}, "
                    f"{'proven' if found['proven'] else 'NOT PROVEN'} ({found['method']})",
                    flush=True,
                )
    lines = summary(results)
    print("\n".join(lines))
    if not options.quick:
        write_text(options.output.with_suffix(".md"), "\n".join(lines) + "\n")


def payload(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the file of results holds."""
    latency = f"HAQ's ({HAQ.name}, MIT)" if HAQ.exists() else "made up"
    settings = {
        "layers": LAYERS,
        "options": len(PAIRS),
        "latency of the single budget": latency,
        "all else": "made up from the seed",
        "time_limit_s": TIME_LIMIT_S,
        "scipy (HiGHS)": version("scipy"),
    }
    return {"benchmark": "exact", **environment(), "settings": settings, "results": results}


def summary(results: dict[str, Any]) -> list[str]:
    """Return a table in Markdown: a row for each kind of problem and budget."""
    lines = [
        f"{LAYERS} layers x {len(PAIRS)} pairs of bits, processor seconds on one thread; see "
        "`benchmarks/exact.py` for the problems.",
        "",
        "| problem | limits at | problems | proven | median s | worst s | worst gap | target s | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PROBLEMS:
        target = TARGETS_S[name.partition(" ")[0]]
        for fraction in FRACTIONS:
            end = f" {fraction:.0%}"
            found = [r for key, r in results.items() if key.startswith(f"{name}, seed") and key.endswith(end)]
            if not found:
                continue
            seconds, proven = [r["processor_seconds"] for r in found], [r["proven"] for r in found]
            reached = all(proven) and max(seconds) <= target
            lines.append(
                f"| {name} | {fraction:.0%} | {len(found)} | {sum(proven)} | "
                f"{statistics.median(seconds):.2f} | {max(seconds):.2f} | "
                f"{max(r['gap'] for r in found):.1e} | {target:g} | "
                f"{'yes' if reached else 'NO'} |"
            )
    return lines


if __name__ == "__main__":
    main()
