"""Single networks of a run, as they are before finetuning."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.atomic import replacing
from autocompress.elastic.extract import inherited
from autocompress.elastic.supernet import Supernet, resize
from autocompress.errors import CheckpointError, ToleranceError
from autocompress.network import model_of, unshared, whole_network
from autocompress.prune.beforehand import score_of
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.ptq import improve
from autocompress.quantize.reconstruct import Settings as RoundingSettings
from autocompress.run import Run, Shown, is_differentiable
from autocompress.space import Architecture
from autocompress.stages.training import train
from autocompress.training.evaluate import calibration_batches

IMPROVED = "rounded.safetensors"


def resolution(run: Run, arch: Architecture) -> tuple[int, int]:
    """Return height and width of the input of a network."""
    blocks = run.space.operations(run.space.encode([arch]))
    return blocks[0][1][0].in_shape[1:]


def calibration(run: Run) -> list[Tensor]:
    """Return the training images on which batch-norm statistics are computed."""
    return calibration_batches(run.data, run.recipe.search.calibration_images, seed=run.recipe.search.seed)


def extract_recalibrated(run: Run, supernet: Supernet, arch: Architecture) -> nn.Module:
    """Copy a network out of the supernet, with batch-norm statistics of its own (`inherited`)."""
    return inherited(supernet, arch, calibration(run), brought=brought_untrained(run))


def brought_untrained(run: Run) -> bool:
    """Whether the weights of the supernet are those that a model brought, not trained further."""
    return bool(run.space.settings.get("weights")) and not run.recipe.train.epochs


def teacher_of(run: Run, supernet: Supernet) -> tuple[nn.Module, tuple[int, int]]:
    """Return who teaches slices of a supernet in finetuning, and height and width of the teacher's input."""
    from autocompress.distill.teachers import load_teacher

    settings = run.recipe.finetune
    if settings.teachers:
        teacher = load_teacher(settings.teachers, run.data, temperature=settings.temperature)
        return teacher, run.data.in_shape[1:]
    largest = run.space.decode(run.space.largest())[0]
    # A model that brought its weights teaches, even where slices of it were trained since.
    brought = run.space.settings.get("weights")
    teacher = whole_network(run.space) if brought else extract_recalibrated(run, supernet, largest)
    return teacher, resolution(run, largest)


def untrained(run: Run, shown: Shown, supernet: Supernet, arch: Architecture) -> nn.Module:
    """Return a network as it is before finetuning; one of few bits improved as the recipe says."""
    network = extract_recalibrated(run, supernet, arch)
    settings = run.recipe.quantize
    if not has_quantizers(network) or (settings.rounding, settings.biases) == ("nearest", "kept"):
        return network
    path = run.network_folder(arch) / IMPROVED
    if path.exists():
        try:
            network.load_state_dict(load_file(path), strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove it, and it is made again") from None
        return network
    size, done = resolution(run, arch), list[str]()
    images = calibration_batches(run.data, settings.images, seed=run.recipe.search.seed)
    with shown.stage(f"round {arch.key} by {settings.rounding}") as progress:
        progress(0, 1, "")
        done = improve(
            model_of(network),
            model_of(whole_network(run.space)),
            torch.cat([resize(batch, size) for batch in images]),
            rounding=settings.rounding,
            bias_correction=settings.biases == "corrected",
            settings=RoundingSettings(steps=settings.steps, seed=run.recipe.search.seed),
        )
        progress(1, 1, "")
    for line in done:
        shown.say(f"{arch.key}: {line}")
    with replacing(path) as temporary:
        save_file(unshared(network.state_dict()), temporary)
    return network


def reference_score(run: Run, shown: Shown) -> float:
    """Return the validation score of what is made smaller: the model as it was brought, or the largest slice.

    Raises:
        ToleranceError: There is none before a strategy by gradients was run, which trains it along.
    """
    arch = run.space.decode(run.space.largest())[0]
    if run.space.settings.get("weights"):
        network = whole_network(run.space)
    elif is_differentiable(run.recipe):
        raise ToleranceError(
            f"a tolerance is measured from a trained network, but {run.recipe.search.strategy!r} trains one "
            "for each budget: bring weights (space.arguments.weights), or take another strategy"
        )
    else:
        network = extract_recalibrated(run, train(run, shown), arch)
    return score_of(network, resolution(run, arch), run.data, run.task).mean
