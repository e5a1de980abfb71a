"""One policy tried: the passes, what the network costs, finetuning, and its score; whole or resumable.

A trial has a folder of its own: `costs.json`, checkpoints of finetuning, `network.safetensors` and last of
all `report.json`. Whoever tries the policy again reads it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.atomic import held, read_json, replacing, write_json
from autocompress.budget import Budget
from autocompress.errors import AutocompressError, StorageError
from autocompress.latency.measure import measure_networks
from autocompress.latency.runtime import pinned, prepare_onnx
from autocompress.latency.target import Target, load_target
from autocompress.network import unshared
from autocompress.policy.passes import (
    CHECKPOINTS,
    Context,
    Policy,
    Setting,
    apply,
    counted_costs,
    is_off,
    structure_of,
)
from autocompress.policy.recipe import PolicyRecipe
from autocompress.prune.load import load_model_for
from autocompress.training.data import DataSet, load_data_of
from autocompress.training.evaluate import evaluate
from autocompress.training.task import Task, load_task

TRIALS, COSTS, WEIGHTS, REPORT = "trials", "costs.json", "network.safetensors", "report.json"
WHOLE, MEASURING = "original.onnx", ".measuring"


@dataclass
class Job:
    """What all trials of a tuning share; data and model are loaded when first asked for.

    Attributes:
        recipe: What to do.
        folder: The run directory.
    """

    recipe: PolicyRecipe
    folder: Path

    @cached_property
    def data(self) -> DataSet:
        """The data set."""
        return load_data_of(self.recipe.data)

    @cached_property
    def task(self) -> Task:
        """Losses and metric."""
        return load_task(self.recipe.task)

    @cached_property
    def target(self) -> Target:
        """What networks run on."""
        settings = self.recipe.target
        return load_target(settings.name, threads=settings.threads, batch=settings.batch)

    @cached_property
    def model(self) -> nn.Module:
        """The network as it was brought.

        Raises:
            ConversionError: It cannot be made, or its weights are of another model.
        """
        recipe = self.recipe
        return load_model_for(self.data, recipe.model, recipe.arguments, recipe.weights).eval()

    def load(self) -> None:
        """Load all that trials share.

        Raises:
            AutocompressError: Data, model, task or target cannot be had.
        """
        for _ in (self.data, self.task, self.target, self.model):
            pass

    def context(self, **changes: Any) -> Context:
        """Return what passes work on."""
        given: dict[str, Any] = {
            "teacher": self.model,
            "data": self.data,
            "task": self.task,
            "target": self.target,
            "size": self.data.in_shape[1:],
            "seed": self.recipe.tune.seed,
            "finetune": self.recipe.finetune,
        }
        return Context(**given | changes)


def policy_of(recipe: PolicyRecipe, settings: Mapping[str, Setting]) -> Policy:
    """Return the passes of a setting of the choices of `search_spaces.policy`.

    Choices without effect may be left out; a setting that is a list and not chosen has its first option.
    """
    found = []
    for number, entry in enumerate(recipe.passes):
        ((name, given),) = entry.items()
        found.append(
            (
                name,
                {
                    key: settings.get(f"{number}.{name}.{key}", value[0])
                    if isinstance(value, list | tuple)
                    else value
                    for key, value in given.items()
                },
            )
        )
    return found


def key_of(policy: Policy) -> str:
    """Return 16 hexadecimal digits of a policy; settings of passes that are turned off do not count."""
    counted = [
        (name, dict(sorted(settings.items()))) for name, settings in policy if not is_off(name, settings)
    ]
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def try_policy(
    job: Job, policy: Policy, after_epoch: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Try a policy, or read what became of it.

    What does not fit the budget is not trained.

    Args:
        job: What is compressed.
        policy: How.
        after_epoch: Told each epoch of finetuning and its validation score.

    Returns:
        `policy`, `costs`, by which share a limit is exceeded at most (`excess`), `fits`, and where it fits
        `score` and `standard_error` on the validation part.

    Raises:
        AutocompressError: A pass cannot do what it should.
    """
    folder = job.folder / TRIALS / key_of(policy)
    if (folder / REPORT).exists():
        found: dict[str, Any] = read_json(folder / REPORT, StorageError, "report of a policy")
        return found
    torch.set_num_threads(job.recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    costs = costs_of(job, policy)
    excess = use_of(job, costs) - 1
    report: dict[str, Any] = {
        "policy": [[name, dict(settings)] for name, settings in policy],
        "costs": costs,
        "excess": excess,
        "fits": excess <= 0,
    }
    if report["fits"]:
        context = job.context(checkpoint=folder / CHECKPOINTS, after_epoch=after_epoch)
        network = apply(job.model, policy, context)
        scored = evaluate(network, job.data.validation, job.task.score)
        report |= {"score": scored.mean, "standard_error": scored.standard_error}
        with replacing(folder / WEIGHTS) as temporary:
            save_file(unshared(network.state_dict()), temporary)
    write_json(folder / REPORT, report)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return report


def attempt(
    job: Job, policy: Policy, after_epoch: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Try a policy as `try_policy` does; one that cannot be has a report, too, with its `error`.

    Raises:
        OSError: Of the machine, such as a full disk: no fault of the policy.
        MemoryError: Likewise.
    """
    try:
        return try_policy(job, policy, after_epoch)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (exporters raise anything)
        # Trying again would end the same.
        text = str(error) if isinstance(error, AutocompressError) else f"{type(error).__name__}: {error}"
        report = {"policy": [[name, dict(s)] for name, s in policy], "fits": False, "error": text}
        folder = job.folder / TRIALS / key_of(policy)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT, report)
        return report


def limits_of(job: Job) -> dict[str, float]:
    """Return the budget, absolute: percent are of the network as it was brought."""
    whole = original_costs(job)
    return {
        limit.metric: limit.value / 100 * whole[limit.metric] if limit.percent else limit.value
        for limit in Budget.of(job.recipe.tune.budget).limits
    }


def use_of(job: Job, costs: Mapping[str, float]) -> float:
    """Return the share of the budget that costs use; above 1 they do not fit."""
    return max(costs[metric] / limit for metric, limit in limits_of(job).items())


def original_costs(job: Job) -> dict[str, float]:
    """Return what the network costs as it was brought, measured once."""
    path = job.folder / "original.json"
    # One at a time: who measures while another one does measures both.
    with held(job.folder / MEASURING):
        if not path.exists():
            write_json(path, _costs(job, job.model, job.folder / WHOLE, None))
    found: dict[str, float] = read_json(path, StorageError, "costs of the network")
    return found


def costs_of(job: Job, policy: Policy) -> dict[str, float]:
    """Return what the network of a policy costs, measured once for all that differ in training only.

    Latency is measured in the same rounds as that of the original, and given as its share of what the
    original took when the run began: a machine that is slower meanwhile makes no policy look worse.
    """
    structure = structure_of(policy)
    folder = job.folder / "structures" / key_of(structure)
    if not (folder / COSTS).exists():
        whole = original_costs(job)
        network = apply(job.model, structure, job.context())
        folder.mkdir(parents=True, exist_ok=True)
        with held(job.folder / MEASURING):
            if not (folder / COSTS).exists():  # another worker may have measured it meanwhile
                write_json(folder / COSTS, _costs(job, network, folder / "network.onnx", whole))
    found: dict[str, float] = read_json(folder / COSTS, StorageError, "costs of a policy")
    return found


def _costs(job: Job, network: nn.Module, file: Path, whole: Mapping[str, float] | None) -> dict[str, float]:
    from autocompress.export.formats import onnx_of

    with replacing(file) as temporary:
        onnx_of(network, job.data.in_shape, temporary)
    files = {"this": file} | ({} if whole is None else {"whole": job.folder / WHOLE})
    with pinned(job.target):
        runs = {name: prepare_onnx(path, job.target) for name, path in files.items()}
        measured = measure_networks(runs, target=job.target, count=job.recipe.tune.runs)
    latency = measured["this"].median_ms
    if whole is not None:
        latency *= whole["latency_ms"] / measured["whole"].median_ms
    return {
        "latency_ms": latency,
        **counted_costs(network, torch.zeros(1, *job.data.in_shape)),
        "size_bytes": float(file.stat().st_size),
    }
