"""Images that are made from the statistics of batch norms."""

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.data_free import synthesize


class Net(nn.Module):
    """Norms are named in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.second, self.first = nn.Conv2d(6, 4, 3), nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(self.first(x)).relu()))  # type: ignore[no-any-return]


def trained() -> Net:
    """A network whose statistics come from data that are not noise."""
    generator = torch.Generator().manual_seed(0)
    network = Net()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    for norm in (network.early, network.late):
        norm.weight.data.fill_(1)
        norm.momentum = None
    with torch.no_grad():
        for _ in range(5):
            base = torch.randn(32, 1, 1, 1, generator=generator) + torch.randn(
                32, 3, 8, 8, generator=generator
            )
            network(base * 0.7)
    return network


def distance(network: Net, images: Tensor) -> float:
    fresh = Net()
    fresh.load_state_dict(network.state_dict())
    for norm in (fresh.early, fresh.late):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        fresh.train()(images)
    return sum(
        float((getattr(a, name) - getattr(b, name)).square().sum())
        for a, b in ((fresh.early, network.early), (fresh.late, network.late))
        for name in ("running_mean", "running_var")
    )


def test_statistics_of_made_images_are_those_of_the_data() -> None:
    network = trained()
    noise = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = synthesize(network, (3, 8, 8), images=16, steps=150, learning_rate=0.1)
    assert made.shape == noise.shape
    assert distance(network, made) < 0.1 * distance(network, noise)


def test_the_network_is_left_as_it_was_and_the_seed_decides() -> None:
    network = trained().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    first, again, other = (synthesize(network, (3, 8, 8), images=4, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_networks_that_know_nothing_of_their_data_are_refused() -> None:
    with pytest.raises(QuantizationError, match="Sequential has no batch norm with running statistics"):
        synthesize(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), (3, 8, 8))
    with pytest.raises(QuantizationError, match="images must be at least 2"):
        synthesize(trained(), (3, 8, 8), images=1)

    class Idle(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(QuantizationError, match="no batch norm of the network is run"):
        synthesize(Idle(), (3, 8, 8))
