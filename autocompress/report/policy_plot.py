"""Bits layer by layer over what each layer costs: a policy at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autocompress.atomic import replacing
from autocompress.errors import QuantizationError

FLOATS = 32


@dataclass(frozen=True)
class PlottedLayer:
    """A layer of a policy.

    Attributes:
        name: Of the layer.
        weight_bits: Of its weights; 32 is floating point.
        input_bits: Of what it reads.
        cost: What it costs at these bits.
        whole_cost: And at the most bits that the device has.
    """

    name: str
    weight_bits: int
    input_bits: int
    cost: float
    whole_cost: float


def policy_plot(path: Path, layers: Sequence[PlottedLayer], *, metric: str, title: str) -> None:
    """Draw bits of weights and inputs, and below them the cost of each layer, before and after.

    Args:
        path: An SVG file.
        layers: In the order in which they run.
        metric: What costs are, with the unit.
        title: Above the plot.

    Raises:
        QuantizationError: There are no layers.
        StorageError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if not layers:
        raise QuantizationError("a plot of a policy needs at least one layer, got none")
    figure = Figure(figsize=(max(6.0, 0.16 * len(layers) + 2), 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    places = range(len(layers))
    above.bar(places, [layer.weight_bits for layer in layers], width=0.8, color="tab:blue", label="weights")
    above.plot(places, [layer.input_bits for layer in layers], "o", color="tab:orange", ms=4, label="inputs")
    bits = sorted({bits for layer in layers for bits in (layer.weight_bits, layer.input_bits)})
    above.set(ylabel="bits", title=title, yticks=bits)
    above.set_yticklabels(["floats" if b == FLOATS else str(b) for b in bits])
    above.legend(fontsize=8, loc="lower right")
    below.bar(places, [layer.whole_cost for layer in layers], width=0.8, color="0.8", label="at most bits")
    below.bar(places, [layer.cost for layer in layers], width=0.8, color="tab:green", label="at these bits")
    below.set(ylabel=metric, xlabel="layer")
    below.set_xticks(list(places), [layer.name for layer in layers], rotation=90, fontsize=5)
    below.legend(fontsize=8)
    # Names inside the file are drawn at random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": title}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
