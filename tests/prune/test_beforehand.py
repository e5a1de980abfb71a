"""What is known of a model on its data before anything takes long."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.errors import ConversionError
from autocompress.prune.beforehand import check_trainable, describe_score, report_of, score_of
from autocompress.prune.source import Source
from autocompress.recipe import TaskSettings
from autocompress.training.data import DataSet, load_data
from autocompress.training.evaluate import Scored
from autocompress.training.task import load_task
from search_spaces.channels import channel_space

TASK = load_task(TaskSettings())


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load_data("digits", limit=200)


class InPlace(nn.Module):
    """What autograd needs is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).sigmoid()
        y.mul_(2)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def test_a_model_that_autograd_refuses_is_refused(data: DataSet) -> None:
    with pytest.raises(
        ConversionError, match=r"takes no gradients through it \(one of the variables.*in\n? ?place"
    ):
        check_trainable(InPlace(), (8, 8), data, TASK)


def test_the_model_is_left_as_it_was(data: DataSet) -> None:
    model = plain().eval()
    space = channel_space(Source(model, torch.zeros(1, 1, 8, 8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert report_of(space, data, TASK, trained=False) == []
    (said, warning) = report_of(space, data, TASK, trained=True)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert said.startswith("as you brought it: validation accuracy 0.")
    assert "on images of 8 x 8, values / 255, less the mean " in said
    assert "hardly better than guessing (0.1000)" in warning
    # By the statistics that the model has, not by those of the batch that gradients were taken of.
    assert f"{score_of(model, (8, 8), data, TASK).mean:.4f}" in said


@pytest.mark.parametrize(("mean", "warned"), [(0.10, True), (0.13, True), (0.17, False), (0.9, False)])
def test_scores_like_those_of_guessing_are_warned_of(data: DataSet, mean: float, warned: bool) -> None:
    lines = describe_score(Scored(mean=mean, standard_error=0.015, count=400), (8, 8), data, TASK)
    assert (len(lines) == 2) == warned


def test_outputs_that_stand_for_no_class_are_warned_of(data: DataSet) -> None:
    model = plain()
    model[4] = nn.Linear(4, 1000)
    (warning,) = report_of(channel_space(Source(model, torch.zeros(1, 1, 8, 8))), data, TASK, trained=False)
    assert warning.startswith("WARNING: it has 1000 outputs for 10 classes")


def test_damaged_variances_are_refused() -> None:
    model = plain()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    norm.running_var[2] = -1
    with pytest.raises(
        ConversionError, match=r"1\.running_var of Sequential holds -1: a variance is never negative"
    ):
        Source(model, torch.zeros(1, 1, 8, 8))


def test_weights_that_layers_share_are_extracted_once(tmp_path: Path) -> None:
    """Tied weights stay tied in the supernet, in what is copied out of it, and in files."""
    from autocompress.elastic.extract import extract
    from autocompress.elastic.recalibrate import recalibrate

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
            self.two.weight = self.one.weight
            self.fc = nn.Linear(6, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.two(self.one(self.first(x)).relu()).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    space = channel_space(Source(Tied(), torch.zeros(1, 1, 8, 8)), steps=2)
    supernet = space.supernet().eval()
    images = torch.randn(3, 1, 8, 8)
    for arch in space.decode(space.sample(4, np.random.default_rng(0))):
        statistics = recalibrate(supernet, arch, [images])
        network = extract(supernet, arch, statistics)
        with torch.no_grad():
            assert torch.equal(network(images), supernet(images, arch, statistics=statistics))
        one, two = (network.get_parameter(f"network.0.{name}.weight") for name in ("one", "two"))
        assert one is two
