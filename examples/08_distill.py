"""A network of your own taught by another one: losses on outputs and on maps, added up, and gone afterwards.

python examples/08_distill.py           # two minutes on 2 cores
python examples/08_distill.py --smoke   # checks that it runs

First in one call, by the names of losses; then in a training loop of one's own, with a `Distiller`.
"""

import copy
import sys
from collections.abc import Sized
from typing import cast

import torch
from torch import nn

from autocompress.distill.distiller import Distiller, Probe
from autocompress.distill.finetune import finetune
from autocompress.models.resnet_cifar import ResNetCifar
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.training.data import batches, load_data
from autocompress.training.evaluate import evaluate
from autocompress.training.task import load_task

smoke = "--smoke" in sys.argv
torch.manual_seed(0)
data = load_data("digits", limit=300 if smoke else None)
task, size = load_task(TaskSettings()), data.in_shape[1:]
epochs = 1 if smoke else 8


def score(network: nn.Module) -> float:
    """Return the accuracy on the validation part."""
    return evaluate(network.eval(), data.validation, task.score).mean


def settings(distill: str) -> FinetuneSettings:
    """Return settings that differ in what is distilled only."""
    return FinetuneSettings.model_validate({"epochs": epochs, "learning_rate": 0.1, "distill": distill})


teacher = ResNetCifar(3, in_channels=data.in_shape[0], classes=10)
finetune(teacher, data, task, settings("none"), resolution=size)
print(f"teacher: {score(teacher):.4f}")

start = ResNetCifar(1, in_channels=data.in_shape[0], classes=10)
for distill in ("none", "kd", "kd+at"):
    student = copy.deepcopy(start)
    finetune(student, data, task, settings(distill), resolution=size, teacher=teacher)
    print(f"student, {distill}: {score(student):.4f}")

student = copy.deepcopy(start).train()
terms = settings("kd+at").distill
images, targets = next(batches(data.train, 4, seed=None))
samples = len(cast(Sized, data.train))
probe = Probe(images, images, targets, samples=samples, classes=10)
distiller = Distiller(student, student, teacher, terms, probe, alpha=0.9, temperature=4.0, seed=0)
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)  # projectors are trained too
loss_on_labels = task.training_loss(0.0)
for epoch in range(epochs):
    distiller.train()
    for images, targets in batches(data.train, 128, seed=epoch):
        outputs = distiller(images)
        with torch.no_grad():
            taught = teacher(images)
        loss = distiller.loss(
            loss_on_labels(outputs, targets), outputs, taught, targets,
            indices=torch.arange(len(images)),  # of samples, for losses that remember them (crd)
            share=epoch / epochs,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
distiller.close()  # nothing of it is left in either network
print(f"student in a loop of one's own: {score(student):.4f}")
