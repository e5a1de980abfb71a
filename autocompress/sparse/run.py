"""A folder of one sparse training: whole, or resumed by the same call.

`settings.json` (resolved, written first), `checkpoint.pt`, `weights.safetensors`, and last of all
`sparsify.json`, the report.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress.atomic import locked, read_json, remove_leftovers, replacing, write_json
from autocompress.errors import RecipeError, StorageError
from autocompress.network import unshared
from autocompress.prune.check import check
from autocompress.prune.load import load_model_for
from autocompress.run import Shown
from autocompress.sparse.methods import method_of, options_of
from autocompress.sparse.recipe import SparsifyRecipe
from autocompress.sparse.train import sparsify
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.training.data import DataSet, load_data_of
from autocompress.training.loop import seeded
from autocompress.training.task import load_task

SETTINGS, CHECKPOINT, WEIGHTS, REPORT = (
    "settings.json",
    "checkpoint.pt",
    "weights.safetensors",
    "sparsify.json",
)


def sparsify_folder(folder: Path, recipe: SparsifyRecipe, shown: Shown) -> dict[str, Any]:
    """Train sparsely, or read what such a training left.

    Args:
        folder: Made if absent.
        recipe: What to do.
        shown: Told progress.

    Returns:
        The report that stands in `sparsify.json`.

    Raises:
        RecipeError: The folder holds another run, or a setting is wrong.
        ConversionError: The model cannot be made or worked on.
        StorageError: Another process is working on the folder, or it cannot be written.
    """
    method = method_of(recipe.method)
    options = options_of(recipe.method, recipe.options)
    if method.trained and recipe.weights is None:
        raise RecipeError(f"method {recipe.method!r} compares with trained weights: give them by --weights")
    data = load_data_of(recipe.data)
    model = make_model(recipe, data)
    check(model, torch.zeros(1, *data.in_shape))
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--out needs a directory, but {folder} is a file")
    with locked(folder):
        remove_leftovers(folder)
        settings = _settled(
            folder,
            {
                **recipe.model_dump(mode="json"),
                "options": options.model_dump(mode="json"),
                "threads": recipe.threads,
                "fingerprints": {"data": data.fingerprint, "weights": weights_fingerprint(model)},
            },
        )
        if (folder / REPORT).exists() and (folder / WEIGHTS).exists():
            report = read_json(folder / REPORT, StorageError, "report of sparse training")
            return dict(report)
        torch.set_num_threads(settings["threads"])
        with shown.stage(f"sparsify by {recipe.method}") as progress:
            found = sparsify(
                model,
                data,
                load_task(recipe.task),
                recipe.train,
                method=recipe.method,
                options=options,
                ignore=recipe.ignore,
                identity={"model": recipe.model, **settings["fingerprints"]},
                checkpoint=folder / CHECKPOINT,
                progress=progress,
            )
        write_weights(folder / WEIGHTS, found.network)
        report = {
            "schema": "autocompress.sparsify",
            "version": 1,
            "method": recipe.method,
            "settings": settings,
            "validation": {
                "metric": load_task(recipe.task).metric,
                "before": dataclasses.asdict(found.before),
                "after": dataclasses.asdict(found.after),
            },
            **found.account,
        }
        write_json(folder / REPORT, report)
    return report


def make_model(recipe: SparsifyRecipe, data: DataSet) -> nn.Module:
    """Make the model with its weights; without, with random ones that are a function of `train.seed`.

    Raises:
        ConversionError: It cannot be made, or the weights are of another model.
    """
    with seeded(recipe.train.seed, 0):
        return load_model_for(data, recipe.model, recipe.arguments, recipe.weights)


def write_weights(path: Path, network: nn.Module) -> None:
    """Write a state dict under the model's own names, whole or not at all."""
    tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    with replacing(path) as temporary:
        save_file(unshared(tensors), temporary)


def _settled(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that is in the folder, or begin it.

    Raises:
        RecipeError: There is another one.
    """
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        settled = {**wanted, "threads": wanted["threads"] or torch.get_num_threads()}
        write_json(path, settled)
        return settled
    found = read_json(path, StorageError, "settings of sparse training")
    if not isinstance(found, dict) or not isinstance(found.get("threads"), int):
        raise StorageError(f"settings {path} are damaged; remove {folder} to start again")
    if wanted["threads"] is None:
        wanted["threads"] = found["threads"]
    if found != wanted:
        have, want = (json.dumps(each, indent=1, sort_keys=True).splitlines() for each in (found, wanted))
        lines = [line for line in difflib.unified_diff(have, want, n=0, lineterm="") if line[0] in "+-"][2:]
        shown = "; ".join(
            f"{'there' if line[0] == '-' else 'here'} {line[1:].strip(' ,')}" for line in lines[:6]
        )
        raise RecipeError(
            f"{folder} holds another sparse training: {shown}; choose another --out, or remove it"
        )
    return dict(found)
