"""What of a network is zero, layer by layer."""

from typing import Any

from autocompress.sparse.method import Work
from autocompress.sparse.units import zero_units


def account_of(work: Work, method: dict[str, Any], *, channels: bool) -> dict[str, Any]:
    """Count the zeros of every weight, and with `channels` the units of every group that are zero.

    Args:
        work: With the network as it is in the end.
        method: The account of the method, to which this is added.
        channels: Whether the method works on groups.
    """
    layers: list[dict[str, Any]] = [
        {"name": name, "weights": tensor.numel(), "zeros": int((tensor.detach() == 0).sum())}
        for name, tensor in work.network.named_parameters()
        if tensor.dim() > 1
    ]
    found = {
        "notes": [],
        **method,
        "weights": sum(layer["weights"] for layer in layers),
        "zeros": sum(layer["zeros"] for layer in layers),
        "layers": layers,
    }
    if channels:
        zero = zero_units(work)
        groups = [{"name": g.name, "units": len(g), "zero": zero[g.name]} for g in work.source.groups]
        empty = [str(group["name"]) for group in groups if group["zero"] == group["units"]]
        found["groups"] = groups
        if empty:
            note = f"no channel is left in {', '.join(empty)}: choose a smaller strength or fewer epochs"
            found["notes"] = [*found["notes"], note]
    return found
