"""What the command line's settings of OpenMP and of memory do to a training step of a small supernet.

Each case runs in a process of its own, alone and beside a program that keeps one core busy. The baseline
is PyTorch's own settings on all cores.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from record import Figure, parser, report

from autocompress.cli import PROCESS_ENVIRONMENT
from search_spaces.mobilenet_v3 import mobilenet_v3

BATCH = 128
BUSY = "while True: pass"
CASES = {
    "PyTorch's own settings": {},
    "threads that sleep at once": {**PROCESS_ENVIRONMENT, "GOMP_SPINCOUNT": "0"},
    "the command line's settings": PROCESS_ENVIRONMENT,
}


def one_case(threads: int, repeats: int) -> None:
    """Time sandwich steps in this process and print the seconds."""
    torch.set_num_threads(threads)
    space = mobilenet_v3(preset="tiny", in_channels=1, classes=10)
    supernet = space.supernet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    codes = np.vstack([space.largest(), space.smallest(), space.sample(2, np.random.default_rng(0))])
    images = torch.randn(BATCH, 1, 32, 32)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for arch in space.decode(codes):
            supernet(images, arch).square().mean().backward()
        supernet.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    print(json.dumps(times[1:]))  # the first step allocates


def run_case(environment: dict[str, str], threads: int, repeats: int) -> list[float]:
    """Time a case in a process of its own; in seconds."""
    known = {name: value for name, value in os.environ.items() if name not in PROCESS_ENVIRONMENT}
    command = [sys.executable, __file__, "--case", str(threads), str(repeats)]
    done = subprocess.run(
        command, env={**known, **environment}, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return [float(value) for value in json.loads(done.stdout)]


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--case"]:
        one_case(int(sys.argv[2]), int(sys.argv[3]))
        return
    options = parser(__doc__.splitlines()[0], repeats=15).parse_args()
    repeats = 2 if options.quick else options.repeats
    cores = os.cpu_count() or 1
    figures = []
    for neighbour in ("alone", "beside a busy program"):
        busy = None if neighbour == "alone" else subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            for name, environment in CASES.items():
                for threads in sorted({1, cores}):
                    found = run_case(dict(environment), threads, repeats)
                    label = f"{neighbour}, {threads} threads, {name}"
                    figures.append(
                        Figure(
                            label, 1e3 * statistics.median(found), "ms", 1e3 * min(found), 1e3 * max(found)
                        )
                    )
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
    settings = {
        "batch": BATCH,
        "networks a step": 4,
        "space": "mobilenet_v3, preset tiny",
        "repeats": repeats,
    }
    report("threads", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
