"""The comparison as a table, for the console and as Markdown."""

from collections.abc import Callable, Mapping
from typing import Any

from autocompress.report.comparison import random_summary

HEADERS = (
    "network",
    "test {metric} (95 % interval)",
    "MACs (M)",
    "parameters (k)",
    "size (kB)",
    "predicted (ms)",
    "measured (ms)",
    "p95 (ms)",
    "peak memory (MB)",
)


OVER = 1.05
"""Measured latencies above this share of a limit are warned of."""

BITS = "bits of weights, inputs (mean)"


def table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of the comparison, random networks summed up below themselves.

    Where some network has few bits, a column says how many on average.
    """
    headers = [header.format(metric=content["metric"]) for header in HEADERS]
    rows = []
    randoms = [row for row in content["rows"] if row["name"].startswith("random")]
    for row in content["rows"]:
        rows.append(_cells(row))
        if randoms and row is randoms[-1]:
            mean, deviation = random_summary(content["rows"])
            measured = [r["latency_ms"] for r in randoms if r["latency_ms"] is not None]
            latency = _ms(sum(measured) / len(measured) if measured else None)
            name = f"random, mean of {len(randoms)} (standard deviation)"
            rows.append([name, f"{mean:.4f} ({deviation:.4f})", "", "", "", "", latency, "", ""])
    if any(row.get("bits") for row in content["rows"]):
        headers.append(BITS)
        of_name = {row["name"]: row.get("bits") for row in content["rows"]}
        for cells in rows:
            bits = of_name.get(cells[0])
            cells.append(f"{bits[0]:.2f}, {bits[1]:.2f}" if bits else "")
    return headers, rows


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["test_interval"]
    costs, peak = row["costs"], row["peak_memory_bytes"]
    return [
        row["name"],
        f"{row['test']:.4f} ({low:.4f}-{high:.4f})",
        f"{costs['macs'] / 1e6:.2f}",
        f"{costs['params'] / 1e3:.0f}",
        f"{costs['size_bytes'] / 1e3:.0f}" if "size_bytes" in costs else "-",
        _ms(costs.get("latency_ms")),
        _ms(row["latency_ms"]),
        _ms(row["latency_p95_ms"]),
        "-" if peak is None else f"{peak / 1e6:.1f}",
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def notes(content: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know, one sentence a line."""
    limits = ", ".join(f"{metric} <= {value:.4g}" for metric, value in content["limits"].items())
    asked = ", ".join(f"{metric} {value}" for metric, value in content["budget"].items())
    images, earlier = content["rows"][0]["test_images"], content["earlier_reports"]
    read = "read once, after every decision"
    if earlier:
        reports = f"{earlier} earlier report{'s' if earlier > 1 else ''}"
        read = f"read after {reports} of this run, which may have influenced later decisions"
    margin = content["latency_margin"]
    held = ""
    if margin > 1:
        held = (
            f" The latency limit is what was asked for divided by {margin:.3f}: measured latencies hold the "
            f"budget with {content['confidence']:.0%} confidence."
        )
    lines = [
        f"Budget: {asked}, which is {limits}; percent are of the predicted cost of the largest network."
        f"{held}",
        "MACs count a multiply-accumulate once, as FLOPs do in the pruning and NAS literature.",
        f"Test: {images} images, {read}; {content['made']}.",
        f"{content['uniform'][0].upper()}{content['uniform'][1:]}.",
        f"{content['random'][0].upper()}{content['random'][1:]}.",
    ]
    by_name = {row["name"]: row for row in content["rows"]}
    subject = content["subject"]
    searched, largest = by_name[f"{subject}, finetuned"], by_name.get("largest")
    if content["selected_by"]:
        lines.append(
            f"Selected: {content['selected_by']}, in the search under the budget above, at which the uniform-"
            "scaled and the random networks stand."
        )
    if "latency_ms" not in searched["costs"]:
        lines.append(
            "No latency is known: the target is not measured here, and no table of it was given (--table)."
        )
    elif searched["latency_ms"] is None:
        share = _share(subject, searched, largest, "predicted", lambda row: row["costs"]["latency_ms"])
        lines.append(
            f"{share}the table is of another device, where nothing was measured: run the exported "
            "network.onnx there."
        )
    else:
        error = searched["costs"]["latency_ms"] / searched["latency_ms"] - 1
        share = _share(subject, searched, largest, "measured", lambda row: row["latency_ms"])
        lines.append(f"{share}{_off(error)} than was measured.")
    lines += _warnings(content, searched, largest)
    if not content["selected_by"] and by_name.get("uniform-scaled", {}).get("key") == searched["key"]:
        lines.append(
            "The search found nothing better on validation than the uniform-scaled network, with which it "
            "starts: they are the same."
        )
    lines += _undecided(by_name, searched)
    drift = content["drift"]
    if drift is not None:
        then = searched["costs"]["latency_ms"] / (searched["latency_ms"] / drift) - 1
        lines.append(
            f"Networks of the table's error report, measured again here, take {drift:.2f} times what they "
            f"took when the table was measured; at the machine's speed of then {_off(then)} than "
            "was measured."
        )
    if content["exported"] is not None:
        exported = content["exported"]
        predicted = f" (predicted {searched['costs']['latency_ms']:.3f} ms)"
        lines.append(
            f"The exported network.onnx, measured in the same run: median {exported['median_ms']:.3f} ms, "
            f"p95 {exported['p95_ms']:.3f} ms{'' if content.get('passes') else predicted}."
        )
    lines.append(f"Exported files: {content['exported_folder']}")
    stored = content.get("onnx_bytes")
    if stored is not None and searched.get("bits") is not None:
        lines.append(
            f"Sizes count weights at their bits. network.onnx has {stored / 1e3:.0f} kB: the graph besides, "
            "and weights of fewer than 8 bits as int8."
        )
    return lines


