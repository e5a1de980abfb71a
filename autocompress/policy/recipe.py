"""What `autocompress tune` does: a trained model, the passes and what may be chosen of them, the budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from autocompress.budget import Budget, limits_of
from autocompress.recipe import (
    Address,
    Count,
    DataSettings,
    FinetuneSettings,
    Positive,
    Settings,
    TargetSettings,
    TaskSettings,
    absolute_inputs,
    absolute_model,
    default_budget,
    parsed,
    read_yaml,
)

METRICS = ("latency_ms", "macs", "params", "size_bytes")
"""What is measured of a compressed network: latency on the target, counts, bytes of the ONNX file."""
OWNED = ("distill", "temperature", "alpha", "learning_rate", "epochs", "seed", "teachers")
"""Settings of finetuning that belong to the pass `distill`, or to the trial."""


class TuneSettings(Settings):
    """How policies are tried."""

    budget: dict[str, float | str] = Field(default_factory=default_budget)
    """Limits of what is measured; percent are of the network as it was brought."""
    trials: Positive = 24
    """Policies that are finetuned; those over the budget are measured only, and not counted."""
    strategy: str = "tpe"
    """A strategy of `autocompress list strategies` that needs no costs beforehand, or `module:attribute`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the strategy."""
    warm_start: Literal["none", "mildest"] = "mildest"
    """What is tried first: each pass alone, as mild as the budget allows, or the fewest together that fit;
    they are trials like others."""
    workers: Positive = 1
    """Policies at a time, each in a process of Ray."""
    address: Address | None = None
    """Of a Ray cluster, `host:port` or `auto`, whose machines see the run directory and the data under the
    same paths; docs/ray.md."""
    grace_epochs: Positive = 1
    """ASHA: epochs of finetuning before a policy may be stopped."""
    reduction: Annotated[int, Field(ge=2, strict=True)] = 3
    """ASHA: of so many policies that come to a rung one goes on."""
    retries: Count = 3
    """How often a policy whose process died is tried again."""
    runs: Positive = 60
    """Timed runs of a network."""
    random_policies: Positive = 3
    """Random policies under the same budget in the final comparison."""
    seed: Count = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        value = limits_of(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            for limit in Budget.of(value).limits:
                if limit.metric not in METRICS:
                    raise ValueError(f"limits what is measured, {', '.join(METRICS)}, not {limit.metric}")
        return value


class PolicyRecipe(Settings):
    """A whole tuning."""

    model: str
    """`file.py:factory` or `module:factory`; this runs that code."""
    weights: Path | None = None
    """A state dict; without, the weights are those that the factory gives."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the factory."""
    data: DataSettings = DataSettings()
    task: TaskSettings = TaskSettings()
    target: TargetSettings = TargetSettings()
    passes: Annotated[tuple[dict[str, dict[str, Any]], ...], Field(min_length=1)]
    """In the order in which they run, `[{prune: {ratio: [0, 0.3, 0.5]}}, {distill: {epochs: 4}}]`: a list is
    what may be chosen, anything else is fixed."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Settings of finetuning that the pass `distill` has not, such as `batch_size`."""
    tune: TuneSettings = TuneSettings()
    threads: Positive = 1
    """Of each process, in training."""

    @model_validator(mode="after")
    def _settled(self) -> Self:
        for entry in self.passes:
            if len(entry) != 1:
                raise ValueError(f"each pass is one name with its settings, got {sorted(entry)}")
        if wrong := sorted(set(self.finetune) & set(OWNED)):
            raise ValueError(f"finetune.{wrong[0]} belongs to the pass distill, or to tune: leave it out")
        FinetuneSettings(**self.finetune)
        return self


def load_policy_recipe(path: Path) -> PolicyRecipe:
    """Read a recipe file.

    Raises:
        RecipeError: The file is absent, no YAML, or not a valid recipe of a policy.
    """
    return parse_policy_recipe(read_yaml(path), path)


def parse_policy_recipe(payload: Any, path: Path) -> PolicyRecipe:
    """Check a recipe that was read from a file; relative paths in it are relative to the file.

    Raises:
        RecipeError: It is no valid recipe of a policy.
    """
    recipe = parsed(PolicyRecipe, payload, f"recipe {path}")
    folder = path.parent
    updates = absolute_inputs(recipe.data, recipe.target, folder)
    updates["model"] = absolute_model(recipe.model, folder)
    if recipe.weights is not None:
        updates["weights"] = (folder / recipe.weights.expanduser()).resolve()
    return recipe.model_copy(update=updates)
