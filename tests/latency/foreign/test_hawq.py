"""HAWQ-V3's lists give sensitivity, size, BOPs and latency of every layer at 4 and 8 bits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.errors import MissingRowError, TableError
from autocompress.latency.foreign.hawq import read_hawq

Change = Callable[[str, str, str], Path]


def test_costs_of_a_layer_are_worked_out_by_hand(folder: Path) -> None:
    tables = read_hawq(folder / "hawq.json")
    assert tables.network == "two layers and a shortcut"
    assert tables.ties == ((1, 2),)
    assert tables.published == {"latency_0.5": ((8, 8), (4, 4), (4, 4))}
    policy = tables.published["latency_0.5"]
    assert tables.sensitivity.total(policy) == 0.5 * 0.5 + 0.25 * 8 + 0.125 * 16  # trace times squared error
    assert tables.size.total(policy) == 1 + (2 + 3) / 2  # a byte a weight at 8 bits
    assert tables.bops.total(policy) == 1024 / 16 + (2048 + 512) / 64
    assert tables.latency.total(policy) == 0.5 + 0.5 + 1
    assert (tables.size.unit, tables.latency.unit) == ("MiB", "not stated")


def test_widths_that_were_not_measured_are_refused(folder: Path) -> None:
    tables = read_hawq(folder / "hawq.json")
    with pytest.raises(MissingRowError, match="nearest row is layer '0' at 4 and 4"):
        tables.latency.at("0", 5, 4)
    with pytest.raises(MissingRowError, match="at 4 bits of weights and 8 of activations"):
        tables.latency.at("0", 4, 8)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"layers": 3', '"layers": 2', r"hutchinson_trace must have 2 numbers, one a layer, got 3"),
        ("[0.25, 0.5, 1.0]", "[0.25, 0.5]", r"latency_int4 must have 3 numbers, one a layer, got 2"),
        ("[0.25, 0.5, 1.0]", "[0.25, -0.5, 1.0]", r"latency_int4\[1\] must be at least 0, got -0.5"),
        ("[0.25, 0.5, 1.0]", "[0.25, NaN, 1.0]", "must be finite, got NaN"),
        ("[0.25, 0.5, 1.0]", "[0.25, 1e999, 1.0]", r"latency_int4\[1\] must be a finite number, got inf"),
        ("[0.25, 0.5, 1.0]", '[0.25, "1", 1.0]', r"latency_int4\[1\] must be a finite number, got '1'"),
        ("[[1, 2]]", "[[1, 3]]", r"ties\[0\] must be at least two different layers of 0\.\.2, got"),
        ("[[1, 2]]", "[[1, 1]]", r"ties\[0\] must be at least two"),
        ("[[1, 2]]", "[[]]", r"ties\[0\] must be at least two"),
        ('"844"', '"846"', r"published_bits.latency_0.5 must be 3 digits, each 4 or 8, got '846'"),
        ('"844"', '"84"', r"published_bits.latency_0.5 must be 3 digits"),
        ('"latency_int4"', '"latency_int5"', "latency_int4 is missing"),
        ('"note"', '"notes"', "notes is not known; allowed"),
        ('"note"', '"source"', "'source' stands twice"),
    ],
)
def test_a_wrong_list_is_refused_by_its_name(changed: Change, old: str, new: str, match: str) -> None:
    path = changed("hawq.json", old, new)
    with pytest.raises(TableError, match=rf"HAWQ tables .*hawq\.json: .*{match}"):
        read_hawq(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "metric", "cost", "sensitivity"),
    [
        ("modelsize_0.5", "size", 7.2656, 0.074506),
        ("bops_0.5", "bops", 65.0281, 0.215689),
        ("latency_0.5", "latency", 4.2201, 0.202674),
        ("bops_0.25", "bops", 45.7605, 0.460424),
    ],
)
def test_the_published_assignments_cost_what_the_notebook_says(
    shared: Callable[[str], Path], problem: str, metric: str, cost: float, sensitivity: float
) -> None:
    """ALGORITHMS A10, golden test: ResNet-18."""
    tables = read_hawq(shared("tables/hawq_v3_resnet18.json"))
    policy = tables.published[problem]
    assert getattr(tables, metric).total(policy) == pytest.approx(cost, abs=5e-5)
    assert tables.sensitivity.total(policy) == pytest.approx(sensitivity, abs=5e-7)
    assert all(len({policy[layer] for layer in tie}) == 1 for tie in tables.ties)


@pytest.mark.slow
def test_the_published_latencies_have_the_published_totals(shared: Callable[[str], Path]) -> None:
    """ALGORITHMS A10: 3.1487 and 5.3437 for INT4 and INT8."""
    tables = read_hawq(shared("tables/hawq_v3_resnet18.json"))
    assert len(tables.published) == 9
    assert round(tables.latency.total([(4, 4)] * 19), 4) == 3.1487
    assert round(tables.latency.total([(8, 8)] * 19), 4) == 5.3437
