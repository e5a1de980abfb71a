"""Bits of MobileNetV2: searches against the proven optimum on HAQ's table, and which layers get the bits.

    python benchmarks/haq_table.py            # 90 minutes on one core; goes on where it stopped
    python benchmarks/haq_table.py --quick    # a smoke test; prints only, unless --output says where to

First part. HAQ's published latency table (MobileNetV2, batch 16), 53 layers x widths 2 to 8 of weights and of
inputs, at most 0.6 of the latency at 8 bits. What a network loses is made up: the sum over layers of
`u 4^-w + v 4^-a`, u and then v lognormal(0, 1.5) from seed 0; evaluators say `exp(-loss)`. No strategy knows
the formula. The gap is how much more the best network loses than the proven optimum. One evaluation is one
episode, one network of a generation, or one single change.

Second part. MobileNetV2 of width 1, its real shapes, trained here for a short time on Fashion-MNIST; the
sensitivity of a layer is the KL divergence of the outputs from those of the floating-point network when the
weights of this layer alone have few bits (symmetric, one scale a layer, as HAQ's). The optimum of the sum
under the bytes of 4 bits everywhere, and the mean bits of depthwise and of pointwise layers.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, SHARED, environment, parser, use_one_core
from torch import Tensor, nn

from autocompress.atomic import write_json, write_text
from autocompress.baselines import uniform_candidates
from autocompress.budget import Budget, Constraints
from autocompress.cost import AdditiveCost, operation_cost
from autocompress.exact import separable, solve
from autocompress.latency.foreign.haq import read_haq
from autocompress.models.mobilenet_v2 import MobileNetV2
from autocompress.ops import Conv2d, Linear, OpSpec
from autocompress.quantize.grid import quantized, scale_of, weight_grid
from autocompress.quantize.tables import bit_cost, bit_space
from autocompress.report.policy_plot import PlottedLayer, policy_plot
from autocompress.space import Codes
from autocompress.strategy import Strategy
from autocompress.training.data import batches, load_data
from autocompress.trial import Batch
from strategies.additive import AdditiveCritic
from strategies.evolution import AgingEvolution, ElitistEvolution
from strategies.haq import Haq, haq_compat
from strategies.random_search import RandomSearch
from strategies.sensitivity import Sensitivity, greedy

TABLE = SHARED / "tables" / "haq_mobilenetv2_batch16_latency.npy"
IMAGES = SHARED / "FashionMNIST"
WIDTHS = tuple(range(2, 9))
SHARE, EPISODES, GENERATIONS, POPULATION = 0.6, 600, 600, 100
DRAWS = (1, 2, 3, 4, 5)
"""Losses that nothing was chosen on: the options of the additive critic were on that of seed 0."""
MARKS = (100, 300, 600, 2_000, 10_000, 60_000)

Make = Callable[[Constraints, int, int], Strategy]


def evolved(constraints: Constraints, seed: int, evaluations: int) -> Strategy:
    """Return the elitist form, few parents, mutants that exchange bits under the budget."""
    return ElitistEvolution(
        constraints,
        seed=seed,
        population=min(POPULATION, max(1, evaluations // 6)),
        parent_ratio=0.1,
        mutation_ratio=0.8,
        exchange=1.0,
    )


# Name: how it is made, evaluations, evaluations asked at once, seeds, target of the median gap.
STRATEGIES: dict[str, tuple[Make, int, int, tuple[int, ...], float | None]] = {
    "random": (lambda c, s, n: RandomSearch(c, seed=s), EPISODES, 1, (0, 1, 2), None),
    "additive critic": (lambda c, s, n: AdditiveCritic(c, seed=s), EPISODES, 1, (0, 1, 2), 0.05),
    "sensitivity, exact": (lambda c, s, n: Sensitivity(c, seed=s), 638, 638, (0,), None),
    "greedy": (lambda c, s, n: greedy(c, seed=s), 638, 638, (0,), None),
    "evolution, as published": (
        lambda c, s, n: AgingEvolution(c, seed=s, population=POPULATION),
        GENERATIONS * POPULATION,
        POPULATION,
        (0, 1, 2),
        None,
    ),
    "evolution with exchange": (evolved, GENERATIONS * POPULATION, POPULATION, (0, 1, 2), None),
    "evolution with exchange, 600": (
        lambda c, s, n: AgingEvolution(c, seed=s, population=20, exchange=1.0),
        EPISODES,
        1,
        (0, 1, 2),
        0.01,
    ),
    "haq": (lambda c, s, n: Haq(c, seed=s, episodes=n), EPISODES, 1, (0, 1, 2), 0.05),
    "haq-compat": (lambda c, s, n: haq_compat(c, seed=s, episodes=n), EPISODES, 1, (0, 1, 2), None),
}


def problem(draw: int = 0) -> tuple[Constraints, AdditiveCost]:
    """Return the limited space and what networks lose, drawn from a seed."""
    table = read_haq(TABLE)
    space = bit_space(table.layers, weight_bits=WIDTHS, activation_bits=WIDTHS)
    cost = bit_cost(table, space, "cycles")
    rng = np.random.default_rng(draw)
    of_weights, of_inputs = (rng.lognormal(0, 1.5, len(table.layers)) for _ in range(2))
    errors = 4.0 ** -np.array(WIDTHS)
    vectors = [scale * errors for pair in zip(of_weights, of_inputs, strict=True) for scale in pair]
    limit = SHARE * float(cost.of(space.largest())[0])
    return Constraints(space, {"cycles": cost}, {"cycles": limit}), separable(space, vectors, "loss")


def draw(constraints: Constraints, codes: Codes) -> None:
    """Draw the bits of a policy over the latency of each layer."""
    table = read_haq(TABLE)
    (arch,) = constraints.space.decode(codes)
    layers = []
    for name in table.layers:
        bits = int(arch[f"{name}.weight"]), int(arch[f"{name}.input"])
        layers.append(PlottedLayer(name, *bits, table.at(name, *bits) / 1e6, table.at(name, 8, 8) / 1e6))
    title = f"MobileNetV2 on HAQ's table, {SHARE:g} of the latency at 8 bits: the proven optimum"
    policy_plot(RESULTS / "policy_haq_mobilenetv2.svg", layers, metric="cycles (millions)", title=title)


def searched(
    strategy: Strategy, constraints: Constraints, loss: AdditiveCost, evaluations: int, at_once: int
) -> dict[str, Any]:
    """Run one search; return the least loss of what fits, at each mark and at the end."""
    start, best, done = time.perf_counter(), np.inf, 0
    marks: dict[str, float] = {}
    while done < evaluations:
        rows = strategy.ask(min(at_once, evaluations - done))
        if not len(rows):
            break
        lost, fits = loss.of(rows), constraints.feasible(rows)
        for index in range(len(rows)):
            if fits[index]:
                best = min(best, float(lost[index]))
            done += 1
            if done in MARKS and np.isfinite(best):
                marks[str(done)] = best
        outcomes = np.zeros(len(rows), dtype=np.int8)
        strategy.tell(Batch(rows, constraints.price(rows), {"accuracy": np.exp(-lost)}, outcomes))
    return {"loss": best, "marks": marks, "evaluations": done, "seconds": time.perf_counter() - start}


def table_part(results: dict[str, Any], save: Callable[[], None], *, only: list[str], quick: bool) -> None:
    """Fill `results` with optimum, uniform network and every search that is not there yet."""
    constraints, loss = problem()
    if "optimum" not in results:
        optimum = solve(loss, constraints, sense="minimize")
        uniform = uniform_candidates(constraints)
        results["optimum"] = {"loss": optimum.value, "proven": optimum.proven, "seconds": optimum.seconds}
        draw(constraints, optimum.codes)
        results["uniform"] = {"loss": float(loss.of(uniform).min()), "evaluations": len(uniform)}
        save()
    runs = results.setdefault("runs", {})
    for name, (make, evaluations, at_once, seeds, _) in STRATEGIES.items():
        for seed in seeds[:1] if quick else seeds:
            if str(seed) in runs.get(name, {}) or (only and name not in only):
                continue
            # Single changes are asked at once, and there is nothing to see before all are told.
            n = min(evaluations, 30) if quick and at_once < evaluations else evaluations
            found = searched(make(constraints, seed, n), constraints, loss, n, min(at_once, n))
            runs.setdefault(name, {})[str(seed)] = found
            print(
                f"{name}, seed {seed}: {gap(found['loss'], results):.2%}, {found['seconds']:.0f} s",
                flush=True,
            )
            save()


def other_draws(results: dict[str, Any], save: Callable[[], None], *, quick: bool) -> None:
    """Fill `results` with searches of the additive critic on losses of other seeds."""
    found = results.setdefault("other draws", {})
    for draw in DRAWS[:1] if quick else DRAWS:
        if str(draw) in found:
            continue
        constraints, loss = problem(draw)
        optimum = solve(loss, constraints, sense="minimize")
        run = searched(
            AdditiveCritic(constraints, seed=draw), constraints, loss, 30 if quick else EPISODES, 1
        )
        found[str(draw)] = {"gap": run["loss"] / optimum.value - 1, "proven": optimum.proven}
        print(f"additive critic, draw {draw}: {found[str(draw)]}", flush=True)
        save()


def gap(loss: float, results: dict[str, Any]) -> float:
    """Return how much more is lost than by the optimum, relative to that."""
    return loss / float(results["optimum"]["loss"]) - 1.0


# Which layers get the bits ------------------------------------------------------------------------------

STRIDES = (2, 1, 1, 2, 2, 1, 2, 1)
"""Of MobileNetV2, for 28 pixels: the maps of its stages are 14 (three times), 7, 4, 4, 2 and 2."""
TRAINED, EPOCHS, BATCH, PROBED = 20_000, 2, 128, 512


def layers_of(network: nn.Module, images: Tensor) -> dict[str, OpSpec]:
    """Return convolutions and linear layers by name, in the order of the network, as they run on images."""
    found: dict[str, OpSpec] = {}

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                side = inputs[0].shape[-1]
                found[name] = Conv2d(
                    module.in_channels,
                    module.out_channels,
                    side,
                    side,
                    kernel=module.kernel_size[0],
                    stride=module.stride[0],
                    groups=module.groups,
                )
            elif isinstance(module, nn.Linear):
                found[name] = Linear(module.in_features, module.out_features)

        return seen

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    with torch.no_grad():
        network.eval()(images[:1])
    for handle in handles:
        handle.remove()
    return found


def trained(images: Tensor, labels: Tensor, *, epochs: int) -> MobileNetV2:
    """Train on `(n, 1, 28, 28)` for a short time."""
    torch.manual_seed(0)
    network = MobileNetV2(10, 1, strides=STRIDES)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def network_part(results: dict[str, Any], save: Callable[[], None], work: Path, *, quick: bool) -> None:
    """Train, measure the divergence of each layer at each width, solve; resumed layer by layer."""
    data = load_data("fashion_mnist", folder=IMAGES, validation=0.1, seed=0)
    images, labels = next(batches(data.train, 256 if quick else TRAINED, seed=0))
    probe, truth = next(batches(data.validation, 64 if quick else PROBED, seed=0))
    weights = work / f"haq_table_mobilenet{'_quick' if quick else ''}.pt"
    if weights.exists():
        network = MobileNetV2(10, 1, strides=STRIDES).eval()
        network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        network = trained(images, labels, epochs=1 if quick else EPOCHS)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), weights)
    layers = layers_of(network, images)
    modules = dict(network.named_modules())
    with torch.no_grad():
        reference = network(probe).log_softmax(1)
        results["accuracy"] = float((reference.argmax(1) == truth).float().mean())
        divergences = results.setdefault("divergences", {})
        for name in layers:
            if name in divergences:
                continue
            weight = modules[name].weight
            original = weight.clone()
            divergences[name] = []
            for bits in WIDTHS[:: 6 if quick else 1]:
                grid = weight_grid(bits)
                scale, zero = scale_of(original.min(), original.max(), grid)
                weight.copy_(quantized(original, scale, zero, grid))
                found = nn.functional.kl_div(
                    network(probe).log_softmax(1), reference, log_target=True, reduction="batchmean"
                )
                divergences[name].append(float(found))
            weight.copy_(original)
            save()
    widths = WIDTHS[:: 6 if quick else 1]
    space = bit_space(tuple(layers), weight_bits=widths, activation_bits=(8,), operations=layers)
    at_four = bit_space(tuple(layers), weight_bits=(4, 8), activation_bits=(8,), operations=layers)
    size = operation_cost(space, "size_bytes")
    limit = float(operation_cost(at_four, "size_bytes").of(at_four.smallest())[0])
    constraints = Budget.of({"size_bytes": limit}).resolve(space, [size])
    vectors: list[list[float]] = []
    for name in layers:
        vectors += [divergences[name], [0.0]]
    optimum = solve(separable(space, vectors, "divergence"), constraints, sense="minimize")
    bits = [widths[code] for code in optimum.codes[0, ::2]]
    kinds: dict[str, list[int]] = {"depthwise": [], "pointwise": [], "stem and classifier": []}
    for op, given in zip(layers.values(), bits, strict=True):
        kind = "stem and classifier"
        if isinstance(op, Conv2d) and op.in_channels > 1:
            kind = "depthwise" if op.groups > 1 else "pointwise"
        kinds[kind].append(given)
    results["bits"] = dict(zip(layers, bits, strict=True))
    results["mean_bits"] = {kind: statistics.fmean(given) for kind, given in kinds.items()}
    results["layers"] = {kind: len(given) for kind, given in kinds.items()}
    results["proven"], results["limit_bytes"] = optimum.proven, limit
    print(results["mean_bits"])
    save()


# The page -----------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Bits of MobileNetV2", "", "Made by `python benchmarks/haq_table.py`.", ""]
    machine = results["environment"]["machine"]
    lines += [f"{machine['processor']}, one core; commit `{results['environment']['commit'][:12]}`.", ""]
    table = results["table"]
    lines += [
        "## HAQ's table, 0.6 of the latency at 8 bits: gap to the proven optimum",
        "",
        "Median over seeds, least and greatest in brackets. One evaluation is one episode, one network of a "
        "generation or one single change; the evaluator is a formula that no strategy knows.",
        "",
        f"Optimum {table['optimum']['loss']:.6f}; uniform network: "
        f"gap {gap(table['uniform']['loss'], table):.0%}.",
        "",
        "| strategy | seeds | evaluations | gap | at 600 | target | reached | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (*_, target) in STRATEGIES.items():
        runs = list(table.get("runs", {}).get(name, {}).values())
        if not runs:
            continue
        gaps = [gap(run["loss"], table) for run in runs]
        # Single changes are all larger than the budget: there is no network before the last evaluation.
        early = [gap(run["marks"]["600"], table) for run in runs if "600" in run["marks"]]
        median = statistics.median(gaps)
        goal = "" if target is None else f"<= {target:.0%}"
        reached = "" if target is None else ("yes" if median <= target else "NO")
        shown = f"{median:.2%} ({min(gaps):.2%} .. {max(gaps):.2%})"
        at_600 = f"{statistics.median(early):.2%}" if early else ""
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {runs[0]['evaluations']:,} | {shown} | {at_600} | {goal} | {reached} "
            f"| {seconds:.0f} |"
        )
    if draws := [entry["gap"] for entry in table.get("other draws", {}).values()]:
        spread = f"{statistics.median(draws):.2%} ({min(draws):.2%} .. {max(draws):.2%})"
        lines += [
            "",
            "The options of the additive critic were chosen on this loss. On losses of other seeds, one "
            f"search each ({len(draws)}): {spread}.",
        ]
    network = results.get("network", {})
    if "mean_bits" in network:
        lines += [
            "",
            "## A size budget of 4 bits everywhere: who gets the bits",
            "",
            f"MobileNetV2 of width 1 after {EPOCHS} epochs of {TRAINED:,} images of Fashion-MNIST "
            f"({network['accuracy']:.1%} of {PROBED} held-out ones right); divergence of each layer alone, "
            "proven optimum of the sum.",
            "",
            "| layers | number | mean bits |",
            "|---|---|---|",
        ]
        lines += [
            f"| {kind} | {network['layers'][kind]} | {mean:.2f} |"
            for kind, mean in network["mean_bits"].items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing; write after each step."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--part", choices=("table", "network", "both"), default="both")
    options.add_argument("--only", nargs="*", default=[], choices=STRATEGIES, help="of the first part")
    given = options.parse_args()
    use_one_core()
    if not TABLE.exists() or not IMAGES.exists():
        raise SystemExit(f"this benchmark needs {TABLE} and {IMAGES}, which are no part of the distribution")
    path = given.output or RESULTS / "haq_table.json"
    results: dict[str, Any] = {"table": {}, "network": {}}
    if path.exists() and not given.quick:
        results = json.loads(path.read_text(encoding="utf-8"))
    results.setdefault("environment", environment())

    def save() -> None:
        if not given.quick or given.output:
            write_json(path, results)

    if given.part in ("table", "both"):
        table_part(results["table"], save, only=given.only, quick=given.quick)
        other_draws(results["table"], save, quick=given.quick)
    if given.part in ("network", "both"):
        network_part(results["network"], save, RESULTS.parents[1] / "runs", quick=given.quick)
    if not given.quick or given.output:
        write_text(path.with_suffix(".md"), page(results))
    print(page(results))


if __name__ == "__main__":
    main()
