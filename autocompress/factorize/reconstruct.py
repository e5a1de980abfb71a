"""The last part of a factorized layer fitted to what the layer gives on images, by least squares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import FactorizationError
from autocompress.factorize.activations import inputs_of
from autocompress.factorize.apply import Factorized
from autocompress.factorize.candidates import Inputs

POSITIONS = 4096
"""Of the outputs of a layer that are fitted, at most."""


def reconstruct_last(
    model: nn.Module, made: Factorized, images: Inputs, *, ridge: float = 1e-6, seed: int = 0
) -> None:
    """Fit the last part of every factorized layer to the outputs of the whole model, in place.

    Layer by layer, in the order of the model, the last part gets the weights and the bias that map what it
    now reads, behind layers that are fitted already, to what the layer of the whole model gives. They are the
    least-squares solution nearest to the weights it has: on the positions that are taken the error of no
    layer grows, but for rounding. There should be several times as many positions as a part reads numbers for
    one output, or it fits noise.

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection",
    TPAMI 2016, section 3.3 (the asymmetric reconstruction), without its non-linear part.

    Args:
        model: The whole model; not changed.
        made: What `factorize` made of it; the last parts of `made.model` are changed.
        images: A batch of what the model is called with; its values matter.
        ridge: Penalty on the squared change of weights, in parts of the mean square of what they multiply.
        seed: Of the positions that are taken where a layer has more than 4,096.

    Raises:
        FactorizationError: The ridge is out of range, or what a layer reads or gives is not finite; layers
            before that one are changed by then.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < float("inf"):
        raise FactorizationError(f"ridge must be a finite number > 0, got {ridge!r}")
    generator = torch.Generator().manual_seed(seed)
    for one in made.layers:
        part = list(made.model.get_submodule(one.name).named_children())[-1][0]
        name = f"{one.name}.{part}" if one.name else part
        last, layer = made.model.get_submodule(name), model.get_submodule(one.name)
        read = inputs_of(made.model, [name], images).get(name, [])
        given = inputs_of(model, [one.name], images).get(one.name, [])
        if len(read) != len(given) or not read:
            raise FactorizationError(
                f"layer {one.name!r} runs {len(given)} times on the images in the model, its parts "
                f"{len(read)} times; both must run equally often, and once at least"
            )
        with torch.no_grad():
            rows = [(_read_by(last, x), _flat(last, layer(y))) for x, y in zip(read, given, strict=True)]
        x, y = (torch.cat(side) for side in zip(*rows, strict=True))
        if len(x) > POSITIONS:
            taken = torch.randperm(len(x), generator=generator)[:POSITIONS].to(x.device)
            x, y = x[taken], y[taken]
        _fit(one.name, last, x.double(), y.double(), ridge)


def _read_by(last: nn.Module, x: Tensor) -> Tensor:
    """Return what a part reads for each position of its output, `(positions, numbers)`."""
    if not isinstance(last, nn.Conv2d):
        return x.flatten(0, -2)
    x = x[None] if x.dim() == 3 else x
    mode = "constant" if last.padding_mode == "zeros" else last.padding_mode
    padded = F.pad(x, last._reversed_padding_repeated_twice, mode)
    windows = F.unfold(padded, last.kernel_size, last.dilation, 0, last.stride)
    return windows.transpose(1, 2).flatten(0, 1)


def _flat(last: nn.Module, y: Tensor) -> Tensor:
    """Return an output as `(positions, out)`."""
    return y.movedim(-3, -1).flatten(0, -2) if isinstance(last, nn.Conv2d) else y.flatten(0, -2)


@torch.no_grad()
def _fit(name: str, last: nn.Module, x: Tensor, y: Tensor, ridge: float) -> None:
    """Replace weight and bias by the least-squares solution nearest to what they are."""
    weight, bias = last.get_parameter("weight"), last._parameters.get("bias")
    before = weight.flatten(1).double()
    if bias is not None:
        x, before = F.pad(x, (0, 1), value=1.0), torch.cat([before, bias.double()[:, None]], 1)
    squares = x.T @ x
    mean = squares.diagonal().mean()
    if not bool(y.isfinite().all() and mean.isfinite()):
        raise FactorizationError(f"what layer {name!r} reads or gives on the images holds nan or infinity")
    if mean == 0:  # everything that it reads is zero: any weights do
        return
    squares.diagonal().add_(ridge * mean)
    root, failed = torch.linalg.cholesky_ex(squares)
    if failed:
        raise FactorizationError(f"layer {name!r} cannot be fitted with ridge {ridge}: make it greater")
    after = before + torch.cholesky_solve(x.T @ (y - x @ before.T), root).T
    numbers = weight[0].numel()
    weight.copy_(after[:, :numbers].reshape(weight.shape))
    if bias is not None:
        bias.copy_(after[:, numbers])
