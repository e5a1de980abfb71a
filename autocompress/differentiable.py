"""What a differentiable strategy is: it is trained together with a supernet, then asked like any other.

`training.bilevel` alternates: the strategy moves its architecture parameters on held-out images, the loop
moves the weights. After that `ask` gives the networks that were derived.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        step: Steps of the weights that are done in this phase.
        steps: How many there will be.
        generator: For what is random in this step; a function of seed and step alone.
        per_epoch: Steps of an epoch.
    """

    step: int
    steps: int
    generator: "torch.Generator"
    per_epoch: int = 1

    @property
    def progress(self) -> float:
        """The share of the training that is done, 0 to 1."""
        return self.step / self.steps

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last step of an epoch."""
        return (self.step + 1) % self.per_epoch == 0


@dataclass(frozen=True)
class Phase:
    """One of several trainings in a row, each of a supernet of its own.

    Attributes:
        share: Of the epochs, more than 0; those of all phases add up to 1.
        settings: In which the space of its supernet differs from the one that is searched: fewer cells. The
            last phase trains the supernet itself and has none.
    """

    share: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


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
        """Has a `relaxation`: entropy, probabilities, expected costs, indicators of every epoch."""

    @property
    def phases(self) -> Sequence[Phase]:
        """The trainings, in order; one, as a rule."""

    def begin(self, phase: int) -> None:
        """Begin a phase, with all that was learned in those before it."""

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


@runtime_checkable
class Sandwiched(Protocol):
    """A differentiable strategy whose weights are trained as slices, so that slices are worth something.

    The network that is derived is a slice of the supernet like any other: it is finetuned, not trained anew.
    The networks of `weight_gates` learn the labels; batch norms keep their scales and shifts.
    """

    def taught_gates(self, moment: Moment) -> "Sequence[Gates]":
        """Return the gates of networks that the one of `weight_gates` teaches in this step."""
