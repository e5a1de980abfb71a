"""What a call of `autocompress sparsify` says, checked and resolved."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from autocompress.recipe import DataSettings, OptimizerSettings, Positive, TaskSettings
from autocompress.sparse.method import Options


class SparseTraining(OptimizerSettings):
    """How the network is trained; the defaults are for weights that are trained already."""

    epochs: Positive = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.02
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SparsifyRecipe(Options):
    """A whole sparse training, from a model and data to weights."""

    model: str
    """`file.py:factory` or `module:factory`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the factory."""
    weights: Path | None = None
    """A state dict of the model; without, it is trained from scratch."""
    ignore: tuple[str, ...] = ()
    """Layers whose channels are left alone, by name or pattern."""
    method: str = "slimming"
    """One of `METHODS`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the method."""
    data: DataSettings = DataSettings()
    task: TaskSettings = TaskSettings()
    train: SparseTraining = SparseTraining()
    threads: Positive | None = None
    """Of the training; by default as many as PyTorch takes when the run begins."""
