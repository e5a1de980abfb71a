"""What a model must be to be narrowed, checked before anything is done with it."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autocompress.elastic.layers import is_shared_norm
from autocompress.errors import ConversionError

DTYPES = (torch.float32, torch.float64)
"""In which results of two orders of the same sum are near enough to be compared."""


def check(model: nn.Module, image: Tensor) -> nn.Module:
    """Return a copy of a model in evaluation mode.

    Args:
        model: Not changed.
        image: A batch that it is to be run with.

    Raises:
        ConversionError: It is no module, cannot be copied, has weights of several types or of one that the
            image is not of, without values, or that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if not isinstance(image, Tensor):
        raise ConversionError(f"the image must be a tensor, got {type(image).__name__}")
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise ConversionError(f"parameter {name} of {kind} has no shape yet: run the model once before")
        if tensor.is_floating_point() and (tensor.dtype not in DTYPES or tensor.dtype != image.dtype):
            raise ConversionError(
                f"parameter {name} of {kind} is of {tensor.dtype}, the image of {image.dtype}; both must be "
                "of one type, torch.float32 or torch.float64: call model.float() before"
            )
        if tensor.device != image.device:
            raise ConversionError(
                f"parameter {name} of {kind} is on {tensor.device}, the image on {image.device}; both must "
                "be on one device"
            )
    _check_finite(model, kind)
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ConversionError(
            f"{kind} cannot be copied: {type(error).__name__}: {error}; tensors that were computed must not "
            "be attributes of it"
        ) from error


def check_buffers(model: nn.Module) -> None:
    """Check that networks of different widths can share what a model holds.

    A search has one set of weights for all widths. Statistics of batch norm are computed for each width anew;
    what other buffers hold is not known.

    Raises:
        ConversionError: There are other buffers.
    """
    for name, module in model.named_modules():
        if is_shared_norm(module):
            continue
        buffers = [own for own, buffer in module._buffers.items() if buffer is not None]
        if buffers and isinstance(module, nn.modules.batchnorm._NormBase):
            raise ConversionError(
                f"{name or type(model).__name__} is a {type(module).__name__} with affine={module.affine}; "
                "networks of different widths share one set of weights, and running statistics can only be "
                "computed anew for nn.BatchNorm1d and nn.BatchNorm2d with affine=True, and for classes made "
                "of them that normalise their input once, by F.batch_norm, and have no other buffers"
            )
        if buffers:
            raise ConversionError(
                f"buffer {'.'.join((*filter(None, [name]), buffers[0]))} of {type(model).__name__} cannot be "
                "shared by networks of different widths; compute it in forward(), or make it a parameter "
                "with requires_grad=False if it is constant"
            )


def _check_finite(model: nn.Module, kind: str) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        tensors[f"parameter {name}"] = tensor
    for name, module in model.named_modules():
        # Of other buffers, infinity may be meant: masks.
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for own, buffer in module.named_buffers(prefix=name, recurse=False):
                tensors[f"buffer {own}"] = buffer
            if module.running_var is not None and bool((module.running_var < 0).any()):
                least = float(module.running_var.min())
                raise ConversionError(
                    f"buffer {name}.running_var of {kind} holds {least:g}: a variance is never negative; the "
                    "weights are damaged"
                )
    for what, values in tensors.items():
        if not _finite(values.detach()):
            raise ConversionError(f"{what} of {kind} holds nan or infinity: its training failed")


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A sum is finite only if all are; it is quicker than a mask, and only rarely too large itself.
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())
