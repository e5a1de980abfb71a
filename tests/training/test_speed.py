"""Which precision and memory format are chosen, with a clock of our own."""

import os
from typing import Any

import pytest
import torch

from autocompress.machine import cores
from autocompress.recipe import OptimizerSettings
from autocompress.training.speed import autocast, choose_formats, choose_threads

AUTO = OptimizerSettings(precision="auto", memory_format="auto")


class Machine:
    """Steps take the seconds given; the first of each kind takes a hundred more."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0
        self.ran: list[str] = []

    def step(self, precision: str, memory: str) -> None:
        kind = f"{precision}_{memory}"
        self.now += self.seconds.get(kind, 1.0) + (0 if kind in self.ran else 100)
        self.ran.append(kind)

    def clock(self) -> float:
        return self.now


LONG, SHORT = 10_000, 100


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({}, ("fp32", "channels_last")),
        ({"fp32_contiguous": 0.5}, ("fp32", "contiguous")),
        ({"bf16_channels_last": 0.5}, ("bf16", "channels_last")),
        ({"fp32_contiguous": 0.8, "bf16_contiguous": 0.3}, ("bf16", "contiguous")),
        # Not worth it: less than 5 % faster.
        ({"bf16_channels_last": 0.96, "fp32_contiguous": 0.97}, ("fp32", "channels_last")),
    ],
)
def test_in_a_long_training_the_fastest_wins_if_it_is_clearly_faster(
    seconds: dict[str, float], chosen: tuple[str, str]
) -> None:
    machine = Machine(**seconds)
    found = choose_formats(AUTO, machine.step, steps=LONG, clock=machine.clock)
    assert (found["precision"], found["memory_format"]) == chosen


def test_a_short_training_does_not_pay_for_the_trial_of_bf16() -> None:
    machine = Machine(bf16_channels_last=0.1)
    found = choose_formats(AUTO, machine.step, steps=SHORT, clock=machine.clock)
    assert found == {"precision": "fp32", "memory_format": "channels_last"}
    assert {kind.partition("_")[0] for kind in machine.ran} == {"fp32"}


def test_what_is_given_is_not_timed() -> None:
    machine = Machine()
    settings = OptimizerSettings(precision="bf16", memory_format="channels_last")
    found = choose_formats(settings, machine.step, steps=LONG, clock=machine.clock)
    assert found == {"precision": "bf16", "memory_format": "channels_last"}
    assert machine.ran == []


@pytest.mark.parametrize(
    ("given", "ran"),
    [
        ({"precision": "bf16", "memory_format": "auto"}, {"bf16_contiguous", "bf16_channels_last"}),
        ({"precision": "auto", "memory_format": "contiguous"}, {"fp32_contiguous", "bf16_contiguous"}),
    ],
    ids=["format", "precision"],
)
def test_only_what_is_auto_varies(given: dict[str, Any], ran: set[str]) -> None:
    machine = Machine(bf16_contiguous=0.1)
    found = choose_formats(OptimizerSettings(**given), machine.step, steps=LONG, clock=machine.clock)
    assert found == {"precision": "bf16", "memory_format": "contiguous"}
    assert set(machine.ran) == ran


@pytest.mark.parametrize(
    ("seconds", "most", "chosen"),
    [
        ([1.0, 0.6, 0.4, 0.3], 8, 8),
        ([1.0, 0.6, 0.58, 0.1], 8, 2),  # four are not clearly faster than two; eight are not tried
        ([1.0, 1.4], 2, 1),
        ([1.0, 0.6, 0.5], 3, 3),
        ([1.0], 1, 1),
    ],
)
def test_threads_are_doubled_while_that_is_clearly_faster(
    seconds: list[float], most: int, chosen: int
) -> None:
    before, now = torch.get_num_threads(), [0.0]
    tried = [min(2**i, most) for i in range(len(seconds))]

    def step() -> None:
        now[0] += seconds[tried.index(torch.get_num_threads())]

    try:
        assert choose_threads(step, most=most, clock=lambda: now[0]) == chosen
    finally:
        torch.set_num_threads(before)


def test_no_more_threads_than_cores_are_tried() -> None:
    before, seen = torch.get_num_threads(), set()
    ticks = iter(range(1000))
    try:
        # Every step is faster than the one before.
        choose_threads(lambda: seen.add(torch.get_num_threads()), clock=lambda: -float(next(ticks) ** 2))
    finally:
        torch.set_num_threads(before)
    assert max(seen) == cores() <= (os.cpu_count() or 1)


def test_autocast_computes_in_bfloat16_only_when_asked() -> None:
    a = torch.ones(2, 2)
    with autocast("fp32"):
        assert (a @ a).dtype == torch.float32
    with autocast("bf16"):
        assert (a @ a).dtype == torch.bfloat16
