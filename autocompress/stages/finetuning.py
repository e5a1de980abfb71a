"""Finetuning of one network with distillation."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autocompress.atomic import read_json, replacing, write_json
from autocompress.elastic.mixture import Mixture
from autocompress.elastic.supernet import Supernet, resize
from autocompress.errors import CheckpointError
from autocompress.network import build_network, unshared
from autocompress.recipe import FinetuneSettings
from autocompress.run import Run, Shown, trains_anew
from autocompress.space import Architecture
from autocompress.stages.networks import resolution, teacher_of, untrained
from autocompress.stages.selecting import selected
from autocompress.stages.training import chosen_formats, train, train_together, with_formats
from autocompress.training.check import check_regularisers
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.training.evaluate import Scored, evaluate

FINETUNED, FINETUNE_CHECKPOINT, FINETUNE_REPORT = "finetuned.safetensors", "finetune.pt", "finetune.json"


def finetune(run: Run, shown: Shown, arch: Architecture | None = None) -> tuple[nn.Module, Scored]:
    """Finetune one network with distillation from the largest, or read the finetuned one.

    Args:
        run: The run.
        shown: Told progress.
        arch: Which network; the selected one by default.

    Returns:
        The network in evaluation mode and its score on the validation part.
    """
    from autocompress.distill.finetune import Finetuned
    from autocompress.distill.finetune import finetune as finetune_network

    arch = selected(run, shown, arch)
    folder = run.network_folder(arch)
    report, weights = folder / FINETUNE_REPORT, folder / FINETUNED
    if report.exists():
        network: nn.Module = build_network(run.space.operations(run.space.encode([arch])), initialise=False)
        try:
            network.load_state_dict(load_file(weights), assign=True)
            scored = Finetuned(**read_json(report, CheckpointError, "report of finetuning"))
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"what was finetuned in {folder} is damaged: {error}; remove it") from None
        return network.eval(), scored
    # Settings of finetuning may have been changed since the supernet was trained.
    check_regularisers(run.data, run.recipe.finetune, run.space)
    supernet, network, teacher, teacher_size = _start(run, shown, arch)
    teachers = run.recipe.finetune.teachers
    size = resolution(run, arch)
    before = evaluate(lambda images: network(resize(images, size)), run.data.validation, run.task.score)
    with shown.stage("finetune with distillation") as progress:
        scored = finetune_network(
            network,
            run.data,
            run.task,
            settings_of(run, network),
            resolution=size,
            teacher=teacher,
            teacher_resolution=teacher_size,
            identity={"space": run.space.fingerprint, "architecture": arch.key,
                      "weights": weights_fingerprint(supernet),
                      "teachers": weights_fingerprint(teacher) if teachers else ""},
            checkpoint=folder / FINETUNE_CHECKPOINT,
            progress=progress,
        )  # fmt: skip
    with replacing(weights) as temporary:
        save_file(unshared(network.state_dict()), temporary)
    write_json(report, vars(scored))
    done = "trained anew" if trains_anew(run.recipe) else "finetuned"
    shown.say(f"{done} {arch.key}: validation {run.task.metric} {scored.mean:.4f}, before {before.mean:.4f}")
    if scored.epoch and scored.mean < before.mean:
        shown.say(
            "  that is within one standard error, and kept: the score before is that of the network which "
            "these very images chose"
        )
    if scored.epoch == 0:
        shown.say(
            "  no epoch of finetuning was better: the weights before it were kept. More epochs, or more "
            "steps in each (a smaller finetune.batch_size), may help"
        )
    return network, scored


def _start(
    run: Run, shown: Shown, arch: Architecture
) -> tuple[Supernet, nn.Module, nn.Module, tuple[int, int]]:
    """Return the supernet, what finetuning starts from, its teacher, and the size of the teacher's images.

    A slice of a supernet is finetuned, and taught by the largest one. What a differentiable search derives
    is trained anew and taught by the mixture: no network alone was ever trained there, and slices of it are
    worth little (a cell on digits: mixture 98 %, slice 38 %).
    """
    if not trains_anew(run.recipe):
        supernet = train(run, shown)
        teacher, size = teacher_of(run, supernet)
        return supernet, untrained(run, shown, supernet, arch), teacher, size
    supernet, _, strategy = train_together(run, shown)
    (start,) = supernet.space.decode(strategy.start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.recipe.finetune.seed)
        network = build_network(run.space.operations(run.space.encode([arch])))
    if run.recipe.finetune.teachers:
        return supernet, network, *teacher_of(run, supernet)
    mixture = Mixture(supernet, start, strategy.mixture(), channels=strategy.channels)
    return supernet, network, mixture, supernet.space.operations(strategy.start)[0][1][0].in_shape[1:]


def settings_of(run: Run, network: nn.Module) -> FinetuneSettings:
    """Return the settings of finetuning, with the formats that were fastest for the supernet for `auto`."""
    from autocompress.distill.finetune import suited

    return suited(with_formats(run.recipe.finetune, chosen_formats(run)), network)
