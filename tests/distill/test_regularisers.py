"""Cutout, dropped paths and the auxiliary classifier in finetuning: rates, resume, and no traces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import assert_equal, small_data, small_network, weights
from torch import Tensor, nn

from autocompress.distill.finetune import finetune
from autocompress.errors import RecipeError
from autocompress.export.formats import trace, write_onnx
from autocompress.network import DropPath
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.training.auxiliary import with_auxiliary
from autocompress.training.data import batches
from autocompress.training.evaluate import Scored, calibration_batches
from autocompress.training.loop import training_batches
from autocompress.training.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = small_data(64)
TASK = load_task(TaskSettings())
SIDE = (12, 12)
ALL: dict[str, Any] = {"cutout": 6, "drop_path": 0.3, "auxiliary": 0.4}


class Cell(nn.Module):
    """Two paths, each of which can be dropped, and an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels),
                DropPath(),
            )
            for kernel in (1, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        result = x
        for path in self.paths:
            result = result + path(x)
        return result


def cells(*, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
        return nn.Sequential(stem, Cell(6), Cell(6), head)


def settings(**changes: Any) -> FinetuneSettings:
    given: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.05,
        "shift": 1,
        "precision": "fp32",
        "memory_format": "contiguous",
        "label_smoothing": 0.1,
    }
    return FinetuneSettings(**given | changes)


def droppers(network: nn.Module) -> list[DropPath]:
    return [module for module in network.modules() if isinstance(module, DropPath)]


class Killed(BaseException):
    """Ends a run where nothing can be put in order, as a kill would."""


# Dropped paths ---------------------------------------------------------------------------------------------


def test_the_rate_rises_from_0_by_the_epoch_and_is_0_again_at_the_end() -> None:
    network = cells()
    rates: list[float] = []
    first, *others = droppers(network)
    for path in droppers(network):
        path.rate = 0.7  # of whoever trained it before

    def progress(step: int, total: int, text: str) -> None:
        assert {path.rate for path in others} == {first.rate}
        rates.append(first.rate)

    finetune(network, DATA, TASK, settings(drop_path=0.6), resolution=SIDE, progress=progress)
    assert rates == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4)
    assert {path.rate for path in droppers(network)} == {0.0}


def test_without_the_setting_no_path_is_dropped_whatever_rate_was_left() -> None:
    clean, touched = cells(), cells()
    for path in droppers(touched):
        path.rate = 0.7
    for network in (clean, touched):
        finetune(network, DATA, TASK, settings(epochs=1), resolution=SIDE)
    assert_equal(weights(touched), weights(clean))


def test_the_rate_is_0_again_after_a_run_that_failed() -> None:
    network = cells()

    def progress(step: int, total: int, text: str) -> None:
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        finetune(network, DATA, TASK, settings(drop_path=0.6), resolution=SIDE, progress=progress)
    assert {path.rate for path in droppers(network)} == {0.0}


def test_dropping_changes_what_is_learned_and_validation_runs_every_path() -> None:
    plain, dropped = cells(), cells()
    finetune(plain, DATA, TASK, settings(), resolution=SIDE, keep_best=False)
    found = finetune(dropped, DATA, TASK, settings(drop_path=0.5), resolution=SIDE, keep_best=False)
    assert not torch.equal(plain[3][2].weight, dropped[3][2].weight)
    again = finetune(cells(), DATA, TASK, settings(drop_path=0.5), resolution=SIDE, keep_best=False)
    assert found == again


def test_a_network_without_paths_is_refused() -> None:
    message = r"finetune.drop_path \(0.2\) drops paths of cells, .* has none .*; set finetune.drop_path to 0"
    with pytest.raises(RecipeError, match=message):
        finetune(small_network(), DATA, TASK, settings(drop_path=0.2), resolution=SIDE)


# The auxiliary classifier ----------------------------------------------------------------------------------


def test_the_gradient_has_the_weighed_loss_of_the_auxiliary_classifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = settings(auxiliary=0.4)
    network, plain = cells(), cells()
    both = with_auxiliary(plain, DATA, chosen, SIDE).train()
    kept: list[dict[str, Tensor]] = []

    def unclipped(parameters: Any, limit: float) -> Tensor:
        assert len(list(parameters)) == len(list(both.parameters()))
        kept.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
    finetune(network, DATA, TASK, chosen, resolution=SIDE)
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    outputs, aside = both(images)
    main, other = (F.cross_entropy(found, labels, label_smoothing=0.1) for found in (outputs, aside))
    (main + 0.4 * other).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(kept[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_labels_that_are_no_classes_are_refused() -> None:
    data = small_data(64, labels=lambda classes: classes.float())
    task = load_task(TaskSettings(loss="mse", metric="negative_mse", distillation="mse"))
    with pytest.raises(RecipeError, match="needs labels that are classes"):
        finetune(cells(), replace(data, classes=0), task, settings(auxiliary=0.4), resolution=SIDE)


# Cutout ----------------------------------------------------------------------------------------------------


def test_images_of_training_are_cut_out_and_those_of_validation_are_not() -> None:
    network = cells()
    trained: list[Tensor] = []
    judged: list[Tensor] = []
    network.register_forward_pre_hook(
        lambda module, args: (trained if module.training else judged).append(args[0].clone())
    )
    finetune(network, DATA, TASK, settings(cutout=6, epochs=1, shift=0), resolution=SIDE)
    plain = training_batches(DATA, settings(epochs=1, shift=0), epoch=0, seed=0)
    for (images, _), cut in zip(plain, trained, strict=True):
        blanked = (cut == 0).all(1, keepdim=True)
        assert torch.equal(torch.where(blanked, 0, images), cut)
        assert all(blanked.flatten(1).any(1))
    (held_out, _) = next(batches(DATA.validation, 16, seed=None))
    # Between them are training images for the statistics of batch norm.
    assert torch.equal(judged[0], held_out)
    assert torch.equal(judged[-1], held_out)
    assert torch.equal(torch.cat(judged[1:-1]), torch.cat(calibration_batches(DATA, 1024)))


# All of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, 4, 6, 11])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    def run(network: nn.Module, checkpoint: Path | None, **rest: Any) -> Scored:
        return finetune(
            network,
            DATA,
            TASK,
            settings(**ALL),
            resolution=SIDE,
            teacher=small_network(seed=4),
            checkpoint=checkpoint,
            keep_best=False,
            **rest,
        )

    whole = cells()
    state = torch.get_rng_state()
    expected = run(whole, None)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)

    def progress(step: int, total: int, text: str) -> None:
        torch.rand(1)  # of someone else in the process
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run(cells(), tmp_path / "c", progress=progress)
    network = cells(seed=8)
    assert run(network, tmp_path / "c") == expected
    assert_equal(weights(network), weights(whole))


def test_the_network_is_left_without_traces_and_is_exported(tmp_path: Path) -> None:
    network = cells()
    names = list(network.state_dict())
    finetune(network, DATA, TASK, settings(**ALL), resolution=SIDE)
    assert list(network.state_dict()) == names
    assert not any(module._forward_hooks or module.training for module in network.modules())
    plain = cells()
    for module in plain.modules():
        if isinstance(module, Cell):
            module.paths = nn.ModuleList(path[:3] for path in module.paths)  # type: ignore[index]
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, *SIDE)
    assert torch.equal(network(x), plain.eval()(x))
    operators = [write_onnx(tmp_path / "network.onnx", trace(one, (3, *SIDE))) for one in (network, plain)]
    assert operators[0] == operators[1]
    assert not {"Dropout", "Bernoulli", "RandomUniformLike"} & operators[0].keys()
