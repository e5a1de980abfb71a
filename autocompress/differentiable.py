"""What a differentiable strategy is: it is trained together with a supernet, then asked like any other.

`training.bilevel` alternates: the strategy moves its architecture parameters on held-out images, the loop
moves the weights. After that `ask` gives the networks that were derived.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from autocompress.space import Codes
from autocompress.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from autocompress.elastic.mixture import Gates

Images = tuple["Tensor", "Tensor"]
"""Images `(batch, channels, height, width)` and their targets."""


@dataclass(frozen=True)
class Moment:
    """Where a bilevel training is.

    Attributes:
        step: Steps of the weights that are done.
        steps: How many there will be.
        generator: For what is random in this step; a function of seed and step alone.
    """

    step: int
    steps: int
    generator: "torch.Generator"

    @property
    def progress(self) -> float:
        """The share of the training that is done, 0 to 1."""
        return self.step / self.steps


class Mixed(Protocol):
    """A supernet with a task, run as mixtures."""

    def loss(self, batch: Images, gates: "Gates") -> "Tensor":
        """Return the loss of the task, a scalar with gradients to weights and gates."""

    @property
    def weights(self) -> "list[tuple[torch.nn.Parameter, Mapping[str, Any]]]":
        """The weights, each with the settings of its optimizer: lr, momentum, weight_decay."""

    def velocity(self, weight: "torch.nn.Parameter") -> "Tensor | None":
        """Return the momentum of a weight; `None` before its first step."""


@runtime_checkable
class Differentiable(Strategy, Protocol):
    """A strategy whose architecture parameters are trained by gradients."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """Has a `relaxation`: entropy, probabilities, expected costs."""

    @property
    def channels(self) -> int:
        """Cells mix one in so many channels."""

    @property
    def start(self) -> Codes:
        """The codes `(1, choices)` that say the options of choices without gates."""

    def mixture(self) -> "Gates":
        """Return the gates of the mixture that was trained; without gradients."""

    def weight_gates(self, moment: Moment) -> "Gates":
        """Return the gates under which the weights make a step; without gradients."""

    def architecture_step(self, network: Mixed, train: Images, held_out: Images, moment: Moment) -> None:
        """Move the architecture parameters; leaves the weights and their gradients as they are.

        Args:
            network: The supernet.
            train: The images of the coming step of the weights.
            held_out: Images that the weights never see.
            moment: Where the training is.

        Raises:
            TrainingError: The parameters are not finite any more.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in training: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
