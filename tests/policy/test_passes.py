"""Passes of a policy: what each leaves of a network, what it never touches, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import assert_equal, small_data, weights
from torch import nn

from autocompress.count import count
from autocompress.errors import (
    DistillationError,
    PolicyError,
    QuantizationError,
)
from autocompress.latency.target import load_target
from autocompress.policy.passes import PASSES, Context, above_threshold, apply, check, is_off, settings_of
from autocompress.prune.source import Source
from autocompress.quantize.layer import has_quantizers
from autocompress.recipe import TaskSettings
from autocompress.training.task import load_task

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = small_data(64)
IMAGE = torch.zeros(1, 3, 12, 12)


def network(seed: int = 0) -> nn.Sequential:
    """Three convolutions; nothing of it is at zero or one by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for entering, leaving, stride in ((3, 16, 1), (16, 16, 2), (16, 24, 1)):
            layers += [
                nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(leaving),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)).eval()


def context(**changes: Any) -> Context:
    given: dict[str, Any] = {
        "teacher": network(),
        "data": DATA,
        "task": load_task(TaskSettings()),
        "target": load_target("onnxruntime-cpu"),
        "size": (12, 12),
        "finetune": {"batch_size": 16, "shift": 1},
    }
    return Context(**given | changes)


def macs(made: nn.Module) -> int:
    return count(made, IMAGE).macs


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_off_returns_what_it_was_given(name: str) -> None:
    given = network()
    assert PASSES[name].run(given, context(), **PASSES[name].off) is given


SMALLER: dict[str, dict[str, Any]] = {
    "prune": {"ratio": 0.4, "criterion": "l2"},
    "factorize": {"method": "svd", "ratio": 0.5},
    "compact": {"kind": "depthwise"},
    "quantize": {"bits": 8},
    "distill": {"epochs": 1},
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_leaves_what_it_was_given_as_it_was(name: str) -> None:
    given = network()
    before = weights(given)
    made = PASSES[name].run(given, context(teacher=given), **SMALLER[name])
    assert made is not given
    assert_equal(before, weights(given))
    assert not given.training
    assert made.eval()(torch.randn(2, 3, 12, 12)).shape == (2, 3)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("criterion", ["taylor", "l2"])
def test_pruning_removes_at_least_its_share_of_the_macs(ratio: float, criterion: str) -> None:
    made = PASSES["prune"].run(network(), context(), ratio=ratio, criterion=criterion)
    assert macs(made) <= (1 - ratio) * macs(network())


def test_the_threshold_is_the_lowest_that_leaves_the_share() -> None:
    source = Source(network(), IMAGE)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(len(group)) for group in source.groups}
    source = source.ranked(scores)
    limit = 0.5 * sum(op.macs for op in source.operations(source.full))
    found = above_threshold(source, scores, 0.5)
    everything = np.sort(np.concatenate(list(scores.values())))

    def above(threshold: float) -> tuple[int, ...]:
        kept = (int((scores[group.name] > threshold).sum()) for group in source.groups)
        return tuple(max(least, n) for least, n in zip(source.least, kept, strict=True))

    fitting = [
        widths
        for widths in map(above, everything)
        if sum(op.macs for op in source.operations(widths)) <= limit
    ]
    assert found == fitting[0]


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_kept_channels_are_multiples_or_all_there_are_and_hold_the_share(multiple: int) -> None:
    source = Source(network(), IMAGE)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(len(group)) for group in source.groups}
    source = source.ranked(scores)
    found = above_threshold(source, scores, 0.6, multiple)
    assert all(n % multiple == 0 or n == full for n, full in zip(found, source.full, strict=True))
    macs_of = [sum(op.macs for op in source.operations(widths)) for widths in (found, source.full)]
    assert macs_of[0] <= 0.6 * macs_of[1]


def test_a_multiple_below_none_is_refused() -> None:
    with pytest.raises(PolicyError, match="multiple of pruning must be 1 or more"):
        PASSES["prune"].run(network(), context(), ratio=0.2, multiple=-1)


def test_what_cannot_be_pruned_away_is_refused_with_the_least() -> None:
    with pytest.raises(PolicyError, match=r"cannot leave 0% of the MACs: the fewest channels need [\d.]+%"):
        PASSES["prune"].run(network(), context(), ratio=0.9999, criterion="l2")


@pytest.mark.parametrize("method", ["svd", "spatial", "tucker"])
def test_factorized_layers_need_less(method: str) -> None:
    made = PASSES["factorize"].run(network(), context(), method=method, ratio=0.5)
    # The first convolution has three inputs, and the last layer is small: others are halved.
    assert macs(made) <= 0.75 * macs(network())


@pytest.mark.parametrize(
    ("kind", "share", "replaced"), [("depthwise", 1.0, 2), ("fire", 1.0, 2), ("fire", 0.5, 1)]
)
def test_compact_layers_take_the_place_of_the_largest(kind: str, share: float, replaced: int) -> None:
    given = network()
    made = PASSES["compact"].run(given, context(), kind=kind, share=share)
    assert isinstance(made[0], nn.Conv2d)  # three inputs
    changed = [n for n in (3, 6) if not isinstance(made[n], nn.Conv2d)]
    assert len(changed) == replaced
    assert changed[-1] == 6 or share == 1.0
    assert macs(made) < macs(given)


