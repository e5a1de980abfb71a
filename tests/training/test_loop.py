"""The loop against a plain one, killed and resumed, and rolled back."""

import copy
import itertools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_networks import assert_equal, small_data, small_network, weights
from torch import Tensor, nn

from autocompress.errors import CheckpointError, TrainingError
from autocompress.recipe import OptimizerSettings
from autocompress.training.checkpoint import save_checkpoint
from autocompress.training.data import Augmentation, batches
from autocompress.training.loop import (
    MAX_ROLLBACKS,
    Compute,
    Position,
    learning_rate,
    make_optimizer,
    run_epochs,
    seeded,
    steps_per_epoch,
    training_batches,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = small_data(64)
IDENTITY = {"kind": "test"}
STEPS = 4  # an epoch, at batches of 16


def settings(**changes: Any) -> OptimizerSettings:
    given: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.1, "shift": 1, "warmup_epochs": 1}
    return OptimizerSettings(**given | changes)


def supervised(model: nn.Module) -> Compute:
    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        loss = F.cross_entropy(model(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return compute


def every_minute() -> Callable[[], float]:
    """A clock by which each step takes so long that a checkpoint is due."""
    return itertools.count(0, 100).__next__


# Schedule ------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(settings(learning_rate=2.0), step, STEPS, epochs=3) for step in range(12)]
    ramp = [2 * share for share in (1 / 5, 2 / 5, 3 / 5, 4 / 5)]
    fall = [1 + math.cos(math.pi * done / 8) for done in range(8)]
    assert rates == pytest.approx(ramp + fall)
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)  # half way down


@given(st.floats(0, 4), st.integers(1, 20), st.integers(1, 6))
def test_the_learning_rate_is_positive_rises_then_falls_and_never_exceeds_the_setting(
    warmup: float, per_epoch: int, epochs: int
) -> None:
    chosen = settings(warmup_epochs=warmup)
    rates = [learning_rate(chosen, step, per_epoch, epochs) for step in range(per_epoch * epochs)]
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_past_the_end_the_learning_rate_is_zero() -> None:
    assert learning_rate(settings(), 12, STEPS, epochs=3) == pytest.approx(0, abs=1e-18)
    assert learning_rate(settings(), 20, STEPS, epochs=3) == pytest.approx(0, abs=1e-18)


# Optimizer and batches -----------------------------------------------------------------------------------


def test_weights_decay_and_biases_and_batch_norm_do_not() -> None:
    model = small_network()
    optimizer = make_optimizer(model, settings(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {"0.weight": 0.5, "1.weight": 0, "1.bias": 0, "5.weight": 0.5, "5.bias": 0}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_nesterov_s_if_there_is_momentum(momentum: float) -> None:
    optimizer = make_optimizer(small_network(), settings(momentum=momentum))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == momentum
    assert optimizer.defaults["nesterov"] == (momentum > 0)


def test_adamw_is_adamw() -> None:
    assert isinstance(make_optimizer(small_network(), settings(optimizer="adamw")), torch.optim.AdamW)


@pytest.mark.parametrize(("count", "steps"), [(64, 4), (63, 3), (16, 1), (5, 1)])
def test_an_epoch_has_whole_batches_only_unless_there_is_no_whole_one(count: int, steps: int) -> None:
    data = small_data(count)
    assert steps_per_epoch(data, settings()) == steps
    found = list(training_batches(data, settings(), epoch=0, seed=0))
    assert [len(images) for images, _ in found] == [min(16, count)] * steps


def test_skipped_batches_leave_the_rest_of_the_epoch_as_it_was() -> None:
    whole = list(training_batches(DATA, settings(cutout=3), epoch=2, seed=7))
    rest = list(training_batches(DATA, settings(cutout=3), epoch=2, seed=7, skip=1))
    assert len(rest) == 3
    for (images, targets), (expected, labels) in zip(rest, whole[1:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)


# Training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_the_plain_loop(optimizer: str) -> None:
    chosen = settings(optimizer=optimizer, gradient_clip=0.5, seed=3, cutout=2, weight_decay=0.01)
    model, plain = small_network(), small_network()
    position = run_epochs(model, DATA, chosen, supervised(model), epochs=3, identity=IDENTITY)

    decayed = [plain[0].weight, plain[5].weight]
    others = [plain[1].weight, plain[1].bias, plain[5].bias]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    mine: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    if optimizer == "adamw":
        mine = torch.optim.AdamW(groups, lr=0.1)
    losses = []
    for epoch in range(3):
        plain.train()
        found = batches(
            DATA.train, 16, seed=3, epoch=epoch, augment=Augmentation(shift=1, cutout=2), drop_last=True
        )
        for number, (images, targets) in enumerate(found):
            step = 4 * epoch + number
            rate = 0.1 * (step + 1) / 5 if step < 4 else 0.05 * (1 + math.cos(math.pi * (step - 4) / 8))
            for group in mine.param_groups:
                group["lr"] = rate
            mine.zero_grad()
            loss = F.cross_entropy(plain(images), targets)
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
            for parameter in plain.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(min(1.0, 0.5 / (float(norm) + 1e-6)))
            mine.step()
            losses.append(float(loss.detach()))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-6)
    expected = [sum(losses[4 * e : 4 * e + 4]) / 4 for e in range(3)]
    assert position.losses == pytest.approx(expected, rel=1e-4)
    assert (position.step, position.rollbacks, position.rate) == (12, 0, 1.0)


def test_it_tells_of_every_step_and_asks_for_validation_after_every_epoch() -> None:
    model = small_network()
    told: list[tuple[int, int, str]] = []
    called: list[str] = []

    def validate(epoch: int, position: Position) -> None:
        called.append(f"validate {epoch} at {position.step}")
        model.eval()  # the next epoch trains in training mode all the same

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        assert model.training
        return supervised(model)(images, targets, step)

    run_epochs(
        model,
        DATA,
        settings(),
        compute,
        epochs=2,
        identity=IDENTITY,
        validate=validate,
        prepare=lambda position, optimizer: called.append("prepare"),
        before_epoch=lambda epoch, optimizer: called.append(f"before {epoch}"),
        progress=lambda step, total, text: told.append((step, total, text)),
    )
    assert called == ["prepare", "before 0", "validate 0 at 4", "before 1", "validate 1 at 8"]
    assert [(step, total) for step, total, _ in told] == [(step, 8) for step in range(1, 9)]
    assert told[0][2].startswith("epoch 1/2, loss ")


# Resume --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run where nothing can be put in order, as a kill would."""


class Noisy(nn.Sequential):
    """Random numbers of the global generator are part of a run."""

    def __init__(self) -> None:
        network = small_network()
        super().__init__(*list(network)[:-1], nn.Dropout(0.5), network[-1])


def train(
    model: nn.Module, checkpoint: Path | None, *, kill_at: int = -1, optimizer: str = "sgd"
) -> Position:
    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        if step == kill_at:
            raise Killed
        return supervised(model)(images, targets, step)

    return run_epochs(
        model,
        DATA,
        settings(optimizer=optimizer),
        compute,
        epochs=3,
        identity=IDENTITY,
        checkpoint=checkpoint,
        validate=lambda epoch, position: position.scores.append([epoch, "x", position.losses[-1]]),
        clock=every_minute(),
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kill_at", [0, 1, 4, 6, 11])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, kill_at: int, optimizer: str) -> None:
    torch.manual_seed(1)
    whole = Noisy()
    expected = train(whole, None, optimizer=optimizer)

    checkpoint = tmp_path / "checkpoint.pt"
    torch.manual_seed(1)
    with pytest.raises(Killed):
        train(Noisy(), checkpoint, kill_at=kill_at, optimizer=optimizer)
    torch.manual_seed(99)  # another process has other random numbers, and a model of its own
    model = Noisy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    found = train(model, checkpoint, optimizer=optimizer)
    assert_equal(weights(model), weights(whole))
    assert found == expected


def test_what_a_network_draws_depends_on_seed_and_step_alone_and_global_numbers_stay_as_they_were() -> None:
    def run(before: int) -> tuple[Noisy, Tensor]:
        model = Noisy()
        torch.manual_seed(before)
        train(model, None)
        return model, torch.rand(1)

    with torch.random.fork_rng(devices=[]):
        (one, after), (other, _) = run(1), run(2)
        assert_equal(weights(one), weights(other))
        torch.manual_seed(1)
        assert torch.equal(after, torch.rand(1))


def test_steps_and_seeds_draw_different_numbers() -> None:
    drawn = set()
    for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1), (10**30, 0)]:
        with seeded(seed, step):
            drawn.add(float(torch.rand(1)))
    assert len(drawn) == 5


def test_the_global_numbers_are_put_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), seeded(0, 0):
        torch.rand(1).view(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_inside_an_epoch_it_goes_on_at_the_very_step(tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(Killed):
        train(Noisy(), tmp_path / "checkpoint.pt", kill_at=6)
    model = Noisy()

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        steps.append(step)
        return supervised(model)(images, targets, step)

    run_epochs(
        model,
        DATA,
        settings(),
        compute,
        epochs=3,
        identity=IDENTITY,
        checkpoint=tmp_path / "checkpoint.pt",
    )
    assert steps == list(range(6, 12))


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    model = Noisy()
    expected = train(model, tmp_path / "checkpoint.pt")
    trained = weights(model)
    again = Noisy()
    assert train(again, tmp_path / "checkpoint.pt", kill_at=0) == expected
    assert_equal(weights(again), trained)


def test_seconds_of_a_training_are_those_before_a_kill_too(tmp_path: Path) -> None:
    spent: list[float] = []

    def run(kill_at: int) -> Position:
        model = small_network()

        def compute(images: Tensor, targets: Tensor, step: int) -> float:
            if step == kill_at:
                raise Killed
            time.sleep(0.05)
            return supervised(model)(images, targets, step)

        start = time.monotonic()
        try:
            return run_epochs(
                model, DATA, settings(), compute, epochs=2, identity=IDENTITY,
                checkpoint=tmp_path / "checkpoint.pt", clock=every_minute(),
            )  # fmt: skip
        finally:
            spent.append(time.monotonic() - start)

    with pytest.raises(Killed):
        run(4)
    assert 8 * 0.05 <= run(-1).seconds <= sum(spent)


def test_between_checkpoints_there_is_at_least_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(
        "autocompress.training.loop.save_checkpoint",
        lambda path, identity, content: saved.append(content["position"]["step"]),
    )
    model = small_network()
    seconds = itertools.count(0, 25).__next__  # 60 s are over at every third step
    run_epochs(
        model,
        small_data(160),
        settings(),
        supervised(model),
        epochs=1,
        identity=IDENTITY,
        checkpoint=tmp_path / "c",
        clock=seconds,
    )
    assert saved == [0, 3, 6, 9, 10]


def test_more_state_than_the_model_s_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"

    def run(extra: dict[str, Any], kill_at: int) -> None:
        model = small_network()

        def compute(images: Tensor, targets: Tensor, step: int) -> float:
            if step == kill_at:
                raise Killed
            extra["sum"] = extra.get("sum", torch.zeros(())) + step
            return supervised(model)(images, targets, step)

        run_epochs(
            model,
            DATA,
            settings(),
            compute,
            epochs=2,
            identity=IDENTITY,
            checkpoint=path,
            extra_state=extra,
            clock=every_minute(),
        )

    with pytest.raises(Killed):
        run({}, 5)
    extra = {"sum": torch.tensor(1000.0)}
    run(extra, -1)
    assert extra["sum"] == sum(range(8))


def test_a_checkpoint_of_another_identity_is_refused(tmp_path: Path) -> None:
    train(small_network(), tmp_path / "checkpoint.pt")
    model = small_network()
    with pytest.raises(CheckpointError, match="its kind is 'test', here 'other'"):
        run_epochs(
            model,
            DATA,
            settings(),
            supervised(model),
            epochs=3,
            identity={"kind": "other"},
            checkpoint=tmp_path / "checkpoint.pt",
        )


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(small_network(), tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="does not fit this network"):
        train(small_network(width=7), tmp_path / "checkpoint.pt")


def test_a_checkpoint_that_lacks_parts_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", IDENTITY, {"position": {"step": 1}})
    with pytest.raises(CheckpointError, match="does not fit this network: 'model'"):
        train(small_network(), tmp_path / "checkpoint.pt")


# Collapse ------------------------------------------------------------------------------------------------


class Faulty:
    """Trains, but fails at given steps the first times it comes there."""

    def __init__(self, model: nn.Module, faults: dict[int, int], how: str = "loss") -> None:
        self.model, self.faults, self.how = model, dict(faults), how
        self.visited: list[int] = []
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> float:
        self.visited.append(step)
        self.images.append(images)
        loss = supervised(self.model)(images, targets, step)
        if self.faults.get(step, 0):
            self.faults[step] -= 1
            if self.how == "loss":
                return math.nan
            next(self.model.parameters()).grad[0] = math.inf  # type: ignore[index]
        return loss


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_rolls_back_to_the_start_of_the_epoch_with_half_the_rate(how: str) -> None:
    model = small_network()
    compute = Faulty(model, {6: 1}, how)
    told: list[str] = []
    rates: list[float] = []
    state: list[dict[str, Tensor]] = []

    def progress(step: int, total: int, text: str) -> None:
        if text.startswith("rolled back"):
            told.append(f"{step} {text}")
            assert_equal(weights(model), state[-1])

    def guard(step: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        rates.append(optimizer.param_groups[0]["lr"])
        return nullcontext()

    position = run_epochs(
        model,
        DATA,
        settings(),
        compute,
        epochs=3,
        identity=IDENTITY,
        guard=guard,
        before_epoch=lambda epoch, optimizer: state.append(weights(model)),
        progress=progress,
    )
    assert compute.visited == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11]
    assert told == [f"4 rolled back: the {how} is {'nan' if how == 'loss' else 'inf'} at step 6"]
    assert (position.rollbacks, position.rate, position.step, len(position.losses)) == (1, 0.5, 12, 3)
    schedule = [learning_rate(settings(), step, STEPS, 3) for step in range(12)]
    assert rates == pytest.approx([*schedule[:6], *(rate / 2 for rate in schedule[4:])])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not torch.equal(compute.images[4], compute.images[7]), "the same batches again"


def test_after_the_last_roll_back_it_is_an_error_that_says_where_and_how_small_the_rate_was() -> None:
    model = small_network()
    compute = Faulty(model, {5: 99})
    with pytest.raises(TrainingError, match="the loss is nan at step 5, after 3 roll-backs") as caught:
        run_epochs(model, DATA, settings(), compute, epochs=3, identity=IDENTITY)
    assert compute.visited.count(5) == MAX_ROLLBACKS + 1
    assert "the last 0.0125" in str(caught.value)  # 0.1 / 2^3
    assert "learning_rate (0.1)" in str(caught.value)


def scripted(model: nn.Module, means: list[float]) -> Compute:
    """Trains, but reports these losses, one an epoch, roll-backs included."""
    reported = iter(means)
    current = [0.0]

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        if step % STEPS == 0:
            current[0] = next(reported)
        supervised(model)(images, targets, step)
        return current[0]

    return compute


def test_a_loss_back_at_the_start_rolls_back_to_the_last_good_epoch() -> None:
    model = small_network()
    ends: list[dict[str, Tensor]] = []
    back: list[dict[str, Tensor]] = []
    # Learned to 0.6 of the first loss, then lost all of it; the second try goes well.
    compute = scripted(model, [2.0, 1.2, 1.97, 1.1])
    position = run_epochs(
        model,
        DATA,
        settings(),
        compute,
        epochs=3,
        identity=IDENTITY,
        validate=lambda epoch, position: ends.append(weights(model)),
        progress=lambda step, total, text: back.append(weights(model)) if "rolled back" in text else None,
    )
    assert position.losses == pytest.approx([2.0, 1.2, 1.1])
    assert (position.rollbacks, position.rate) == (1, 0.5)
    assert len(ends) == 3
    assert len(back) == 1
    assert_equal(back[0], ends[1])


@pytest.mark.parametrize("losses", [[2.0, 1.2, 1.9], [2.0, 1.4, 1.97], [2.0, 2.5, 3.0]])
def test_less_than_that_is_no_collapse(losses: list[float]) -> None:
    # Risen by less than all that was learned; little had been learned; nothing had been learned.
    model = small_network()
    position = run_epochs(model, DATA, settings(), scripted(model, losses), epochs=3, identity=IDENTITY)
    assert position.rollbacks == 0


def test_a_run_with_a_roll_back_in_an_earlier_epoch_is_resumed_exactly(tmp_path: Path) -> None:
    def run(checkpoint: Path | None, kill_at: int) -> tuple[nn.Module, Position]:
        model = small_network()
        faulty = Faulty(model, {5: 1} if kill_at != -1 or checkpoint is None else {})

        def compute(images: Tensor, targets: Tensor, step: int) -> float:
            if step == kill_at:
                raise Killed
            return faulty(images, targets, step)

        return model, run_epochs(
            model,
            DATA,
            settings(),
            compute,
            epochs=3,
            identity=IDENTITY,
            checkpoint=checkpoint,
            clock=every_minute(),
        )

    whole, expected = run(None, -1)
    with pytest.raises(Killed):
        run(tmp_path / "c", 10)
    model, found = run(tmp_path / "c", -1)
    assert_equal(weights(model), weights(whole))
    assert found == expected
    assert found.rollbacks == 1


def test_what_was_read_of_a_good_state_does_not_change_with_training() -> None:
    # Two roll-backs to one epoch: the second restores the same weights as the first.
    model = small_network()
    back: list[dict[str, Tensor]] = []
    run_epochs(
        model,
        DATA,
        settings(),
        Faulty(model, {6: 2}),
        epochs=2,
        identity=IDENTITY,
        progress=lambda step, total, text: (
            back.append(copy.deepcopy(weights(model))) if "rolled back" in text else None
        ),
    )
    assert len(back) == 2
    assert_equal(back[0], back[1])
