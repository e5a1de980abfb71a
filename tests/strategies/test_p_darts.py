"""P-DARTS: which options are left, how dropout falls, phases that grow and are resumed."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import small_data
from torch import Tensor

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.differentiable import Moment, Phase
from autocompress.errors import RecipeError
from autocompress.recipe import TaskSettings, TrainSettings
from autocompress.space import SearchSpace
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.bilevel import train_relaxed
from autocompress.training.task import load_task
from search_spaces.darts import darts
from search_spaces.nas_bench_201 import nas_bench_201
from strategies.collapse import SKIP
from strategies.p_darts import PDarts
from strategies.relaxed import RelaxedSearch


def cells(count: int = 1) -> SearchSpace:
    return nas_bench_201(channels=4, cells=count, resolution=12, classes=3)


def limited(space: SearchSpace, budget: str = "macs=70%") -> Constraints:
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


def give(strategy: RelaxedSearch, *logits: float) -> None:
    """Give every variable these logits, rolled by its number."""
    with torch.no_grad():
        for at, vector in enumerate(strategy.relaxation.logits):
            vector.copy_(torch.tensor(logits[: len(vector)], dtype=torch.float64).roll(at))


def left(strategy: PDarts) -> list[list[int]]:
    return [kept.nonzero().flatten().tolist() for kept in strategy.relaxation.kept]


# Options that are left -------------------------------------------------------------------------------------


def test_each_phase_keeps_the_most_probable_options() -> None:
    strategy = PDarts(limited(cells()), seed=0)
    strategy.begin(0)
    assert left(strategy) == [[0, 1, 2, 3, 4]] * 6
    give(strategy, 0.5, 0.1, 0.4, 0.2, 0.3)
    strategy.begin(1)  # 5/8 of 5: three; codes 0, 2, 4 of the first edge, 1, 3, 0 of the second
    assert left(strategy) == [[0, 2, 4], [0, 1, 3], [1, 2, 4], [0, 2, 3], [1, 3, 4], [0, 2, 4]]
    give(strategy, 0.1, 0.9, 0.2, 0.8, 0.3)
    strategy.begin(2)  # 3/8 of 5: two, of those that are left alone
    assert left(strategy) == [[2, 4], [0, 3], [1, 4], [0, 2], [1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("operations", "keep", "counts"),
    [
        (8, (5 / 8, 3 / 8), (8, 5, 3)),
        (6, (5 / 8, 3 / 8), (6, 4, 2)),
        (3, (5 / 8, 3 / 8), (3, 2, 2)),
        (2, (5 / 8, 3 / 8), (2, 2, 2)),
        (8, (0.1, 0.0), (8, 2, 2)),
        (8, (1.0, 1.0), (8, 8, 8)),
        (1, (5 / 8, 3 / 8), (1, 1, 1)),
    ],
)
def test_the_shares_of_the_paper_leave_eight_five_three_and_never_fewer_than_two(
    operations: int, keep: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    names = (
        SKIP, "none", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
        "dil_conv_5x5",
    )[:operations]  # fmt: skip
    space = darts(channels=2, layers=3, resolution=4, operations=names)
    strategy = PDarts(limited(space, "macs=100%"), seed=0, keep=keep, max_skips=None)
    for phase, count in enumerate(counts):
        strategy.begin(phase)
        assert {len(codes) for codes in left(strategy)} == {count}
        give(strategy, *range(operations))
        entropy = strategy.notes["relaxation"]["entropy"]
        assert 0 < entropy < 1 if count > 1 else entropy == 0
    give(strategy, *[0.0] * operations)
    probable = [p for p in strategy.relaxation.probabilities()["normal.edge_0_4"].tolist() if p]
    assert probable == pytest.approx([1 / counts[-1]] * counts[-1])


def test_logits_and_their_optimizer_start_anew_in_each_phase() -> None:
    def begun(seed: int) -> list[list[Tensor]]:
        strategy = PDarts(limited(cells()), seed=seed)
        found = []
        for phase in range(3):
            strategy.begin(phase)
            found.append([vector.detach().clone() for vector in strategy.relaxation.logits])
            assert not strategy._optimizer.state
            give(strategy, 5, 4, 3, 2, 1)
            strategy.relaxation.logits[0].grad = torch.ones(5, dtype=torch.float64)
            strategy.move()
        return found

    first, second, other = begun(1), begun(1), begun(2)
    for phase in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first[phase], second[phase], strict=True))
        assert not torch.equal(first[phase][0], other[phase][0])
        assert all(float(vector.abs().max()) < 0.005 for vector in first[phase])  # 1e-3 times a normal
        assert not torch.equal(first[phase][0], first[phase - 1][0])


def test_dropped_options_are_not_computed() -> None:
    space = cells()
    strategy = PDarts(limited(space), seed=0)
    give(strategy, 0.5, 0.1, 0.4, 0.2, 0.3)
    strategy.begin(1)
    moment = Moment(0, 10, torch.Generator())
    for gates in (strategy.soft_gates(), strategy.mixture(), strategy.weight_gates(moment)):
        assert [list(gate.codes) for gate in gates.values()] == left(strategy)
        assert all(float(gate.weights.sum().detach()) == pytest.approx(1.0) for gate in gates.values())


# Dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "first"), [(0, 0.0), (1, 0.4), (2, 0.7)])
def test_dropout_falls_as_in_the_repository(phase: int, first: float) -> None:
    """Of 25 epochs of 4 steps: `r (E - e - 1) / E` in the ten of the warm-up, then `r exp(-0.2 (e - 10))`.

    The repository sets the rate once an epoch. Ours falls with every step: in the warm-up it comes to the
    repository's at the end of the epoch, after it starts from the repository's.
    """
    strategy = PDarts(limited(cells()), seed=0)
    strategy.begin(phase)

    def rate(step: int) -> float:
        gates = strategy.weight_gates(Moment(step, 100, torch.Generator(), 4))
        assert {tuple(gate.dropout) for gate in gates.values()} == {(SKIP,)}
        (found,) = {gate.dropout[SKIP] for gate in gates.values()}
        return found

    for epoch in range(25):
        if epoch < 10:
            theirs = first * (25 - epoch - 1) / 25
            assert rate(4 * epoch) == pytest.approx(theirs + first / 25)
            assert rate(4 * epoch + 3) == pytest.approx(theirs + first / 100)
        else:
            theirs = first * math.exp(-0.2 * (epoch - 10))
            assert rate(4 * epoch) == pytest.approx(theirs)
            assert rate(4 * epoch + 3) == pytest.approx(theirs * math.exp(-0.15))


def test_identities_are_dropped_for_weights_and_logits_but_not_in_the_mixture() -> None:
    space = cells()
    strategy = PDarts(limited(space), seed=0, eigenvalue=False)
    strategy.begin(2)
    seen: list[set[float]] = []

    class Network:
        weights = ()

        def loss(self, batch: Any, gates: Any) -> Tensor:
            seen.append({gate.dropout.get(SKIP, 0.0) for gate in gates.values()})
            return torch.stack([gate.weights[0] for gate in gates.values()]).sum()

        def velocity(self, weight: Any) -> None:
            return None

    nothing = torch.zeros(1), torch.zeros(1)
    strategy.architecture_step(Network(), nothing, nothing, Moment(40, 100, torch.Generator(), 100))
    assert seen == [{0.7}]
    assert {tuple(gate.dropout) for gate in strategy.mixture().values()} == {()}


# Options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dropout": (0.1, 0.2)},
            "needs a rate of dropout a phase, and keep and grow for all phases but one",
        ),
        ({"keep": (0.5,)}, "needs a rate of dropout a phase"),
        ({"grow": {"cells": (1,)}}, r"needs a rate of dropout a phase.*\{'cells': \[1\]\}"),
        ({"grow": {"cells": (1, 2), "channels": (4, 4, 4)}}, "needs a rate of dropout a phase"),
        ({"grow": {"cells": 5}}, "cells must be a list, a number a phase, got 5"),
        ({"keep": 0.5}, r"keep must be a list, a number a phase, got 0\.5"),
        ({"dropout": "0.1"}, r"dropout must be a list, a number a phase, got '0\.1'"),
        ({"dropout": (0.0, 0.4, 1.7)}, r"dropout must be in 0\.\.1, got 1\.7"),
        ({"keep": (0.5, -0.1)}, r"keep must be in 0\.\.1, got -0\.1"),
        ({"keep": (0.3, 0.5)}, "keep must not rise"),
        ({"early_stopping": "eigenvalue"}, "P-DARTS has no early stopping"),
        ({"max_skips": -1}, "max_skips must be an integer >= 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PDarts(limited(cells()), seed=0, **options)


def test_derived_cells_have_two_skips_by_default() -> None:
    space = cells()
    skip = space.choices[0].options.index(SKIP)
    for options, most in (({}, 2), ({"max_skips": 1}, 1), ({"max_skips": None}, 6)):
        strategy = PDarts(constraints=limited(space), seed=0, at_least=0.0, **options)  # type: ignore[arg-type]
        give(strategy, *range(5))
        with torch.no_grad():
            for vector in strategy.relaxation.logits:
                vector[skip] = 9.0
        assert (strategy.ask(1) == skip).sum() == most
    assert len(PDarts(limited(toy_classifier_space()), seed=0).ask(1)) == 1  # nothing there is a skip


# Phases ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """As a kill, but in this process."""


class Run:
    """A training of three phases, of supernets of 1, 1 and 2 cells a stage, four steps an epoch."""

    def __init__(self, folder: Path | None = None) -> None:
        self.checkpoint = None if folder is None else folder / "checkpoint.pt"
        self.grown: list[Mapping[str, Any]] = []
        self.epochs: list[int] = []
        self.strategy = PDarts(limited(cells(2)), seed=0, grow={"cells": (1, 1)}, learning_rate=0.02)
        self.supernet = cells(2).supernet()

    def smaller(self, settings: Mapping[str, Any]) -> SearchSpace:
        self.grown.append(dict(settings))
        return cells(settings["cells"])

    def train(self, *, epochs: int = 3, steps: int = 1000, **more: Any) -> None:
        """Train, and be stopped after so many steps."""
        done: list[int] = []

        def progress(step: int, total: int, note: str = "") -> None:
            done.append(step)
            if step == 1:
                self.epochs.append(total // 4)
            if len(done) == steps:
                raise StoppedError

        settings = TrainSettings(
            epochs=epochs, batch_size=8, warmup_epochs=0, precision="fp32", memory_format="contiguous"
        )
        train_relaxed(
            self.supernet,
            self.strategy,
            small_data(64),
            load_task(TaskSettings()),
            settings,
            seed=0,
            checkpoint=self.checkpoint,
            progress=progress,
            **{"smaller": self.smaller, **more},
        )


def test_smaller_supernets_are_trained_first_and_the_given_one_last() -> None:
    run = Run()
    before = {name: tensor.clone() for name, tensor in run.supernet.state_dict().items()}
    with pytest.raises(StoppedError):
        run.train(steps=8)  # at the end of the second phase
    assert run.grown == [{"cells": 1}, {"cells": 1}]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.supernet.state_dict().items())
    assert [len(codes) for codes in left(run.strategy)] == [3] * 6
    run = Run()
    run.train()
    assert run.epochs == [1, 1, 1]
    assert [len(codes) for codes in left(run.strategy)] == [2] * 6
    assert any(not torch.equal(t, before[name]) for name, t in run.supernet.state_dict().items())


@pytest.mark.slow
def test_a_training_that_was_stopped_in_each_phase_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)
    whole = Run()
    whole.train()
    stopped = 0
    while True:
        run = Run(tmp_path)
        try:
            run.train(steps=3)
            break
        except StoppedError:
            stopped += 1
    # Two of the three steps of each run are in its checkpoint; eleven steps come before the last.
    assert stopped == 5
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "checkpoint-phase1.pt", "checkpoint-phase2.pt", "checkpoint.pt",
    }  # fmt: skip
    for ours, theirs in zip(whole.strategy.relaxation.logits, run.strategy.relaxation.logits, strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in whole.supernet.state_dict().items():
        assert torch.equal(tensor, run.supernet.state_dict()[name]), name
    assert left(whole.strategy) == left(run.strategy)
    assert whole.strategy.notes == run.strategy.notes
    np.testing.assert_array_equal(whole.strategy.ask(1), run.strategy.ask(1))


def test_phases_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(RecipeError, match="trains in 3 phases, which need as many epochs, got 2"):
        Run().train(epochs=2)
    with pytest.raises(RecipeError, match=r"trains a supernet with \{'cells': 1\} first, which nothing here"):
        Run().train(smaller=None)


def test_phases_have_their_shares_of_the_epochs_each_one_and_no_more_in_all() -> None:
    run = Run()
    run.strategy.phases = (Phase(0.45, {"cells": 1}), Phase(0.05, {"cells": 1}), Phase(0.5))
    run.train(epochs=5)
    assert run.epochs == [2, 1, 2]
