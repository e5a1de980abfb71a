"""Rounds measure every item until its median is certain, and never again what is finished."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import TableError
from autocompress.latency.measure import (
    REFERENCE,
    Item,
    Stopping,
    bootstrap_positions,
    half_width,
    measure,
    measure_networks,
    summarize,
    time_once,
)
from autocompress.latency.samples import SampleFile

SUBJECT: dict[str, object] = {"target": "t", "device": "d"}


class Machine:
    """Runs items and times them by their number; every fourth, from the first, with noise on request."""

    def __init__(self, noise: float = 0.0, every: int = 4) -> None:
        self._every = every
        self.ran: Counter[str] = Counter()
        self.built: Counter[str] = Counter()
        self.timed: list[str] = []
        self._last = ""
        self._noise = noise
        self._rng = np.random.default_rng(0)

    def _run(self, key: str) -> None:
        self.ran[key] += 1
        self._last = key

    def _build(self, key: str) -> Callable[[], None]:
        self.built[key] += 1
        return partial(self._run, key)

    def items(self, count: int) -> list[Item]:
        return [Item(str(number), partial(self._build, str(number))) for number in range(1, count + 1)]

    def timer(self, run: Callable[[], object]) -> float:
        run()
        self.timed.append(self._last)
        noise = self._noise * (int(self._last) % self._every == 1) * self._rng.standard_normal()
        return float(self._last) * float(np.exp(noise))


def test_a_summary_has_the_quartiles_of_a_known_row() -> None:
    summary = summarize([float(value) for value in range(1, 102)])
    assert (summary.median_ms, summary.spread_ms, summary.p95_ms, summary.count) == (51, 50, 96, 101)


def test_no_samples_have_no_median() -> None:
    with pytest.raises(TableError, match="at least one sample"):
        summarize([])


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    # Of 1000 rows of 40 samples of an exponential distribution (median log 2) at least 95 % are wanted;
    # 93 % is below that by 2.9 standard deviations.
    rng = np.random.default_rng(0)
    covered = 0
    for row in np.sort(rng.exponential(size=(1000, 40)), axis=1):
        low, high = row[list(bootstrap_positions(40))]
        assert half_width(row.tolist()) == pytest.approx((high - low) / 2 / np.median(row))
        covered += low <= np.log(2) <= high
    assert covered >= 930


@pytest.mark.parametrize("count", [7, 24, 41, 60])
def test_the_interval_is_that_of_resampled_medians(count: int) -> None:
    """A second implementation: 20,000 resamples, whose lower and upper middles are looked at one by one."""
    resampled = np.sort(np.random.default_rng(0).integers(count, size=(20_000, count)), axis=1)
    low, high = bootstrap_positions(count)
    noise = 4 * np.sqrt(0.025 * 0.975 / 20_000)
    lower, upper = resampled[:, (count - 1) // 2], resampled[:, count // 2]
    assert (lower < low).mean() - noise <= 0.025 <= (lower <= low).mean() + noise
    assert (upper < high).mean() - noise <= 0.975 <= (upper <= high).mean() + noise


@given(st.floats(0.001, 1000), st.lists(st.floats(0.5, 2), min_size=6, max_size=50))
def test_the_half_width_has_no_unit(factor: float, samples: list[float]) -> None:
    ordered = sorted(samples)
    assert half_width([factor * sample for sample in ordered]) == pytest.approx(half_width(ordered), abs=1e-9)


def test_five_samples_say_nothing_for_certain() -> None:
    assert half_width([1.0] * 5) == inf
    assert half_width([1.0] * 6) == 0


def test_every_round_runs_each_item_once_in_another_order() -> None:
    machine = Machine()
    samples = measure(machine.items(60), stopping=Stopping(0.02, 6, 9), timer=machine.timer)
    rounds = [machine.timed[start : start + 60] for start in range(0, len(machine.timed), 60)]
    assert len(rounds) == 6
    assert all(len(set(order)) == 60 for order in rounds)
    assert len({tuple(order) for order in rounds}) == 6
    assert all(samples[str(number)].raw_ms == (float(number),) * 6 for number in range(1, 61))


@pytest.mark.parametrize(
    ("every", "rounds"),
    [
        # 15 of 60 items are uncertain, which is more than 5 %: all are measured on, to the most rounds.
        (4, 12),
        # 3 of 60 are 5 %: the last few may never be certain.
        (20, 6),
    ],
)
def test_items_are_measured_on_together(every: int, rounds: int) -> None:
    machine = Machine(noise=0.5, every=every)
    samples = measure(machine.items(60), stopping=Stopping(0.02, 6, 12), timer=machine.timer)
    assert {len(samples[key].raw_ms) for key in samples if key != REFERENCE} == {rounds}


def test_items_that_have_their_samples_run_untimed_among_the_others(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    file = SampleFile(path, SUBJECT)
    for _ in range(8):
        file.append({"1": 1.0, "2": 2.0})
    file.finish(["1", "2"], 0.02)
    machine = Machine()
    measure(
        machine.items(5),
        stopping=Stopping(0.02, 6, 12),
        timer=machine.timer,
        samples=SampleFile(path, SUBJECT),
    )
    assert Counter(machine.timed) == {"3": 6, "4": 6, "5": 6}
    # 6 rounds, and 3 runs to warm up.
    assert set(machine.ran.values()) == {6 + 3}


def test_everything_is_built_anew_after_some_rounds() -> None:
    machine = Machine()
    measure(machine.items(50), stopping=Stopping(0.0, 20, 20, rounds_per_load=8), timer=machine.timer)
    assert set(machine.built.values()) == {3}


def test_the_reference_runs_in_every_round() -> None:
    machine = Machine()
    reference = Item(REFERENCE, partial(machine._build, "7"))
    samples = measure(
        machine.items(3), stopping=Stopping(0.02, 6, 9), timer=machine.timer, reference=reference
    )
    assert samples[REFERENCE].raw_ms == (7.0,) * 6


def test_progress_ends_at_its_total_and_never_goes_back() -> None:
    machine = Machine(noise=0.5)
    told: list[tuple[int, int]] = []
    measure(
        machine.items(10),
        stopping=Stopping(0.02, 6, 12),
        timer=machine.timer,
        progress=lambda done, total: told.append((done, total)),
    )
    assert {total for _, total in told} == {120}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (120, 120)


def test_what_a_file_has_as_finished_is_never_measured_again(tmp_path: Path) -> None:
    machine = Machine(noise=0.5)
    stopping = Stopping(0.02, 6, 12)
    path = tmp_path / "samples.jsonl"
    first = measure(
        machine.items(20), stopping=stopping, timer=machine.timer, samples=SampleFile(path, SUBJECT)
    )
    again = Machine()
    second = measure(again.items(20), stopping=stopping, timer=again.timer, samples=SampleFile(path, SUBJECT))
    assert not again.timed
    assert not again.built
    assert second == first


def test_finished_stays_finished_although_later_samples_cast_doubt_on_it(tmp_path: Path) -> None:
    # What is known of the drift changes with every round, and with it how certain a median looks.
    path = tmp_path / "samples.jsonl"
    file = SampleFile(path, SUBJECT)
    for number in range(8):
        file.append({"1": 1.0 + number % 3, "2": 2.0})
    file.finish(["1"], 0.02)
    machine = Machine()
    stopping = Stopping(0.02, 6, 12)
    measure(machine.items(3), stopping=stopping, timer=machine.timer, samples=SampleFile(path, SUBJECT))
    assert "3" in machine.timed
    assert "1" not in machine.timed


@pytest.mark.parametrize("cut", [1, 500, 2000, 4000])
def test_after_a_kill_only_what_is_missing_is_measured(tmp_path: Path, cut: int) -> None:
    stopping = Stopping(0.02, 6, 12)
    path = tmp_path / "samples.jsonl"
    whole = measure(
        (machine := Machine()).items(50),
        stopping=stopping,
        timer=machine.timer,
        samples=SampleFile(path, SUBJECT),
    )
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - cut])
    kept = SampleFile(path, SUBJECT)
    known = Counter(key for samples in kept.rounds for key in samples)
    again = Machine()
    resumed = measure(again.items(50), stopping=stopping, timer=again.timer, samples=kept)
    assert resumed == whole
    assert Counter(again.timed) == Counter({str(n): 6 - known[str(n)] for n in range(1, 51)}) + Counter()


def test_a_smaller_tolerance_takes_more_samples_of_what_was_finished(tmp_path: Path) -> None:
    machine = Machine(noise=0.1)
    path = tmp_path / "samples.jsonl"
    measure(
        machine.items(9),
        stopping=Stopping(0.2, 6, 30),
        timer=machine.timer,
        samples=SampleFile(path, SUBJECT),
    )
    before = len(machine.timed)
    measure(
        machine.items(9),
        stopping=Stopping(0.02, 6, 30),
        timer=machine.timer,
        samples=SampleFile(path, SUBJECT),
    )
    assert before == 9 * 6
    assert set(Counter(machine.timed).values()) == {30}


def test_networks_are_measured_exactly_as_often_as_asked() -> None:
    machine = Machine()
    runs = {key: partial(machine._run, key) for key in ("2", "3")}
    measured = measure_networks(runs, count=7, timer=machine.timer)
    assert {name: (row.median_ms, row.count) for name, row in measured.items()} == {
        "2": (2.0, 7),
        "3": (3.0, 7),
    }


def test_another_network_runs_before_each_timed_run() -> None:
    ran: list[str] = []
    runs = {key: partial(ran.append, key) for key in "abc"}

    def timer(run: Callable[[], object]) -> float:
        before = ran[-1]
        run()
        assert ran[-1] != before
        return 1.0

    measured = measure_networks(runs, count=20, timer=timer)
    assert {row.count for row in measured.values()} == {20}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1, 6, 9), "tolerance must be >= 0"),
        ((float("nan"), 6, 9), "tolerance must be >= 0"),
        ((0.1, 0, 9), r"min_rounds must be in 1..max_rounds \(9\), got 0"),
        ((0.1, 10, 9), r"min_rounds must be in 1..max_rounds \(9\), got 10"),
        ((0.1, 6, 9, 0), "rounds_per_load must be >= 1"),
    ],
)
def test_impossible_settings_are_refused(arguments: tuple[float, int, int], match: str) -> None:
    with pytest.raises(TableError, match=match):
        Stopping(*arguments)


def test_the_clock_runs_a_function_once_and_gives_a_time() -> None:
    ran = []
    assert time_once(lambda: ran.append(1)) > 0
    assert ran == [1]
