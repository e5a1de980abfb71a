"""Every schedule against sums that are written out; killed and resumed."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import arch_of, shaken, small_data, weights
from torch import Tensor

import autocompress.training.loop
from autocompress.elastic.extract import active_masks
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Supernet
from autocompress.errors import CheckpointError, RecipeError
from autocompress.recipe import Phase, TaskSettings, TrainSettings, parse_recipe
from autocompress.space import Architecture
from autocompress.testing.toys import toy_classifier_space
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.loop import Position, training_batches
from autocompress.training.supernet import train_supernet
from autocompress.training.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = toy_classifier_space()
DATA = small_data(64)
TASK = load_task(TaskSettings())


def settings(**changes: Any) -> TrainSettings:
    given: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 0.05,
        "shift": 1,
        "precision": "fp32",
        "memory_format": "contiguous",
        "random_networks": 1,
        "weight_decay": 0.01,
    }
    return TrainSettings(**given | changes)


class Spy:
    """Keeps which networks ran at each step, and weights and gradients before each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[Architecture] = []
        self.steps: list[tuple[list[Architecture], dict[str, Tensor], dict[str, Tensor | None]]] = []
        run = Supernet.run
        spy = self

        def spied(supernet: Supernet, x: Tensor, arch: Architecture, *rest: Any) -> Tensor:
            if torch.is_grad_enabled():
                spy.ran.append(arch)
            return run(supernet, x, arch, *rest)

        monkeypatch.setattr(Supernet, "run", spied)

        def unclipped(parameters: Any, limit: float) -> Tensor:
            return torch.zeros(())

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)

        def wrap(kind: type[torch.optim.Optimizer]) -> None:
            step = kind.step

            def stepped(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
                spy.keep()
                return step(optimizer, *args, **kwargs)

            monkeypatch.setattr(kind, "step", stepped)

        wrap(torch.optim.SGD)
        wrap(torch.optim.AdamW)
        self.supernet: Supernet | None = None

    def keep(self) -> None:
        assert self.supernet is not None
        gradients = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in self.supernet.named_parameters()
        }
        self.steps.append((self.ran, weights(self.supernet), gradients))
        self.ran = []


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def train(supernet: Supernet, chosen: TrainSettings, checkpoint: Path | None = None, **rest: Any) -> Position:
    return train_supernet(supernet, DATA, TASK, chosen, checkpoint=checkpoint, **rest)


def assert_gradients(supernet: Supernet, found: dict[str, Tensor | None], losses: list[Tensor]) -> None:
    """The gradient is the sum of those of the losses, each computed on its own."""
    names = list(dict(supernet.named_parameters()))
    total: dict[str, Tensor | None] = dict.fromkeys(names)
    for loss in losses:
        each = torch.autograd.grad(loss, list(supernet.parameters()), allow_unused=True)
        for name, gradient in zip(names, each, strict=True):
            if gradient is not None:
                total[name] = gradient if total[name] is None else total[name] + gradient  # type: ignore[operator]
    for name in names:
        mine, its = found[name], total[name]
        assert (mine is None) == (its is None), name
        if mine is not None:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


# Sandwich ---------------------------------------------------------------------------------------------


def test_each_step_trains_the_largest_random_ones_and_the_smallest(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, settings(random_networks=2))
    largest, smallest = SPACE.decode(np.vstack([SPACE.largest(), SPACE.smallest()]))
    assert len(spy.steps) == 8
    drawn = []
    for archs, _, _ in spy.steps:
        assert len(archs) == 4
        assert archs[0] == largest
        assert archs[-1] == smallest
        drawn += archs[1:3]
    assert len(set(drawn)) > 8, "random networks repeat"


def test_without_random_networks_the_largest_and_the_smallest_are_left(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, settings(random_networks=0, epochs=1))
    assert [len(archs) for archs, _, _ in spy.steps] == [2] * 4


