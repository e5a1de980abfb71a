"""Take a small sample of the published NAS-Bench-201 architectures, with their parameters and MACs.

Usage: python tests/golden/make_nas_bench_201_cells.py ../shared/data/nas_bench_201/accuracy.npz

Every 801st row by MACs and name, so that the sample reaches from the smallest to the largest. The numbers are
the published ones, copied and not computed: nothing of autocompress is imported here.
"""

import json
import sys
from pathlib import Path

import numpy as np

SOURCE = (
    "NAS-Bench-201 / NATS-Bench (Dong & Yang, MIT): CIFAR-10, 16 channels, 5 cells; "
    "macs are the published FLOPs less the 10 biases of the classifier"
)
STEP = 801


def main() -> None:
    published = Path(sys.argv[1])
    with np.load(published, allow_pickle=False) as file:
        rows = sorted(zip(*(file[name].tolist() for name in ("macs", "arch_str", "params")), strict=True))
    sample = rows[::STEP]
    if sample[-1] is not rows[-1]:
        sample.append(rows[-1])
    payload = {
        "source": SOURCE,
        "command": f"python tests/golden/{Path(__file__).name} ../shared/data/nas_bench_201/{published.name}",
        "tolerance": 0,
        "platform": "any: integers",
        "rows": [{"cell": cell, "params": params, "macs": macs} for macs, cell, params in sample],
    }
    target = Path(__file__).with_name("nas_bench_201_cells.json")
    target.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
