"""What of a model can be quantized, read off its graph."""

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import residual
from torch import Tensor, nn

from autocompress.errors import QuantizationError
from autocompress.quantize.plan import make_plan

IMAGE = torch.zeros(1, 3, 8, 8)


def test_layers_stand_in_order_with_what_is_folded_into_them() -> None:
    plan = make_plan(residual(), IMAGE)
    assert [site.name for site in plan.sites] == [
        "stem", "left", "after", "right", "swish", "last", "fc",
    ]  # fmt: skip
    assert {site.name: site.norm for site in plan.sites if site.norm} == {
        "stem": "stem_norm",
        "left": "left_norm",
    }
    assert not plan.left


def test_layers_that_read_one_tensor_have_one_source() -> None:
    plan = make_plan(residual(), IMAGE)
    assert plan.site("left").source == plan.site("right").source == "left"
    assert plan.site("after").source == "after"


def test_signs_follow_from_activations() -> None:
    plan = make_plan(residual(), IMAGE)
    positive = {site.name: site.positive for site in plan.sites}
    # An image has any sign, hard swish is negative somewhere, a mean of what ReLU gives is not.
    assert positive == {
        "stem": False, "left": True, "after": True, "right": True, "swish": True, "last": False, "fc": True,
    }  # fmt: skip


def test_integers_are_handed_on_only_where_nothing_else_reads_them() -> None:
    plan = make_plan(residual(), IMAGE)
    readers = {site.name: site.reader for site in plan.sites}
    # What the stem gives is read by two layers, through one ReLU; the others meet an addition, hard swish, a
    # mean, or the end.
    assert readers == {
        "stem": "left",
        "left": "after",
        "after": "",
        "right": "",
        "swish": "",
        "last": "",
        "fc": "",
    }
    assert {site.name for site in plan.sites if site.rectified} == {"stem", "left", "last"}


class Functional(nn.Module):
    """A convolution as a function, a layer that runs twice, and one that can be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.twice = nn.Conv2d(3, 3, 1)
        self.once = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(F.relu(self.twice(F.conv2d(x, self.weight)))))


def test_functions_and_layers_that_run_twice_stay_in_floating_point() -> None:
    plan = make_plan(Functional(), IMAGE)
    assert [site.name for site in plan.sites] == ["once"]
    reasons = {left.layer: (left.reason, left.advice) for left in plan.left}
    assert "calls conv2d as a function" in reasons["weight"][0]
    assert "module of Conv2d" in reasons["weight"][1]
    assert "runs 2 times" in reasons["twice"][0]


class Shared(nn.Module):
    """One batch norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))


def test_a_batch_norm_of_two_layers_is_part_of_neither() -> None:
    assert [site.norm for site in make_plan(Shared().eval(), IMAGE).sites] == ["", ""]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(QuantizationError, match="no layer of Sequential can be quantized"):
        make_plan(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval(), IMAGE)
