"""Scores with intervals, against published examples and plain loops."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import small_data, small_network
from torch import Tensor

from autocompress.errors import EvaluationError
from autocompress.training.data import Images
from autocompress.training.evaluate import Scored, calibration_batches, evaluate
from autocompress.training.task import accuracy


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3 (Wilson), 95 %.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilson_s(successes: int, count: int, low: float, high: float) -> None:
    found = Scored(successes / count, 0.0, count).interval
    assert found == pytest.approx((low, high), abs=0.5e-4)


@given(st.integers(1, 10_000), st.data())
def test_the_interval_of_a_share_stays_in_it_and_holds_it(count: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, count)) / count
    low, high = Scored(share, 0.0, count).interval
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1 + 1e-12
    mirrored = Scored(1 - share, 0.0, count).interval
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_any_other_mean_is_normal() -> None:
    assert Scored(-2.0, 0.1, 50).interval == pytest.approx((-2 - 0.1959964, -2 + 0.1959964))


def test_a_score_is_the_mean_over_samples_with_its_standard_error() -> None:
    data = small_data(40)
    network = small_network().eval()
    scores = []
    with torch.no_grad():
        for position in range(10):
            x, y = data.validation[position]
            scores.append(float(network(x[None]).argmax() == y))
    found = evaluate(network, data.validation, accuracy)
    assert found.mean == pytest.approx(statistics.mean(scores))
    assert found.standard_error == pytest.approx(statistics.stdev(scores) / 10**0.5)
    assert found.count == 10
    assert 0 < found.mean < 1, "a network that is always right shows nothing"


def test_batches_of_any_size_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, network = small_data(40), small_network().eval()
    whole = evaluate(network, data.validation, accuracy)
    monkeypatch.setattr("autocompress.training.evaluate.EVALUATION_BATCH", 3)
    assert evaluate(network, data.validation, accuracy) == whole


def test_images_come_in_the_memory_format_and_no_gradient_is_kept() -> None:
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        assert not torch.is_grad_enabled()
        return x.mean((2, 3))

    evaluate(forward, small_data(16).validation, accuracy, memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_one_sample_has_no_spread() -> None:
    data = small_data(4)
    assert evaluate(small_network().eval(), data.validation, accuracy).standard_error == 0.0


@pytest.mark.parametrize(("asked", "sizes"), [(10, [10]), (64, [64]), (1000, [64]), (1, [1])])
def test_calibration_takes_so_many_training_images(asked: int, sizes: list[int]) -> None:
    assert [len(batch) for batch in calibration_batches(small_data(64), asked)] == sizes


def test_many_calibration_images_come_in_equal_batches_all_different() -> None:
    data = small_data(600, side=4)
    found = calibration_batches(data, 512)
    assert [len(batch) for batch in found] == [256, 256]
    assert len(torch.cat(found).flatten(1).unique(dim=0)) == 512


def test_calibration_images_are_training_images_as_they_are() -> None:
    data = small_data(16)
    assert isinstance(data.train, Images)
    known = {tuple(row.tolist()) for row in data.train.normalise(data.train.images).flatten(1)}
    (batch,) = calibration_batches(data, 8, seed=3)
    assert {tuple(row.tolist()) for row in batch.flatten(1)} <= known


def test_calibration_images_depend_on_the_seed_only() -> None:
    first, again, other = (calibration_batches(small_data(64), 8, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("broken_input", "cause"), [(True, "its input or target holds nan"), (False, "an output of the network")]
)
def test_a_score_that_is_not_finite_is_refused_with_the_first_sample_and_the_cause(
    broken_input: bool, cause: str
) -> None:
    items = [(torch.zeros(3, 4, 4), torch.tensor(0.0)) for _ in range(9)]
    items[5] = (torch.full((3, 4, 4), float("nan") if broken_input else 1.0), torch.tensor(0.0))

    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.where(outputs == 0, 0.0, float("nan"))

    with pytest.raises(
        EvaluationError, match=f"1 of 9 held-out samples is not finite, first of sample 5: {cause}"
    ):
        evaluate(lambda x: x.flatten(1).sum(dim=1), items, score)  # type: ignore[arg-type]


def test_an_accuracy_of_outputs_that_are_not_finite_is_refused() -> None:
    """The largest of nan is some class, right or wrong."""
    items = [(torch.zeros(3, 4, 4), torch.tensor(0)) for _ in range(3)]

    def forward(x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [1.0, 0.0]])[: len(x)]

    with pytest.raises(EvaluationError, match="1 of 3 held-out samples is not finite, first of sample 1"):
        evaluate(forward, items, accuracy)  # type: ignore[arg-type]
