"""Soft pruning: zeros after each epoch, filters that come back, and units that can be removed in the end."""

import torch
from sparsify.test_units import without
from sparsify.works import DATA, small, trained, training, work_on

from autocompress.sparse.soft import SoftOptions, soft
from autocompress.sparse.units import dead, zero_units


def test_in_the_end_the_share_is_zero_and_removing_it_changes_nothing() -> None:
    found = trained("soft", options={"rate": 0.4})
    assert [(g["name"], g["zero"]) for g in found.account["groups"]] == [
        ("conv1", 3),
        ("conv3", 4),
        ("conv4", 2),
    ]
    work = work_on(found.network)
    zero = torch.tensor(sorted(dead(work)))
    assert len(zero) == 9
    x = torch.stack([DATA.validation[i][0] for i in range(8)])
    with torch.no_grad():
        torch.testing.assert_close(
            without(work.source, zero)(x), found.network(x), atol=1e-5, rtol=0, check_stride=False
        )


def test_filters_are_zeroed_after_an_epoch_and_come_back_in_the_next() -> None:
    work = work_on(small(), settings=training(epochs=2))
    hooks = soft(work, SoftOptions(rate=0.5))
    network = work.network
    with torch.no_grad():
        for n in (1, 2, 3):
            network.get_parameter(f"bn{n}.bias").fill_(0.1)  # at 0 a zeroed filter would be at ReLU's kink
    hooks.end_epoch(0)
    zeroed = {n: (network.get_parameter(n).flatten(1) == 0).all(1) for n in ("conv1.weight", "conv3.weight")}
    assert [int(each.sum()) for each in zeroed.values()] == [4, 5]
    assert zero_units(work) == {"conv1": 0, "conv3": 0, "conv4": 0}
    # One step of training moves zeroed filters again.
    network.train()
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    network(x)[:, 0].sum().backward()
    for name, gone in zeroed.items():
        grad = network.get_parameter(name).grad
        assert grad is not None
        assert (grad[gone].flatten(1) != 0).any()
    # At the end of the last epoch units are zeroed as a whole.
    hooks.end_epoch(1)
    assert zero_units(work) == {"conv1": 4, "conv3": 5, "conv4": 3}


def test_the_lowest_norms_go_first() -> None:
    work = work_on(small())
    with torch.no_grad():
        work.network.get_parameter("conv3.weight")[[2, 5, 7]] *= 0.01
    soft(work, SoftOptions(rate=0.3)).end_epoch(0)
    weight = work.network.get_parameter("conv3.weight").flatten(1)
    assert (weight == 0).all(1).nonzero().flatten().tolist() == [2, 5, 7]
