"""Signs of a collapse: eigenvalues, skips, the rules that stop a search, and limits on skips."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import small_data
from torch import Tensor

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.errors import BudgetError, RecipeError
from autocompress.recipe import TaskSettings, TrainSettings
from autocompress.space import Block, Choice, SearchSpace
from autocompress.testing.toys import every_network, toy_classifier_space
from autocompress.training.bilevel import train_relaxed
from autocompress.training.task import load_task
from search_spaces.darts import darts
from search_spaces.nas_bench_201 import nas_bench_201
from strategies.collapse import WINDOW, Watch, dominant_eigenvalue, skip_costs
from strategies.darts import Darts
from strategies.relaxed import RelaxedSearch

SKIP = "skip_connect"
OPERATIONS = ("none", SKIP, "nor_conv_1x1", "nor_conv_3x3")
CELLS = nas_bench_201(channels=4, cells=1, operations=OPERATIONS, classes=3, resolution=12)


def nodes(*operations: str) -> SearchSpace:
    return darts(channels=2, layers=3, operations=operations, resolution=4, classes=3)


def limited(space: SearchSpace, budget: str = "macs=100%") -> Constraints:
    return Budget.parse(budget).resolve(space, [operation_cost(space, "macs")])


# The dominant eigenvalue -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [(5.0, -2.0, 1.0, 0.5, 0.1), (-5.0, 2.0, 1.0, 0.5, 0.1), (3.0, 0, 0, 0, 0)]
)
def test_the_eigenvalue_of_a_quadratic_form_is_found_with_its_sign(values: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))
    hessian = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    parameters = [
        torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True) for size in (2, 3)
    ]

    def loss() -> Tensor:
        flat = torch.cat(parameters)
        return flat @ hessian @ flat / 2 + flat.sum()

    before = [vector.detach().clone() for vector in parameters]
    assert dominant_eigenvalue(loss, parameters) == pytest.approx(values[0], rel=0.02)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    assert all(vector.grad is None for vector in parameters)


def test_a_linear_loss_has_no_curvature() -> None:
    vector = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert dominant_eigenvalue(lambda: 2 * vector.sum(), [vector]) == 0.0


def test_parameters_are_put_back_also_when_the_loss_fails() -> None:
    vector = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        dominant_eigenvalue(loss, [vector])
    assert vector.tolist() == [1.0, 1.0, 1.0]


# Skips -----------------------------------------------------------------------------------------------------


def test_skips_are_counted_by_kind_of_cell() -> None:
    (cost,) = skip_costs(CELLS)
    rows = every_network(CELLS)
    np.testing.assert_array_equal(cost.of(rows), (rows == OPERATIONS.index(SKIP)).sum(axis=1))
    space = nodes("none", "max_pool_3x3", SKIP, "sep_conv_3x3")
    rows = space.sample(50, np.random.default_rng(0))
    normal, reduce = skip_costs(space)
    for kind, cost in (("normal", normal), ("reduce", reduce)):
        counts = [
            sum(str(option).count(SKIP) for name, option in arch.settings if name.startswith(kind))
            for arch in space.decode(rows)
        ]
        assert cost.of(rows).tolist() == counts
    assert len(set(normal.of(rows).tolist())) > 3
    assert skip_costs(toy_classifier_space()) == []
    assert skip_costs(nodes("none", "max_pool_3x3")) == []


def test_every_kind_of_cell_has_a_limit_of_its_own() -> None:
    operations = CELLS.blocks[1].operations
    names = [tuple(f"{kind}{edge}" for edge in range(6)) for kind in "ab"]
    space = SearchSpace(
        "two kinds",
        tuple(Choice(name, OPERATIONS, ordinal=False) for kind in names for name in kind),
        tuple(Block(f"cell{at}", kind, operations) for at, kind in enumerate(names)),
    )
    first, second = skip_costs(space)
    assert first.metric != second.metric


# Rules -----------------------------------------------------------------------------------------------------


def watched(watch: Watch, seen: list[dict[str, Any]], *, still: int = 0) -> float:
    """Return the parameter at the end: that of an epoch is its number."""
    parameter = torch.zeros(1, dtype=torch.float64)
    for entry in seen:
        epoch = len(watch.history) + 1
        if watch.stopped is None:
            parameter.fill_(epoch)
            watch.add(entry, [parameter], moving=epoch > still)
    return float(parameter)


def eigenvalues(*values: float) -> list[dict[str, Any]]:
    return [{"eigenvalue": value} for value in values]


@pytest.mark.parametrize(
    ("values", "stopped"),
    [
        ([1.0] * 5 + [1.32] * 5, None),  # 1 / 1.32 = 0.758
        ([1.0] * 5 + [1.35] * 5, 5),  # 1 / 1.35 = 0.741
        ([1.0] * 5 + [-1.35] * 5, 5),
        ([1.0] * 5 + [9.0] * 4, None),  # the two windows are not full
        ([1.0] * 7 + [1.35] * 5, 7),
        ([2.0] * 6 + [1.0] * 6, None),
        # Means of five: 1, 1, 1, 1.2, 1.4 against ones.
        ([1.0] * 5 + [1.0, 1.0, 1.0, 2.0, 2.0], 5),  # 1 / 1.4
    ],
)
def test_a_search_goes_back_five_epochs_once_the_eigenvalue_has_risen(
    values: list[float], stopped: int | None
) -> None:
    assert WINDOW == 5
    watch = Watch("eigenvalue", None)
    assert watched(watch, eigenvalues(*values)) == (stopped or len(values))
    assert watch.stopped == stopped
    assert [seen["epoch"] for seen in watch.history] == list(range(1, len(watch.history) + 1))
    other = Watch("none", None)
    watched(other, eigenvalues(*values))
    assert other.stopped is None


def test_eigenvalues_of_the_warm_up_stop_nothing() -> None:
    values = [1.0] * 6 + [9.0] * 10
    watch = Watch("eigenvalue", None)
    watched(watch, eigenvalues(*values), still=6)
    assert watch.stopped is None
    watched(watch, eigenvalues(*[20.0] * 5), still=6)
    assert watch.stopped is not None
    assert watch.stopped > 6


@pytest.mark.parametrize(
    ("skips", "stopped"),
    [
        ([[1], [2], [3]], 2),
        ([[3], [4], [5]], None),
        ([[3], [2], [4]], 2),
        ([[0, 2], [0, 3]], 1),
        ([[0, 0], [2, 2]], None),
    ],
)
def test_a_search_goes_back_to_the_last_epoch_with_few_skips(
    skips: list[list[int]], stopped: int | None
) -> None:
    watch = Watch("skips", 2)
    last = watched(watch, [{"skips": counts} for counts in skips])
    assert watch.stopped == stopped
    assert last == (stopped or len(skips))


def test_what_was_watched_survives_a_file() -> None:
    values = eigenvalues(*[9.0] * 2, *[1.0] * 5, *[1.35] * 5)
    for at in range(len(values)):
        watch, twin = Watch("eigenvalue", None), Watch("eigenvalue", None)
        watched(watch, values[:at], still=2)
        file = io.BytesIO()
        torch.save(watch.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
        assert watched(twin, values[at:], still=2) == 7
        assert twin.stopped == 7
        assert len(watch.history) == at


@pytest.mark.parametrize("stops", [(), (2, 6, 7, 11)])
def test_a_search_that_stopped_keeps_its_parameters_to_the_end(
    stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.collapse.WINDOW", 1)
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)

    def seen(self: RelaxedSearch, network: Any, held_out: Any) -> dict[str, Any]:
        return {"entropy": 0.5, "eigenvalue": 1.0 if len(self._watch.history) < 2 else 2.0}

    monkeypatch.setattr(RelaxedSearch, "_seen", seen)
    logits: dict[int, list[Tensor]] = {}

    def train(stop: int = 0) -> Darts:
        strategy = Darts(limited(CELLS), seed=0, early_stopping="eigenvalue", learning_rate=0.02)

        def progress(done: int, total: int, note: str = "") -> None:
            logits[done] = [vector.detach().clone() for vector in strategy.relaxation.logits]
            if done == stop:
                raise InterruptedError

        settings = TrainSettings(
            epochs=4, batch_size=8, warmup_epochs=0, precision="fp32", memory_format="contiguous"
        )
        train_relaxed(
            CELLS.supernet(),
            strategy,
            small_data(48),
            load_task(TaskSettings()),
            settings,
            seed=0,
            checkpoint=tmp_path / "checkpoint.pt",
            progress=progress,
        )
        return strategy

    for stop in stops:
        with pytest.raises(InterruptedError):
            train(stop)
    strategy = train()
    notes = strategy.notes["relaxation"]
    assert (notes["stopped"], len(notes["epochs"])) == (2, 3)
    # Three steps an epoch: stopped at the end of the third, with those of the second.
    assert not torch.equal(logits[6][0], logits[8][0])
    for vectors in (logits[9], logits[12], list(strategy.relaxation.logits)):
        assert all(torch.equal(one, other) for one, other in zip(vectors, logits[6], strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": "soon"}, "early_stopping must be one of none, eigenvalue, skips, got 'soon'"),
        ({"early_stopping": "skips"}, "stops where there are more than max_skips: give max_skips"),
        (
            {"early_stopping": "eigenvalue", "eigenvalue": False},
            "needs the eigenvalue, which is switched off",
        ),
        ({"max_skips": -1}, "max_skips must be an integer >= 0, or left out, got -1"),
        ({"max_skips": 1.5}, r"max_skips must be an integer >= 0, or left out, got 1\.5"),
        ({"max_skips": True}, "max_skips must be an integer >= 0, or left out, got True"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Darts(limited(CELLS), seed=0, **options)


# Limits on skips -------------------------------------------------------------------------------------------


def favour(strategy: RelaxedSearch, scale: float = 3.0) -> None:
    """Make skips by far the most probable."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, vector in zip(strategy.relaxation.relaxed, strategy.relaxation.logits, strict=True):
            vector.copy_(torch.rand(len(vector), generator=generator, dtype=vector.dtype))
            vector[strategy.relaxation.space.variables[name].options.index(SKIP)] += scale


