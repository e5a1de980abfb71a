"""8 bits on this machine: a ResNet-18 trained here, and a MobileNetV3 whose layers are 8 bits or floats.

    python benchmarks/int8_latency.py [--quick] [--only resnet18|mobilenet_v3]    # about half an hour

ONNX Runtime, one thread, one image; weights signed with a scale a channel, inputs unsigned, as the target
`onnxruntime-cpu` states. What is compared is measured in turn, in the same rounds.

ResNet-18: CIFAR-10 at 32 pixels, 10,000 training images, random weights before; 8 bits everywhere by ranges
on 512 training images, without finetuning. Accuracy on 10,000 test images. The same network at 224 pixels is
timed with the same weights.

MobileNetV3 (the large one of `search_spaces.mobilenet_v3`, kernel 5, expansion 4, at 224 pixels; weights do
not matter to time): the bits space is profiled, and the policy of least predicted latency is found by the
exact minimum of the table's cost, conversions between neighbours included. It stands beside 32-bit floats and
8 bits everywhere. The cost has a constant and is no sum of layers alone: what the table says of each is
printed too, raw and corrected.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, ROOT, cifar10_folder, environment
from torch import Tensor, nn

from autocompress.atomic import read_json, write_json, write_text
from autocompress.distill.finetune import finetune
from autocompress.elastic.supernet import resize
from autocompress.errors import StorageError
from autocompress.export.onnx_graph import onnx_model
from autocompress.latency.measure import time_once
from autocompress.latency.profile import profile
from autocompress.latency.runtime import Run, background, pinned, prepare
from autocompress.latency.target import load_target
from autocompress.models.resnet import resnet18
from autocompress.network import build_network
from autocompress.quantize.schemes import legal_widths
from autocompress.quantize.source import QuantizationSource
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.space import Codes, SearchSpace
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.task import load_task
from search_spaces.bits import bit_space
from search_spaces.mobilenet_v3 import mobilenet_v3

ROUNDS = 101
PROMISED, MOST_LOST = 1.8, 0.5


def quantized_space(model: nn.Module, images: list[Tensor]) -> tuple[QuantizationSource, SearchSpace]:
    """Return a model at 8 bits or in floats, layer by layer."""
    scheme, widths = legal_widths(load_target("onnxruntime-cpu"))
    source = QuantizationSource(
        model, images[0][:1], calibration=images, widths=widths, scheme=scheme, outputs=True
    )
    return source, bit_space(source)


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Time networks in turn, small blocks in between, so that none finds its weights in the cache."""
    target = load_target("onnxruntime-cpu", threads=1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    with pinned(target):
        others = background(target)
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name in rng.permutation(list(runs)):
                for index in rng.permutation(len(others))[:6]:
                    others[index]()
                times[name].append(time_once(runs[name]))
    return times


def ratios(times: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Return how much longer one takes than the other: median over rounds, with its 95 % interval."""
    pairs = sorted(a / b for a, b in zip(times[one], times[other], strict=True))
    half = 0.98 * len(pairs) ** 0.5
    low, high = int(len(pairs) / 2 - half), min(int(len(pairs) / 2 + half) + 1, len(pairs) - 1)
    return {"median": statistics.median(pairs), "low": pairs[max(low, 0)], "high": pairs[high]}


def resnet(quick: bool) -> dict[str, Any]:
    """Train, quantize, test and time ResNet-18."""
    torch.set_num_threads(2)
    total, side = (600, 32) if quick else (15_000, 32)
    data = load_data("cifar10", folder=cifar10_folder(), limit=total, validation=1 / 3)
    task, path = load_task(TaskSettings()), ROOT / "runs" / "int8_latency" / f"resnet18_{total}.pt"
    torch.manual_seed(0)
    model = resnet18(classes=10)
    settings = FinetuneSettings(
        epochs=1 if quick else 15, batch_size=64, learning_rate=0.05, weight_decay=5e-4, precision="fp32",
        memory_format="contiguous",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    finetune(model, data, task, settings, resolution=(side, side), checkpoint=path)
    images = calibration_batches(data, 64 if quick else 512)
    source, space = quantized_space(model.eval(), images)

    def test(network: nn.Module) -> float:
        return 100 * evaluate(lambda x: network(resize(x, (side, side))), data.test, task.score).mean

    integers = source.network(((8, 8),) * len(source.plan.sites))
    found: dict[str, Any] = {"test, floats": test(model), "test, 8 bits": test(integers)}
    target = load_target("onnxruntime-cpu", threads=1)
    for pixels in (side, 224):
        if pixels != side:
            _, space = quantized_space(model, [resize(images[0][:16], (pixels, pixels))])
        runs = {
            "floats": prepare(space.operations(space.largest()), target),
            "8 bits": prepare(space.operations(space.smallest()), target),
        }
        times = interleaved(runs, 5 if quick else ROUNDS)
        found[f"{pixels} px"] = {
            "ms": {name: statistics.median(values) for name, values in times.items()},
            "floats / 8 bits": ratios(times, "floats", "8 bits"),
        }
    sizes = {
        name: len(onnx_model(space.operations(codes), batch=1))
        for name, codes in (("floats", space.largest()), ("8 bits", space.smallest()))
    }
    return {**found, "ONNX bytes": sizes}


def mobilenet(quick: bool) -> dict[str, Any]:
    """Profile MobileNetV3 at both precisions, find the fastest policy, and time it."""
    base = mobilenet_v3(preset="tiny") if quick else mobilenet_v3(width=1.0, resolutions=(224,))
    torch.manual_seed(0)
    (arch,) = base.decode(_middle(base))
    blocks = base.operations(base.encode([arch]))
    model = build_network(blocks).eval()
    shape = blocks[0][1][0].in_shape
    images = [torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))]
    source, space = quantized_space(model, images)
    target = load_target("onnxruntime-cpu", threads=1)
    folder = ROOT / "runs" / "int8_latency" / ("quick" if quick else "mobilenet_v3")
    table = profile(
        space,
        target,
        folder=folder,
        networks=8 if quick else 40,
        min_rounds=6 if quick else 24,
        max_rounds=6 if quick else 40,
        progress=lambda done, total: print(f"profile {done} of {total}", end="\r", flush=True),
    )
    cost = table.cost(space)
    policies = {"floats": space.largest(), "8 bits": space.smallest(), "searched": cost.argmin()}
    runs = {name: prepare(space.operations(codes), target) for name, codes in policies.items()}
    times = interleaved(runs, 5 if quick else ROUNDS)
    report = table.error_report
    assert report is not None
    return {
        "layers": len(source.plan.sites),
        "in integers": int((policies["searched"] == 0).sum()),
        "choices": len(space.choices),
        "predicted ms": {name: float(cost.of(codes)[0]) for name, codes in policies.items()},
        "measured ms": {name: statistics.median(values) for name, values in times.items()},
        "floats / searched": ratios(times, "floats", "searched"),
        "8 bits / searched": ratios(times, "8 bits", "searched"),
        "floats / 8 bits": ratios(times, "floats", "8 bits"),
        "table": {
            "rows": len(table.rows),
            "leave-one-out error, %": report.figures.mape_percent,
            "correction": vars(table.correction),
        },
        "kinds": by_kind(space, table.row_ms),
    }


def _middle(space: SearchSpace) -> Codes:
    """Return the network of middle kernels and expansions, at its greatest depth."""
    settings = {}
    for choice in space.choices:
        last = choice.name.rpartition(".")[2]
        middle = choice.options[len(choice.options) // 2]
        settings[choice.name] = choice.options[-1] if last in ("depth", "resolution") else middle
    return space.encode([space.architecture(settings)])


def by_kind(space: SearchSpace, row_ms: Any) -> dict[str, dict[str, float]]:
    """Return what layers of each kind take alone, in floats and in 8 bits, and what conversions do, in ms."""
    found: dict[str, dict[str, float]] = {}
    for precision, codes in (("floats", space.largest()), ("8 bits", space.smallest())):
        for _, ops in space.priced_operations(codes):
            for op in ops:
                inner = getattr(op, "op", op)
                kind = type(inner).__name__
                if getattr(inner, "depthwise", False):
                    kind = "depthwise"
                elif getattr(inner, "kernel", 0) == 1:
                    kind = "pointwise"
                entry = found.setdefault(kind, {"floats": 0.0, "8 bits": 0.0})
                entry[precision] += row_ms.get(op.key, float("nan"))
    return found


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# 8 bits on this machine", ""]
    if one := found.get("resnet18"):
        lost = one["test, floats"] - one["test, 8 bits"]
        lines += [
            "## ResNet-18",
            "",
            f"Test {one['test, floats']:.2f} % in floats, {one['test, 8 bits']:.2f} % in 8 bits: "
            f"{lost:+.2f} points lost (at most {MOST_LOST}: {'yes' if lost <= MOST_LOST else 'no'}). ONNX "
            f"{one['ONNX bytes']['floats'] / 1e6:.1f} and {one['ONNX bytes']['8 bits'] / 1e6:.1f} MB.",
            "",
            "| image | floats, ms | 8 bits, ms | faster (95 %) |",
            "|---|---|---|---|",
        ]
        for pixels in ("32 px", "224 px"):
            row, ratio = one[pixels]["ms"], one[pixels]["floats / 8 bits"]
            lines.append(
                f"| {pixels} | {row['floats']:.3f} | {row['8 bits']:.3f} | {ratio['median']:.2f} "
                f"({ratio['low']:.2f} to {ratio['high']:.2f}) |"
            )
    if two := found.get("mobilenet_v3"):
        lines += [
            "",
            "## MobileNetV3",
            "",
            f"{two['layers']} layers, {two['choices']} choices; the policy of least predicted latency "
            f"has {two['in integers']} of them in 8 bits. Table: {two['table']['rows']} rows, leave-one-out "
            f"error {two['table']['leave-one-out error, %']:.1f} %.",
            "",
            "| policy | predicted, ms | measured, ms | against the searched one (95 %) |",
            "|---|---|---|---|",
        ]
        for name in ("floats", "8 bits", "searched"):
            ratio = two.get(f"{name} / searched")
            said = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""
            lines.append(
                f"| {name} | {two['predicted ms'][name]:.3f} | {two['measured ms'][name]:.3f} | {said} |"
            )
        lines += [
            "",
            "Rows of the table by kind, uncorrected sums:",
            "",
            "| kind | floats, ms | 8 bits, ms |",
        ]
        lines += ["|---|---|---|"]
        for kind, sums in two["kinds"].items():
            lines.append(f"| {kind} | {sums['floats']:.3f} | {sums['8 bits']:.3f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run both, or one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", choices=("resnet18", "mobilenet_v3"))
    parser.add_argument("--output", type=Path, default=RESULTS / "int8_latency.json")
    given = parser.parse_args()
    path = Path("/tmp/int8_latency_quick.json") if given.quick else given.output
    found: dict[str, Any] = {}
    if path.exists() and not given.quick:
        found = read_json(path, StorageError, "results")["found"]
    for name, run in (("resnet18", resnet), ("mobilenet_v3", mobilenet)):
        if given.only in (None, name):
            found[name] = {**run(given.quick), "commit": environment()["commit"]}
            write_json(path, {"environment": environment(), "found": found})
            write_text(path.with_suffix(".md"), table(found))
    print(table(found))


if __name__ == "__main__":
    main()
