"""A user's model at the bits of a policy as one operation of a space, priced layer by layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autocompress.errors import QuantizationError
from autocompress.network import user_model
from autocompress.ops import OpSpec, Shape, UserModel
from autocompress.quantize.ops import FULL_PRECISION
from autocompress.quantize.schemes import weights_of
from autocompress.quantize.source import Policy, QuantizationSource
from autocompress.space import SearchSpace

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class QuantizedNetwork(UserModel):
    """A whole model with the weights and inputs of each layer at some bits.

    Attributes:
        name: Of the model's class.
        digest: Of its weights and scales: equal networks of equal models are equal.
        policy: Bits of weights and of the input of each layer.
        source: The model.
    """

    name: str
    digest: str
    policy: Policy
    source: QuantizationSource = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """Model and bits."""
        bits = ".".join(f"{weights}-{inputs}" for weights, inputs in self.policy)
        return f"{type(self).__name__}(name={self.name},digest={self.digest},bits={bits})"

    @property
    def ops(self) -> tuple[OpSpec, ...]:
        """The operations of the network that cost something."""
        return self.source.operations(self.policy)

    @property
    def in_shape(self) -> Shape:
        """Channels, height and width of the images."""
        return self.source.plan.in_shape

    @property
    def out_shape(self) -> Shape:
        """The output, filled up to three axes with ones."""
        shape = (*self.source.plan.out_shape, 1, 1)
        return shape[0], shape[1], shape[2]

    @property
    def entries(self) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Which of the scales of all widths are used."""
        return self.source.entries(self.policy)

    def module(self) -> "nn.Module":
        """Build the network with the model's own weights and the calibrated scales."""
        import torch

        return self.source.network(self.policy, meta=torch.get_default_device().type == "meta").train()

    @classmethod
    def shared_module(cls, ops: Sequence[OpSpec]) -> "nn.Module":
        """Return the model with the scales of every width."""
        (source,) = {id(op.source): op.source for op in ops if isinstance(op, QuantizedNetwork)}.values()
        return source.shared()

    @property
    def is_whole(self) -> bool:
        """Never: at 32 bits too, batch norm is folded."""
        return False

    def whole(self) -> "nn.Module":
        """Return the model in floating point, with batch norm folded."""
        import copy

        return copy.deepcopy(self.source.model)

    def described(self) -> list[dict[str, Any]]:
        """Return for people and manifests what each layer has, and how its weights are stored."""
        found = []
        for site, (weights, inputs) in zip(self.source.plan.sites, self.policy, strict=True):
            stored = "float32"
            if weights != FULL_PRECISION:
                grid = weights_of(self.source.scheme, weights)
                stored = f"int8 in {grid.qmin}..{grid.qmax}" if weights <= 8 else f"{weights} bits"
                if grid.levels == "logarithmic":
                    stored = f"{weights} bits, sign and power of two; float32 in torch.export"
            found.append(
                {"layer": site.name, "weight_bits": weights, "input_bits": inputs, "weights_stored": stored}
            )
        return found

    def in_floats(self) -> "QuantizedNetwork":
        """Return the same model with every layer in floating point."""
        return self.at(((FULL_PRECISION, FULL_PRECISION),) * len(self.policy))

    def at(self, policy: Policy) -> "QuantizedNetwork":
        """Return the same model at other bits."""
        return dataclasses.replace(self, policy=policy)


def quantized_network_of(space: SearchSpace) -> QuantizedNetwork:
    """Return the smallest network of a space of bits.

    Raises:
        QuantizationError: Its networks are others.
    """
    model = user_model(space)
    if isinstance(model, QuantizedNetwork):
        return model
    raise QuantizationError(f"space {space.name!r} does not quantize a model; space bits does")