@pytest.mark.parametrize("most", [0, 1, 3, 6])
@pytest.mark.parametrize("budget", ["macs=100%", "macs=45%"])
def test_derived_networks_have_at_most_so_many_skips(most: int, budget: str) -> None:
    constraints = limited(CELLS, budget)
    strategy = Darts(constraints, seed=0, max_skips=most, at_least=0.0, candidates=5)
    favour(strategy)
    rows = every_network(CELLS)
    few = (rows == OPERATIONS.index(SKIP)).sum(axis=1) <= most
    few &= [strategy.relaxation.space.connected(row[None]) for row in rows]
    logs = [p.detach().log().numpy() for p in strategy.relaxation.probabilities().values()]
    values = sum(log[rows[:, at]] for at, log in enumerate(logs))
    order = np.argsort(-np.where(few & constraints.feasible(rows), values, -np.inf))
    np.testing.assert_array_equal(strategy.ask(5), rows[order[:5]])


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("budget", ["macs=100%", "macs=90%"])
def test_the_integer_program_keeps_the_limit_on_skips_too(most: int, budget: str) -> None:
    space = nodes("none", "max_pool_3x3", SKIP, "sep_conv_3x3")
    constraints = limited(space, budget)
    strategy = Darts(constraints, seed=0, max_skips=most, candidates=2, at_least=0.0)
    favour(strategy)
    rows = strategy.ask(2)
    assert constraints.feasible(rows).all()
    # Skips are the most probable: as many are taken as may be.
    for cost in skip_costs(space):
        assert cost.of(rows).max() == most
        assert cost.of(strategy.relaxation.most_probable(strategy.weights()))[0] == 8


def test_limits_on_skips_that_nothing_keeps_are_refused() -> None:
    with pytest.raises(BudgetError, match="nothing fits the budget with"):
        Darts(limited(nodes("none", SKIP)), seed=0, max_skips=0)
    with pytest.raises(BudgetError, match="at most 0 skip connections in each kind of cell"):
        Darts(limited(nodes("none", SKIP, "sep_conv_3x3"), "macs=60%"), seed=0, max_skips=0)
    with pytest.raises(RecipeError, match="max_skips counts options 'skip_connect' of cells, of which"):
        Darts(limited(toy_classifier_space()), seed=0, max_skips=1)
