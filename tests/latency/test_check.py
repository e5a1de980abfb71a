"""A check measures networks the table was not fitted to, and tells a slow machine from a wrong table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.errors import TableError
from autocompress.latency.check import check_table, save_check
from autocompress.latency.plan import network_name
from autocompress.latency.profile import profile
from autocompress.latency.table import LatencyTable
from autocompress.latency.target import load_target
from autocompress.space import SearchSpace

FITTED = 10


@pytest.fixture
def table(space: SearchSpace, tmp_path: Path, clock: Any) -> LatencyTable:
    return profile(
        space,
        load_target(),
        folder=tmp_path / "profile",
        networks=FITTED,
        min_rounds=6,
        max_rounds=6,
        granularity="block",
        timer=clock.timer,
        prepare=clock.prepare,
    )


def check(table: LatencyTable, space: SearchSpace, folder: Path, clock: Any, **more: Any) -> Any:
    timer = more.pop("timer", clock.timer)
    settings = {"networks": 8, "min_rounds": 6, "max_rounds": 6, **more}
    return check_table(table, space, folder=folder, timer=timer, prepare=clock.prepare, **settings)


def test_a_table_that_is_right_has_no_error_on_networks_it_never_saw(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    found = check(table, space, tmp_path, clock)
    # The space has 18 networks, of which the table was fitted to 10.
    assert len(found.networks) == 8
    assert found.figures.max_error_percent == pytest.approx(0, abs=1e-6)
    assert found.machine_factor == pytest.approx(1)
    assert found.raw.bias_percent > 5
    assert found.repeat_noise_percent == pytest.approx(0, abs=1e-9)
    predicted = [network.predicted_ms for network in found.networks]
    assert predicted == sorted(predicted)


def test_no_network_of_the_error_report_is_among_the_checked(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    found = check(table, space, tmp_path, clock)
    assert table.error_report is not None
    fitted = {network.name for network in table.error_report.networks}
    by_key = {
        space.decode(row[None])[0].key: network_name(space.operations(row))
        for row in np.unique(space.sample(500, np.random.default_rng(0)), axis=0)
    }
    assert not {by_key[network.architecture] for network in found.networks} & fitted


def test_a_machine_that_became_slower_is_told_from_a_table_that_is_wrong(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    slower = check(table, space, tmp_path / "slower", clock, timer=lambda run: 1.25 * clock.timer(run))
    assert slower.machine_factor == pytest.approx(1.25)
    assert slower.measured_again == 8
    assert slower.figures.bias_percent == pytest.approx(-20)
    assert slower.figures_at_that_speed.max_error_percent == pytest.approx(0, abs=1e-6)

    kernel = next(key for key in table.rows if "kernel=5" in key)
    wrong = {**table.rows, kernel: replace(table.rows[kernel], median_ms=2 * table.rows[kernel].median_ms)}
    off = check(replace(table, rows=wrong), space, tmp_path / "wrong", clock)
    assert off.machine_factor == pytest.approx(1)
    assert off.figures_at_that_speed.max_error_percent > 20
    # The worst networks are shown with their blocks, which add up to the prediction.
    worst = off.worst[0]
    assert kernel in {block.key for block in worst.blocks}
    total = sum(block.predicted_ms for block in worst.blocks) + table.correction.constant_ms
    assert total == pytest.approx(worst.predicted_ms)


def test_a_check_that_was_stopped_goes_on(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    expected = check(table, space, tmp_path / "whole", clock)
    stopped = type(clock)(stop_after=50)
    with pytest.raises(KeyboardInterrupt):
        check(table, space, tmp_path / "killed", stopped)
    resumed = type(clock)()
    assert check(table, space, tmp_path / "killed", resumed) == expected
    # Of 8 networks and 8 measured again, 3 of 6 rounds were whole.
    assert len(resumed.timed) == 3 * 16


def test_a_table_without_an_error_report_can_be_checked_but_not_the_machine(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    found = check(replace(table, error_report=None), space, tmp_path, clock)
    assert (found.machine_factor, found.measured_again) == (1.0, 0)


def test_a_table_of_another_machine_is_refused(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    device = {"cpu": "Z80", "cores": 1, "architecture": "z80"}
    other = replace(table, provenance={**table.provenance, "device": device})
    with pytest.raises(TableError, match=r"device is .*Z80.*, not"):
        check(other, space, tmp_path, clock)


def test_fewer_than_two_networks_are_no_check(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    for count in (1, 0, -5):
        with pytest.raises(TableError, match=f"at least 2 networks the table was not fitted to, got {count}"):
            check(table, space, tmp_path, clock, networks=count)


def test_json_and_plot_are_written(
    table: LatencyTable, space: SearchSpace, tmp_path: Path, clock: Any
) -> None:
    found = check(table, space, tmp_path, clock)
    save_check(found, tmp_path / "check.json", title="toy")
    payload = json.loads((tmp_path / "check.json").read_text())
    assert (payload["schema"], payload["unit"], len(payload["networks"])) == (
        "autocompress.latency_check",
        "ms",
        8,
    )
    drawn = (tmp_path / "check.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "</svg>" in drawn
