"""The comparison as a table, by hand."""

from typing import Any

import pytest

from autocompress.report.show import markdown, notes, table


def row(name: str, test: float, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "key": "k",
        "test": test,
        "test_interval": (test - 0.05, test + 0.05),
        "test_images": 359,
        "validation": 0.5,
        "costs": {"macs": 1.5e6, "params": 2000.0, "size_bytes": 8000.0, "latency_ms": 1.1 * ms},
        "latency_ms": ms,
        "latency_p95_ms": 2 * ms,
        "peak_memory_bytes": 20_500_000,
        **more,
    }


CONTENT: dict[str, Any] = {
    "budget": {"latency_ms": "60%"},
    "limits": {"latency_ms": 1.23456},
    "metric": "accuracy",
    "rows": [
        row("largest", 0.9, 2.0),
        row("random 1", 0.5, 1.0),
        row("random 2", 0.7, 3.0),
        row("searched", 0.8, 1.0, peak_memory_bytes=None),
        row("searched, finetuned", 0.85, 1.0),
    ],
    "made": "networks not marked finetuned are slices",
    "drift": 0.88,
    "latency_margin": 1.0,
    "confidence": None,
    "subject": "searched",
    "selected_by": "",
    "earlier_reports": 0,
    "exported": {"median_ms": 1.25, "p95_ms": 1.5},
    "exported_folder": "runs/demo/networks/k/exported",
    "uniform": "uniform-scaled: so",
    "random": "random: thus",
}


def test_a_row_has_every_promised_number_in_its_unit() -> None:
    headers, rows = table(CONTENT)
    assert dict(zip(headers, rows[0], strict=True)) == {
        "network": "largest",
        "test accuracy (95 % interval)": "0.9000 (0.8500-0.9500)",
        "MACs (M)": "1.50",
        "parameters (k)": "2",
        "size (kB)": "8",
        "predicted (ms)": "2.200",
        "measured (ms)": "2.000",
        "p95 (ms)": "4.000",
        "peak memory (MB)": "20.5",
    }


def test_random_networks_are_summed_up_below_themselves() -> None:
    _, rows = table(CONTENT)
    names = [cells[0] for cells in rows]
    assert names[1:4] == ["random 1", "random 2", "random, mean of 2 (standard deviation)"]
    assert rows[3][1] == "0.6000 (0.1414)"
    assert rows[3][6] == "2.000"


def test_what_was_not_measured_is_a_dash() -> None:
    _, rows = table(CONTENT)
    assert rows[4][0] == "searched"
    assert rows[4][-1] == "-"


def test_the_notes_say_what_a_reader_must_know() -> None:
    text = "\n".join(notes(CONTENT))
    assert "Budget: latency_ms 60%, which is latency_ms <= 1.235; percent are of the predicted cost" in text
    assert "MACs count a multiply-accumulate once" in text
    assert "Test: 359 images, read once" in text
    assert "Uniform-scaled: so." in text
    assert "Random: thus." in text
    assert (
        "takes 50% of the largest one's measured latency; 10.0% more was predicted than was measured." in text
    )
    # 1.1 ms were predicted; what takes 1 ms now took 1 / 0.88 then.
    assert "take 0.88 times what they took when the table was measured" in text
    assert "at the machine's speed of then 3.2% less was predicted than was measured." in text
    assert "median 1.250 ms, p95 1.500 ms (predicted 1.100 ms)" in text
    assert text.endswith("Exported files: runs/demo/networks/k/exported")


def test_later_reports_do_not_say_that_the_test_part_was_read_once() -> None:
    text = "\n".join(notes({**CONTENT, "earlier_reports": 2}))
    assert "read once" not in text
    assert "read after 2 earlier reports of this run" in text


def test_a_selected_network_is_not_called_searched() -> None:
    rows = [
        {**r, "name": r["name"].replace("searched", "selected"), "key": r["name"]} for r in CONTENT["rows"]
    ]
    rows += [row("uniform-scaled", 0.8, 1.0)]
    text = "\n".join(notes({**CONTENT, "rows": rows, "subject": "selected", "selected_by": "least macs"}))
    assert "Selected: least macs, in the search under the budget above" in text
    assert "The selected network takes 50% of" in text
    assert "found nothing better" not in text


