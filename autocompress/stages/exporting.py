"""Export of the finetuned network."""

from pathlib import Path
from typing import Any

from autocompress.elastic.supernet import resize
from autocompress.errors import ExportError
from autocompress.network import user_model
from autocompress.quantize.layer import has_quantizers
from autocompress.quantize.network import QuantizedNetwork
from autocompress.run import Run, Shown
from autocompress.space import Architecture
from autocompress.stages.checking import passes_of
from autocompress.stages.compressing import compress, final_folder
from autocompress.stages.networks import resolution
from autocompress.stages.pricing import costs
from autocompress.stages.selecting import selected
from autocompress.training.data import DataSet, Images, batches

QUANTIZED_SAMPLE = 500
"""Validation images on which decisions of a network of few bits and its exported form are compared."""


def export(run: Run, shown: Shown, arch: Architecture | None = None) -> Path:
    """Export the finetuned network, or what passes made of it, and check every format against it.

    What was exported before is checked, and left as it is.

    Returns:
        The folder with the files.
    """
    from autocompress.export.export import export_network
    from autocompress.export.manifest import verify_export

    arch = selected(run, shown, arch)
    network, scored = compress(run, shown, arch)
    passes = passes_of(run.recipe)
    folder = final_folder(run, arch) / "exported"
    if (folder / "manifest.json").exists():
        try:
            written = verify_export(folder)
        except ExportError as error:
            raise ExportError(f"{error}; remove {folder} first") from None
        if {*written.parity, *written.left_out} == {*run.recipe.export.formats}:
            return folder
    codes = run.space.encode([arch])
    size = resolution(run, arch)
    priced = {cost.metric: float(cost.of(codes)[0]) for cost in costs(run, shown)}
    policy = _policy(run, arch)
    # Decisions of networks of few bits are compared one by one.
    sampled = QUANTIZED_SAMPLE if has_quantizers(network) else 16
    with shown.stage("export") as progress:
        progress(0, 1, "writing and checking")
        manifest = export_network(
            network,
            architecture=arch,
            # Passes make other operations than those of the space.
            blocks=[] if passes else run.space.operations(codes),
            in_shape=(run.data.in_shape[0], *size),
            folder=folder,
            preprocessing=preprocessing(run.data, size),
            formats=run.recipe.export.formats,
            sample=resize(next(batches(run.data.validation, sampled, seed=None))[0], size),
            extra={
                "predicted_costs": {} if passes else priced,
                "validation": vars(scored),
                "metric": run.task.metric,
                **({"bits": policy} if policy else {}),
                **({"passes": passes} if passes else {}),
            },
        )
        progress(1, 1, "")
    left_out = "".join(f"; no {name}: {reason}" for name, reason in manifest.left_out.items())
    if manifest.input.shape[0] == 1:
        left_out += (
            "; ONNX and torch.export for one image at a time: forward() makes a constant of the batch size, "
            "as len(x) does; x.shape[0] would leave it free"
        )
    shown.say(f"exported to {folder}{left_out}")
    return folder


def preprocessing(data: DataSet, size: tuple[int, int]) -> dict[str, Any]:
    """Return what has to be done to an image before a network sees it, for the manifest of an export."""
    return {
        "resize": list(size),
        "resize_mode": "bilinear, antialiased",
        # Data sets of the user with float inputs come normalised and are taken as they are.
        "divide_by": 255 if isinstance(data.train, Images) else 1,
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": list(data.class_names) or data.classes,
    }


def _policy(run: Run, arch: Architecture) -> list[dict[str, Any]]:
    """Return bits and storage of each layer of a network of few bits; nothing of others."""
    model = user_model(run.space, run.space.encode([arch]))
    return model.described() if isinstance(model, QuantizedNetwork) else []
