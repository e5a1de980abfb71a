"""The final comparison: the searched network beside the largest, uniform-scaled and random ones.

This is the one place that reads the test part of the data, after every decision was made. A run that is
searched again, or in which another network is selected, is compared again; the report then says how often the
test part was read before.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.atomic import read_json, write_json
from autocompress.baselines import random_networks, uniform_candidates
from autocompress.budget import Constraints
from autocompress.cost import OPERATION_METRICS
from autocompress.elastic.supernet import resize
from autocompress.errors import StorageError
from autocompress.evaluator import Evaluator
from autocompress.export.onnx_graph import onnx_model
from autocompress.latency.check import measure_beside, measured_before
from autocompress.latency.energy import METRIC as ENERGY
from autocompress.latency.energy import EnergyModel
from autocompress.latency.measure import Measurement
from autocompress.latency.memory import peak_memory_bytes
from autocompress.latency.runtime import Blocks, pinned, prepare, prepare_onnx, reads_onnx
from autocompress.network import user_model, whole_network
from autocompress.policy.passes import counted_costs, policy_text
from autocompress.quantize.layer import effective_bits, has_quantizers
from autocompress.quantize.network import QuantizedNetwork
from autocompress.report.policy_plot import PlottedLayer, policy_plot
from autocompress.run import Run, Shown, trains_anew
from autocompress.space import Architecture, Codes
from autocompress.stages import (
    LATENCY,
    compress,
    constraints,
    evaluator,
    export,
    finetune,
    latency_margin,
    passes_of,
    price_of,
    profile,
    resolution,
    selected,
    selection,
    target,
    train,
    untrained,
)
from autocompress.training.evaluate import evaluate

BROUGHT, POLICY_PLOT, SIZE = "as you brought it", "policy.svg", "size_bytes"
SCHEMA = "autocompress.report"
# Random networks use at least this share of the budget: they are compared at the same budget, not below it.
RANDOM_AT_LEAST = 0.9
UNIFORM_RULE = (
    "uniform-scaled: the better, on validation, of the same relative setting for every choice and of "
    "compound scaling of depth, width and resolution, each as large as fits"
)
UNIFORM_BITS = (
    "uniform-scaled: the better, on validation, of the same relative setting for all weights and another, or "
    "the same, for all inputs, each as large as fits"
)
RANDOM_RULE = (
    "random: every choice drawn uniformly, given that the network's output depends on its input, and that it "
    f"fits the budget and uses at least {RANDOM_AT_LEAST:.0%} of it"
)

Compared = tuple[str, Architecture, nn.Module]
"""What a network is, which, and its weights."""


@dataclass(frozen=True)
class Row:
    """One network of the comparison.

    Attributes:
        name: What it is.
        key: Of its architecture.
        test: Mean of the metric on the test part, its 95 % interval, and the number of images.
        validation: Mean of the metric on the held-out part.
        costs: Metric to cost; latency is predicted by the table.
        bits: Of a network of few bits, the mean bits of a weight and of what layers read.
        latency_ms: Measured median; rows of the same network share it. `None` where the table is of another
            device.
        latency_p95_ms: Measured 95th percentile, likewise.
        peak_memory_bytes: Of the network as ONNX in 32-bit floats; `None` on other targets.
    """

    name: str
    key: str
    test: float
    test_interval: tuple[float, float]
    test_images: int
    validation: float
    costs: Mapping[str, float]
    bits: tuple[float, float] | None
    latency_ms: float | None
    latency_p95_ms: float | None
    peak_memory_bytes: int | None


def report(run: Run, shown: Shown, arch: Architecture | None = None) -> dict[str, Any]:
    """Compare and measure, or read what was compared.

    Args:
        run: The run; stages that are missing are run first.
        shown: Told progress.
        arch: Which network; the selected one by default.

    Returns:
        The content of the report's file: rows, limits, what uniform and random mean, paths.
    """
    chosen = selection(run)
    rule = chosen[1] if chosen is not None and arch in (None, chosen[0]) else ""
    arch = selected(run, shown, arch)
    path = run.report_path(arch)
    if path.exists():
        known = _read(path)
        if known["selected_by"] == rule:
            export(run, shown, arch)  # other formats may be wanted since
            return known
    folder = export(run, shown, arch)
    supernet = train(run, shown)
    limits = constraints(run, shown)
    score = evaluator(run, supernet)
    uniform = run.space.decode(_best_uniform(run, limits, score))
    drawn = random_networks(
        limits,
        run.recipe.random_networks,
        np.random.default_rng((run.recipe.search.seed, 3)),
        at_least=RANDOM_AT_LEAST,
    )
    name = "selected" if rule else "searched"
    baselines = [("uniform-scaled", a) for a in uniform]
    randoms = [(f"random {i + 1}", random) for i, random in enumerate(run.space.decode(drawn))]
    networks: list[Compared] = []
    if trains_anew(run.recipe):
        # No network alone was trained in a mixture: those it is compared with are trained anew like it.
        baselines += randoms
    else:
        largest = run.space.decode(run.space.largest())[0]
        slices = [("largest", largest), *baselines, *randoms, (name, arch)]
        networks += [(which, a, untrained(run, shown, supernet, a)) for which, a in slices]
        brought = user_model(run.space, run.space.largest())
        if (
            run.space.settings.get("weights")
            and brought
            and (run.recipe.train.epochs or not brought.is_whole)
        ):
            # Slices of it were trained since, or are of integers: the largest is not what the user has.
            networks.insert(0, (BROUGHT, largest, whole_network(run.space)))
    files = {}
    compressed: list[Compared] = []
    for which, a in [*baselines, (name, arch)]:
        networks.append((f"{which}, finetuned", a, finetune(run, shown, a)[0]))
        if passes := passes_of(run.recipe):
            title = f"{which}, finetuned, {policy_text(passes)}"
            files[title] = export(run, shown, a) / "network.onnx"
            compressed.append((title, a, compress(run, shown, a)[0]))
    with shown.stage("measure and compare") as progress:
        progress(0, len(networks), "latency")
        exported = folder / "network.onnx"
        distinct = list({a.key: a for _, a, _ in networks}.values())
        files["exported"] = exported
        measured, drift = _measure(run, distinct, files, _checked(run, shown))
        peaks = {a.key: _peak_memory(run, a) for a in distinct}
        rows = []
        for done, compared in enumerate(networks):
            progress(done, len(networks), compared[0])
            a = compared[1]
            rows.append(
                _row(run, _costs(run, limits, *compared[:2]), compared, measured.get(a.key), peaks[a.key])
            )
        for one in compressed:
            costs = _counted(run, one, files[one[0]])
            rows.append(_row(run, costs, one, measured.get(one[0]), None))
        progress(len(networks), len(networks), "")
    content = {
        "schema": SCHEMA,
        "version": 1,
        "subject": name,
        "selected_by": rule,
        "earlier_reports": _earlier_reports(run),
        "budget": dict(run.recipe.search.budget),
        "limits": dict(limits.limits),
        "latency_margin": latency_margin(run, shown, limits.limits),
        "confidence": run.recipe.search.confidence,
        "metric": run.task.metric,
        "made": _made(run),
        "target": target(run).describe(),
        "rows": [asdict(row) for row in rows],
        "drift": drift,
        "exported": asdict(measured["exported"]) if "exported" in measured else None,
        "passes": [[name, dict(settings)] for name, settings in passes_of(run.recipe)],
        "exported_folder": str(folder),
        "onnx_bytes": exported.stat().st_size if exported.exists() else None,
        "uniform": (UNIFORM_BITS if _is_quantized(run) else UNIFORM_RULE)
        if uniform
        else "uniform-scaled: no such network fits the budget",
        "random": RANDOM_RULE
        if _uses_enough(limits, drawn)
        else f"{RANDOM_RULE}, where there are enough such",
    }
    write_json(path, content)
    _draw(run, shown, arch, next(iter(limits.limits), SIZE))
    return content


def _is_quantized(run: Run) -> bool:
    return isinstance(user_model(run.space, run.space.largest()), QuantizedNetwork)


def _made(run: Run) -> str:
    """Say where the networks of the table come from."""
    if trains_anew(run.recipe):
        return "all networks were trained anew in the same way, taught by the mixture of the search"
    if _is_quantized(run):
        return "networks not marked finetuned are your model with fewer bits, not trained after that"
    if user_model(run.space, run.space.largest()) is not None:
        return "networks not marked finetuned are your model cut, with batch-norm statistics of their own"
    return "networks not marked finetuned are slices of the supernet with batch-norm statistics of their own"


def _draw(run: Run, shown: Shown, arch: Architecture, metric: str) -> None:
    """Draw the policy of a network of few bits over the cost that was limited."""
    model = user_model(run.space, run.space.encode([arch]))
    if not isinstance(model, QuantizedNetwork):
        return
    whole = user_model(run.space, run.space.largest())
    assert isinstance(whole, QuantizedNetwork)  # noqa: S101  (of one space)
    price = price_of(run, shown, metric)
    layers = [
        PlottedLayer(site.name, *bits, cost=price(site.at(bits)), whole_cost=price(site.at(most)))
        for site, bits, most in zip(model.source.plan.sites, model.policy, whole.policy, strict=True)
    ]
    path = run.network_folder(arch) / POLICY_PLOT
    policy_plot(path, layers, metric=metric, title=f"{model.name}: bits of each layer")
    shown.say(f"bits of each layer, over {metric}: {path}")


def _best_uniform(run: Run, limits: Constraints, score: Evaluator) -> Codes:
    """Return the best of the uniform-scaled networks, or no row if none fits, though others do."""
    candidates = uniform_candidates(limits)
    if not len(candidates):
        return candidates
    scores = score(candidates)[run.task.metric]
    return candidates[[int(scores.argmax())]]


def _uses_enough(limits: Constraints, codes: Codes) -> bool:
    return bool((limits.violation(codes) >= RANDOM_AT_LEAST - 1).all())


def _earlier_reports(run: Run) -> int:
    """Return how many comparisons of this run read the test part before."""
    paths = run.folder.glob("networks/*/report-*.json")
    # One that was made again replaced another, so files are not counted.
    return max((_read(path)["earlier_reports"] + 1 for path in paths), default=0)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, StorageError, "comparison")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise StorageError(f"{path} is damaged; remove it to compare again")
    return content


def _checked(run: Run, shown: Shown) -> dict[str, tuple[Blocks, float]]:
    """Return some networks of the table's error report, small to large, and what they took then, in ms."""
    if run.recipe.profile.measured == "nowhere":
        return {}
    return measured_before(profile(run, shown), run.space, run.recipe.profile.seed)


