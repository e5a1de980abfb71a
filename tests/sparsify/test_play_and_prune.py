"""Play and Prune: the controller in closed form, and the tolerance that always holds."""

import itertools
from typing import Any

import pytest
import torch
from sparsify.works import DATA, TASK, small, trained, training, work_on
from torch import nn

from autocompress.errors import RecipeError
from autocompress.sparse.play_and_prune import PlayAndPruneOptions, controlled, play_and_prune
from autocompress.sparse.units import dead
from autocompress.training.evaluate import Scored, evaluate


@pytest.fixture(scope="module")
def good() -> nn.Module:
    """A network that has learned."""
    found = trained("slimming", options={"strength": 1e-9}, settings=training(epochs=12, learning_rate=0.2))
    assert found.after.mean > 0.9
    return found.network


@pytest.mark.parametrize(
    ("accuracy", "points"), [(0.9, 2.0), (0.905, 2.5), (0.89, 1.0), (0.88, 0.0), (0.5, 0.0), (1.0, 12.0)]
)
def test_penalty_and_threshold_are_proportional_to_what_is_left_of_the_tolerance(
    accuracy: float, points: float
) -> None:
    options = PlayAndPruneOptions(tolerance=2.0, strength=0.3, threshold=0.7)
    assert controlled(accuracy, 0.9, options) == pytest.approx((0.3 * points, 0.7 * points), abs=1e-9)


def played(accuracies: list[float], **options: Any) -> tuple[Any, Any, list[set[int]]]:
    """Epochs in which accuracy is as given, whatever the weights are; and what was dead after each."""
    left = iter(accuracies)
    work = work_on(
        small(), score=lambda: Scored(next(left), 0.0, 100), settings=training(epochs=len(accuracies))
    )
    hooks = play_and_prune(work, PlayAndPruneOptions(**options))
    work.state["before"] = {"mean": 0.9}
    hooks.begin()
    gone = []
    for epoch in range(len(accuracies)):
        if work.state.get("ended"):
            break
        hooks.begin_epoch(epoch)
        for parameter in work.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        hooks.gradients()
        generator = torch.Generator().manual_seed(epoch)
        with torch.no_grad():
            for parameter in work.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        hooks.after_step(0.1)
        assert dead(work) == set(work.state["gone"].tolist())  # none has come back by the step
        hooks.end_epoch(epoch)
        gone.append(dead(work))
    return work, hooks, gone


def test_pruned_units_never_revive_and_every_layer_loses_its_share() -> None:
    work, _, gone = played([0.9] * 5, alpha=20, threshold=2.0)
    assert all(before < after for before, after in itertools.pairwise(gone))
    # 20 % of 8, of 10 and of 6, rounded down, at least one: 1 + 2 + 1, then of what is left.
    assert [len(each) for each in gone] == [4, 7, 10, 13, 16]
    assert set(work.state["gone"].tolist()) == gone[-1]


def test_below_the_tolerance_nothing_is_penalised_or_pruned_until_it_is_regained() -> None:
    work, hooks, gone = played([0.9, 0.85, 0.88, 0.895, 0.9], tolerance=1.0, threshold=2.0)
    counts = [len(each) for each in gone]
    assert counts[1] == counts[2] == counts[3]  # epochs 3 and 4 only recover
    assert counts[0] < counts[1] < counts[4]
    hooks.finish()
    assert (work.state["kept"]["epoch"], work.state["kept"]["gone"]) == (5, counts[4])


def test_it_ends_when_the_tolerance_is_not_regained_and_rolls_the_last_step_back() -> None:
    work, hooks, gone = played([0.9, 0.895, 0.5, 0.6, 0.7, 0.9], tolerance=1.0, threshold=2.0, patience=3)
    assert len(gone) == 5
    assert work.state["ended"]
    hooks.finish()
    assert dead(work) == gone[1] < gone[2]
    (note,) = hooks.account()["notes"]
    assert note.startswith(f"{len(gone[4])} units were pruned, and accuracy did not come back: rolled back")
    assert [row["accuracy"] for row in hooks.account()["history"]] == [0.9, 0.895, 0.5, 0.6, 0.7]


def test_if_nothing_is_within_the_tolerance_the_weights_come_back_as_they_were() -> None:
    work, hooks, _ = played([0.1, 0.1, 0.1, 0.1], threshold=2.0)
    assert dead(work)
    hooks.finish()
    for name, tensor in small().state_dict().items():
        assert torch.equal(work.network.state_dict()[name], tensor)
    (note,) = hooks.account()["notes"]
    assert note == "nothing could be pruned within 1 points: these are the weights of before the training"


def test_only_small_candidates_are_pruned_and_only_candidates_penalised() -> None:
    work = work_on(small())
    weight = work.network.get_parameter("conv3.weight")
    with torch.no_grad():
        weight.copy_(torch.sign(weight) * 0.1)
        weight[4] *= 0.55
        weight[7] *= 0.45
    hooks = play_and_prune(work, PlayAndPruneOptions(alpha=20, threshold=0.5, tolerance=1.0, strength=0.25))
    work.state["before"] = {"mean": 0.9}
    hooks.begin()
    hooks.begin_epoch(0)
    weight.grad = torch.zeros_like(weight)
    hooks.gradients()
    expected = torch.zeros_like(weight)
    expected[[4, 7]] = 0.25 * torch.sign(weight.detach()[[4, 7]])
    assert torch.equal(weight.grad, expected)
    hooks.end_epoch(0)
    # The mean of the ten is 0.9 of the others: half of it lies between the two.
    assert (weight.flatten(1) == 0).all(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("tolerance", [0.0, 5.0, 30.0])
def test_what_comes_back_is_within_the_tolerance_on_the_validation_part(
    good: nn.Module, tolerance: float
) -> None:
    before = evaluate(good, DATA.validation, TASK.score).mean
    found = trained(
        "play-and-prune",
        good,
        options={"tolerance": tolerance, "alpha": 30},
        settings=training(epochs=6, learning_rate=0.02),
    )
    assert found.before.mean == before
    again = evaluate(found.network, DATA.validation, TASK.score).mean
    assert again == found.after.mean
    assert again >= before - tolerance / 100 - 1e-9
    if tolerance == 30.0:
        assert sum(group["zero"] for group in found.account["groups"]) >= 6


def test_accuracy_has_to_be_a_share() -> None:
    work = work_on(small())
    hooks = play_and_prune(work, PlayAndPruneOptions())
    work.state["before"] = {"mean": -3.2}
    with pytest.raises(RecipeError, match=r"needs a metric between 0 and 1, such as accuracy, got -3\.2"):
        hooks.begin()
