"""A comparison of strategies for people: tables, curves and verdicts, as Markdown and as plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.atomic import read_json, replacing, write_json, write_text
from autocompress.compare.cells import Cell, read_cell
from autocompress.compare.problem import Problem
from autocompress.compare.statistics import (
    Pair,
    Standing,
    counted,
    curves,
    curves_over_seconds,
    early_ends,
    pairs,
    standings,
    trainings,
    verdicts,
)
from autocompress.errors import RecipeError, StorageError

SCHEMA: Final = "autocompress.compare"
VERSION: Final = 1
SETTINGS: Final = "comparison.json"
POINTS: Final = (0.1, 0.25, 0.5, 1.0)
"""Shares of the evaluations at which the table shows the best score so far."""


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a comparison in a folder, or go on with the one that is there.

    Raises:
        RecipeError: The folder holds a comparison of another problem or length.
        StorageError: What it holds is damaged or, without settings, of another length; or it cannot be
            written.
    """
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        # Where somebody removed the settings, the cells say of how many evaluations they are.
        for cell in folder.glob("cells/*/*.json"):
            read_cell(cell, settings["evaluations"])
        write_json(path, wanted)
        return
    known = read_json(path, lambda text: StorageError(f"{text}; use another --output"), "comparison")
    if not isinstance(known, dict) or known.keys() != wanted.keys():
        raise StorageError(f"{path} is damaged: it must have {', '.join(wanted)}; use another --output")
    if known != wanted:
        differing = [key for key in wanted if known[key] != wanted[key]]
        raise RecipeError(
            f"{folder} holds a comparison with other settings ({', '.join(differing)}): more strategies and "
            "seeds can be added to it, but another problem or length needs another --output"
        )


def write_comparison(
    folder: Path, problem: Problem, cells: Sequence[Cell], evaluations: int
) -> tuple[list[Standing], list[str]]:
    """Write `results.json`, `report.md`, `evaluations.svg` and `seconds.svg`.

    Returns:
        Standings, the best first, and verdicts.

    Raises:
        StorageError: They cannot be written.
    """
    found = standings(cells, evaluations, problem.optimum)
    compared = pairs(found)
    said = [
        *early_ends(cells, evaluations),
        *trainings(found, problem.prepared),
        *verdicts(found, compared),
    ]
    write_json(
        folder / "results.json",
        {
            "schema": SCHEMA,
            "version": VERSION,
            "problem": problem.name,
            "objective": problem.objective,
            "limits": dict(problem.constraints.limits),
            "optimum": problem.optimum,
            "evaluations": evaluations,
            "standings": [_plain(standing) for standing in found],
            "pairs": [asdict(pair) for pair in compared],
            "verdicts": said,
            "best": [{"label": c.label, "seed": c.seed, "architecture": c.best} for c in cells if c.best],
        },
    )
    write_text(folder / "report.md", markdown(problem, cells, evaluations, found, compared, said))
    _plot(folder, problem, cells, evaluations)
    return found, said


def _plain(standing: Standing) -> dict[str, Any]:
    """Return a standing as JSON has it: `null` where nothing was found."""
    payload = asdict(standing)
    if not standing.finals:
        payload |= {"mean": None, "median": None, "interval": None}
    return payload


def extent(cells: Sequence[Cell], evaluations: int) -> str:
    """Return how much was searched, in words."""
    seeds = len({cell.seed for cell in cells})
    up_to = "up to " if early_ends(cells, evaluations) else ""
    return f"{counted(seeds, 'seed')}, {up_to}{counted(evaluations, 'evaluation')} each"


def markdown(
    problem: Problem,
    cells: Sequence[Cell],
    evaluations: int,
    found: Sequence[Standing],
    compared: Sequence[Pair],
    said: Sequence[str],
) -> str:
    """Return the comparison as Markdown."""
    limits = ", ".join(f"{metric} <= {limit:.6g}" for metric, limit in problem.constraints.limits.items())
    at = sorted({max(1, round(share * evaluations)) for share in POINTS})
    lines = [
        f"# Strategies on {problem.name}",
        "",
        f"{extent(cells, evaluations)}; limits: "
        f"{limits or 'none'}; best {problem.objective} on the data that is searched, no test score.",
        "" if problem.optimum is None else f"Known optimum within the limits: {problem.optimum:.6g}.",
        "",
        "| strategy | mean | 95 % interval | spread | median | "
        + " | ".join(f"after {count}" for count in at)
        + " | regret | ms of the strategy a network |",
        "|---|" + "---|" * (len(at) + 6),
    ]
    shown = curves(cells, evaluations)
    for standing in found:
        if not standing.finals:
            lines.append(f"| {standing.label} | failed |" + " |" * (len(at) + 5))
            continue
        curve = " | ".join(f"{shown[standing.label][0][count - 1]:.4f}" for count in at)
        regret = "" if standing.regret is None else f"{standing.regret:.4f}"
        low, high = standing.interval
        lines.append(
            f"| {standing.label} | {standing.mean:.4f} | {low:.4f}-{high:.4f} | {standing.spread:.4f} | "
            f"{standing.median:.4f} | {curve} | {regret} | {1e3 * standing.strategy_s:.2f} |"
        )
    lines += ["", *(f"- {line}" for line in said), ""]
    if compared:
        lines += ["Pairs (two-sided Mann-Whitney U, p after Holm's correction):", ""]
        lines += ["| pair | difference of medians | p | corrected |", "|---|---|---|---|"]
    else:
        lines += ["No test is possible: it needs two seeds at least of two strategies at least."]
    lines += [
        f"| {pair.first} - {pair.second} | {pair.difference:+z.4f} | {pair.p:.3g} | {pair.corrected:.3g} |"
        for pair in compared
    ]
    errors = [f"- {cell.label}, seed {cell.seed}: {cell.error}" for cell in cells if cell.error]
    if errors:
        lines += ["", "Failed searches:", "", *errors]
    return "\n".join(lines) + "\n"


def _plot(folder: Path, problem: Problem, cells: Sequence[Cell], evaluations: int) -> None:
    from matplotlib.figure import Figure

    seconds = "seconds, those of evaluations assumed" if problem.simulated else "seconds, measured"
    for name, label in (("evaluations", "evaluations"), ("seconds", seconds)):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        if name == "evaluations":
            for strategy, (mean, low, high) in curves(cells, evaluations).items():
                axis = np.arange(1, evaluations + 1)
                axes.plot(axis, mean, label=strategy, linewidth=1.2)
                axes.fill_between(axis, low, high, alpha=0.15)
        else:
            for strategy, (axis, mean) in curves_over_seconds(cells).items():
                # A curve of one network is a point.
                axes.plot(axis, mean, label=strategy, linewidth=1.2, marker="o", markersize=3, markevery=[-1])
        if problem.optimum is not None:
            axes.axhline(problem.optimum, color="0.4", linestyle="--", linewidth=0.8, label="optimum")
        axes.set(xlabel=label, ylabel=f"best {problem.objective} so far", title=problem.name)
        if axes.get_legend_handles_labels()[0]:  # none where every search failed
            axes.legend(fontsize=8)
        with replacing(folder / f"{name}.svg") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