def _measure(
    run: Run,
    archs: Sequence[Architecture],
    files: Mapping[str, Path],
    checked: Mapping[str, tuple[Blocks, float]],
) -> tuple[dict[str, Measurement], float | None]:
    """Measure different architectures, ONNX files and the checks, interleaved on the target.

    Nothing is measured where the table is of another device.

    Returns:
        Measurements by key of an architecture and by name of a file; and how much longer the checks take now
        than when the table was measured, as a factor (the median over them): the speed of a shared machine
        changes.
    """
    where = target(run)
    if run.recipe.profile.measured != "here":
        return {}, None
    with pinned(where):
        runs = {arch.key: prepare(run.space.operations(run.space.encode([arch])), where) for arch in archs}
        there = {name: file for name, file in files.items() if reads_onnx(where) and file.exists()}
        runs |= {name: prepare_onnx(file, where) for name, file in there.items()}
        return measure_beside(checked, runs, where)


def _peak_memory(run: Run, arch: Architecture) -> int | None:
    where = target(run)
    if run.recipe.profile.measured != "here" or (where.runtime, where.number_format) != (
        "onnxruntime",
        "float32",
    ):
        return None
    blocks = run.space.operations(run.space.encode([arch]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        file.write_bytes(onnx_model(blocks, batch=target(run).batch))
        return peak_memory_bytes(file, target(run))


def _row(
    run: Run,
    costs: Mapping[str, float],
    compared: Compared,
    measured: Measurement | None,
    peak: int | None,
) -> Row:
    name, arch, network = compared
    size = resolution(run, arch)
    test, validation = (
        evaluate(partial(_forward, network, size), part, run.task.score)
        for part in (run.data.test, run.data.validation)
    )
    return Row(
        name=name,
        key=arch.key,
        test=test.mean,
        test_interval=test.interval,
        test_images=test.count,
        validation=validation.mean,
        costs=costs,
        bits=_bits(network),
        latency_ms=None if measured is None else measured.median_ms,
        latency_p95_ms=None if measured is None else measured.p95_ms,
        peak_memory_bytes=peak,
    )


def _costs(run: Run, limits: Constraints, name: str, arch: Architecture) -> dict[str, float]:
    """Return the costs of a network; of a model that was brought and then quantized, those in floats."""
    codes = run.space.encode([arch])
    costs = {metric: float(values[0]) for metric, values in limits.price(codes).items()}
    model = user_model(run.space, codes)
    if name != BROUGHT or not isinstance(model, QuantizedNetwork):
        return costs
    floats = model.in_floats()
    own = {metric: float(getattr(floats, metric)) for metric in OPERATION_METRICS}
    own[ENERGY] = EnergyModel().price(floats.ops, batch=target(run).batch)
    # A device without floats has no latency of them.
    return own | ({LATENCY: costs[LATENCY]} if LATENCY in costs and floats == model else {})


def _counted(run: Run, compared: Compared, file: Path) -> dict[str, float]:
    """Return the costs of what passes made, which no table prices: counted, and bytes of the ONNX file."""
    _, arch, network = compared
    image = torch.zeros(1, run.data.in_shape[0], *resolution(run, arch))
    stored = {SIZE: float(file.stat().st_size)} if file.exists() else {}
    return {**counted_costs(network, image), **stored}


def _bits(network: nn.Module) -> tuple[float, float] | None:
    return effective_bits(network) if has_quantizers(network) else None


def _forward(network: nn.Module, size: tuple[int, int], images: Any) -> Any:
    return network(resize(images, size))


def random_summary(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return mean and standard deviation of the test metric of the random networks."""
    values = [row["test"] for row in rows if row["name"].startswith("random")]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
