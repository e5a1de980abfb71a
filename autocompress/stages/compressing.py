"""What is done to a finetuned network before it is exported: the passes of the recipe."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.atomic import read_json, replacing, write_json
from autocompress.elastic.supernet import resize
from autocompress.errors import CheckpointError
from autocompress.kept import digest
from autocompress.network import unshared
from autocompress.policy.passes import CHECKPOINTS, Context, apply, policy_text, structure_of
from autocompress.policy.recipe import OWNED
from autocompress.run import Run, Shown
from autocompress.space import Architecture
from autocompress.stages.checking import passes_of
from autocompress.stages.finetuning import finetune, settings_of
from autocompress.stages.networks import resolution
from autocompress.stages.pricing import target
from autocompress.stages.selecting import selected
from autocompress.training.evaluate import Scored, evaluate

COMPRESSED, COMPRESSED_REPORT = "compressed.safetensors", "compressed.json"


def final_folder(run: Run, arch: Architecture) -> Path:
    """Return the folder of a network as it is exported: that of its finetuning, or of its passes in there."""
    folder = run.network_folder(arch)
    passes = passes_of(run.recipe)
    return folder / f"passes-{digest([passes, run.recipe.search.seed])}" if passes else folder


def compress(run: Run, shown: Shown, arch: Architecture | None = None) -> tuple[nn.Module, Scored]:
    """Run the passes of the recipe on the finetuned network, or read what they made of it.

    Who teaches in them is the finetuned network itself.

    Args:
        run: The run; stages that are missing are run first.
        shown: Told progress.
        arch: Which network; the selected one by default.

    Returns:
        The network in evaluation mode, as it was finetuned if there are no passes, and its score on the
        validation part.

    Raises:
        AutocompressError: A pass cannot do what it should.
        CheckpointError: What was made before is damaged.
    """
    arch = selected(run, shown, arch)
    finetuned, before = finetune(run, shown, arch)
    passes = passes_of(run.recipe)
    if not passes:
        return finetuned, before
    folder, size = final_folder(run, arch), resolution(run, arch)
    report, weights = folder / COMPRESSED_REPORT, folder / COMPRESSED
    settings = settings_of(run, finetuned).model_dump(exclude={*OWNED})
    context = Context(
        finetuned,
        run.data,
        run.task,
        target(run),
        size,
        seed=run.recipe.search.seed,
        checkpoint=folder / CHECKPOINTS,
        finetune=settings,
    )
    if report.exists():
        network = apply(finetuned, structure_of(passes), context)
        try:
            network.load_state_dict(load_file(weights))
            return network, Scored(**read_json(report, CheckpointError, "report of passes"))
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"what passes made in {folder} is damaged: {error}; remove it") from None
    folder.mkdir(parents=True, exist_ok=True)
    with shown.stage(policy_text(passes)) as progress:
        progress(0, 1, arch.key)
        network = apply(finetuned, passes, context)
        scored = evaluate(lambda x: network(resize(x, size)), run.data.validation, run.task.score)
        progress(1, 1, arch.key)
    with replacing(weights) as temporary:
        save_file(unshared(network.state_dict()), temporary)
    write_json(report, vars(scored))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    shown.say(
        f"{policy_text(passes)} of {arch.key}: validation {run.task.metric} {scored.mean:.4f}, before "
        f"{before.mean:.4f}"
    )
    return network, scored
