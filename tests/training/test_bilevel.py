"""Bilevel training: what learns from which images; a run that was stopped ends as one that was not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import small_data

from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.elastic.mixture import Gates
from autocompress.errors import CheckpointError, DataError, TrainingError
from autocompress.recipe import TaskSettings, TrainSettings
from autocompress.space import SearchSpace
from autocompress.testing.toys import toy_classifier_space, toy_width_space
from autocompress.training.bilevel import halves, train_relaxed
from autocompress.training.data import Images
from autocompress.training.task import load_task
from search_spaces.nas_bench_201 import nas_bench_201
from strategies.darts import Darts
from strategies.gumbel import GumbelSoftmax
from strategies.pc_darts import PcDarts
from strategies.proxyless import ProxylessNas
from strategies.relaxed import RelaxedSearch

SETTINGS = TrainSettings(
    epochs=2, batch_size=8, warmup_epochs=0, precision="fp32", memory_format="contiguous", learning_rate=0.05
)
CELLS = nas_bench_201(channels=4, cells=1, resolution=12, in_channels=3, classes=3)
STRATEGIES: dict[str, tuple[type[RelaxedSearch], dict[str, Any]]] = {
    "darts": (Darts, {}),
    "darts, second order": (Darts, {"order": 2}),
    "pc_darts": (PcDarts, {"warmup": 0.2}),
    "gumbel": (GumbelSoftmax, {}),
    "snas": (GumbelSoftmax, {"hard": False}),
    "proxyless": (ProxylessNas, {"warmup": 0.2}),
}


def limited(space: SearchSpace) -> Constraints:
    return Budget.parse("macs=70%").resolve(space, [operation_cost(space, "macs")])


def trained(
    make: type[RelaxedSearch], options: dict[str, Any], *, space: SearchSpace = CELLS, **more: Any
) -> tuple[RelaxedSearch, Any]:
    strategy = make(limited(space), seed=0, learning_rate=0.02, **options)
    supernet = space.supernet()
    train_relaxed(supernet, strategy, small_data(64), load_task(TaskSettings()), SETTINGS, seed=0, **more)
    return strategy, supernet


class StoppedError(Exception):
    """As a kill, but in this process."""


def stop_at(step: int) -> Any:
    def progress(done: int, total: int, note: str = "") -> None:
        if done == step:
            raise StoppedError

    return progress


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step has a checkpoint.
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)
    make, options = STRATEGIES[name]
    whole, network = trained(make, options)
    for step in (1, 3, 6):
        with pytest.raises(StoppedError):
            trained(make, options, checkpoint=tmp_path / "checkpoint.pt", progress=stop_at(step))
    again, other = trained(make, options, checkpoint=tmp_path / "checkpoint.pt")
    for ours, theirs in zip(whole.relaxation.logits, again.relaxation.logits, strict=True):
        assert torch.equal(ours, theirs)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    assert whole.notes == again.notes
    np.testing.assert_array_equal(whole.ask(1), again.ask(1))
    # What was trained is there at once.
    ready, _ = trained(make, options, checkpoint=tmp_path / "checkpoint.pt", progress=stop_at(1))
    assert ready.notes == whole.notes


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "pc_darts"])
def test_chains_of_blocks_are_searched_too(name: str) -> None:
    make, options = STRATEGIES[name]
    space = toy_classifier_space(blocks=2)
    before = make(limited(space), seed=0, **options)
    strategy, _ = trained(make, options, space=space)
    for old, new in zip(before.relaxation.logits, strategy.relaxation.logits, strict=True):
        assert not torch.equal(old, new)
    assert limited(space).feasible(strategy.ask(1)).all()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "pc_darts"])
def test_held_out_images_move_the_logits_of_widths(name: str) -> None:
    make, options = STRATEGIES[name]
    space = toy_width_space()
    # Nothing else moves them: neither the budget nor weight decay.
    options = {**options, "penalty": "none", "weight_decay": 0.0}
    before = make(limited(space), seed=0, **options).relaxation
    strategy, _ = trained(make, options, space=space)
    assert before.relaxed == tuple(choice.name for choice in space.choices)
    for old, new in zip(
        before.probabilities().values(), strategy.relaxation.probabilities().values(), strict=True
    ):
        assert float((old - new).abs().max().detach()) > 1e-5
    assert limited(space).feasible(strategy.ask(1)).all()


def test_weights_and_architecture_never_see_the_same_image() -> None:
    data = small_data(64)
    ours, theirs = halves(data, 0.5)
    assert isinstance(ours.train, Images)
    assert isinstance(theirs.train, Images)
    assert isinstance(data.train, Images)
    assert torch.equal(torch.cat([ours.train.images, theirs.train.images]), data.train.images)
    assert (len(ours.train), len(theirs.train)) == (32, 32)
    assert len(halves(data, 0.8)[0].train) == 51  # type: ignore[arg-type]
    seen: dict[str, list[torch.Tensor]] = {"weights": [], "architecture": []}

    class Spy(RelaxedSearch):
        def weight_gates(self, moment: Any) -> Gates:
            return self.soft_gates()

        def gradients(self, network: Any, train: Any, held_out: Any, moment: Any) -> None:
            seen["weights"].append(train[1])
            seen["architecture"].append(held_out[1])
            self.set_gradients(network.loss(held_out, self.soft_gates()))

    trained(Spy, {}, space=CELLS)
    for images in seen.values():
        assert len(images) == 8  # two epochs of 32 images in batches of 8
    first, second = data.train.labels[:32], data.train.labels[32:]
    for part, images in ((first, seen["weights"]), (second, seen["architecture"])):
        for epoch in (images[:4], images[4:]):
            assert torch.equal(torch.cat(epoch).bincount(), part.bincount())


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_a_part_without_images_is_refused(share: float) -> None:
    with pytest.raises(DataError, match=rf"splits the 64 training images in two; a share of {share} leaves"):
        trained(Darts, {}, share=share)


def test_a_loss_that_is_not_finite_is_an_error_and_not_an_architecture() -> None:
    data = small_data(64)
    strategy = Darts(limited(CELLS), seed=0)
    supernet = CELLS.supernet()
    with torch.no_grad():
        next(supernet.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="gradient of the architecture parameters of 'edge_0_1' is"):
        train_relaxed(supernet, strategy, data, load_task(TaskSettings()), SETTINGS, seed=0)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    trained(Darts, {}, checkpoint=path, identity={"strategy": "darts"})
    with pytest.raises(CheckpointError, match="its strategy is 'darts', here 'proxyless'"):
        trained(ProxylessNas, {}, checkpoint=path, identity={"strategy": "proxyless"})
