"""Losses and metrics against their formulas, and how they are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.errors import PluginError
from autocompress.recipe import TaskSettings
from autocompress.training.task import (
    accuracy,
    load_task,
    mean_squared_error,
    negative_mean_squared_error,
    pixel_accuracy,
    soft_cross_entropy,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Metrics -------------------------------------------------------------------------------------------------


def test_accuracy_is_one_where_the_largest_output_is_the_target() -> None:
    outputs = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.1, 0.2]])
    assert accuracy(outputs, torch.tensor([1, 1, 2])).tolist() == [1, 0, 1]


def test_pixel_accuracy_is_the_share_of_right_pixels_of_each_image() -> None:
    outputs = torch.zeros(2, 2, 2, 2)
    outputs[0, 1] = 1  # the first image is all class 1, the second all class 0
    targets = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 1]]])
    assert pixel_accuracy(outputs, targets).tolist() == [0.75, 0.0]


def test_negative_squared_error_is_one_number_a_sample_and_larger_is_better() -> None:
    outputs = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    targets = torch.tensor([[1.0, 4.0], [0.0, 0.0]])
    assert negative_mean_squared_error(outputs, targets).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_targets_of_a_regression_may_lack_the_axis_of_the_only_output(shape: tuple[int, ...]) -> None:
    outputs, targets = random(4, 1), random(*shape, seed=1)
    expected = ((outputs.flatten() - targets.flatten()) ** 2).mean()
    torch.testing.assert_close(mean_squared_error(outputs, targets), expected)
    torch.testing.assert_close(-negative_mean_squared_error(outputs, targets).mean(), expected)


def test_integer_targets_can_be_regressed() -> None:
    assert mean_squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 4])).item() == 2


# Losses --------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_is_that_of_the_teacher_s_probabilities() -> None:
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    outputs = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    expected = -(math.log(0.5) + 0.5 * math.log(0.9) + 0.5 * math.log(0.1)) / 2
    assert soft_cross_entropy(outputs, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_soft_cross_entropy_to_a_sure_teacher_is_cross_entropy() -> None:
    outputs, labels = random(5, 3), torch.tensor([0, 1, 2, 1, 0])
    sure = 1000.0 * F.one_hot(labels, 3)
    torch.testing.assert_close(soft_cross_entropy(outputs, sure), F.cross_entropy(outputs, labels))


@given(st.integers(1, 6))
def test_soft_cross_entropy_does_not_depend_on_the_batch_size(repeats: int) -> None:
    outputs, teacher = random(4, 3), random(4, 3, seed=1)
    whole = soft_cross_entropy(outputs.repeat(repeats, 1), teacher.repeat(repeats, 1))
    torch.testing.assert_close(whole, soft_cross_entropy(outputs, teacher))


def test_soft_cross_entropy_takes_maps_of_classes() -> None:
    outputs, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    rows = soft_cross_entropy(outputs.movedim(1, -1).reshape(-1, 3), teacher.movedim(1, -1).reshape(-1, 3))
    torch.testing.assert_close(soft_cross_entropy(outputs, teacher), rows)


def test_label_smoothing_mixes_in_the_mean_over_all_classes() -> None:
    # Szegedy et al., CVPR 2016, section 7: (1 - e) H(label, p) + e H(uniform, p).
    outputs, labels = random(5, 3), torch.tensor([0, 1, 2, 1, 0])
    logs = outputs.log_softmax(1)
    expected = 0.8 * -logs[range(5), labels].mean() + 0.2 * -logs.mean()
    task = load_task(TaskSettings())
    torch.testing.assert_close(task.training_loss(0.2)(outputs, labels), expected)
    torch.testing.assert_close(task.training_loss(0.0)(outputs, labels), F.cross_entropy(outputs, labels))


def test_label_smoothing_has_no_effect_on_other_losses() -> None:
    task = load_task(TaskSettings(loss="mse", distillation="mse", metric="negative_mse"))
    outputs, targets = random(4, 1), random(4, 1, seed=1)
    assert torch.equal(task.training_loss(0.3)(outputs, targets), task.loss(outputs, targets))


# Names ---------------------------------------------------------------------------------------------------


def test_names_resolve_to_functions() -> None:
    task = load_task(TaskSettings())
    assert (task.loss, task.distillation, task.score) == (F.cross_entropy, soft_cross_entropy, accuracy)
    assert task.metric == "accuracy"
    assert task.smoothed
    regression = load_task(TaskSettings(loss="mse", metric="negative_mse", distillation="mse"))
    assert (regression.loss, regression.score) == (mean_squared_error, negative_mean_squared_error)
    assert not regression.smoothed


def test_functions_of_the_user_are_named_by_module_and_attribute() -> None:
    task = load_task(
        TaskSettings(loss="torch.nn.functional:l1_loss", metric="torch.nn.functional:cosine_similarity")
    )
    assert task.loss is F.l1_loss
    assert task.metric == "cosine_similarity"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TaskSettings(loss="entropy"), "task.loss must be one of cross_entropy, mse or module:function"),
        (TaskSettings(metric="f1"), "task.metric must be one of accuracy, pixel_accuracy, negative_mse"),
        (TaskSettings(distillation="kl"), "task.distillation must be one of soft_cross_entropy, mse"),
        (TaskSettings(loss="no_such_module:f"), "task.loss 'no_such_module:f' cannot be imported"),
        (TaskSettings(metric="math:no_such"), "task.metric 'math:no_such' cannot be imported"),
        (TaskSettings(metric=":f"), "task.metric ':f' cannot be imported"),
        (TaskSettings(metric="math:"), "task.metric 'math:' cannot be imported"),
        (TaskSettings(loss=".near:f"), "task.loss '.near:f' cannot be imported"),
        (TaskSettings(loss="math:pi"), "task.loss 'math:pi' must be something to call, got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_resolved_is_an_error_that_says_what_can(settings: TaskSettings, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        load_task(settings)
    assert message in str(caught.value)
