"""Your own trained network in fewer bits, from Python: here a ResNet-20 on the bundled digits.

    python examples/07_quantize.py            # two minutes
    python examples/07_quantize.py --smoke    # checks that it runs

Bits of 2, 4 and 8 for the weights and the input of each layer, as many bytes as 4-bit weights everywhere.
What each choice alone does to the outputs is measured, and the best sum that fits is proven. The uniform and
a random network stand beside it, finetuned in the same way; the result is written as ONNX with integers.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from autocompress.budget import Budget
from autocompress.cost import operation_cost
from autocompress.distill.finetune import finetune
from autocompress.engine import search
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.export.export import export_network
from autocompress.latency.target import load_target
from autocompress.models.resnet_cifar import resnet20
from autocompress.network import build_network
from autocompress.quantize.schemes import legal_widths
from autocompress.quantize.source import QuantizationSource
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.space import Codes
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches, evaluate
from autocompress.training.task import load_task
from search_spaces.bits import bit_space
from strategies.sensitivity import Sensitivity

smoke = "--smoke" in sys.argv
torch.set_num_threads(1)
data = load_data("digits", limit=300 if smoke else None)
task = load_task(TaskSettings())
size = data.in_shape[1:]

# The network that you bring ---------------------------------------------------------------------------------

torch.manual_seed(0)
model = resnet20(classes=10, in_channels=1, width=8)
settings = FinetuneSettings(epochs=1 if smoke else 10, learning_rate=0.1, batch_size=32)
trained = finetune(model, data, task, settings, resolution=size)

# What can be quantized, and the ranges of all widths --------------------------------------------------------

scheme, widths = legal_widths(load_target("arm-cpu-low-bit"), [2, 4, 8])
images = calibration_batches(data, 128)
source = QuantizationSource(model, images[0][:1], calibration=images, widths=widths, scheme=scheme)
for site in source.plan.sites[:3]:
    folded = f", {site.norm} is folded into it" if site.norm else ""
    print(f"{site.name} reads {'what is never negative' if site.positive else 'any numbers'}{folded}")
print(f"... {len(source.plan.sites)} layers in all")

# Bits under a budget ----------------------------------------------------------------------------------------

space = bit_space(source)
bytes_ = operation_cost(space, "size_bytes")


def uniform(bits: int) -> Codes:
    """Return the network with these bits everywhere but at its ends."""
    return space.encode(
        [space.architecture({c.name: bits if bits in c.options else c.options[0] for c in space.choices})]
    )


limits = Budget.of({"size_bytes": float(bytes_.of(uniform(4))[0])}).resolve(space, [bytes_])
judge = SupernetEvaluator(space.supernet(), data, task, images, compared=True)
strategy = Sensitivity(limits, seed=0, points=2 if smoke else None)
best = search(strategy, limits, judge, evaluations=1000).best()
found: dict[str, Codes] = {
    "searched": space.encode([best.architecture]),
    "uniform": uniform(4),
    "random": limits.sample(1, np.random.default_rng(0), at_least=0.95),
}

# Finetune with the network in floating point as teacher ----------------------------------------------------

whole = 4e-3 * sum(parameter.numel() for parameter in model.parameters())
print(f"in floating point: validation accuracy {trained.mean:.3f}, {whole:.0f} kB")
settings = FinetuneSettings(epochs=1 if smoke else 3, learning_rate=0.01, batch_size=32, precision="fp32")
for name, codes in found.items():
    network = build_network(space.operations(codes)).eval()
    before = evaluate(network, data.validation, task.score).mean
    after = finetune(network, data, task, settings, resolution=size, teacher=model).mean
    kilobytes = float(bytes_.of(codes)[0]) / 1e3
    print(f"{name}: {kilobytes:.0f} kB; validation accuracy {before:.3f}, finetuned {after:.3f}")
    if name == "searched":
        with tempfile.TemporaryDirectory() as folder:
            manifest = export_network(
                network,
                architecture=space.decode(codes)[0],
                blocks=space.operations(codes),
                in_shape=data.in_shape,
                folder=Path(folder) / "exported",
                preprocessing={},
                formats=("onnx",),
            )
            print(f"exported: ONNX of {manifest.files['network.onnx'].size_bytes / 1e3:.0f} kB")
