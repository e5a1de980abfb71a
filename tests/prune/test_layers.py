"""What the criteria see of a model: its layers, norms, and rows of them."""

import numpy as np
import prune_networks as networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.prune.layers import Layer, entering, is_depthwise, leaving, structure
from autocompress.prune.samples import inputs_at, outputs_at, sample
from autocompress.prune.source import Source


def test_layers_come_in_the_order_in_which_they_run_with_the_norm_that_reads_them() -> None:
    found = structure(networks.chained())
    assert [(layer.name, layer.norm and layer.norm.scale) for layer in found.layers] == [
        ("0", "1.weight"),
        ("3", None),
        ("6", "7.weight"),
        ("11", None),
    ]
    assert [norm.scale for norm in found.norms] == ["1.weight", "7.weight"]
    assert found.layers[1].stride == (2, 2)
    assert found.layers[1].filters == ("3.weight", "3.bias")


def test_weights_without_a_module_and_layers_that_run_twice_are_seen() -> None:
    found = structure(networks.source_of(networks.Own()))
    assert [layer.weight for layer in found.layers] == ["kernel", "twice.weight", "fc.weight"]
    assert found.layers[0].padding == "same"
    assert found.runs["twice.weight"] == 2


def test_depthwise_layers_pass_labels_on_and_groups_share_them() -> None:
    source = networks.source_of(networks.Grouped())
    expand, depthwise, halves, _ = structure(source).layers
    assert [is_depthwise(source, layer) for layer in (expand, depthwise, halves)] == [False, True, False]
    labels = leaving(source, expand)
    for found in (entering(source, depthwise), leaving(source, depthwise), entering(source, halves)):
        np.testing.assert_array_equal(found, labels)
    np.testing.assert_array_equal(labels[:4], labels[4:])


class Multiplied(nn.Module):
    """A depthwise convolution with two outputs for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.depthwise(self.expand(x)).mean((2, 3)))
        return out


def test_a_depthwise_layer_that_multiplies_channels_reads_each_once() -> None:
    source = networks.source_of(Multiplied())
    expand, depthwise, fc = structure(source).layers
    np.testing.assert_array_equal(entering(source, depthwise), leaving(source, expand))
    np.testing.assert_array_equal(entering(source, fc), np.repeat(leaving(source, expand), 2))


def test_a_model_of_doubles_is_run_in_doubles() -> None:
    assert len(structure(Source(networks.chain().double(), torch.zeros(1, 3, 8, 8).double())).layers) == 4


# Rows ------------------------------------------------------------------------------------------------------


# PyTorch says that odd padding takes a copy.
@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 5, 1),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(0, 2)),
        nn.Conv2d(4, 5, 3, dilation=2, padding=1),
        nn.Conv2d(4, 5, (5, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(4, 5, (2, 4), padding="same"),
        nn.Conv2d(4, 5, 2, padding="valid"),
    ],
    ids=repr,
)
def test_weights_times_rows_of_inputs_are_rows_of_outputs(conv: nn.Conv2d) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 9, 7, generator=generator)
    layer = Layer(
        "weight",
        None,
        1,
        1,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
    )
    with torch.no_grad():
        output = F.conv2d(
            x,
            conv.weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        places = sample(layer, output, 4, generator)
        read, made = inputs_at(layer, x, output, places), outputs_at(layer, output, places)
        assert read.shape[:2] == (12, 4)
        torch.testing.assert_close(
            read.flatten(1) @ conv.weight.double().flatten(1).T, made, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("shape", [(3, 4), (3, 6, 4), (3, 5, 2, 4)])
def test_rows_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(5, 4, generator=generator)
    layer, output = Layer("weight", None, -1), x @ weight.T
    places = sample(layer, output, 3, generator)
    read, made = inputs_at(layer, x, output, places), outputs_at(layer, output, places)
    assert len(read) == 3 * min(3, x[0].numel() // 4)
    torch.testing.assert_close(read[:, :, 0] @ weight.double().T, made, rtol=1e-5, atol=1e-5)


def test_positions_are_drawn_once_each_and_all_where_there_are_not_more() -> None:
    layer, output = Layer("weight", None, 1), torch.zeros(5, 2, 4, 3)
    for count in (5, 12, 100):
        places = sample(layer, output, count, torch.Generator().manual_seed(0))
        pairs = set(zip(places.images.tolist(), places.positions.tolist(), strict=True))
        assert len(pairs) == len(places.images) == 5 * min(count, 12)
    assert {image for image, _ in pairs} == set(range(5))