def test_a_search_that_ends_where_it_started_says_so() -> None:
    same = [*CONTENT["rows"], row("uniform-scaled", 0.8, 1.0)]
    assert "found nothing better on validation" in "\n".join(notes({**CONTENT, "rows": same}))
    other = [*CONTENT["rows"], row("uniform-scaled", 0.8, 1.0, key="other")]
    for rows in (other, CONTENT["rows"]):
        assert "found nothing better" not in "\n".join(notes({**CONTENT, "rows": rows}))


@pytest.mark.parametrize(
    ("test", "key", "said"), [(0.85, "u", True), (0.81, "u", True), (0.79, "u", False), (0.85, "k", False)]
)
def test_too_few_test_images_to_decide_are_named(test: float, key: str, said: bool) -> None:
    """The searched network has 0.85, its interval goes from 0.80 to 0.90."""
    rows = [*CONTENT["rows"], row("uniform-scaled, finetuned", test, 1.0, key=key)]
    text = "\n".join(notes({**CONTENT, "rows": rows}))
    assert ("359 test images are too few to tell the searched, finetuned network" in text) == said


def test_a_tightened_limit_is_explained() -> None:
    text = "\n".join(notes({**CONTENT, "latency_margin": 1.031, "confidence": 0.95}))
    assert "divided by 1.031: measured latencies hold the budget with 95% confidence" in text
    assert "confidence." not in "\n".join(notes(CONTENT))


def test_what_is_over_the_limit_or_no_faster_as_measured_is_warned_of() -> None:
    assert "WARNING" not in "\n".join(notes(CONTENT))
    rows = [*CONTENT["rows"][:-1], row("searched, finetuned", 0.85, 2.1) | {"key": "other"}]
    said = "\n".join(notes({**CONTENT, "rows": rows}))
    assert "WARNING: measured, it takes 2.386 ms at the speed of the table" in said
    assert "more than the limit of 1.235 ms" in said
    assert "not faster than the largest network" in said
    # Without a limit on latency, none was broken; that nothing is faster is worth a warning all the same.
    said = "\n".join(notes({**CONTENT, "rows": rows, "limits": {"macs": 1.0}}))
    assert said.count("WARNING") == 1
    assert "not faster than the largest network" in said


def test_the_size_of_the_file_is_told_apart_from_that_of_the_bits() -> None:
    rows = [*CONTENT["rows"][:-1], row("searched, finetuned", 0.85, 1.0, bits=(4.0, 8.0))]
    said = "\n".join(notes({**CONTENT, "rows": rows, "onnx_bytes": 19_400}))
    assert "network.onnx has 19 kB" in said
    assert "kB" not in "\n".join(notes({**CONTENT, "onnx_bytes": 19_400}))


def test_without_checks_nothing_is_said_of_the_machine() -> None:
    assert "speed" not in "\n".join(notes({**CONTENT, "drift": None}))


def test_without_an_exported_onnx_file_nothing_is_said_of_it() -> None:
    assert "network.onnx" not in "\n".join(notes({**CONTENT, "exported": None}))


def test_markdown_is_a_table_of_as_many_cells_in_every_line_and_the_notes() -> None:
    lines = markdown(CONTENT).splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert len(cells) == 2 + 6
    assert {line.count("|") for line in cells} == {10}
    assert [line[2:] for line in lines if line.startswith("- ")] == notes(CONTENT)


def test_bits_have_a_column_where_some_network_has_few() -> None:
    rows = [
        row("largest", 0.9, 2.0, bits=(32.0, 32.0)),
        row("searched, finetuned", 0.8, 1.0, bits=(4.25, 8.0)),
    ]
    headers, cells = table({**CONTENT, "rows": rows})
    assert headers[-1] == "bits of weights, inputs (mean)"
    assert [line[-1] for line in cells] == ["32.00, 32.00", "4.25, 8.00"]
    assert len(table(CONTENT)[0]) == len(headers) - 1


def test_costs_without_a_latency_are_those_of_a_device_that_is_not_known() -> None:
    costs = {"macs": 1.5e6, "params": 2000.0, "size_bytes": 8000.0}
    rows = [
        {**row(name, 0.5, 1.0), "costs": costs, "latency_ms": None}
        for name in ("largest", "searched, finetuned")
    ]
    content = {**CONTENT, "rows": rows, "drift": None, "exported": None, "limits": {"size_bytes": 9000.0}}
    assert "No latency is known" in "\n".join(notes(content))
    assert table(content)[1][0][5] == "-"
