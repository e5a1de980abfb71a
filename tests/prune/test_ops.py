"""Operations of users' models against the modules they build."""

import dataclasses
import itertools

import pytest
import torch
from prune.zoo import macs_of, params_of, run

from autocompress.ops import OpSpec
from autocompress.prune.ops import BatchNorm, Convolution, Parameters, Product

CONVOLUTIONS = [
    Convolution(6, 4, 9, 7, kernel, stride, padding, dilation, groups, bias, norm, "relu")
    for (kernel, stride, padding, dilation), groups, (bias, norm) in itertools.product(
        [
            ((1, 7), (1, 1), (0, 3), (1, 1)),
            ((3, 3), (2, 1), (1, 0), (2, 1)),
            ((2, 3), (1, 3), (2, 2), (1, 2)),
        ],
        [1, 2],
        [(True, False), (False, True)],
    )
]
TRANSPOSED = [
    dataclasses.replace(op, transposed=True, output_padding=(op.stride[0] - 1, 0)) for op in CONVOLUTIONS
]
DEPTHWISE = [
    Convolution(6, 12, 5, 5, (3, 2), groups=6),
    Convolution(6, 12, 5, 5, (3, 2), (2, 2), groups=6, transposed=True),
]


@pytest.mark.parametrize("op", [*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE], ids=lambda op: op.key)
def test_a_convolution_states_what_its_module_has(op: Convolution) -> None:
    module, image = op.module().eval(), torch.randn(1, *op.in_shape)
    assert run(module, image).shape == (1, *op.out_shape)
    assert op.macs == macs_of(module, image)
    assert op.params == params_of(module) == sum((*op.weight_tensors, *op.other_tensors))
    tensors = [parameter.numel() for parameter in module.parameters()]
    assert sorted((*op.weight_tensors, *op.other_tensors)) == sorted(tensors)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_has_parameters_and_no_macs(affine: bool) -> None:
    op = BatchNorm(5, 3, 4, affine)
    module = op.module().eval()
    assert run(module, torch.randn(2, *op.in_shape)).shape == (2, *op.out_shape)
    assert (op.macs, op.params, op.weight_tensors) == (0, params_of(module), ())
    assert sum(op.other_tensors) == op.params == 10 * affine


NOTHING: list[tuple[OpSpec, int, int]] = [
    (Parameters(3, 4, 5), 0, 60),
    (Parameters(-3, 4), 0, -12),
    (Product(7, 6), 42, 0),
]


@pytest.mark.parametrize(("op", "macs", "params"), NOTHING)
def test_what_belongs_to_the_whole_model_builds_nothing(op: OpSpec, macs: int, params: int) -> None:
    assert (op.macs, op.params) == (macs, params)
    image = torch.randn(1, *op.in_shape)
    assert op.in_shape == op.out_shape
    assert torch.equal(op.module()(image), image)
