"""Finetuning: teacher and labels, the best epoch, resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import arch_of, assert_equal, shaken, small_data, small_network, weights
from torch import Tensor, nn

from autocompress.distill.finetune import finetune
from autocompress.elastic.extract import extract
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import resize
from autocompress.errors import CheckpointError
from autocompress.latency.target import Scheme
from autocompress.quantize.source import QuantizationSource
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.testing.toys import toy_classifier_space
from autocompress.training import statistics
from autocompress.training.evaluate import Scored, calibration_batches, evaluate
from autocompress.training.loop import training_batches
from autocompress.training.task import Task, load_task

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = small_data(64)
TASK = load_task(TaskSettings())
SIDE = (12, 12)


def settings(**changes: Any) -> FinetuneSettings:
    given: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 0.05,
        "shift": 1,
        "precision": "fp32",
        "memory_format": "contiguous",
        "label_smoothing": 0.0,
    }
    return FinetuneSettings(**given | changes)


def teacher_network() -> nn.Sequential:
    return small_network(width=9, seed=4)


# The loss ------------------------------------------------------------------------------------------------


def gradients_of_first_step(
    monkeypatch: pytest.MonkeyPatch, network: nn.Module, *args: Any, **rest: Any
) -> dict[str, Tensor]:
    """Run and keep the gradient of the first step, as it was before clipping."""
    kept: list[dict[str, Tensor]] = []

    def unclipped(parameters: Any, limit: float) -> Tensor:
        kept.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
    finetune(network, *args, **rest)
    return kept[0]


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 4.0), (0.3, 4.0), (1.0, 2.0)])
def test_the_gradient_is_that_of_labels_and_the_softened_teacher_in_their_shares(
    monkeypatch: pytest.MonkeyPatch, alpha: float, temperature: float
) -> None:
    chosen = settings(alpha=alpha, temperature=temperature, label_smoothing=0.1)
    network, teacher = small_network(), teacher_network()
    plain, known = small_network().train(), teacher_network().eval()
    found = gradients_of_first_step(
        monkeypatch, network, DATA, TASK, chosen, resolution=SIDE, teacher=teacher
    )
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    outputs, target = plain(images), known(images).detach()
    p, q = (target / temperature).softmax(1), (outputs / temperature).softmax(1)
    distilled = temperature**2 * (p * (p / q).log()).sum(1).mean()
    loss = (1 - alpha) * F.cross_entropy(outputs, labels, label_smoothing=0.1) + alpha * distilled
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_without_a_teacher_the_labels_have_all_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(alpha=0.9)
    network, plain = small_network(), small_network()
    found = gradients_of_first_step(monkeypatch, network, DATA, TASK, chosen, resolution=SIDE)
    images, labels = next(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    F.cross_entropy(plain(images), labels).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_another_distillation_loss_takes_the_place_of_hinton_s(
    monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    # Also where labels are classes: what the task names is what is used.
    labels = None if loss == "cross_entropy" else (lambda classes: F.one_hot(classes, 3).float())
    data = small_data(64, labels=labels)
    metric = "accuracy" if loss == "cross_entropy" else "negative_mse"
    task = load_task(TaskSettings(loss=loss, metric=metric, distillation="mse"))
    chosen = settings(alpha=0.25)
    network, plain, teacher = small_network(), small_network(), teacher_network()
    found = gradients_of_first_step(
        monkeypatch, network, data, task, chosen, resolution=SIDE, teacher=teacher
    )
    images, targets = next(training_batches(data, chosen, epoch=0, seed=chosen.seed))
    outputs = plain(images)
    on_labels = F.cross_entropy(outputs, targets) if labels is None else (outputs - targets).square().mean()
    (0.75 * on_labels + 0.25 * (outputs - teacher(images).detach()).square().mean()).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_network_and_teacher_get_images_of_their_own_resolution() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {"network": set(), "teacher": set()}
    network, teacher = small_network(), teacher_network()
    for name, module in (("network", network), ("teacher", teacher)):
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen[name].add(tuple(args[0].shape[2:]))  # type: ignore[misc]
        )
    finetune(
        network,
        DATA,
        TASK,
        settings(epochs=1),
        resolution=(8, 8),
        teacher=teacher,
        teacher_resolution=(10, 10),
    )
    assert seen == {"network": {(8, 8)}, "teacher": {(10, 10)}}


def test_the_teacher_is_in_evaluation_mode_and_does_not_change() -> None:
    teacher = teacher_network().train()
    before = weights(teacher)
    modes: list[bool] = []
    teacher.register_forward_hook(lambda module, args, output: modes.append(module.training))
    finetune(small_network(), DATA, TASK, settings(epochs=1), resolution=SIDE, teacher=teacher)
    assert modes == [False] * 5  # once to try the loss, then four steps
    assert_equal(weights(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# The result ----------------------------------------------------------------------------------------------


def test_it_learns_and_returns_the_score_of_what_it_leaves() -> None:
    network = small_network()
    before = evaluate(small_network().eval(), DATA.validation, TASK.score)
    found = finetune(network, DATA, TASK, settings(epochs=10, learning_rate=0.2), resolution=SIDE)
    assert not network.training
    assert vars(found) == {**vars(evaluate(network, DATA.validation, TASK.score)), "epoch": found.epoch}
    assert 0 < (found.epoch or 0) <= 10
    assert found.mean >= 0.9 > before.mean


def test_statistics_that_lag_behind_a_short_epoch_are_computed_anew() -> None:
    network = small_network()
    finetune(network, DATA, TASK, settings(epochs=1), resolution=SIDE, keep_best=False)
    left = copy.deepcopy(network.state_dict())
    statistics.recalibrate(network, calibration_batches(DATA, 1024, seed=settings().seed))
    assert_equal(network.state_dict(), left)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9  # after four steps nothing is left of what was before
    finetune(network, DATA, TASK, settings(epochs=1), resolution=SIDE, keep_best=False)
    left = copy.deepcopy(network.state_dict())
    statistics.recalibrate(network, calibration_batches(DATA, 1024, seed=settings().seed))
    assert any(not torch.equal(left[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("momentum", "steps", "lags"), [(0.1, 43, True), (0.1, 44, False), (None, 1, False)])
def test_statistics_lag_while_more_than_a_hundredth_is_old(
    momentum: float | None, steps: int, lags: bool
) -> None:
    assert statistics.lags(nn.Sequential(nn.BatchNorm2d(2, momentum=momentum)), steps) == lags
    assert not statistics.lags(nn.Sequential(nn.Conv2d(2, 2, 1)), steps)


@pytest.mark.parametrize(
    ("means", "best"),
    [
        ([0.1, 0.5, 0.4, 0.3], 1),
        ([0.9, 0.5, 0.4, 0.3], 0),
        ([0.1, 0.2, 0.3, 0.4], 3),
        ([0.4] * 4, 3),
        ([0.3, 0.4, 0.4, 0.1], 2),
    ],
)
def test_the_weights_of_the_best_epoch_are_kept_the_latest_of_equals_the_start_included(
    monkeypatch: pytest.MonkeyPatch, means: list[float], best: int
) -> None:
    network = small_network()
    states: list[dict[str, Tensor]] = []

    def score(forward: Any, dataset: Any, score: Any) -> Scored:
        states.append(weights(network))
        return Scored(means[len(states) - 1], 0.0, 16)

    monkeypatch.setattr("autocompress.distill.finetune.evaluate", score)
    found = finetune(network, DATA, TASK, settings(epochs=3), resolution=SIDE)
    assert found.mean == max(means)
    assert found.epoch == best
    assert len(states) == 4
    assert_equal(weights(network), states[best])
    assert_equal(weights(small_network()), states[0])


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        ([0.9, 0.86, 0.7, 0.8], 1),  # within a standard error of the start, the best of the epochs
        ([0.9, 0.84, 0.7, 0.8], 0),
        ([0.9, 0.86, 0.88, 0.85], 2),
        ([0.9, 0.86, 0.84, 0.83], 1),  # only the start is flattered
    ],
)
def test_the_start_is_kept_only_where_every_epoch_is_worse_by_a_standard_error(
    monkeypatch: pytest.MonkeyPatch, means: list[float], kept: int
) -> None:
    network = small_network()
    states: list[dict[str, Tensor]] = []

    def score(forward: Any, dataset: Any, score: Any) -> Scored:
        states.append(weights(network))
        return Scored(means[len(states) - 1], 0.05, 16)

    monkeypatch.setattr("autocompress.distill.finetune.evaluate", score)
    found = finetune(network, DATA, TASK, settings(epochs=3), resolution=SIDE)
    assert found.mean == means[kept]
    assert_equal(weights(network), states[kept])


def test_otherwise_the_weights_of_the_last_epoch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_network()
    states: list[dict[str, Tensor]] = []

    def score(forward: Any, dataset: Any, score: Any) -> Scored:
        states.append(weights(network))
        return Scored([0.9, 0.5, 0.4][len(states) - 1], 0.0, 16)

    monkeypatch.setattr("autocompress.distill.finetune.evaluate", score)
    found = finetune(network, DATA, TASK, settings(epochs=3), resolution=SIDE, keep_best=False)
    assert found.mean == 0.4
    assert_equal(weights(network), states[-1])


def test_a_regression_is_trained_and_distilled() -> None:
    data = small_data(64, labels=lambda classes: classes.float())
    task = load_task(TaskSettings(loss="mse", metric="negative_mse", distillation="mse"))
    teacher = small_network(1, width=9, seed=4)
    finetune(teacher, data, task, settings(epochs=10), resolution=SIDE)
    network = small_network(1)
    before = evaluate(small_network(1).eval(), data.validation, task.score)
    found = finetune(network, data, task, settings(epochs=10), resolution=SIDE, teacher=teacher)
    # Always saying 1, the mean of 0, 1 and 2, has an error of 2/3.
    assert before.mean < -2 / 3 < -0.4 < found.mean < 0


def test_an_extracted_network_goes_on_from_the_supernet_s_weights_at_its_resolution() -> None:
    space = toy_classifier_space()
    supernet = shaken(space)
    arch = arch_of(space, resolution=8, block1_expand=2)
    network = extract(supernet, arch, recalibrate(supernet, arch, calibration_batches(DATA, 32)))
    start = weights(network)
    teacher = extract(supernet, arch_of(space))
    found = finetune(
        network, DATA, TASK, settings(), resolution=(8, 8), teacher=teacher, teacher_resolution=SIDE
    )
    scored = evaluate(lambda x: network(resize(x, (8, 8))), DATA.validation, TASK.score)
    assert vars(found) == {**vars(scored), "epoch": found.epoch}
    assert set(weights(network)) == set(start)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_memory_format_is_that_of_the_settings(memory_format: str) -> None:
    network = small_network()
    finetune(network, DATA, TASK, settings(epochs=1, memory_format=memory_format), resolution=SIDE)
    last = network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last == (memory_format == "channels_last")


def test_timing_formats_changes_neither_weights_nor_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(chosen: FinetuneSettings, step: Any, *, steps: int) -> dict[str, str]:
        assert steps == 2 * 4
        for _ in range(3):
            step("fp32", "channels_last")
        return {"precision": "fp32", "memory_format": "contiguous"}

    monkeypatch.setattr("autocompress.distill.finetune.choose_formats", choose)
    measured, given = small_network(), small_network()
    finetune(measured, DATA, TASK, settings(), resolution=SIDE)
    monkeypatch.undo()
    finetune(given, DATA, TASK, settings(), resolution=SIDE)
    assert_equal(weights(measured), weights(given))


# Resume --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run where nothing can be put in order, as a kill would."""


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("kill_at", [1, 4, 6, 11])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, keep_best: bool
) -> None:
    chosen = settings(epochs=3)

    def run(network: nn.Module, checkpoint: Path | None, **rest: Any) -> Scored:
        return finetune(
            network,
            DATA,
            TASK,
            chosen,
            resolution=SIDE,
            teacher=teacher_network(),
            checkpoint=checkpoint,
            keep_best=keep_best,
            **rest,
        )

    whole = small_network()
    expected = run(whole, None)
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)

    def progress(step: int, total: int, text: str) -> None:
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run(small_network(), tmp_path / "c", progress=progress)
    network = small_network(seed=8)
    found = run(network, tmp_path / "c")
    assert found == expected
    assert_equal(weights(network), weights(whole))
    again = small_network(seed=9)
    assert run(again, tmp_path / "c", progress=progress) == expected
    assert_equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {"arch": "b"}}, "its arch is 'a', here 'b'"),
        ({"settings": settings(alpha=0.1)}, r"its settings\.alpha is 0\.\d, here 0\.1"),
        ({"network": small_network(width=5)}, "does not fit this network"),
    ],
    ids=["architecture", "settings", "network"],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    identity = {"arch": "a"}
    finetune(
        small_network(), DATA, TASK, settings(), resolution=SIDE, identity=identity, checkpoint=tmp_path / "c"
    )
    with pytest.raises(CheckpointError, match=message):
        finetune(
            copy.deepcopy(changes.get("network", small_network())),
            DATA,
            TASK,
            changes.get("settings", settings()),
            resolution=SIDE,
            identity=changes.get("identity", identity),
            checkpoint=tmp_path / "c",
        )


