"""Distillation where the data are not there any more: images out of the teacher's batch-norm statistics.

Sources: Yin et al., "Dreaming to Distill", CVPR 2020 (statistics of batch norm as the prior of images); the
images are those of ZeroQ (`autocompress.quantize.data_free`), without labels as targets or augmentation.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import TensorDataset

from autocompress.errors import DistillationError
from autocompress.progress import Progress, silent
from autocompress.quantize.data_free import synthesize
from autocompress.training.data import DataSet


def without_training_data(
    teacher: nn.Module,
    data: DataSet,
    *,
    images: int = 512,
    batch: int = 64,
    steps: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> DataSet:
    """Return the data set with a training part that is made of the teacher alone, labelled by it.

    The training part that is there is not looked at. Finetune on it with `alpha` 1, or `distill` with
    `beside: nothing`: the labels are the teacher's guesses.

    Args:
        teacher: With batch norms that are not folded; not changed.
        data: Says the shape of images; its validation and test parts stay.
        images: How many, at least `batch`.
        batch: Images that are made together, at least 2: their joint statistics are the norms'.
        steps: Of Adam, a batch.
        seed: Of the noise they start from.
        progress: Told batches.

    Raises:
        DistillationError: Too few images are asked for.
        QuantizationError: The teacher has no statistics of batch norm.
    """
    if batch < 2 or images < batch:
        raise DistillationError(
            f"images must be at least batch, and batch at least 2, got {images} and {batch}"
        )
    made, labels, count = [], [], images // batch
    for number in range(count):
        made.append(synthesize(teacher, data.in_shape, images=batch, steps=steps, seed=seed + number))
        with torch.no_grad():
            labels.append(teacher.eval()(made[-1]).argmax(dim=1))
        progress(number + 1, count, "images made")
    text = f"{images} images made of a teacher, steps {steps}, batch {batch}, seed {seed}"
    return replace(
        data,
        name=f"{data.name}, {text}",
        train=TensorDataset(torch.cat(made), torch.cat(labels)),
        fingerprint=f"{data.fingerprint} {text}",
    )
