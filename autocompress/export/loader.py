"""Rebuild an exported network in plain PyTorch: `load(folder)`. A copy travels with every export."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS = {"relu": "ReLU", "relu6": "ReLU6", "hard_swish": "Hardswish", "hard_sigmoid": "Hardsigmoid"}
ACTIVATIONS |= {"sigmoid": "Sigmoid", "silu": "SiLU"}


class SqueezeExcite(nn.Module):
    """Scale each channel by what its global average says of it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to the same shape."""
        scale = self.reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * nn.functional.hardsigmoid(self.expand(scale))


class Residual(nn.Sequential):
    """Run the layers in sequence and add the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` to the same shape."""
        result = x
        for layer in self:
            result = layer(result)
        return x + result


def build(kind: str, op: dict[str, Any]) -> nn.Module:
    """Build one operation from its fields."""
    if kind == "SqueezeExcite":
        return SqueezeExcite(op["channels"], op["hidden"])
    if kind in ("GlobalAvgPool", "Add"):  # An addition belongs to its block: `Residual`.
        return nn.AdaptiveAvgPool2d(1) if kind == "GlobalAvgPool" else nn.Identity()
    size, stride = op.get("kernel", 1), op.get("stride", 1)
    if kind == "MaxPool":
        return nn.MaxPool2d(size, stride, 0 if size == stride else size // 2)
    if kind == "Conv2d":
        ends, rest = (op["in_channels"], op["out_channels"]), (op["groups"], op["bias"])
        parts = OrderedDict[str, nn.Module](conv=nn.Conv2d(*ends, size, stride, size // 2, 1, *rest))
    elif kind == "Linear":
        linear = nn.Linear(op["in_features"], op["out_features"], op["bias"])
        parts = OrderedDict[str, nn.Module](flatten=nn.Flatten(), linear=linear)
    else:
        raise ValueError(f"this loader cannot build an operation of kind {kind!r}")
    if op.get("norm"):
        parts["bn"] = nn.BatchNorm2d(op["out_channels"])
    if op["activation"] != "none":
        parts["act"] = getattr(nn, ACTIVATIONS[op["activation"]])()
    return nn.Sequential(parts)


def load(folder: str | Path) -> nn.Module:
    """Return the network in `folder` with its weights, on the CPU, in eval mode."""
    network = nn.Sequential()
    with torch.device("meta"):
        for block in json.loads(Path(folder, "network.json").read_text(encoding="utf-8"))["blocks"]:
            ops = block["ops"]
            residual = ops[-1]["kind"] == "Add"
            layers = [build(op["kind"], op) for op in (ops[:-1] if residual else ops)]
            network.add_module(block["name"], (Residual if residual else nn.Sequential)(*layers))
    network.to_empty(device="cpu").load_state_dict(load_file(Path(folder, "network.safetensors")))
    return network.eval()
