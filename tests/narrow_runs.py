"""The smallest run that narrows a model of the user: 200 digits, two groups of channels, trained weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_runs import small_payload, table_by_hand
from torch import nn

from autocompress.recipe import parse_recipe
from autocompress.run import make_space

MODEL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, classes=10, in_channels=1, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 12, 1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


def make(classes=10, in_channels=1):
    return Small(classes, in_channels)


def no_model():
    return 3
"""


def write_model(folder: Path) -> Path:
    """Write the file of a model, and beside it `weights.safetensors`; return the file.

    The weights are random: nothing here depends on how good they are.
    """
    # A name of its own: modules are cached by theirs.
    path = folder / f"model_{abs(hash(folder)) % 10**8}.py"
    path.write_text(MODEL)
    names: dict[str, Any] = {}
    exec(MODEL, names)
    torch.manual_seed(0)
    made: nn.Module = names["make"]()
    save_file(made.state_dict(), folder / "weights.safetensors")
    return path


def narrow_payload(model: Path, **changes: Any) -> dict[str, Any]:
    """The recipe that narrows the model of `write_model`, as it stands in YAML, with sections changed."""
    arguments = {
        "model": f"{model}:make",
        "weights": str(model.with_name("weights.safetensors")),
        "image": [1, 8, 8],
        "classes": 10,
        "steps": 4,
    }
    payload = small_payload(**changes)
    payload["space"] = {"name": "channels", "arguments": arguments}
    payload["train"]["epochs"] = changes.get("train", {}).get("epochs", 0)
    return payload


def with_narrow_table(folder: Path, payload: dict[str, Any]) -> Path:
    """Make a run directory that has a latency table already; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    space = make_space(parse_recipe(payload), lambda: None)  # type: ignore[arg-type, return-value]
    table_by_hand(space).save(folder / "latency_table.json")
    return folder
