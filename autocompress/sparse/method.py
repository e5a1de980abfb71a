"""What a method of sparse training is: options, and what it does at which moment of training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from autocompress.prune.layers import Structure, structure
from autocompress.prune.scores import Given
from autocompress.prune.source import Source
from autocompress.recipe import OptimizerSettings
from autocompress.training.evaluate import Scored


class Options(BaseModel):
    """Of a method; frozen, an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Work:
    """What a method works on.

    Attributes:
        network: Trained in place.
        image: A batch that it takes.
        settings: Of the training.
        steps: Optimizer steps an epoch.
        score: Scores the network, as it is, on the validation part.
        renew: Computes the statistics of batch norm anew, on training images.
        ignore: Layers whose channels are left alone, by name or pattern.
        state: All that a method remembers; it is in the checkpoint, and restored in place at a roll-back. A
            method has no other memory. `begin` fills it; `ended` ends the training before its last epoch.
    """

    network: nn.Module
    image: Tensor
    settings: OptimizerSettings
    steps: int
    score: Callable[[], Scored]
    renew: Callable[[], None]
    ignore: tuple[str, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source:
        """The groups of channels, of the network itself and not of a copy.

        Raises:
            ConversionError: It cannot be traced, or nothing of it can be narrowed.
        """
        found = Source(self.network, self.image, ignore=self.ignore)
        return found.trying(self.network, found.ranking)

    @cached_property
    def structure(self) -> Structure:
        """The layers and norms that make and pass on the channels of the groups."""
        return structure(self.source)

    @property
    def given(self) -> Given:
        """What criteria of importance by weights look at."""
        return Given(self.source, self.structure, None, None, 0)


def nothing(*_: Any) -> None:
    """Do nothing."""


def no_account() -> dict[str, Any]:
    """Return nothing."""
    return {}


@dataclass(frozen=True)
class Hooks:
    """What a method does at which moment of training; all of it in place.

    Attributes:
        begin: Once, before the first epoch of a new run: checks the weights, fills the state.
        begin_epoch: Is given the epoch, from 0.
        gradients: After each backward pass, before the gradient is clipped.
        after_step: After each step of the optimizer; is given its learning rate.
        end_epoch: Is given the epoch, from 0.
        finish: Once, after the last epoch.
        account: For the report: plain values.
    """

    begin: Callable[[], None] = nothing
    begin_epoch: Callable[[int], None] = nothing
    gradients: Callable[[], None] = nothing
    after_step: Callable[[float], None] = nothing
    end_epoch: Callable[[int], None] = nothing
    finish: Callable[[], None] = nothing
    account: Callable[[], dict[str, Any]] = no_account


class Start(Protocol):
    """Makes the hooks of a method."""

    def __call__(self, work: Work, options: Any) -> Hooks:
        """Look at the network, which has its weights from before the training, and return what to do."""


@dataclass(frozen=True)
class Method:
    """A method of sparse training.

    Attributes:
        start: Makes its hooks; its docstring says what it does and where that comes from.
        options: Their names, types, ranges and defaults.
        channels: Whether it works on groups of channels, and so on models that can be narrowed.
        trained: Whether the weights have to be trained ones.
    """

    start: Start
    options: type[Options]
    channels: bool = True
    trained: bool = False