def _warnings(
    content: Mapping[str, Any], searched: Mapping[str, Any], largest: Mapping[str, Any] | None
) -> list[str]:
    """Say where measurements do not bear out what a search was for."""
    measured, limit = searched["latency_ms"], content["limits"].get("latency_ms")
    found: list[str] = []
    if measured is None:
        return found
    # At the speed that the machine had when the table was measured.
    then = measured / (content["drift"] or 1.0)
    if limit is not None and then > OVER * limit:
        found.append(
            f"WARNING: measured, it takes {then:.3f} ms at the speed of the table, more than the limit of "
            f"{limit:.3f} ms, which predictions hold: search.confidence tightens it by the table's errors."
        )
    for row in content["rows"]:
        # What passes made of a network stands after it, under a longer name.
        if row["name"].startswith(f"{searched['name']}, ") and (row["latency_ms"] or 0.0) >= measured:
            found.append(f"WARNING: measured, {row['name']} is no faster than without these passes.")
    if (
        largest is not None
        and largest["latency_ms"] is not None
        and largest["key"] != searched["key"]
        and measured >= largest["latency_ms"]
    ):
        found.append("WARNING: measured, it is not faster than the largest network: it buys no speed.")
    return found


def _share(
    subject: str,
    searched: Mapping[str, Any],
    largest: Mapping[str, Any] | None,
    kind: str,
    latency: Callable[[Mapping[str, Any]], float],
) -> str:
    """Say how much of the largest network's latency another takes, where that is in the table."""
    if largest is None:
        return f"The {subject} network: "
    share = latency(searched) / latency(largest)
    return f"The {subject} network takes {share:.0%} of the largest one's {kind} latency; "


def _undecided(by_name: Mapping[str, Any], searched: Mapping[str, Any]) -> list[str]:
    """Say so where the test images are too few to tell the network from the uniform-scaled one."""
    uniform = by_name.get("uniform-scaled, finetuned")
    if uniform is None or uniform["key"] == searched["key"]:
        return []
    low, high = searched["test_interval"]
    if not low <= uniform["test"] <= high:
        return []
    return [
        f"{searched['test_images']} test images are too few to tell the {searched['name']} network from the "
        "uniform-scaled one, whose accuracy lies within its interval."
    ]


def _off(error: float) -> str:
    return f"{abs(error):.1%} {'more' if error >= 0 else 'less'} was predicted"


def markdown(content: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown."""
    headers, rows = table(content)
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(content))]) + "\n"
