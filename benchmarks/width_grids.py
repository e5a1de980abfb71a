"""Latency over channel counts: a grid of measured widths, interpolated, against whole networks.

ResNet-18-like and MobileNetV2-like networks for 32 px, every width a multiple of 8 from a quarter to all of
its channels, ONNX Runtime, 32-bit floats, 1 thread. Per number of knots: rows measured, seconds, error of
operations off the grid, and error of 40 random width assignments that nothing was fitted to.

python benchmarks/width_grids.py [--quick] [--target onnxruntime-cpu]    # about 15 minutes
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import width_networks as networks
from record import RESULTS, environment

from autocompress.atomic import write_json, write_text
from autocompress.export.formats import trace, write_onnx
from autocompress.export.onnx_graph import onnx_model
from autocompress.latency.assemble import assemble, width_report
from autocompress.latency.correction import Figures, figures
from autocompress.latency.measure import Stopping, summarize
from autocompress.latency.plan import plan_widths, row_name
from autocompress.latency.profile import open_samples, provenance_of, take_samples
from autocompress.latency.runtime import Run, prepare_onnx
from autocompress.latency.steps import learn_steps, probe_steps, steps_of
from autocompress.latency.target import Target, load_target
from autocompress.space import SearchSpace

HELD_OUT, FITTED = 40, 40
KNOTS = (2, 3, 4, 6)
DEFAULT = 6


def main() -> None:
    """Measure both networks at every number of knots that is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few knots and rounds: checks that it runs")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "width_grids.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.output.exists() and not options.quick:
        results = json.loads(options.output.read_text())["results"]
    target = load_target(options.target)
    spaces = {"resnet18": networks.resnet18_space(), "mobilenet_v2": networks.mobilenet_v2_space()}
    for name, space in spaces.items():
        with tempfile.TemporaryDirectory() as folder:
            build = lru_cache(maxsize=None)(partial(onnx_file, name, space, Path(folder)))
            for knots in (2,) if options.quick else KNOTS:
                key = f"{name} {knots}"
                if key not in results:
                    results[key] = run(space, target, knots, build, quick=options.quick)
                    if not options.quick:
                        save(options.output, results)
                print(line(key, results[key]))


def onnx_file(name: str, space: SearchSpace, folder: Path, codes: tuple[int, ...]) -> Path:
    """Write the network of a row of codes as ONNX, as a user would export it; once."""
    path = folder / f"{'_'.join(map(str, codes))}.onnx"
    row = np.array(codes)
    if name == "resnet18":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = networks.resnet18(space, row)
        write_onnx(path, trace(module, (3, networks.PIXELS, networks.PIXELS)))
    else:
        path.write_bytes(onnx_model(networks.mobilenet_v2_chain(space, row), batch=1))
    return path


def run(
    space: SearchSpace,
    target: Target,
    knots: int,
    build: Callable[[tuple[int, ...]], Path],
    *,
    quick: bool,
) -> dict[str, Any]:
    """Profile with a number of knots, then measure random networks and compare."""

    def prepared(row: Any) -> Run:
        return prepare_onnx(build(tuple(int(code) for code in row)), target)

    fitted, held_out = (8, 8) if quick else (FITTED, HELD_OUT)
    stopping = Stopping(0.02, 6, 6) if quick else Stopping(0.02, 24, 40)
    start = time.perf_counter()
    probed = probe_steps(target)
    steps = steps_of(learn_steps({key: row.median_ms for key, row in probed.items()}))
    plan = plan_widths(space, fitted, 0, knots=knots, steps=steps)
    rows = networks.random_rows(space, held_out, seed=7)
    # In the same rounds: among other neighbours, networks take up to 10 % longer.
    both = replace(
        plan,
        networks=(*plan.networks, *(space.operations(row) for row in rows)),
        codes=np.concatenate([plan.codes, rows]),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = open_samples(Path(folder), target)
        samples = take_samples(
            both, target, file, rows=tuple(plan.rows), stopping=stopping, prepare_network=prepared
        )
        profile_s = time.perf_counter() - start
        measured_keys = tuple(key for key in plan.rows if key not in plan.held_out)
        provenance = provenance_of(space, target, file.started)
        table = assemble(target, samples, plan.keys, measured_keys, {}, 0.02, provenance, grid=plan.grid)
    off_grid = {key: summarize(samples[row_name(key)].steady_ms) for key in plan.held_out}
    assert plan.grid is not None
    table = replace(table, width_report=width_report(table, plan.grid, plan, off_grid, profile_s))
    names = [keys.name for keys in both.keys[fitted:]]
    measured = np.array([summarize(samples[name].steady_ms).median_ms for name in names])
    predicted = table.cost(space).of(rows)
    report = table.width_report
    assert report is not None
    assert table.error_report is not None
    return {
        **environment(),
        "networks": len(rows),
        "latency_ms": [float(measured.min()), float(measured.max())],
        "profile_seconds": profile_s,
        "steps": dict(table.grid.steps) if table.grid else {},
        "width_report": asdict(report),
        "seconds_per_layer": report.seconds_per_layer,
        "leave_one_out": asdict(table.error_report.figures),
        "repeat_noise_percent": table.error_report.repeat_noise_percent,
        "held_out": asdict(figures(predicted, measured)),
    }


def line(key: str, result: dict[str, Any]) -> str:
    """Return a result for people."""
    found, report = Figures(**result["held_out"]), result["width_report"]
    reached = found.within_10_percent >= 95 and found.mape_percent <= 4 and result["profile_seconds"] <= 600
    return (
        f"{key} knots: {report['measured_rows']} of {report['priced_rows']} rows, "
        f"{result['profile_seconds']:.0f} s; held-out widths of operations "
        f"{report['held_out']['mape_percent']:.1f} % off; {result['networks']} random networks: MAPE "
        f"{found.mape_percent:.2f} %, bias {found.bias_percent:+.2f} %, within 10 % "
        f"{found.within_10_percent:.0f} %, Spearman {found.spearman or 0:.3f}; reached: {reached}"
    )


def save(path: Path, results: dict[str, Any]) -> None:
    """Write what is finished, as JSON and as a table for people."""
    wanted = {f"{name} {knots}" for name in ("resnet18", "mobilenet_v2") for knots in KNOTS}
    complete = wanted <= results.keys()
    write_json(path, {"benchmark": "width_grids", "complete": complete, **environment(), "results": results})
    lines = [
        f"# Width grids{'' if complete else ' (partial)'}",
        "",
        "`python benchmarks/width_grids.py`; machine and commit in `width_grids.json`.",
        "",
        "| network, knots an axis | rows measured | of (%) | seconds | s a layer | operations off the grid, "
        "MAPE % | 40 random networks, MAPE % | bias % | <= 5 % | <= 10 % | Spearman |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, result in results.items():
        report, found = result["width_report"], Figures(**result["held_out"])
        share = 100 * report["measured_rows"] / report["priced_rows"]
        lines.append(
            f"| {key} | {report['measured_rows']} | {share:.1f} | {result['profile_seconds']:.0f} | "
            f"{result['seconds_per_layer']:.1f} | {report['held_out']['mape_percent']:.1f} | "
            f"{found.mape_percent:.2f} | {found.bias_percent:+.2f} | {found.within_5_percent:.0f} | "
            f"{found.within_10_percent:.0f} | {found.spearman or 0:.3f} |"
        )
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
