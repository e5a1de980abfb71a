"""Scores after distillation: those of `finetune` called by hand, and nothing that is given is changed."""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from small_networks import assert_equal, shaken, small_data, small_network, weights

from autocompress.distill.finetune import finetune
from autocompress.distributed import shared
from autocompress.elastic.extract import extract, inherited
from autocompress.elastic.recalibrate import recalibrate
from autocompress.errors import EvaluationError, RecipeError
from autocompress.evaluation.distilled import DistilledEvaluator
from autocompress.evaluator import evaluated
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.data import Images
from autocompress.training.evaluate import calibration_batches
from autocompress.training.task import load_task

SPACE = toy_classifier_space()
CODES = SPACE.sample(3, np.random.default_rng(0))
DATA, TASK = small_data(), load_task(TaskSettings())
ERROR = "accuracy_error"


def settings(**changes: Any) -> FinetuneSettings:
    """High learning rates: one epoch of four steps shall be seen in the scores of 16 images."""
    plain: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 0.5, "temperature": 2.0}
    return FinetuneSettings(**plain, precision="fp32", memory_format="contiguous", **changes)


def judge(**changes: Any) -> DistilledEvaluator:
    """A new evaluator, of new weights that are the same."""
    given: dict[str, Any] = {
        "settings": settings(),
        "teacher": small_network().eval(),
        "teacher_resolution": (10, 10),
    }
    return DistilledEvaluator(shaken(SPACE), DATA, TASK, calibration_batches(DATA, 32), **(given | changes))


def soft(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A score that says more than whether an image is right."""
    return outputs.softmax(1).gather(1, targets[:, None])[:, 0]


SOFT = replace(TASK, score=soft)


def soft_judge(**changes: Any) -> DistilledEvaluator:
    return replace(judge(**changes), task=SOFT)


def test_a_score_is_that_of_finetuning_by_hand() -> None:
    found = soft_judge()(CODES)
    assert set(found) == {"accuracy", ERROR}
    supernet = shaken(SPACE)
    for row, arch in enumerate(SPACE.decode(CODES)):
        network = extract(supernet, arch, recalibrate(supernet, arch, calibration_batches(DATA, 32)))
        side = int(arch["resolution"])
        by_hand = finetune(
            network,
            DATA,
            SOFT,
            settings(),
            resolution=(side, side),
            teacher=small_network(),
            teacher_resolution=(10, 10),
            keep_best=False,
        )
        assert (found["accuracy"][row], found[ERROR][row]) == (by_hand.mean, by_hand.standard_error)
        assert by_hand.epoch == 2


def test_scores_are_a_function_of_each_row_alone() -> None:
    evaluator = soft_judge()
    together = evaluator(CODES)["accuracy"]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    backwards = [evaluator(CODES[[row]])["accuracy"][0] for row in reversed(range(len(CODES)))]
    assert torch.equal(torch.get_rng_state(), before)
    assert backwards[::-1] == together.tolist()
    assert soft_judge()(CODES)["accuracy"].tolist() == together.tolist()
    assert len(set(together.tolist())) == len(CODES)


def test_supernet_teacher_and_data_stay_bit_for_bit() -> None:
    last = settings(distill="kd+at").model_copy(update={"memory_format": "channels_last"})
    evaluator = judge(settings=last)
    teacher = evaluator.teacher
    assert teacher is not None
    images = cast(Images, DATA.train).images
    before = weights(evaluator.supernet), weights(teacher), images.clone()
    evaluator(CODES)
    assert_equal(before[0], weights(evaluator.supernet))
    assert_equal(before[1], weights(teacher))
    assert torch.equal(before[2], images)
    assert not evaluator.supernet.training
    assert not any(module._forward_hooks for module in teacher.modules())
    assert next(teacher.parameters()).is_contiguous()


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": settings(alpha=0.1)},
        {"settings": settings(distill="kd+sp")},
        {"settings": settings(seed=1)},
        {"settings": settings().model_copy(update={"epochs": 1})},
        {"teacher": small_network(seed=3).eval()},
    ],
)
def test_what_is_distilled_and_how_long_changes_scores_and_identity(changes: dict[str, Any]) -> None:
    plain, other = soft_judge(), soft_judge(**changes)
    assert plain.identity != other.identity
    assert plain.identity == soft_judge().identity
    assert (plain(CODES[:1])["accuracy"] != other(CODES[:1])["accuracy"]).all()


def test_without_distillation_no_teacher_is_needed() -> None:
    alone = soft_judge(settings=settings(distill="none"), teacher=None, teacher_resolution=None)
    beside = soft_judge(settings=settings(distill="none"))
    assert alone(CODES[:1])["accuracy"] == beside(CODES[:1])["accuracy"]
    assert alone(CODES[:1])["accuracy"] != soft_judge()(CODES[:1])["accuracy"]


def test_the_score_is_of_the_last_epoch_even_if_it_was_better_before() -> None:
    """Finetuning would keep the weights before it; a score that learning lowers."""

    def wrong(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 1 - soft(outputs, targets)

    task = replace(TASK, score=wrong)
    longer = settings().model_copy(update={"epochs": 6})
    found = replace(judge(settings=longer), task=task)(CODES[:1])["accuracy"]
    evaluator = judge()
    (arch,) = SPACE.decode(CODES[:1])
    network = inherited(evaluator.supernet, arch, evaluator.calibration)
    side = int(arch["resolution"])
    kept = finetune(
        network, DATA, task, longer, resolution=(side, side), teacher=evaluator.teacher,
        teacher_resolution=(10, 10),
    )  # fmt: skip
    assert kept.epoch == 0
    assert found < kept.mean


def test_an_evaluator_in_memory_of_others_writes_nothing_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's workers have it; every tensor is there, small ones too."""
    monkeypatch.setattr(shared, "SMALL_BYTES", 1)
    evaluator = judge()
    content, buffers = shared.packed(evaluator)
    assert len(buffers) > 20
    before, copies = ([np.array(buffer) for buffer in buffers] for _ in range(2))
    found = shared.unpacked(content, copies)
    assert {k: v.tolist() for k, v in found(CODES).items()} == {
        k: v.tolist() for k, v in evaluator(CODES).items()
    }
    for one, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(one, copy)


def test_a_score_that_is_not_finite_is_of_this_network_only() -> None:
    def broken(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return soft(outputs, targets) * torch.nan

    with pytest.raises(EvaluationError, match="of 16 held-out samples is not finite"):
        replace(judge(), task=replace(TASK, score=broken))(CODES[:1])


def test_a_training_that_collapses_is_of_this_network_only() -> None:
    hopeless = settings().model_copy(update={"learning_rate": 1e38, "warmup_epochs": 0.0})
    found = evaluated(judge(settings=hopeless), CODES[:1])
    assert isinstance(found, EvaluationError)
    assert "cannot be distilled: training collapsed" in str(found)


@pytest.mark.parametrize("name", ["precision", "memory_format"])
def test_formats_that_timing_would_choose_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} of the training .* must be named"):
        judge(settings=settings().model_copy(update={name: "auto"}))
