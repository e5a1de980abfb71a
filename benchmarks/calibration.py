"""How exact traces of Hessians are, and how long the calibration of a ResNet-18 for all widths takes.

    python benchmarks/calibration.py [--quick]    # about three minutes

Calibration is all that stands between a network in floating point and scales for every width: forward passes
of 512 images at 224 pixels with a histogram of what each of the 21 layers reads, then ranges of activations
(unsigned or signed, symmetric and asymmetric) and of weights (per channel) for all widths. Images are random
and made beforehand; reading files, and folding batch norms, are not included. Traces are those of a small
convolutional network behind ReLU, against every second derivative.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import threadpoolctl
import torch
import torch.nn.functional as F
from record import RESULTS, Figure, parser, report
from torch import Tensor, nn

from autocompress.atomic import write_text
from autocompress.models.resnet import resnet18
from autocompress.quantize.grid import WIDTHS, activation_grid, scale_of, weight_grid
from autocompress.quantize.hessian import exact_traces, hessian_traces
from autocompress.quantize.layer import KINDS, QuantizedLayer, out_axis, quantized_layers
from autocompress.quantize.observers import READERS, HistogramObserver, weight_range

IMAGES, BATCH, SIDE, THREADS = 512, 16, 224, 2
CALIBRATION_S, TRACE_ERROR = 60.0, 0.05
SAMPLES, SEEDS = 400, 5


def prepared() -> nn.Module:
    """Return a ResNet-18 whose layers are held by quantized layers without quantizers yet."""
    torch.manual_seed(0)
    network = resnet18().eval()
    for name, module in list(network.named_modules()):
        if type(module) in KINDS:
            parent, _, last = name.rpartition(".")
            network.get_submodule(parent).register_module(last, QuantizedLayer(module))
    return network


def batches(images: int) -> Iterator[Tensor]:
    """Yield random images, the same few again and again: they are not what is measured."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(BATCH, 3, SIDE, SIDE, generator=generator) for _ in range(4)]
    for at in range(images // BATCH):
        yield made[at % len(made)]


def observe(network: nn.Module, images: int) -> dict[str, HistogramObserver]:
    """Return observers of what each layer reads, fed with all images."""
    observers = {name: HistogramObserver(READERS["mse"]) for name, _ in quantized_layers(network)}

    def hook(name: str) -> Any:
        def feed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            observers[name].observe(args[0])

        return feed

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in quantized_layers(network)]
    with torch.no_grad():
        for batch in batches(images):
            network(batch)
    for handle in handles:
        handle.remove()
    return observers


def activation_scales(observers: dict[str, HistogramObserver], method: str) -> int:
    """Find scales of all activations for all widths; return how many."""
    found = 0
    for watch in observers.values():
        positive = watch.histogram.least >= 0
        for bits in WIDTHS:
            for symmetric in (True, False):
                grid = activation_grid(bits, positive=positive, symmetric=symmetric)
                scale_of(*READERS[method](watch.histogram, grid), grid)
                found += 1
    return found


def weight_scales(network: nn.Module) -> int:
    """Find scales of all weights, one a channel, for all widths; return how many."""
    found = 0
    for _, layer in quantized_layers(network):
        weight = layer.layer.get_parameter("weight")
        for bits in WIDTHS:
            grid = weight_grid(bits)
            scale, _ = scale_of(*weight_range(weight, grid, out_axis(layer.layer), "mse"), grid)
            found += len(scale)
    return found


def calibration(images: int, repeats: int) -> list[Figure]:
    """Measure each part of the calibration, and all of it."""
    network = prepared()
    parts: dict[str, list[float]] = {}

    def clocked(name: str, start: float) -> float:
        parts.setdefault(name, []).append(time.perf_counter() - start)
        return time.perf_counter()

    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches(images):
                network(batch)
        start = clocked(f"forward passes of {images} images alone", start)
        observers = observe(network, images)
        observed = clocked(f"forward passes of {images} images, with histograms", start)
        activation_scales(observers, "mse")
        clocked("ranges of activations, mse, all widths", observed)
        now = time.perf_counter()
        weight_scales(network)
        clocked("ranges of weights, mse, all widths", now)
        clocked("calibration, all of it", start)
        for method in ("percentile", "kl"):
            now = time.perf_counter()
            activation_scales(observers, method)
            clocked(f"ranges of activations, {method}, all widths, not included", now)
    figures = []
    for name, seconds in parts.items():
        value = statistics.median(seconds)
        promised = name == "calibration, all of it"
        figures.append(
            Figure(
                name,
                value,
                "s",
                min(seconds),
                max(seconds),
                f"<= {CALIBRATION_S:g}" if promised else "",
                value <= CALIBRATION_S if promised else None,
            )
        )
    return figures


def trace_errors(samples: int, seeds: int) -> list[Figure]:
    """Compare estimated traces with exact ones, each tensor and each seed."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 10),
    )
    for parameter in network.parameters():
        deviation = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(0, deviation, generator=generator)
    data = [(torch.randn(32, 2, 6, 6, generator=generator), torch.arange(32) % 10)]
    weights = {name: value for name, value in network.named_parameters() if value.dim() > 1}
    exact = exact_traces(network, F.cross_entropy, data, weights)
    errors = []
    for seed in range(seeds):
        found = hessian_traces(
            network, F.cross_entropy, data, weights, samples=samples, tolerance=0, seed=seed
        )
        errors += [abs(trace.mean - exact[name]) / abs(exact[name]) for name, trace in found.items()]
    return [
        Figure(
            f"relative error of traces, {samples} samples, greatest of {len(errors)}",
            max(errors),
            "",
            min(errors),
            max(errors),
            f"<= {TRACE_ERROR:g}",
            max(errors) <= TRACE_ERROR,
        ),
        Figure(
            f"relative error of traces, {samples} samples, median",
            statistics.median(errors),
            "",
            min(errors),
            max(errors),
        ),
    ]


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "", repeats=3).parse_args()
    threadpoolctl.threadpool_limits(THREADS)
    torch.set_num_threads(THREADS)
    figures = trace_errors(20 if options.quick else SAMPLES, 1 if options.quick else SEEDS)
    figures += calibration(64 if options.quick else IMAGES, 1 if options.quick else options.repeats)
    settings = {
        "network": "ResNet-18 at 224 pixels, 21 layers",
        "images": f"{IMAGES} in batches of {BATCH}, random",
        "widths": ", ".join(map(str, WIDTHS)),
        "activations": "histograms per tensor; symmetric and asymmetric grids",
        "weights": "per channel, symmetric",
        "repeats": options.repeats,
        "threads": THREADS,
    }
    report("calibration", figures, settings=settings, options=options)
    if options.quick and options.output is None:
        return
    path = (options.output or RESULTS / "calibration.json").with_suffix(".md")
    lines = ["| figure | median | range | unit | target | reached |", "|---|---:|---:|---|---|---|"]
    for figure in figures:
        reached = {None: "", True: "yes", False: "no"}[figure.reached]
        spread = f"{figure.low:.3g} .. {figure.high:.3g}"
        lines.append(
            f"| {figure.name} | {figure.value:.3g} | {spread} | {figure.unit} | {figure.target} | {reached} |"
        )
    lines += ["", *(f"- {key}: {value}" for key, value in settings.items())]
    write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
