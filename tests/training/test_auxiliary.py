"""The auxiliary classifier: its layers, its place, and a network that does not notice."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_networks import images, small_data, small_network, weights
from torch import Tensor, nn

from autocompress.errors import RecipeError
from autocompress.recipe import FinetuneSettings
from autocompress.training.auxiliary import AuxiliaryHead, WithAuxiliary, with_auxiliary

DATA = small_data(16)
SETTINGS = FinetuneSettings(auxiliary=0.4, batch_size=8)


def chain(cells: int, *, classes: int = 3) -> nn.Sequential:
    """A stem, cells whose outputs are `(batch, 3 + index, 12, 12)`, and a classifier."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 3, 1)]
    blocks += [nn.Conv2d(3 + cell, 4 + cell, 1) for cell in range(cells)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 + cells, classes))
    return nn.Sequential(*blocks, head)


def attach(network: nn.Module, **changes: Any) -> WithAuxiliary:
    given: dict[str, Any] = {"data": DATA, "settings": SETTINGS, "resolution": (12, 12)}
    return with_auxiliary(network, **given | changes)


# The head --------------------------------------------------------------------------------------------------


def test_on_the_map_of_darts_it_has_the_layers_of_darts() -> None:
    # 8x8 -> (8 - 5) // 3 + 1 = 2 -> 1; convolutions without biases, norms with two numbers a channel.
    head = AuxiliaryHead((144, 8, 8), 10)
    parameters = 144 * 128 + 2 * 128 + 128 * 768 * 2 * 2 + 2 * 768 + 768 * 10 + 10
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters
    kinds = [type(layer).__name__ for layer in head.features]
    assert kinds == ["ReLU", "AvgPool2d", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU"]
    assert head.features(torch.randn(2, 144, 8, 8)).shape == (2, 768, 1, 1)


@pytest.mark.parametrize(
    ("side", "kernel"),
    [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((1, 5), (1, 2)), ((7, 7), (2, 2)), ((32, 20), (2, 2))],
)
def test_maps_of_every_size_are_classified(side: tuple[int, int], kernel: tuple[int, int]) -> None:
    head = AuxiliaryHead((3, *side), 5)
    found = [layer.kernel_size for layer in head.features if isinstance(layer, nn.Conv2d)]
    assert found == [(1, 1), kernel]
    x = torch.randn(2, 3, *side)
    before = x.clone()
    assert head(x).shape == (2, 5)
    assert torch.equal(x, before)


# Its place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "cell"), [(20, 13), (8, 5), (14, 9), (1, 0), (2, 1)])
def test_it_sits_after_two_thirds_of_the_blocks(cells: int, cell: int) -> None:
    """As DARTS counts its cells from 0: `2 * layers // 3`; never on the classifier."""
    found = attach(chain(cells))
    assert found.block == cell + 1
    first = found.head.features[2]  # type: ignore[union-attr,index]
    assert first.in_channels == 4 + cell  # type: ignore[union-attr]


def test_it_sees_the_output_of_its_block_and_the_network_s_own_outputs_are_as_before() -> None:
    network = chain(3)
    both = attach(network).eval()
    x = images()
    outputs, aside = both(x)
    assert torch.equal(outputs, network(x))
    assert torch.equal(aside, both.head(network[:4](x)))
    assert aside.shape == outputs.shape == (4, 3)


class Pair(nn.Module):
    """A cell that passes on the output before its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[:, :2] + 1


class Second(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[1].mean((2, 3))


def test_of_a_tuple_the_last_tensor_is_taken() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), Pair(), nn.Sequential(Second(), nn.Linear(2, 3)))
    both = attach(network).eval()
    x = images()
    assert torch.equal(both(x)[1], both.head(network[0](x)[:, :2] + 1))


def test_the_head_sees_the_map_before_a_later_block_changes_it_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Hardtanh(5, 6, inplace=True))
    network.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    both = WithAuxiliary(network, 1, AuxiliaryHead((4, 12, 12), 3)).eval()
    x = images()
    assert torch.equal(both(x)[1], both.head(network[:2](x)))


def test_the_network_is_left_without_hooks_also_after_an_error() -> None:
    network = chain(3)
    both = attach(network)
    with pytest.raises(RuntimeError, match="channels"):
        both(torch.zeros(2, 7, 12, 12))
    both(images())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_first_weights_depend_on_the_seed_alone_and_global_numbers_stay() -> None:
    network = chain(3)
    before, state = weights(network), torch.get_rng_state()
    one = weights(attach(network).head)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    torch.rand(1)
    same = weights(attach(network).head)
    other = weights(attach(network, settings=SETTINGS.model_copy(update={"seed": 1})).head)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), {}, "at least 3 blocks, got 2 in a row"),
        (nn.Linear(3, 3), {}, "at least 3 blocks, got a Linear"),
        (small_network(), {}, r"a map .*, got \(1, 6\) from block 5 of 6"),
        (chain(2, classes=3)[:-1], {}, r"outputs \(batch, classes\), got \(1, 5, 12, 12\)"),
        (chain(2), {"data": replace(DATA, classes=0)}, "labels that are classes, not those of small"),
        (chain(2), {"settings": FinetuneSettings(auxiliary=0.4, batch_size=1)}, "2 images a step, got 1"),
    ],
    ids=["short", "no sequence", "no map", "maps as outputs", "no classes", "one image"],
)
def test_where_it_has_no_place_is_an_error_with_the_way_out(
    network: nn.Module, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"{message}; set finetune.auxiliary .0.4. to 0"):
        attach(network, **changes)
    assert not any(module._forward_hooks for module in network.modules())
