"""After calibration, before any training: rounding that is learned, and biases that are corrected."""

from typing import Literal

from torch import Tensor, nn

from autocompress.quantize.correct import correct_bias
from autocompress.quantize.layer import QuantizedLayer, quantized_layers
from autocompress.quantize.reconstruct import Settings, reconstruct

Rounding = Literal["nearest", "adaround", "brecq"]


def blocks_of(network: nn.Module, rounding: Rounding) -> list[str]:
    """Return the modules whose outputs are matched, in order.

    AdaRound: every layer with quantized weights. BRECQ: the outermost modules that hold some, containers and
    the network itself apart: residual blocks as a rule.
    """
    layers = [name for name, layer in quantized_layers(network) if layer.weight is not None]
    if rounding == "adaround":
        return layers
    return list(dict.fromkeys(_block(network, name) for name in layers))


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _block(network: nn.Module, layer: str) -> str:
    parts = layer.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        if type(network.get_submodule(name)) not in CONTAINERS:
            return name
    return layer


def _has_bias(layer: QuantizedLayer) -> bool:
    return layer.weight is not None and getattr(layer.layer, "bias", None) is not None


def improve(
    network: nn.Module,
    reference: nn.Module,
    images: Tensor,
    *,
    rounding: Rounding = "nearest",
    bias_correction: bool = False,
    settings: Settings | None = None,
) -> list[str]:
    """Improve a quantized network without labels.

    Args:
        network: A user's model with quantizers, changed in place.
        reference: The same in floating point.
        images: `(images, channels, height, width)`, normalised, of the training part.
        rounding: How weights are rounded.
        bias_correction: Whether biases are shifted so that means are those of the reference.
        settings: Of learning to round.

    Returns:
        What was done, in lines.

    Raises:
        QuantizationError: A block cannot be reconstructed.
    """
    said = []
    if rounding != "nearest":
        blocks = blocks_of(network, rounding)
        if blocks:
            done = reconstruct(network, reference, blocks, images, settings)
            before, after = (sum(getattr(one, when) for one in done) for when in ("before", "after"))
            said.append(
                f"{rounding}: squared error of {len(done)} blocks {after / max(before, 1e-30):.0%} of that "
                "of the nearest levels"
            )
    if bias_correction:
        # Layers without a bias do not get one: the network keeps the parameters that it was built with.
        named = [name for name, layer in quantized_layers(network) if _has_bias(layer)]
        shifts = correct_bias(network, reference, images, names=named)
        said.append(
            f"biases of {len(shifts)} layers corrected, by {max(shifts.values(), default=0.0):.3g} at most"
        )
    return said
