"""What of a network is zero, layer by layer."""

from typing import Any

from autocompress.sparse.method import Work
from autocompress.sparse.units import zero_units


def account_of(work: Work, *, channels: bool) -> dict[str, Any]:
    """Count the zeros of every weight, and with `channels` the units of every group that are zero."""
    layers: list[dict[str, Any]] = [
        {"name": name, "weights": tensor.numel(), "zeros": int((tensor.detach() == 0).sum())}
        for name, tensor in work.network.named_parameters()
        if tensor.dim() > 1
    ]
    found: dict[str, Any] = {
        "weights": sum(layer["weights"] for layer in layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "layers": layers,
    }
    if channels:
        zero = zero_units(work)
        found["groups"] = [
            {"name": group.name, "units": len(group), "zero": zero[group.name]}
            for group in work.source.groups
        ]
    return found
