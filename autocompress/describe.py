"""Latency tables, their errors and costs of networks, in a line for people."""

from collections.abc import Mapping
from typing import Any

from autocompress.latency.correction import ErrorReport
from autocompress.latency.table import LatencyTable
from autocompress.peak_memory import METRIC as PEAK

# Beyond these, a latency table says little about which of two networks is faster.
DOUBTFUL_MAPE_PERCENT, DOUBTFUL_SPEARMAN = 10.0, 0.8


def describe_table(table: LatencyTable) -> str:
    """Return one line on how far the table can be trusted."""
    report = table.error_report
    if not table.rows:
        return "latency table: no rows, it prices nothing"
    if report is None:
        return f"latency table: {len(table.rows)} rows, not checked against whole networks"
    figures = report.figures
    doubtful = figures.mape_percent > DOUBTFUL_MAPE_PERCENT or (figures.spearman or 0.0) < DOUBTFUL_SPEARMAN
    warning = "; WARNING: too uncertain to rank networks by, measure more rounds on a quieter machine"
    return (
        f"latency table: {len(table.rows)} rows; against {len(report.networks)} whole networks, leave-one-"
        f"out error {figures.mape_percent:.1f} % (raw sum {report.forms['raw'].mape_percent:.1f} %), bias "
        f"{figures.bias_percent:+.1f} %, {figures.within_10_percent:.0f} % within 10 %, Spearman "
        f"{figures.spearman or 0.0:.3f}, Kendall {figures.kendall or 0.0:.3f}; repeat noise "
        f"{report.repeat_noise_percent:.1f} %; priced by {report.granularity}{_other(report)}"
        f"{warning if doubtful else ''}"
    )


def _other(report: ErrorReport) -> str:
    """Say what the other granularity would have given."""
    if not report.other_forms:
        return ""
    name = "op" if report.granularity == "block" else "block"
    least = min(figures.mape_percent for figures in report.other_forms.values())
    return f" (by {name} {least:.1f} %)"


def describe_error(table: LatencyTable) -> str:
    """Return how far predicted latencies are off, to stand behind them; empty if nobody checked."""
    report = table.error_report
    if report is None:
        return ""
    return f"; predicted latencies are {report.figures.mape_percent:.1f} % off on average"


def describe_predictor(notes: Mapping[str, Any] | None) -> str:
    """Return how well the predictor of a search ordered networks, to stand behind its result."""
    predictor = (notes or {}).get("predictor")
    if not isinstance(predictor, Mapping):
        return "" if predictor is None else f"; predictor {predictor}"
    low, high = predictor["kendall_tau_interval"]
    return (
        f"; {predictor['kind']} predictor, {predictor['judged']} Kendall tau {predictor['kendall_tau']:.2f} "
        f"({low:.2f} to {high:.2f}) on {predictor['rows']} networks"
    )


# Entropy of the options, of 1, above which nothing was learned to speak of.
UNMOVED = 0.99


def describe_relaxation(notes: Mapping[str, Any]) -> str:
    """Return how sure a differentiable search is of its options, and what it expects to cost."""
    relaxation = notes["relaxation"]
    costs = "".join(
        f", expected {metric} {value:.4g} (of the mixture, not of the network)"
        for metric, value in relaxation["expected_costs"].items()
    )
    skips = relaxation["skips"]
    shown = "" if skips is None else f", {skips:.0%} of the probability on skip connections"
    moved = ""
    if relaxation["entropy"] > UNMOVED:
        moved = (
            "; the probabilities hardly moved, so that what is derived is close to a random network: train "
            "for more epochs, or raise search.options.learning_rate"
        )
    return f"entropy of the options {relaxation['entropy']:.2f} of 1{shown}{costs}{moved}"


def describe_epoch(relaxation: Mapping[str, Any]) -> str:
    """Return what a differentiable search saw of its last epoch: signs of a collapse, if there are any."""
    if not relaxation["epochs"]:
        return "the architecture parameters have stopped"
    seen = relaxation["epochs"][-1]
    counts = " and ".join(map(str, seen.get("skips", ())))
    skips = f", {counts} skip connections without the budget" if counts else ""
    value = f", dominant eigenvalue {seen['eigenvalue']:.3g}" if "eigenvalue" in seen else ""
    line = f"epoch {seen['epoch']}: entropy of the options {seen['entropy']:.3f} of 1{skips}{value}"
    stopped = relaxation["stopped"]
    return line if stopped is None else f"{line}; stopped early: back to those of epoch {stopped}"


def describe_costs(found: Mapping[str, float]) -> str:
    """Return the costs of a network in a line."""
    line = (
        f"{found['macs'] / 1e6:.2f} M MACs, {found['params'] / 1e3:.0f} k parameters, "
        f"{found['size_bytes'] / 1e6:.2f} MB"
    )
    if "latency_ms" in found:  # not of targets of which nothing is known
        line = f"{found['latency_ms']:.3f} ms (predicted), {line}"
    peak = found.get(PEAK)  # results of earlier releases lack it
    return line if peak is None else f"{line}, activations of at most {peak / 1e3:.0f} kB"
