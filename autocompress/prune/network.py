"""A user's model with some of its channels as one operation of a space, priced layer by layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from autocompress.errors import ConversionError
from autocompress.network import user_model
from autocompress.ops import GatedSpec, OpSpec, Shape, UserModel
from autocompress.prune.source import Source, Widths
from autocompress.space import SearchSpace

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class NarrowNetwork(UserModel, GatedSpec):
    """A whole model with so many units of each group of channels.

    Attributes:
        name: Of the model's class.
        digest: Of its weights and groups: equal networks of equal models are equal.
        widths: Units kept of each group.
        source: The model.
    """

    name: str
    digest: str
    widths: Widths
    source: Source = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """Model and widths."""
        return f"{type(self).__name__}(name={self.name},digest={self.digest},widths={self.widths})"

    @property
    def ops(self) -> tuple[OpSpec, ...]:
        """The operations of the narrow model that cost something."""
        return self.source.operations(self.widths)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the images."""
        return self.source.trace.in_shape

    @property
    def out_shape(self) -> Shape:
        """The output, filled up to three axes with ones."""
        shape = (*self.source.trace.out_shape, 1, 1)
        return shape[0], shape[1], shape[2]

    @property
    def entries(self) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Which channels of each parameter are kept."""
        found: dict[str, dict[int, Sequence[int]]] = {}
        for name, axis, kept in self.source.positions(self.widths):
            found.setdefault(name, {})[axis] = kept.tolist()
        return found

    def module(self) -> "nn.Module":
        """Build the narrow model with random weights, as its own layers initialise themselves.

        What no layer initialises (parameters of the user's own modules, buffers) is as in the model.
        """
        import torch

        device = torch.get_default_device()
        if device.type == "meta":
            return self.source.empty(self.widths).train()
        narrow = self.source.narrowed(self.widths).to(device)
        for module in narrow.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return narrow.train()

    @classmethod
    def shared_module(cls, ops: Sequence[OpSpec]) -> "nn.Module":
        """Return the model with its trained weights: what a search starts from."""
        (source,) = {id(op.source): op.source for op in ops if isinstance(op, NarrowNetwork)}.values()
        return source.narrowed(source.full)

    @property
    def is_whole(self) -> bool:
        """Whether all channels are kept."""
        return self.widths == self.source.full

    def whole(self) -> "nn.Module":
        """Return the whole model, with its own weights and statistics."""
        return self.source.narrowed(self.source.full)

    def full(self) -> "NarrowNetwork":
        """Return the whole model."""
        return self.at(self.source.full)

    def channel_gate(self, norm: str, kept: "Sequence[Tensor | None]") -> "Tensor | None":
        """Return the probability that each channel of a batch norm is kept, see `GatedSpec`."""
        import torch

        labels = self.source.trace.slices.get(f"{norm}.weight", {}).get(0)
        if labels is None:
            return None
        numbers, places = self.source.places(labels)
        # One entry more, a 1, for channels that always stay.
        whole = torch.cat([*(torch.ones(1) if k is None else k for k in kept), torch.ones(1)])
        sizes = [1 if k is None else len(k) for k in kept]
        starts = np.concatenate([np.cumsum([0, *sizes]), [0]])
        at = np.where(numbers < 0, len(whole) - 1, starts[numbers] + places)
        return whole[torch.from_numpy(at)]

    def at(self, widths: Widths) -> "NarrowNetwork":
        """Return the same model at other widths."""
        return dataclasses.replace(self, widths=widths)


def source_of(space: SearchSpace) -> Source:
    """Return the model that a space narrows.

    Raises:
        ConversionError: It narrows none.
    """
    model = user_model(space)
    if isinstance(model, NarrowNetwork):
        return model.source
    raise ConversionError(f"space {space.name!r} does not narrow a model; space channels does")