def test_quantized_layers_have_the_bits_that_were_asked_for() -> None:
    made = PASSES["quantize"].run(network(), context(), bits=8)
    assert has_quantizers(made)
    with pytest.raises(QuantizationError, match="cannot run widths 3"):
        PASSES["quantize"].run(network(), context(), bits=3)


def test_each_epoch_of_distillation_is_told_when_its_checkpoint_is_there(tmp_path: Path) -> None:
    told: list[tuple[int, float, bool]] = []

    def tell(epoch: int, score: float) -> None:
        told.append((epoch, score, (tmp_path / "distill.pt").exists()))

    PASSES["distill"].run(network(), context(checkpoint=tmp_path, after_epoch=tell), epochs=2, losses="kd+at")
    assert [(epoch, there) for epoch, _, there in told] == [(1, True), (2, True)]
    assert all(0 <= score <= 1 for _, score, _ in told)


def test_a_whole_policy_is_its_passes_one_after_the_other() -> None:
    given, surroundings = network(), context()
    policy = [(name, SMALLER[name]) for name in ("prune", "factorize", "quantize", "distill")]
    whole = apply(given, policy, surroundings)
    by_hand: nn.Module = given
    for name, settings in policy:
        by_hand = PASSES[name].run(by_hand, surroundings, **settings)
    images = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(whole(images), by_hand.eval()(images))
    assert has_quantizers(whole)


@pytest.mark.parametrize(
    ("policy", "error", "text"),
    [
        ([("prun", {})], PolicyError, "a pass is one of prune, .*, got 'prun'; did you mean 'prune'?"),
        ([("prune", {"rate": 0.5})], PolicyError, "has the settings criterion, ratio, multiple, not rate"),
        (
            [("quantize", {"bits": 8}), ("prune", {"ratio": 0.5})],
            PolicyError,
            "'prune' works on floating point, and stands behind 'quantize': put it before",
        ),
        ([("prune", {"ratio": 1.0})], PolicyError, r"must be a share in \[0, 1\), got 1.0"),
        ([("prune", {"ratio": 0.5, "criterion": "best"})], PolicyError, "must be .*taylor.*, got 'best'"),
        ([("factorize", {"method": "lu"})], PolicyError, "must be none, svd, .*, got 'lu'"),
        ([("compact", {"kind": "ice"})], PolicyError, "must be none, depthwise, fire, got 'ice'"),
        ([("distill", {"losses": "kb"})], DistillationError, "no distillation loss 'kb'"),
        (
            [("distill", {"alpha": 1.5})],
            PolicyError,
            "alpha of pass 'distill': .* less than or equal to 1, got 1.5",
        ),
        ([("distill", {"temperature": 0})], PolicyError, "temperature of pass 'distill': .* than 0, got 0"),
        ([("distill", {"epochs": 1.5})], PolicyError, "epochs of pass 'distill': .* got 1.5"),
        (
            [("distill", {"epochs": 1}), ("prune", {"ratio": 0.5})],
            PolicyError,
            "'prune' stands behind 'distill': what is pruned would hang on training",
        ),
    ],
)
def test_what_cannot_be_is_refused(policy: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        apply(network(), policy, context())


def test_a_pass_that_comes_twice_has_checkpoints_of_its_own_and_resumes(tmp_path: Path) -> None:
    policy: Any = [("distill", {"epochs": 1}), ("quantize", {"bits": 8}), ("distill", {"epochs": 1})]
    first, again = (apply(network(), policy, context(checkpoint=tmp_path)) for _ in range(2))
    assert {path.parent.name for path in tmp_path.rglob("distill.pt")} == {"0", "2"}
    assert_equal(weights(first), weights(again))
    assert_equal(weights(first), weights(apply(network(), policy, context())))


def test_a_quantized_network_learns_from_maps_and_not_from_weights() -> None:
    """What rounds weights gives tensors of four dimensions, too."""
    policy: Any = [("quantize", {"bits": 8}), ("distill", {"epochs": 1, "losses": "kd+at+sp"})]
    assert has_quantizers(apply(network(), policy, context()))


def test_what_a_pass_that_is_off_leaves_behind_it_is_free() -> None:
    check([("distill", {"epochs": 0}), ("prune", {"ratio": 0.5})])
    check([("distill", {"epochs": 1}), ("prune", {"ratio": 0.0})])


def test_a_pass_whose_switch_is_left_out_is_off_where_that_is_its_default() -> None:
    assert is_off("factorize", {"ratio": 0.5})
    assert is_off("prune", {})
    assert not is_off("distill", {"losses": "kd"})


def test_settings_have_their_defaults() -> None:
    assert settings_of("prune") == {"criterion": "taylor", "ratio": 0.0, "multiple": 0}
    assert settings_of("distill")["losses"] == "kd"
