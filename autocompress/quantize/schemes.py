"""What a device can run: legal widths, and grids as its scheme asks for them."""

from collections.abc import Sequence

from torch import nn

from autocompress.errors import QuantizationError
from autocompress.latency.target import Scheme, Target
from autocompress.quantize.grid import Grid, Levels, activation_grid, weight_grid
from autocompress.quantize.layer import out_axis, out_channels
from autocompress.quantize.ops import FULL_PRECISION

Bits = tuple[int, int]
"""Of the weights, of the input of a layer; 32 and 32 leave it in floating point."""


def levels_of(scheme: Scheme) -> Levels:
    """Return how levels lie; dynamic fixed point is evenly spaced at a scale that is a power of two."""
    return "power_of_two_scale" if scheme.levels == "dynamic_fixed_point" else scheme.levels


def weights_of(scheme: Scheme, bits: int) -> Grid:
    """Return the grid of weights of a width."""
    return weight_grid(bits, levels_of(scheme), symmetric=scheme.weights == "symmetric")


def activations_of(scheme: Scheme, bits: int, *, positive: bool) -> Grid:
    """Return the grid of activations of a width, which are never negative where they are positive."""
    symmetric = scheme.activations == "symmetric"
    return activation_grid(bits, positive=positive, symmetric=symmetric, levels=levels_of(scheme))


def scales_of(scheme: Scheme, layer: nn.Module) -> tuple[int, int | None]:
    """Return how many scales the weights of a layer have, and along which of their axes.

    One a channel where the device allows it: where it has both, that is better. Groups of a transposed
    convolution share an axis of the weights, and one scale.
    """
    grouped = isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1
    if "per_channel" not in scheme.granularity or grouped:
        return 1, None
    return out_channels(layer), out_axis(layer)


def legal_widths(
    target: Target, widths: Sequence[int | Sequence[int]] | None = None
) -> tuple[Scheme, tuple[tuple[int, int], ...]]:
    """Return how a target quantizes, and which pairs of widths may be chosen, ascending.

    Weights and activations have one width where the target is measured here: its runtime has no other
    kernels. It runs 32-bit floats beside integers, and so a layer may stay in floating point.

    Raises:
        QuantizationError: The target runs no integers, or not the widths that were asked for.
    """
    if not target.schemes:
        raise QuantizationError(
            f"target {target.name!r} states no way to quantize (schemes); take one that runs integers: "
            "`autocompress list targets`"
        )
    if target.runtime and target.number_format != "float32":
        raise QuantizationError(
            f"target {target.name!r} computes everything in {target.number_format}, and leaves nothing to "
            "choose; take the target of the same runtime in float32, which runs 8 bits beside floats"
        )
    scheme = target.schemes[0]
    floats = ((FULL_PRECISION, FULL_PRECISION),) if target.runtime else ()
    same = {(bits, bits) for bits in scheme.bits}
    every = same if target.runtime else {(w, a) for w in scheme.bits for a in scheme.bits}
    legal = {*every, *floats}
    if widths is None:
        return scheme, tuple(sorted(legal))
    asked: list[tuple[int, int]] = []
    for entry in widths:
        pair = (entry, entry) if isinstance(entry, int) else tuple(entry)
        if len(pair) != 2 or pair not in legal:
            raise QuantizationError(
                f"target {target.name!r} cannot run widths {entry!r}; it runs "
                f"{', '.join(f'{w}/{a}' for w, a in sorted(legal))} (weights/activations, 32 is floating "
                "point)"
            )
        asked.append((pair[0], pair[1]))
    return scheme, tuple(sorted(set(asked)))


def at_ends(pairs: Sequence[Bits], ends: int | None) -> tuple[Bits, ...]:
    """Return which of the legal pairs the first and the last layer have.

    They have `ends` bits where others can have fewer; `None`, or a width that is not legal, leaves them open.
    """
    if ends is not None and (ends, ends) in pairs and any(bits < ends for pair in pairs for bits in pair):
        return ((ends, ends),)
    return tuple(pairs)


def chosen_apart(pairs: Sequence[Bits]) -> bool:
    """Whether weights and inputs have a choice each; otherwise a layer has one for both.

    Raises:
        QuantizationError: The pairs are neither all of some widths nor equal ones only.
    """
    weights, inputs = ({pair[side] for pair in pairs} for side in (0, 1))
    if len(pairs) == len(weights) * len(inputs):
        return True
    if any(w != a for w, a in pairs):
        raise QuantizationError(
            "widths must be all pairs of some widths of weights and of activations, or equal ones only, got "
            f"{', '.join(f'{w}/{a}' for w, a in pairs)}"
        )
    return False
