"""A supernet's slices against the networks extracted from them, at ImageNet size.

    python benchmarks/elastic.py            # a few minutes on one core
    python benchmarks/elastic.py --quick

The once-for-all MobileNetV3 space, 224 pixels, channels_last, one thread; smallest, largest and 10 random
sub-networks. Slice and extracted network run in turns, so that a disturbance hits both; each ratio is that of
their medians for one network, and the figure is the median over networks. Peak memory is that of a process of
its own (VmHWM of Linux).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from record import Figure, parser, report, use_one_core

from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.space import Architecture
from search_spaces.mobilenet_v3 import mobilenet_v3

LAST = torch.channels_last
MEMORY_BATCH = 32


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median seconds of two functions that run alternately, after a warm-up of each."""
    first()
    second()
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[index]()
            times[index].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def images(batch: int) -> torch.Tensor:
    """Return random images."""
    return torch.randn(batch, 3, 224, 224).contiguous(memory_format=LAST)


def forwards(supernet: Supernet, archs: list[Architecture], batch: int, repeats: int) -> list[float]:
    """Return slice over extracted, forward in evaluation, for each network."""
    ratios, x = [], images(batch)
    for arch in archs:
        statistics_of = recalibrate(supernet, arch, [images(4)])
        network = extract(supernet, arch, statistics_of)
        with torch.no_grad():
            elastic_s, static_s = in_turns(
                lambda a=arch, s=statistics_of: supernet(x, a, statistics=s), lambda n=network: n(x), repeats
            )
        ratios.append(elastic_s / static_s)
    return ratios


def training_step(supernet: Supernet, largest: Architecture, repeats: int) -> float:
    """Return slice over extracted for forward, backward and optimizer step of the largest network."""
    network, x = extract(supernet, largest), images(8)
    steps = []
    for run, module in ((lambda: supernet(x, largest), supernet), (lambda: network(x), network)):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)

        def step(run: Callable[[], torch.Tensor] = run, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            run().square().mean().backward()
            optimizer.step()

        steps.append(step)
    elastic_s, static_s = in_turns(steps[0], steps[1], repeats)
    return elastic_s / static_s


def extractions(supernet: Supernet, archs: list[Architecture], repeats: int) -> list[float]:
    """Return milliseconds of an extraction, median for each network."""
    result = []
    for arch in archs:
        statistics_of = recalibrate(supernet, arch, [images(2)])
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            extract(supernet, arch, statistics_of)
            times.append(1e3 * (time.perf_counter() - start))
        result.append(statistics.median(times))
    return result


def recalibrations(supernet: Supernet, archs: list[Architecture], repeats: int) -> list[float]:
    """Return recalibration over a plain forward of the extracted network, over the same batches."""
    ratios, batches = [], [images(8) for _ in range(2)]
    for arch in archs:
        network = extract(supernet, arch, recalibrate(supernet, arch, batches))

        def plain(network: torch.nn.Module = network) -> None:
            with torch.no_grad():
                for batch in batches:
                    network(batch)

        recalibrate_s, plain_s = in_turns(lambda a=arch: recalibrate(supernet, a, batches), plain, repeats)
        ratios.append(recalibrate_s / plain_s)
    return ratios


def peak_bytes(case: str) -> int:
    """Return the peak memory of a sandwich step, or of one step of the largest network, by itself."""
    command = [sys.executable, __file__, "--memory-case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return int(json.loads(done.stdout)["peak_bytes"])


def memory_case(case: str) -> None:
    """Run the steps of one case and print the peak."""
    torch.set_num_threads(1)
    space = mobilenet_v3()
    supernet = Supernet(space).to(memory_format=LAST)
    codes = np.vstack([space.largest(), space.smallest(), space.sample(2, np.random.default_rng(0))])
    archs = space.decode(codes if case == "sandwich" else space.largest())
    x = images(MEMORY_BATCH)
    for _ in range(2):
        supernet.zero_grad(set_to_none=True)
        for arch in archs:
            supernet(x, arch).square().mean().backward()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    sys.stdout.write(json.dumps({"peak_bytes": peak}))


def figure(name: str, values: list[float], at_most: float, unit: str = "ratio") -> Figure:
    """Return the median of some values with its target."""
    value = statistics.median(values)
    return Figure(name, value, unit, min(values), max(values), f"<= {at_most:g}", value <= at_most)


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--memory-case"]:
        memory_case(sys.argv[2])
        return
    options = parser(__doc__.splitlines()[0], repeats=11).parse_args()
    use_one_core()
    space = mobilenet_v3()
    supernet = Supernet(space).to(memory_format=LAST)
    n = 1 if options.quick else 10
    repeats = 3 if options.quick else options.repeats
    codes = np.vstack([space.smallest(), space.largest(), space.sample(n, np.random.default_rng(0))])
    archs = space.decode(codes)
    figures = [
        figure("forward, batch 1: slice / extracted", forwards(supernet, archs, 1, 3 * repeats), 1.10),
        figure("forward, batch 8: slice / extracted", forwards(supernet, archs, 8, repeats), 1.05),
        figure(
            "training step, largest: slice / extracted", [training_step(supernet, archs[1], repeats)], 1.05
        ),
        figure("extraction", extractions(supernet, archs, repeats), 20.0, "ms"),
        figure("recalibration / plain forward", recalibrations(supernet, archs, max(3, repeats // 3)), 1.5),
        figure(
            "peak memory: sandwich step / largest alone",
            [peak_bytes("sandwich") / peak_bytes("largest")],
            1.1,
        ),
    ]
    settings = {
        "networks": len(archs),
        "repeats": repeats,
        "resolution": 224,
        "memory_format": "channels_last",
        "threads": 1,
        "batch of the memory case": MEMORY_BATCH,
        "slices": "kept between forward passes of one network without gradients",
    }
    report("elastic", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
