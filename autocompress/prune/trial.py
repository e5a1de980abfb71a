"""A trial whether a narrow model computes what the whole one does without the channels that were removed.

The graph does not tell a number in `forward()` from `x.shape`: `x.view(n, 64, h, w)` is followed by labels,
and fails in the narrow model. So groups are tried before they are offered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.prune.cut import copied

if TYPE_CHECKING:
    from autocompress.prune.source import Source

TOLERANCE = 1e-3
"""Greatest difference of the narrow model from the masked one, in parts of the greatest output."""

DRAWS = 2
"""Choices of channels that are tried at half width."""

CUT_DRAWS = 12
"""Further choices, of random width, for models that take slices of channels: some widths may fit by luck."""


@dataclass(frozen=True)
class Failure:
    """A group that cannot be narrowed after all.

    Attributes:
        group: Its number.
        text: What goes wrong.
    """

    group: int
    text: str


class Trial:
    """Tries narrow models on random weights and images: trained zeros would hide what goes wrong.

    Args:
        model: In evaluation mode; not changed.
        image: A batch of the shape and type that it takes.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self._image = torch.randn(image.shape, generator=generator).to(image)
        self._own, self._tried = model, _randomised(model, generator)

    def failure(self, source: "Source") -> Failure | None:
        """Return a group without some of whose channels the model does not run, or computes something else.

        All groups are tried together; only where that fails, fewer of them are.

        Raises:
            ConversionError: The model does not even repeat what it computes, or that is not finite.
        """
        try:
            return self._failure(source)
        except FloatingPointError:
            if self._tried is self._own:
                raise ConversionError(
                    f"{type(self._own).__name__} returns nan or infinity for random images"
                ) from None
        # Some weights have to be small, or positive: the model's own are what it can be tried with.
        self._tried = self._own
        return self.failure(source)

    def _failure(self, source: "Source") -> Failure | None:
        for draw in range(DRAWS + source.trace.is_cut * CUT_DRAWS):
            rng = np.random.default_rng(draw)
            orders = []
            for group in source.groups:
                scores = 1 + rng.random(len(group))
                if draw < DRAWS:
                    # x[:, :k] goes unnoticed while all of the first k channels stay, or no others: so the
                    # first one goes and the last one stays, and the other way round for x[:, -k:].
                    scores[[-draw, draw - 1]] = 0, 3
                orders.append(group.order(scores))
            trial = source.trying(self._tried, [order for order, _ in orders])
            widths = [
                max(least, len(order) // 2 if draw < DRAWS else int(rng.integers(len(order))))
                for order, least in orders
            ]
            if (found := self._first_failing(trial, widths)) is not None:
                return found
        return None

    def _first_failing(self, trial: "Source", narrow: Sequence[int]) -> Failure | None:
        def difference(count: int) -> str:
            """Return what goes wrong if the first so many groups are narrow; empty if nothing does."""
            widths = (*narrow[:count], *trial.full[count:])
            expected = _run(trial.masked(widths), self._image)
            if not expected.isfinite().all():
                raise FloatingPointError
            try:
                found = _run(trial.narrowed(widths), self._image)
            except Exception as error:  # noqa: BLE001  (whatever forward() raises)
                return f"does not run: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
            scale = float(expected.abs().max()) or 1.0
            if found.shape != expected.shape:
                return f"returns shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            worst = float((found - expected).abs().max())
            return "" if worst <= TOLERANCE * scale else f"differs by {worst / scale:.1%} of its output"

        text = difference(len(narrow))
        if not text:
            return None
        if difference(0):
            raise ConversionError(
                f"{type(self._own).__name__} gives different outputs for the same images in evaluation mode; "
                "random operations in forward() must depend on self.training, as nn.Dropout does"
            )
        good, bad = 0, len(narrow)
        while bad - good > 1:
            middle = (good + bad) // 2
            found = difference(middle)
            good, bad, text = (good, middle, found) if found else (middle, bad, text)
        return Failure(bad - 1, text)


def _run(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(image)
    return found


def _randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with other weights: vectors around 1, matrices by He's rule, norms with statistics."""
    variances = {
        f"{name}.running_var" if name else "running_var"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
    }
    parameters = {name for name, _ in model.named_parameters()}

    def made(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or (name not in parameters and name not in variances):
            return tensor
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        if sum(size > 1 for size in tensor.shape) <= 1:
            return new.uniform_(0.5, 1.5, generator=generator).to(tensor)
        bound = (6 / max(1, new[0].numel())) ** 0.5
        return new.uniform_(-bound, bound, generator=generator).to(tensor)

    return copied(model, made)
