"""Take a small sample of the published once-for-all sub-networks, with their parameters and MACs.

Usage: python tests/golden/make_mobilenet_v3_subnets.py ../shared/data/ofa/ofa_mbv3_w10_imagenet_subnets.csv

Every 37th row by MACs, so that the sample reaches from the smallest to the largest. The numbers are the
published ones, copied and not computed: nothing of autocompress is imported here.
"""

import csv
import json
import sys
from pathlib import Path

SOURCE = "DyNAS-T (Intel, Apache-2.0): sub-networks of the once-for-all MobileNetV3 w1.0, ImageNet, 224 px"
STEP = 37


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def main() -> None:
    published = Path(sys.argv[1])
    with published.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (int(row["macs"]), row["kernel"], row["expand"]))
    sample = rows[::STEP]
    if sample[-1] is not rows[-1]:
        sample.append(rows[-1])
    payload = {
        "source": SOURCE,
        "command": f"python tests/golden/{Path(__file__).name} ../shared/data/ofa/{published.name}",
        "tolerance": 0,
        "platform": "any: integers",
        "rows": [
            {
                "kernel": numbers(row["kernel"]),
                "expand": numbers(row["expand"]),
                "depth": numbers(row["depth"]),
                "resolution": int(row["resolution"]),
                "params": int(row["params"]),
                "macs": int(row["macs"]),
            }
            for row in sample
        ],
    }
    text = json.dumps(payload, indent=1)
    # One list a line: a diff of a changed row stays readable.
    target = Path(__file__).with_name("mobilenet_v3_subnets.json")
    target.write_text(compact(text) + "\n", encoding="utf-8")


def compact(text: str) -> str:
    """Join the lines of innermost lists."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside:
            lines[-1] += line.strip() + (" " if line.endswith(",") else "")
            inside = not line.strip().startswith("]")
            if not inside:
                lines[-1] = lines[-1].rstrip()
        else:
            lines.append(line)
            inside = line.endswith(": [") and "rows" not in line
    return "\n".join(lines)


if __name__ == "__main__":
    main()
