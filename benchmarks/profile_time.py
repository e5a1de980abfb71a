"""How long a profile takes, how that grows with the options of a space, and how fast its table is used.

python benchmarks/profile_time.py [--quick]    # about 12 minutes
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, environment

from autocompress.atomic import write_json
from autocompress.latency.plan import make_plan
from autocompress.latency.profile import TABLE_FILE, profile
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import load_target
from search_spaces.mobilenet_v3 import mobilenet_v3

PRICED = 1_000_000
SPACES: dict[str, dict[str, Any]] = {
    "small images": {"geometry": "small", "classes": 10},
    "ImageNet, 1 resolution": {"resolutions": (224,)},
    "ImageNet, 2 resolutions": {"resolutions": (192, 224)},
    "ImageNet, 4 resolutions": {"resolutions": (160, 192, 208, 224)},
    "ImageNet, 5 resolutions": {"resolutions": (128, 160, 192, 208, 224)},
}
LIMITS_S = {"small images": 60, "ImageNet, 5 resolutions": 600}


def main() -> None:
    """Profile every space that is missing, then read, compile and price the largest table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small images only, 6 rounds")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_time.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.output.exists() and not options.quick:
        results = json.loads(options.output.read_text())["results"]
    for name, arguments in list(SPACES.items())[: 1 if options.quick else None]:
        if name in results:
            continue
        results[name] = run(arguments, 6 if options.quick else None)
        if not options.quick:
            complete = SPACES.keys() <= results.keys()
            payload = {"benchmark": "profile_time", "complete": complete, **environment(), "results": results}
            write_json(options.output, payload)
    for name, result in results.items():
        limit = f" (<= {LIMITS_S[name]}: {result['seconds'] <= LIMITS_S[name]})" if name in LIMITS_S else ""
        print(
            f"{name}: {result['options']} options, {result['rows']} rows, {result['seconds']:.1f} s{limit}, "
            f"{1000 * result['seconds'] / result['options']:.0f} ms an option; table read, compiled and "
            f"{PRICED:,} architectures priced in {result['read_compile_price_s']:.2f} s (<= 3: "
            f"{result['read_compile_price_s'] <= 3}); leave-one-out MAPE {result['mape_percent']:.2f} %"
        )
    one, two, four = (
        results.get(f"ImageNet, {n}", {}) for n in ("1 resolution", "2 resolutions", "4 resolutions")
    )
    for before, after in ((one, two), (two, four)):
        if before and after:
            grown = (after["seconds"] / after["options"]) / (before["seconds"] / before["options"])
            print(
                f"{after['options'] / before['options']:.2f} times the options take {grown:.2f} times as "
                f"long an option (< 2: {grown < 2})"
            )


def run(arguments: dict[str, Any], rounds: int | None) -> dict[str, Any]:
    """Profile one space, then use its table as a search would."""
    space = mobilenet_v3(**arguments)
    settings: dict[str, Any] = {} if rounds is None else {"min_rounds": rounds, "max_rounds": rounds}
    # Rows that a profile has to price: what doubling the options of the space doubles.
    rows = len(make_plan(space, "auto", 0, 0).rows)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = profile(space, load_target(), folder=Path(folder), **settings)
        seconds = time.perf_counter() - start
        codes = space.sample(PRICED, np.random.default_rng(0))
        start = time.perf_counter()
        prices = LatencyTable.load(Path(folder) / TABLE_FILE).cost(space).of(codes)
        used_s = time.perf_counter() - start
    assert made.error_report is not None
    return {
        **environment(),
        "options": len(make_plan(space, "block", 0, 0).rows),
        "rows": rows,
        "seconds": seconds,
        "read_compile_price_s": used_s,
        "mape_percent": made.error_report.figures.mape_percent,
        "repeat_noise_percent": made.error_report.repeat_noise_percent,
        "latency_ms": [float(prices.min()), float(prices.max())],
    }


if __name__ == "__main__":
    main()
