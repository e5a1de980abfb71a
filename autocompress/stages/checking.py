"""What is refused before anything takes long: wrong tasks, losses, rewards and passes."""

from autocompress.distill.methods import method_of
from autocompress.errors import PolicyError, RecipeError
from autocompress.latency.target import Target
from autocompress.network import user_model
from autocompress.policy.passes import Policy
from autocompress.policy.passes import check as check_policy
from autocompress.quantize.network import QuantizedNetwork
from autocompress.quantize.schemes import legal_widths
from autocompress.recipe import Recipe
from autocompress.run import Run, is_differentiable
from autocompress.space import SearchSpace
from autocompress.stages.pricing import target
from autocompress.strategy import DISTANCE
from autocompress.training.check import check_regularisers, check_task


def passes_of(recipe: Recipe) -> Policy:
    """Return the passes of a recipe; none for most."""
    return [(name, settings) for entry in recipe.passes for name, settings in entry.items()]


def check_passes(recipe: Recipe, space: SearchSpace, where: Target) -> None:
    """Refuse passes that cannot be, before anything takes long.

    Raises:
        PolicyError: There is no such pass or setting, or the networks of the space have few bits already.
        QuantizationError: The target does not run the bits.
        RecipeError: No format is left in which what passes make can be exported.
    """
    passes = passes_of(recipe)
    check_policy(passes)
    if passes and isinstance(user_model(space, space.largest()), QuantizedNetwork):
        raise PolicyError(
            f"passes work on networks in floating point, but those of space {space.name!r} have few bits "
            "already: leave passes out"
        )
    for name, settings in passes:
        if name == "quantize" and "bits" in settings:
            legal_widths(where, [int(settings["bits"])])
    if passes and {*recipe.export.formats} == {"safetensors"}:
        raise RecipeError(
            "export.formats has safetensors only, whose loader knows the layers of a space and no others: "
            "add onnx or torch_export, or leave passes out"
        )


def check(run: Run) -> None:
    """Refuse a task and regularisers that do not fit data and space, before anything takes long.

    Raises:
        DataError: The task does not.
        RecipeError: A regulariser of finetuning does not, or the strategy cannot have the reward.
        DistillationError: There is no such loss of distillation.
        PolicyError: There is no such pass, or networks cannot have it.
    """
    check_reward(run.recipe)
    check_losses(run.recipe)
    check_passes(run.recipe, run.space, target(run))
    check_task(run.data, run.task, run.space)
    if run.supernet_space is not run.space:
        check_task(run.data, run.task, run.supernet_space)
    check_regularisers(run.data, run.recipe.finetune, run.space)


def check_losses(recipe: Recipe) -> None:
    """Refuse losses of distillation that there are not, and options that they have not.

    Raises:
        DistillationError: Names the nearest, or those that there are.
    """
    for term in recipe.finetune.distill:
        method_of(term.loss, term.options)


def check_reward(recipe: Recipe) -> None:
    """Refuse distilled scores for a strategy that reads none.

    Raises:
        RecipeError: It evaluates no networks, or is told to read something else.
    """
    settings = recipe.search
    if settings.reward == "slice":
        return
    if is_differentiable(recipe):
        raise RecipeError(
            f"search.reward {settings.reward} is for strategies that evaluate one network after another; "
            f"{settings.strategy!r} learns together with the supernet from its loss: take another strategy, "
            "such as predictor, or leave search.reward out"
        )
    if DISTANCE in settings.options.values():
        raise RecipeError(
            f"search.reward {settings.reward} is a score, outputs are not compared: {settings.strategy!r} "
            f"cannot read {DISTANCE!r}; leave it out of search.options"
        )


def check_trained(recipe: Recipe, space: SearchSpace) -> None:
    """Refuse to compress random weights.

    Raises:
        RecipeError: The recipe trains nothing, and the space brings no weights.
    """
    if not recipe.train.epochs and not space.settings.get("weights"):
        raise RecipeError(
            f"train.epochs 0 leaves the supernet of {space.name!r} as it was made, with random weights: "
            "train at least 1 epoch; only a model that brings weights needs none (--weights, or "
            "space.arguments.weights)"
        )