def test_gradients_are_the_sum_of_labels_for_the_largest_and_its_outputs_for_the_others(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    chosen = settings(epochs=1, label_smoothing=0.2)
    train(supernet, chosen)
    found = list(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    for (archs, before, gradients), (x, labels) in zip(spy.steps, found, strict=True):
        twin = SPACE.supernet()
        twin.load_state_dict(before)
        outputs = [twin(x, arch) for arch in archs]
        losses = [F.cross_entropy(outputs[0], labels, label_smoothing=0.2)]
        teacher = outputs[0].detach().softmax(1)
        losses += [F.cross_entropy(student, teacher) for student in outputs[1:]]  # soft targets
        assert_gradients(twin, gradients, losses)


def test_rows_of_kernel_transforms_that_no_network_of_a_step_used_do_not_decay(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, settings(weight_decay=0.5))
    after = [before for _, before, _ in spy.steps[1:]] + [weights(supernet)]
    still = moved = 0
    for (archs, before, _), then in zip(spy.steps, after, strict=True):
        masks = active_masks(supernet, archs)
        for name, parameter in supernet.named_parameters():
            mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
            assert torch.equal(then[name][~mask], before[name][~mask]), name
            still += int((~mask).sum())
            moved += int((then[name] != before[name]).sum())
    assert still > 0
    assert moved > 0


def test_scores_are_those_of_recalibrated_slices_on_the_held_out_part() -> None:
    supernet = shaken(SPACE)
    position = train(supernet, settings(epochs=1))
    largest, smallest = SPACE.decode(np.vstack([SPACE.largest(), SPACE.smallest()]))
    expected = []
    for name, arch in (("largest", largest), ("smallest", smallest)):
        statistics = recalibrate(supernet, arch, calibration_batches(DATA, 512))
        scored = evaluate(
            lambda x, a=arch, s=statistics: supernet(x, a, statistics=s),  # type: ignore[misc]
            DATA.validation,
            TASK.score,
        )
        expected.append([1, name, scored.mean])
    assert position.scores == expected


def test_training_learns() -> None:
    # Three classes that differ in the brightness of one channel; chance is a third.
    supernet = SPACE.supernet()
    position = train(supernet, settings(epochs=8, learning_rate=0.2, label_smoothing=0.0))
    assert position.losses[-1] < 0.7 * position.losses[0]
    scores = {name: value for epoch, name, value in position.scores if epoch == 8}
    assert scores["largest"] >= 0.8
    assert len(position.scores) == 16  # both networks, every epoch of so few


def test_validations_are_about_ten_and_the_last_epoch_has_one() -> None:
    supernet = shaken(toy_classifier_space(blocks=1))
    data = small_data(16)
    chosen = settings(epochs=25, random_networks=0)
    position = train_supernet(supernet, data, TASK, chosen)
    assert [epoch for epoch, name, _ in position.scores if name == "largest"] == [*range(2, 25, 2), 25]


def test_the_test_part_and_the_global_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    train(shaken(SPACE), settings(epochs=1))  # its test part raises when it is read or counted
    assert torch.equal(torch.get_rng_state(), state)


def test_a_task_of_numbers_is_trained_and_distilled_by_its_own_losses(spy: Spy) -> None:
    space = toy_classifier_space(classes=1)
    data = small_data(64, labels=lambda classes: classes.float())
    supernet = spy.supernet = shaken(space)
    task = load_task(TaskSettings(loss="mse", metric="negative_mse", distillation="mse"))
    chosen = settings(epochs=1)
    position = train_supernet(supernet, data, task, chosen)
    archs, before, gradients = spy.steps[0]
    x, labels = next(training_batches(data, chosen, epoch=0, seed=0))
    twin = space.supernet()
    twin.load_state_dict(before)
    outputs = [twin(x, arch) for arch in archs]
    losses = [(outputs[0].flatten() - labels).square().mean()]
    losses += [(student - outputs[0].detach()).square().mean() for student in outputs[1:]]
    assert_gradients(twin, gradients, losses)
    assert all(value <= 0 for _, _, value in position.scores)


# Formats ----------------------------------------------------------------------------------------------


def test_channels_last_is_kept_and_learns_the_same() -> None:
    plain, last = shaken(SPACE), shaken(SPACE)
    train(plain, settings(epochs=1))
    position = train(last, settings(epochs=1, memory_format="channels_last"))
    assert position.choices == {"precision": "fp32", "memory_format": "channels_last"}
    stem = dict(last.named_parameters())["layers.stem.0_conv2d.weight"]
    assert stem.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_timing_formats_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def choose(chosen: TrainSettings, step: Any, *, steps: int) -> dict[str, str]:
        assert steps == 4
        for precision in ("fp32", "bf16"):
            step(precision, "channels_last")
            timed.append(precision)
        return {"precision": "fp32", "memory_format": "contiguous"}

    monkeypatch.setattr("autocompress.training.supernet.choose_formats", choose)
    measured, given = shaken(SPACE), shaken(SPACE)
    train(measured, settings(epochs=1))
    monkeypatch.undo()
    train(given, settings(epochs=1))
    assert timed == ["fp32", "bf16"]
    for name, tensor in given.state_dict().items():
        assert torch.equal(measured.state_dict()[name], tensor), name


# Progressive shrinking --------------------------------------------------------------------------------

PHASES = (Phase(epochs=1, elastic=("kernel",), networks=2), Phase(epochs=1, elastic=("kernel", "depth")))


def progressive(**changes: Any) -> TrainSettings:
    return settings(**{"epochs": 1, "schedule": "progressive", "phases": PHASES} | changes)


def test_phases_vary_what_they_name_and_the_rest_stays_largest(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, progressive())
    largest = arch_of(SPACE)
    assert [archs for archs, _, _ in spy.steps[:4]] == [[largest]] * 4
    kernels = [arch for archs, _, _ in spy.steps[4:8] for arch in archs]
    assert len(kernels) == 4 * 2
    both = [arch for archs, _, _ in spy.steps[8:] for arch in archs]
    assert len(both) == 4
    for arch in kernels + both:
        for name, option in arch.settings:
            if not name.endswith("kernel") and (name != "depth" or arch in kernels):
                assert option == largest[name], name
    assert len({arch["block1.kernel"] for arch in kernels}) > 1


def test_after_the_first_phase_labels_and_the_frozen_largest_teach(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    chosen = progressive(label_smoothing=0.0)
    train(supernet, chosen)
    teacher = SPACE.supernet()
    teacher.load_state_dict(spy.steps[4][1])  # as it was when the second phase began
    for epoch in (1, 2):
        found = list(training_batches(DATA, chosen, epoch=epoch, seed=chosen.seed))
        steps = spy.steps[4 * epoch : 4 * epoch + 4]
        for (archs, before, gradients), (x, labels) in zip(steps, found, strict=True):
            twin = SPACE.supernet()
            twin.load_state_dict(before)
            target = teacher(x, arch_of(SPACE)).detach().softmax(1)
            losses = []
            for arch in archs:
                outputs = twin(x, arch)
                losses.append(F.cross_entropy(outputs, labels) + F.cross_entropy(outputs, target))
            assert_gradients(twin, gradients, losses)


def test_what_no_network_of_a_step_used_does_not_move(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, progressive(weight_decay=0.5))
    after = [before for _, before, _ in spy.steps[1:]] + [weights(supernet)]
    for (archs, before, _), then in list(zip(spy.steps, after, strict=True))[4:]:
        masks = active_masks(supernet, archs)
        for name, parameter in supernet.named_parameters():
            mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
            assert torch.equal(then[name][~mask], before[name][~mask]), name


def test_channels_are_sorted_after_the_first_phase_and_momentum_starts_anew(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, progressive())
    for block in ("block1", "block2"):
        name = f"layers.{block}.3_conv2d.weight"
        first, sorted_ = (spy.steps[step][1][name].abs().sum((0, 2, 3)) for step in (3, 4))
        assert not (first[:-1] >= first[1:]).all()
        assert (sorted_[:-1] >= sorted_[1:]).all()
    # The first step after it moves by rate * (1 + momentum) * (gradient + decay): no older momentum.
    name = "layers.block1.0_conv2d.weight"
    (_, before, gradients), (_, then, _) = spy.steps[4:6]
    gradient = gradients[name]
    assert gradient is not None
    rate = 0.05  # at the end of the warm-up
    direction = gradient + 0.01 * before[name]
    torch.testing.assert_close(then[name], before[name] - rate * 1.9 * direction, rtol=1e-4, atol=1e-6)


def test_a_phase_in_which_nothing_varies_trains_the_largest(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, progressive(phases=(Phase(epochs=1),)))
    assert [set(archs) for archs, _, _ in spy.steps] == [{arch_of(SPACE)}] * 8


def test_a_phase_that_names_no_choice_is_refused_before_anything_is_trained() -> None:
    supernet = shaken(SPACE)
    before = weights(supernet)
    with pytest.raises(RecipeError, match=r"no choices named 'width'; it has \['depth', 'expand', 'kernel'"):
        train(supernet, progressive(phases=(Phase(epochs=1, elastic=("width",)),)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


# Single paths -----------------------------------------------------------------------------------------

ONE_SHOT = ("single_path", "fair")


def one_shot(schedule: str, **changes: Any) -> TrainSettings:
    return settings(**{"schedule": schedule, "random_networks": 2} | changes)


@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_one_update_sums_the_gradients_of_the_step_s_networks_on_the_labels(spy: Spy, schedule: str) -> None:
    supernet = spy.supernet = shaken(SPACE)
    chosen = one_shot(schedule, epochs=1, label_smoothing=0.2)
    position = train(supernet, chosen)
    found = list(training_batches(DATA, chosen, epoch=0, seed=chosen.seed))
    means = []
    for (archs, before, gradients), (x, labels) in zip(spy.steps, found, strict=True):
        assert len(archs) == {"single_path": 1, "fair": 3}[schedule]
        twin = SPACE.supernet()
        twin.load_state_dict(before)
        losses = [F.cross_entropy(twin(x, arch), labels, label_smoothing=0.2) for arch in archs]
        assert_gradients(twin, gradients, losses)
        means.append(np.mean([float(loss.detach()) for loss in losses]))
    assert position.losses == pytest.approx([np.mean(means)], rel=1e-5)


def test_every_fair_step_trains_every_option_of_the_widest_choices_once(spy: Spy) -> None:
    supernet = spy.supernet = shaken(SPACE)
    train(supernet, one_shot("fair"))
    assert len(spy.steps) == 8
    for archs, _, _ in spy.steps:
        assert sorted(arch["block1.kernel"] for arch in archs) == [1, 3, 5]
    for choice in ("resolution", "depth", "block1.expand"):
        drawn = Counter(arch[choice] for archs, _, _ in spy.steps for arch in archs)
        assert list(drawn.values()) == [12, 12]  # two options in 24 draws


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_layers_that_no_path_of_a_step_used_have_no_gradient_and_do_not_move(
    spy: Spy, schedule: str, optimizer: str
) -> None:
    space = toy_classifier_space(blocks=4)
    supernet = spy.supernet = shaken(space)
    train(supernet, one_shot(schedule, epochs=5, weight_decay=0.5, optimizer=optimizer))
    after = [before for _, before, _ in spy.steps[1:]] + [weights(supernet)]
    trained: set[str] = set()
    idle = partly = 0
    for (archs, before, gradients), then in zip(spy.steps, after, strict=True):
        masks = active_masks(supernet, archs)
        for name, parameter in supernet.named_parameters():
            mask = masks.get(name)
            if mask is None:
                assert gradients[name] is None, name
                mask = torch.zeros_like(parameter, dtype=torch.bool)
                idle += name in trained  # has momentum by now
            assert torch.equal(then[name][~mask], before[name][~mask]), name
            partly += bool(mask.any()) and not bool(mask.all())
        trained |= masks.keys()
    assert idle > 0
    assert partly > 0


@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_single_paths_learn_and_report_the_largest_and_the_smallest(schedule: str) -> None:
    supernet = SPACE.supernet()
    chosen = one_shot(schedule, epochs=12, learning_rate=0.2, label_smoothing=0.0)
    position = train(supernet, chosen)
    assert position.losses[-1] < 0.7 * position.losses[0]
    scores = {name: value for epoch, name, value in position.scores if epoch == 12}
    assert scores["largest"] >= 0.8
    assert scores.keys() == {"largest", "smallest"}


@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_single_paths_have_no_teacher(schedule: str) -> None:
    def taught(*_: Any) -> Tensor:
        raise AssertionError("distilled")

    task = dataclasses.replace(TASK, distillation=taught)
    train_supernet(shaken(SPACE), DATA, task, one_shot(schedule, epochs=1))


@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_settings_of_other_schedules_are_refused(schedule: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"random_networks \(3\) belongs to schedule 'sandwich'.*'{schedule}'"
    ):
        parse_recipe({"train": {"schedule": schedule, "random_networks": 3}})
    with pytest.raises(RecipeError, match="phases belong to schedule 'progressive'"):
        parse_recipe({"train": {"schedule": schedule, "phases": [{"epochs": 1}]}})


@pytest.mark.parametrize("schedule", ONE_SHOT)
def test_a_resolved_recipe_of_single_paths_reads_back(schedule: str) -> None:
    recipe = parse_recipe({"train": {"schedule": schedule}})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


# Resume -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run where nothing can be put in order, as a kill would."""


@pytest.mark.parametrize("kill_at", [2, 5, 9])
@pytest.mark.parametrize("schedule", ["sandwich", "progressive", *ONE_SHOT])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, kill_at: int
) -> None:
    chosen = progressive() if schedule == "progressive" else one_shot(schedule, epochs=3)
    whole = shaken(SPACE)
    expected = train(whole, chosen)
    monkeypatch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)

    def progress(step: int, total: int, text: str) -> None:
        if step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(shaken(SPACE), chosen, tmp_path / "c", progress=progress)
    supernet = SPACE.supernet()
    found = train(supernet, chosen, tmp_path / "c")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(supernet.state_dict()[name], tensor), name
    assert found == expected


_CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
path, checkpoint = sys.argv[1:]
sys.path.insert(0, str(Path(path).parents[1]))
specification = importlib.util.spec_from_file_location("under_test", path)
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
module.die(Path(checkpoint))
"""


def die(checkpoint: Path) -> None:
    """Train, and be killed by the system after the sixth of eight steps."""
    torch.set_num_threads(1)
    autocompress.training.loop.CHECKPOINT_SECONDS = -1.0

    def progress(step: int, total: int, text: str) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    train(shaken(SPACE), settings(), checkpoint, progress=progress)


def test_a_run_killed_by_the_system_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, __file__, str(tmp_path / "c")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    whole, supernet = shaken(SPACE), SPACE.supernet()
    steps: list[int] = []
    expected = train(whole, settings())
    found = train(supernet, settings(), tmp_path / "c", progress=lambda step, total, text: steps.append(step))
    assert steps == [6, 7, 8]  # the sixth had not been written yet
    for name, tensor in whole.state_dict().items():
        assert torch.equal(supernet.state_dict()[name], tensor), name
    assert found == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"supernet": toy_classifier_space(blocks=1).supernet()}, r"its space\.fingerprint is"),
        ({"chosen": settings(learning_rate=0.01)}, r"its settings\.learning_rate is 0\.05, here 0\.01"),
        ({"data": small_data(48)}, "its data is"),
    ],
    ids=["space", "settings", "data"],
)
def test_a_checkpoint_of_another_space_data_or_settings_is_refused_and_changes_nothing(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    train(shaken(SPACE), settings(), tmp_path / "c")
    supernet = other.get("supernet") or shaken(SPACE)
    before = copy.deepcopy(weights(supernet))
    data = other.get("data", DATA)
    with pytest.raises(CheckpointError, match=message):
        train_supernet(supernet, data, TASK, other.get("chosen", settings()), checkpoint=tmp_path / "c")
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
