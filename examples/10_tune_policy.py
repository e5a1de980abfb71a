"""A compression policy tuned by Ray Tune: what is pruned, factorized and quantized, and how it is finetuned.

python examples/10_tune_policy.py           # some ten minutes on 2 cores; killed, it goes on when run again
python examples/10_tune_policy.py --smoke   # checks that it runs

The network is trained here first, on bundled digits. Each policy is measured before it is trained; what does
not fit the budget is not. `autocompress tune policy.yaml` does the same from a recipe.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.atomic import locked
from autocompress.distill.finetune import finetune
from autocompress.models.resnet_cifar import ResNetCifar
from autocompress.network import unshared
from autocompress.policy.recipe import parse_policy_recipe
from autocompress.policy.run import begin, markdown, run_policies
from autocompress.recipe import FinetuneSettings, TaskSettings
from autocompress.run import Shown
from autocompress.training.data import load_data
from autocompress.training.task import load_task


def resnet8() -> nn.Module:
    """Return the network that is compressed; the recipe names this function."""
    return ResNetCifar(1, in_channels=1, classes=10)


def main() -> None:
    """Train a network, and tune how it is compressed."""
    smoke = "--smoke" in sys.argv
    folder = Path("runs/policy-smoke" if smoke else "runs/policy")
    weights = folder / "resnet8.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        network, data = resnet8(), load_data("digits")
        settings = FinetuneSettings(epochs=1 if smoke else 15, learning_rate=0.1, distill=())
        scored = finetune(network, data, load_task(TaskSettings()), settings, resolution=data.in_shape[1:])
        print(f"trained: validation {scored.mean:.4f}")
        save_file(unshared(network.state_dict()), weights)
    recipe = {
        "model": f"{Path(__file__).resolve()}:resnet8",
        "weights": str(weights.resolve()),
        "data": {"source": "digits"},
        "passes": [
            {"prune": {"ratio": [0.0, 0.2, 0.4, 0.6]}},
            {"factorize": {"method": ["none", "svd"], "ratio": 0.5}},
            {"quantize": {"bits": [32, 8]}},
            {
                "distill": {
                    "losses": ["kd", "kd+at"],
                    "learning_rate": [0.01, 0.03],
                    "epochs": 1 if smoke else 3,
                }
            },
        ],
        "tune": {
            "budget": {"macs": "70%"} if smoke else {"latency_ms": "70%"},
            "trials": 3 if smoke else 16,
            "workers": 2,
            "random_policies": 1 if smoke else 3,
        },
    }
    run = folder / "tune"
    with locked(run):
        report = run_policies(begin(run, parse_policy_recipe(recipe, Path("policy.yaml"))), Shown(say=print))
    print(markdown(report))
    print(f"the tuned network is in {run / 'best'}")


if __name__ == "__main__":  # workers of Ray import this file, for the network
    main()
