"""A task that does not fit its data is refused before anything takes long."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_networks import small_data
from torch import Tensor

from autocompress.errors import DataError, RecipeError
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.check import check_outputs, check_regularisers, check_task
from autocompress.training.data import DataSet
from autocompress.training.task import Task, load_task

CLASSES = load_task(TaskSettings())
NUMBERS = load_task(TaskSettings(loss="mse", metric="negative_mse", distillation="mse"))


def data(labels: Any = None) -> DataSet:
    return small_data(32) if labels is None else small_data(32, labels=labels)


def test_what_fits_is_accepted_and_the_test_part_is_not_read() -> None:
    check_outputs(data(), CLASSES, (3,))
    check_outputs(data(lambda classes: classes.float()), NUMBERS, (1,))


def test_the_outputs_are_those_of_the_networks_of_a_space() -> None:
    check_task(data(), CLASSES, toy_classifier_space())
    with pytest.raises(DataError, match=r"task.loss .* outputs torch.float32 \(8, 3\)"):
        check_task(data(lambda classes: classes.float()), CLASSES, toy_classifier_space())


def test_another_number_of_channels_is_refused() -> None:
    grey = replace(data(), in_shape=(1, 12, 12))
    with pytest.raises(DataError, match="take 3 channels, the images of small have 1"):
        check_task(grey, CLASSES, toy_classifier_space())


def test_regularisers_that_have_no_place_in_a_space_are_refused() -> None:
    space = toy_classifier_space()
    check_regularisers(data(), FinetuneSettings(cutout=4, auxiliary=0.4), space)
    with pytest.raises(RecipeError, match=r"finetune.drop_path \(0.2\) drops paths of cells"):
        check_regularisers(data(), FinetuneSettings(drop_path=0.2), space)
    with pytest.raises(RecipeError, match="labels that are classes"):
        check_regularisers(replace(data(), classes=0), FinetuneSettings(auxiliary=0.4), space)


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_and_targets_that_are_not_finite_are_refused(part: str, value: float) -> None:
    whole = data(lambda classes: classes.float())
    items = [getattr(whole, part)[i] for i in range(4)]
    name = {"train": "training"}.get(part, part)
    broken = [(torch.full_like(x, value), y) for x, y in items]
    with pytest.raises(DataError, match=f"inputs of the {name} part hold nan or infinity; clean "):
        check_outputs(replace(whole, **{part: broken}), NUMBERS, (1,))
    broken = [(x, torch.full_like(torch.as_tensor(y), value)) for x, y in items]
    with pytest.raises(DataError, match=f"targets of the {name} part hold nan or infinity"):
        check_outputs(replace(whole, **{part: broken}), NUMBERS, (1,))


def test_float_targets_for_cross_entropy_are_refused_with_both_shapes() -> None:
    whole = data(lambda classes: classes.float())
    message = (
        r"task.loss \(cross_entropy\) was given outputs torch.float32 \(8, 3\) and targets torch.float32 "
        r"\(8,\) of the training part and failed: "
    )
    with pytest.raises(DataError, match=message):
        check_outputs(whole, CLASSES, (3,))


def mean_of_a_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros(len(outputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loss": mean_of_a_sample},
            r"task.loss \(mean_of_a_sample\) .* must return a tensor \(\), .* got \(8,\)",
        ),
        ({"distillation": mean_of_a_sample}, r"task.distillation .* must return a tensor \(\)"),
        (
            {"score": CLASSES.loss},
            r"task.metric .* must return a tensor \(8,\), one number a sample.* got \(\)",
        ),
        ({"loss": lambda outputs, targets: 1.0}, "task.loss .* got float"),
        ({"score": lambda outputs, targets: outputs / 0 + [1]}, "task.metric .* and failed: "),
    ],
)
def test_functions_that_do_not_return_what_they_should_are_refused(change: Any, message: str) -> None:
    task: Task = replace(CLASSES, **change)
    with pytest.raises(DataError, match=message):
        check_outputs(data(), task, (3,))