def test_the_test_part_is_never_read_and_a_task_may_be_made_by_hand() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets)

    task = Task(loss, TASK.distillation, TASK.score, "accuracy", smoothed=False)
    finetune(small_network(), DATA, task, settings(epochs=1), resolution=SIDE, teacher=teacher_network())


# Few bits ------------------------------------------------------------------------------------------------


def test_no_step_changes_a_learned_scale_by_more_than_its_share() -> None:
    """At 8 bits a few weights beyond the range push a scale that is a hundredth of theirs."""
    model = small_network(width=16, seed=2).eval()
    images = [resize(batch, SIDE) for batch in calibration_batches(DATA, 16)]
    bits = ((8, 8),)
    source = QuantizationSource(model, images[0][:1], calibration=images, widths=bits, scheme=Scheme((8,)))
    network = source.network(bits * 2)
    before = {n: p.detach().clone() for n, p in network.named_parameters() if n.endswith(".scale")}
    chosen = settings(epochs=1, momentum=0.0, learning_rate=0.01, warmup_epochs=0.0)
    finetune(network, DATA, TASK, chosen, resolution=SIDE, teacher=model, keep_best=False)
    steps = len(list(training_batches(DATA, chosen, epoch=0, seed=0)))
    assert len(before) == 4
    for name, parameter in network.named_parameters():
        if name in before:
            ratio = parameter.detach() / before[name]
            assert float(ratio.max()) <= 1.0101**steps
            assert float(ratio.min()) >= 0.9899**steps
            assert float((ratio - 1).abs().max()) > 0
