"""Sparse training as a whole: resumed bit for bit, the user's model untouched, bad models refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import assert_equal
from sparsify.works import DATA, TASK, small, trained, training
from torch import nn

from autocompress.errors import CheckpointError, ConversionError, RecipeError
from autocompress.sparse.methods import METHODS
from autocompress.training import loop
from autocompress.training.evaluate import evaluate
from autocompress.training.statistics import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, dict[str, Any]] = {
    "slimming": {"strength": 0.02},
    "magnitude": {"sparsity": 0.8, "rounds": 2},
    "soft": {"rate": 0.3},
    "play-and-prune": {"tolerance": 60.0, "alpha": 30},
    "structure": {"strength": 4.0},
}


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


@pytest.mark.parametrize("method", list(METHODS))
def test_a_resumed_training_equals_an_undisturbed_one_and_the_model_is_not_changed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    whole = trained(method, model, options=OPTIONS[method])
    assert_equal(model.state_dict(), before)
    assert model.training
    assert any(not torch.equal(whole.network.state_dict()[name], before[name]) for name in before)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after each step
    checkpoint = tmp_path / "checkpoint.pt"
    for last in (3, 4, 6, 11):  # inside an epoch, at the end of one, inside again, at the last but one step

        def killing(done: int, total: int, note: str = "", last: int = last) -> None:
            if done == last:
                raise KilledError

        with pytest.raises(KilledError):
            trained(method, small(), options=OPTIONS[method], checkpoint=checkpoint, progress=killing)
    resumed = trained(method, small(), options=OPTIONS[method], checkpoint=checkpoint)
    assert_equal(resumed.network.state_dict(), whole.network.state_dict())
    assert resumed.account == whole.account
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    # Complete as it is, it says the same again.
    again = trained(method, small(), options=OPTIONS[method], checkpoint=checkpoint)
    assert_equal(again.network.state_dict(), whole.network.state_dict())


def test_a_checkpoint_of_other_weights_or_options_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    trained("soft", checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="belongs to another run: its weights is"):
        trained("soft", small(seed=1), checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"another run: its options.rate is 0.3, here 0.5"):
        trained("soft", options={"rate": 0.5}, checkpoint=checkpoint)


def test_the_report_counts_the_zeros_of_every_weight() -> None:
    found = trained("soft", options={"rate": 0.3})
    for layer in found.account["layers"]:
        weight = found.network.get_parameter(layer["name"])
        assert (layer["weights"], layer["zeros"]) == (weight.numel(), int((weight == 0).sum()))
    assert found.account["zeros"] == sum(layer["zeros"] for layer in found.account["layers"]) > 0


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = torch.nan
    for method in METHODS:
        with pytest.raises(ConversionError, match=r"conv2.weight of Small holds nan or infinity"):
            trained(method, model)


def test_a_model_that_does_not_take_the_images_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"Conv2d does not run on an image \(3, 12, 12\) of the data"):
        trained("magnitude", nn.Conv2d(1, 3, 3))


def test_a_model_without_batch_norm_can_be_pruned_by_magnitude_and_softly_only() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    with pytest.raises(ConversionError, match="method 'slimming' trains scales of batch norm"):
        trained("slimming", plain)
    with pytest.raises(ConversionError, match="methods without batch norm are soft, play-and-prune and mag"):
        trained("structure", plain)
    assert trained("soft", plain).account["groups"] == [{"name": "0", "units": 8, "zero": 2}]
    assert trained("magnitude", plain).account["zeros"] > 0


def test_single_weights_go_also_where_channels_cannot_be_followed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.fc((x if float(x.detach().sum()) > 0 else -x).mean((2, 3)))

    with pytest.raises(ConversionError, match="Branching cannot be traced"):
        trained("soft", Branching())
    found = trained("magnitude", Branching(), options={"sparsity": 0.5})
    assert found.account["zeros"] == (3 * 8 * 9 + 8 * 3) / 2


def test_the_user_may_name_layers_that_are_left_alone() -> None:
    found = trained("soft", ignore=("conv4", "conv1"))
    assert [group["name"] for group in found.account["groups"]] == ["conv3"]
    with pytest.raises(ConversionError, match="ignore has 'head', which is no layer"):
        trained("soft", ignore=("head",))


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(RecipeError, match="takes strength, not 'rate'"):
        trained("slimming", options={"rate": 0.5})


def test_statistics_are_the_plain_means_over_the_batches() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=0.3))
    first = network[0]
    first.momentum, first.num_batches_tracked = 0.1, torch.tensor(17)
    batches = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    recalibrate(network, batches)
    torch.testing.assert_close(first.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches])
    torch.testing.assert_close(first.running_var, variances.mean(0))
    assert (first.momentum, int(first.num_batches_tracked), network[2].momentum) == (0.1, 17, 0.3)
    assert not any(module.training for module in network.modules())
    # Dropout was off: what the second norm has seen is normalised already.
    torch.testing.assert_close(network[2].running_var, torch.ones(3), atol=0.1, rtol=0)


def test_the_scores_are_those_of_the_weights_before_and_after() -> None:
    found = trained("soft", settings=training(epochs=1))
    assert found.before == evaluate(small().eval(), DATA.validation, TASK.score)
    assert found.after == evaluate(found.network, DATA.validation, TASK.score)
    assert not found.network.training
