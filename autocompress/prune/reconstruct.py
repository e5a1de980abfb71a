"""Weights of a narrowed model that make its layers compute what those of the whole model do."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.prune.layers import Layer, layer_of, names_of, run, structure, tensors_of
from autocompress.prune.samples import POSITIONS, Places, inputs_at, outputs_at, sample
from autocompress.prune.scores import Batch, batches_of
from autocompress.prune.source import Source, Widths


def reconstruct(
    source: Source,
    widths: Widths,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    samples: int = POSITIONS,
    ridge: float = 1e-6,
    seed: int = 0,
) -> tuple[str, ...]:
    """Fit the weights of a narrowed model to the outputs of the whole one, layer by layer, in place.

    Each convolution or linear layer that reads fewer channels gets the weights, and the bias if it has one,
    that map what it now reads, behind layers that are fitted already, to what the whole model's layer makes
    before batch norm. They are the least-squares solution nearest to the weights it has: on the sampled
    positions the error of no layer grows, but for rounding. A row of the regression is a position of an
    image; there should be several times as many as a layer has weights for one output, or it fits noise.

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1;
    He et al., AMC, ECCV 2018, whose code has it for kernels of one point alone.

    Args:
        source: The whole model; not changed.
        widths: Units kept of each group.
        model: `source.narrowed(widths)`, or that with other weights. Changed, and left in evaluation mode.
        batches: Images, and targets that are not looked at.
        samples: Positions of each image.
        ridge: Penalty on the squared change of weights, in parts of the mean square of what they multiply.
        seed: Of the positions.

    Returns:
        Names of layers that read fewer channels and are left as they are: those with groups.

    Raises:
        ConversionError: `samples` or `ridge` is out of its range, the model is not of these widths, or what
            goes into or out of a layer is not finite; layers before that one are changed by then.
        DataError: There is no batch, or one is no pair.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConversionError(f"samples must be an integer >= 1, got {samples!r}")
    if not 0 < ridge < float("inf"):
        raise ConversionError(f"ridge must be a finite number > 0, got {ridge!r}")
    cuts: dict[str, dict[int, Tensor]] = {}
    for name, axis, positions in source.positions(widths):
        cuts.setdefault(name, {})[axis] = positions
    _check(source.model, model, cuts)
    model.eval()
    images = [images for images, _ in batches_of(source, batches)]
    generator = torch.Generator().manual_seed(seed)
    found = structure(source)
    left = []
    for layer in found.layers:
        cut = cuts.get(layer.weight, {})
        if layer.groups == 1 and 1 in cut:
            pair = _Pair(source.model, model, layer, found.runs[layer.weight], cut.get(0))
            _fit(
                model, layer, (row for batch in images for row in pair.rows(batch, samples, generator)), ridge
            )
        elif layer.groups > 1 and cut:
            left.append(layer.name)
    return tuple(left)


def _check(whole: nn.Module, narrow: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]]) -> None:
    there = tensors_of(narrow)
    for name, tensor in tensors_of(whole).items():
        cut = cuts.get(name, {})
        shape = tuple(len(cut.get(axis, range(size))) for axis, size in enumerate(tensor.shape))
        if name not in there or there[name].shape != shape:
            has = tuple(there[name].shape) if name in there else "none"
            raise ConversionError(f"the model is not of these widths: {name} must be {shape}, it has {has}")


class _Reached(Exception):  # noqa: N818  (no error: the rest of the model need not run)
    """The layer has run as often as it does."""


@dataclass(frozen=True)
class _Pair:
    """A layer in the whole model and in the narrow one.

    Attributes:
        whole: The whole model.
        narrow: The narrow model.
        layer: The layer, of the same name in both.
        runs: How often it runs.
        kept: Which of its outputs the narrow model has; `None` for all.
    """

    whole: nn.Module
    narrow: nn.Module
    layer: Layer
    runs: int
    kept: Tensor | None

    def rows(
        self, images: Tensor, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the narrow layer reads and what the whole one makes, `(rows, numbers)` both."""
        made: list[tuple[Places, Tensor]] = []
        read: list[Tensor] = []

        def see_whole(x: Tensor, output: Tensor) -> bool:
            places = sample(self.layer, output, samples, generator)
            rows = outputs_at(self.layer, output, places)
            made.append((places, rows if self.kept is None else rows[:, self.kept.to(rows.device)]))
            return len(made) == self.runs

        def see_narrow(x: Tensor, output: Tensor) -> bool:
            read.append(inputs_at(self.layer, x, output, made[len(read)][0]).flatten(1))
            return len(read) == self.runs

        _run_to(self.whole, self.layer, images, see_whole)
        _run_to(self.narrow, self.layer, images, see_narrow)
        for x, (_, y) in zip(read, made, strict=True):
            yield x, y


def _run_to(model: nn.Module, layer: Layer, images: Tensor, take: Callable[[Tensor, Tensor], bool]) -> None:
    """Run a model until `take`, which is given input and output of a layer, has had enough."""
    names = names_of(model)

    def see(
        function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        found = layer_of(names, function, args, kwargs)
        if found is not None and found[0].weight == layer.weight and take(found[1], output):
            raise _Reached

    with contextlib.suppress(_Reached):
        run(model, images, see)


@torch.no_grad()
def _fit(model: nn.Module, layer: Layer, rows: Iterable[tuple[Tensor, Tensor]], ridge: float) -> None:
    """Replace weight and bias of a layer by the least-squares solution nearest to what they are."""
    tensors = tensors_of(model)
    weight, bias = tensors[layer.weight], None if layer.bias is None else tensors[layer.bias]
    parts = [weight.flatten(1)] if bias is None else [weight.flatten(1), bias[:, None]]
    before = torch.cat(parts, 1).double().T  # (numbers read, out)
    squares, errors = torch.zeros(len(before), len(before)).to(before), torch.zeros_like(before)
    for x, y in rows:
        read = x if bias is None else F.pad(x, (0, 1), value=1.0)
        squares += read.T @ read
        errors += read.T @ (y - read @ before)
    if not bool(squares.isfinite().all() and errors.isfinite().all()):
        raise ConversionError(f"what goes into or out of layer {layer.name} holds nan or infinity")
    mean = squares.diagonal().mean()
    if mean == 0:  # everything that it reads is zero: any weights do
        return
    squares.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(squares)
    if failed:
        raise ConversionError(f"layer {layer.name} cannot be fitted with ridge {ridge}: make it greater")
    after = (before + torch.cholesky_solve(errors, factor)).T
    weight.copy_(after[:, : weight[0].numel()].view_as(weight))
    if bias is not None:
        bias.copy_(after[:, -1])
