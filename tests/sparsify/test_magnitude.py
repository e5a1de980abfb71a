"""Unstructured pruning: masks against sorting, and laws of the rounds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify.works import small, trained, training, work_on

from autocompress.errors import ConversionError, RecipeError
from autocompress.sparse.magnitude import MagnitudeOptions, magnitude, masks, weights_of


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "one": torch.randn(4, 3, 3, 3, generator=generator),
        "two": 3 * torch.randn(7, 5, generator=generator),
    }


def nothing_gone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_the_smallest_weights_of_each_layer_go(seed: int, share: float) -> None:
    weights = random_weights(seed)
    found = masks(weights, nothing_gone(weights), share, scope="layer")
    for name, weight in weights.items():
        count = round(share * weight.numel())
        assert int(found[name].sum()) == count
        threshold = np.sort(weight.abs().numpy().ravel())
        assert count == 0 or (weight[found[name]].abs() <= threshold[count - 1]).all()


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_one_threshold_serves_all_layers(seed: int, share: float) -> None:
    weights = random_weights(seed)
    found = masks(weights, nothing_gone(weights), share, scope="global")
    every = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    gone = torch.cat([found[name].flatten() for name in weights])
    assert int(gone.sum()) == round(share * len(every))
    if gone.any():
        assert float(every[gone].max()) <= float(every[~gone].min())


@given(st.integers(0, 10_000), st.sampled_from(["layer", "global"]))
def test_what_is_gone_stays_gone_even_if_the_rest_became_smaller(seed: int, scope: str) -> None:
    weights = random_weights(seed)
    first = masks(weights, nothing_gone(weights), 0.4, scope=scope)
    # Weights that were removed are large again: a mask does not look at them.
    moved = {name: torch.where(first[name], 100.0, 1e-3 * weight) for name, weight in weights.items()}
    second = masks(moved, first, 0.7, scope=scope)
    for name in weights:
        assert (second[name] | ~first[name]).all()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_is_zero_in_the_end_and_nothing_else(scope: str) -> None:
    found = trained("magnitude", options={"sparsity": 0.7, "rounds": 2, "scope": scope})
    sizes = {layer["name"]: layer["weights"] for layer in found.account["layers"]}
    zeros = {layer["name"]: layer["zeros"] for layer in found.account["layers"]}
    assert set(sizes) == {f"{name}.weight" for name in ("conv1", "conv2", "conv3", "conv4", "fc")}
    if scope == "layer":
        assert zeros == {name: round(0.7 * size) for name, size in sizes.items()}
    else:
        assert sum(zeros.values()) == round(0.7 * sum(sizes.values()))
        assert len({round(zeros[name] / sizes[name], 1) for name in sizes}) > 1
    kept = {layer["name"]: layer["nonzero"] for layer in found.account["csr"]["layers"]}
    assert kept == {name: sizes[name] - zeros[name] for name in sizes}
    # Biases and norms are trained, not removed.
    assert all((p != 0).any() for n, p in found.network.named_parameters() if p.dim() == 1)


def test_masks_never_revive_while_the_rest_is_trained() -> None:
    work = work_on(small(), settings=training(epochs=5))
    hooks = magnitude(work, MagnitudeOptions(sparsity=0.9, rounds=3))
    hooks.begin()
    optimizer = torch.optim.SGD(work.network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    zero: dict[str, Any] = {}
    shares = []
    for epoch in range(5):
        hooks.begin_epoch(epoch)
        before = {name: p.detach().clone() for name, p in work.network.named_parameters()}
        for step in range(3):
            x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(10 * epoch + step))
            optimizer.zero_grad()
            work.network(x).square().sum().backward()
            hooks.gradients()
            optimizer.step()
            hooks.after_step(0.1)
        now = {name: p.detach() == 0 for name, p in work.network.named_parameters() if p.dim() > 1}
        for name, was in zero.items():
            assert (now[name] | ~was).all()
        assert all((p != before[name]).any() for name, p in work.network.named_parameters())
        zero = now
        shares.append(float(torch.cat([each.flatten() for each in now.values()]).float().mean()))
    # Rounds begin at epochs 0, 1 and 3.
    assert shares == pytest.approx([0.3, 0.6, 0.6, 0.9, 0.9], abs=0.005)


def test_layers_can_be_left_alone_and_shared_weights_count_once() -> None:
    network = small()
    network.conv2.weight = network.conv2.weight  # the same parameter under one name
    assert "conv4.weight" not in weights_of(work_on(network, ignore=("conv[45]",)))
    with pytest.raises(ConversionError, match="ignore has 'head', which is none of conv1, conv2"):
        weights_of(work_on(network, ignore=("head",)))
    twice = torch.nn.Sequential(*[torch.nn.Linear(4, 4)] * 2)
    assert list(weights_of(work_on(twice))) == ["0.weight"]
    with pytest.raises(ConversionError, match="BatchNorm2d has no convolution or linear layer whose weights"):
        weights_of(work_on(torch.nn.BatchNorm2d(3)))


def test_each_round_needs_an_epoch() -> None:
    with pytest.raises(RecipeError, match=r"options.rounds \(4\) must not exceed train.epochs \(3\)"):
        trained("magnitude", options={"rounds": 4})
