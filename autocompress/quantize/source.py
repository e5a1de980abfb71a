"""A model that can be quantized: folded, calibrated once for all widths, and the network of a policy."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from autocompress.errors import QuantizationError
from autocompress.latency.target import Scheme
from autocompress.ops import OpSpec
from autocompress.prune.check import check, check_buffers
from autocompress.prune.cut import copied
from autocompress.quantize.calibrate import ranges
from autocompress.quantize.grid import Grid, scale_of
from autocompress.quantize.layer import QuantizedLayer, room_for_bias
from autocompress.quantize.observers import weight_range
from autocompress.quantize.ops import FULL_PRECISION, Conversion
from autocompress.quantize.plan import Plan, make_plan, sources_of
from autocompress.quantize.quantizer import Gradient, Quantizer
from autocompress.quantize.schemes import Bits, activations_of, scales_of, weights_of

Policy = tuple[Bits, ...]
"""Bits of each layer, in the order of the plan."""

OUTPUT_BITS = 8
"""Of integers that a layer gives to others than quantized layers."""


class QuantizationSource:
    """A model whose layers can have few bits.

    Batch norm is folded, ranges of weights and activations are found once for every width: the network of a
    policy is then made without looking at data, and all networks share their weights.

    Args:
        model: Copied; the user's own is never changed.
        image: A batch it takes, `(batch, channels, height, width)`.
        calibration: Images on which ranges of activations are found.
        widths: Legal bits of weights and inputs.
        scheme: How the device quantizes.
        outputs: Whether layers of integers also give integers, as those of ONNX Runtime do.
        weight_ranges: A method of `observers`, for weights.
        activation_ranges: And for activations.
        gradient: How scales are learned in finetuning.

    Attributes:
        calibrated_on: How many images.
        model: The copy, batch norm folded, in evaluation mode.
        plan: What can be quantized.
        origin: How the model is made again: `model`, the name of its factory, and `arguments`; empty if it
            was given as an object.

    Raises:
        ConversionError: The model cannot be traced, has a weight that is not finite, or buffers of its own.
        QuantizationError: Nothing can be quantized, there are no calibration images, or a range is not
            finite.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        *,
        calibration: Iterable[Tensor],
        widths: Iterable[Bits],
        scheme: Scheme,
        outputs: bool = False,
        weight_ranges: str = "mse",
        activation_ranges: str = "mse",
        gradient: Gradient = "lsq",
    ) -> None:
        """Fold, and find the ranges."""
        if gradient not in get_args(Gradient):
            raise QuantizationError(f"gradient must be one of {get_args(Gradient)}, got {gradient!r}")
        self.origin: Mapping[str, Any] = {}
        self.scheme, self.outputs, self.gradient = scheme, outputs, gradient
        self.widths = tuple(sorted(set(widths)))
        found = check(model, image)
        self.plan: Plan = make_plan(found, image)
        self.model = folded(found, self.plan)
        check_buffers(self.model)
        self._by_source = sources_of(self.plan)
        images = list(calibration)
        self.calibrated_on = sum(map(len, images))
        self._holder = self._calibrated(images, weight_ranges, activation_ranges)

    # Grids -------------------------------------------------------------------------------------------

    @cached_property
    def weight_widths(self) -> tuple[int, ...]:
        """Widths of weights, ascending, without floating point."""
        return tuple(sorted({w for w, _ in self.widths if w != FULL_PRECISION}))

    @cached_property
    def activation_widths(self) -> tuple[int, ...]:
        """Widths of activations, ascending, without floating point."""
        return tuple(sorted({a for _, a in self.widths if a != FULL_PRECISION}))

    # Calibration -------------------------------------------------------------------------------------

    def _calibrated(self, images: Iterable[Tensor], weights: str, activations: str) -> nn.Module:
        """Return the model with the quantizers of every width: those of one tensor one after another."""
        inputs = {sites[0].name: sites for sites in self._by_source.values()}
        outputs = {site.name: site for site in self.plan.sites} if self.outputs else {}
        seen = ranges(
            self.model,
            images,
            inputs=list(inputs),
            outputs={n: s.rectified for n, s in outputs.items()},
            method=activations,
        )
        holder = copy.deepcopy(self.model)
        for sites in self._by_source.values():
            grids = [
                activations_of(self.scheme, bits, positive=sites[0].positive)
                for bits in self.activation_widths
            ]
            # Layers of one tensor have one quantizer: a runtime makes its integers once.
            input_ = Quantizer(Grid(8), channels=len(grids))
            input_.lay([scale_of(*seen.inputs[sites[0].name].range(grid), grid) for grid in grids])
            for site in sites:
                layer = cast(Any, holder.get_submodule(site.name))
                count, axis = scales_of(self.scheme, layer)
                weight = Quantizer(Grid(8), channels=count * len(self.weight_widths), axis=axis)
                scales = [
                    scale_of(*weight_range(layer.weight.detach(), grid, axis, weights), grid)
                    for grid in (weights_of(self.scheme, bits) for bits in self.weight_widths)
                ]
                weight.lay(
                    [(room_for_bias(scale, layer.bias, input_.scale.min()), zero) for scale, zero in scales],
                )
                output = None
                if site.name in seen.outputs:
                    output = Quantizer(Grid(8))
                    grid = activations_of(self.scheme, OUTPUT_BITS, positive=site.rectified)
                    output.lay([scale_of(*seen.outputs[site.name].range(grid), grid)])
                holder.set_submodule(
                    site.name, QuantizedLayer(layer, weight=weight, input=input_, output=output)
                )
        return holder.eval()

    # Networks ----------------------------------------------------------------------------------------

    def quantizers(self, policy: Policy, number: int, layer: nn.Module) -> dict[str, Quantizer]:
        """Return the quantizers of a layer, not calibrated; none if it stays in floating point."""
        count, axis = scales_of(self.scheme, layer)
        return {
            part: Quantizer(grid, channels=count, axis=axis, gradient=self.gradient)
            if part == "weight"
            else Quantizer(grid, gradient=self.gradient)
            for part, grid in self._grids(policy, number).items()
        }

    def _grids(self, policy: Policy, number: int) -> dict[str, Grid]:
        """Return what is quantized of a layer: `weight`, `input`, `output`."""
        site, (weight_bits, input_bits) = self.plan.sites[number], policy[number]
        found: dict[str, Grid] = {}
        if weight_bits != FULL_PRECISION:
            found["weight"] = weights_of(self.scheme, weight_bits)
        if input_bits != FULL_PRECISION:
            found["input"] = activations_of(self.scheme, input_bits, positive=site.positive)
        if self.gives_integers(policy, number) and not self.hands_on(policy, number):
            found["output"] = activations_of(self.scheme, OUTPUT_BITS, positive=site.rectified)
        return found

    def quantizer(self, number: int, part: str, bits: int) -> Quantizer:
        """Return a calibrated quantizer of the weights, or of the input, of a layer.

        Args:
            number: Of the layer.
            part: `weight` or `input`.
            bits: Of the widths that were calibrated.
        """
        floats = FULL_PRECISION, FULL_PRECISION
        own = (bits, FULL_PRECISION) if part == "weight" else (FULL_PRECISION, bits)
        policy = tuple(own if n == number else floats for n in range(len(self.plan.sites)))
        name = self.plan.sites[number].name
        found = self.quantizers(policy, number, self.model.get_submodule(name))[part]
        whole = cast(Quantizer, self._holder.get_submodule(f"{name}.{part}"))
        at = list(self.entries(policy)[f"{name}.{part}.scale"][0])
        found.lay([(whole.scale.detach()[at], whole.zero_point.detach()[at])])
        return found

    def gives_integers(self, policy: Policy, number: int) -> bool:
        """Whether a layer gives integers: linear layers give floats where nobody asks for more."""
        layer = self.model.get_submodule(self.plan.sites[number].name)
        return self.outputs and FULL_PRECISION not in policy[number] and not isinstance(layer, nn.Linear)

    def hands_on(self, policy: Policy, number: int) -> bool:
        """Whether what a layer gives is quantized as the input of the layers that read it."""
        reader = self.plan.sites[number].reader
        if not reader:
            return False
        return any(
            site.source == reader and bits[1] != FULL_PRECISION
            for site, bits in zip(self.plan.sites, policy, strict=True)
        )

    def network(self, policy: Policy, *, meta: bool = False) -> nn.Module:
        """Return the network of a policy with the calibrated scales, or on the meta device without values.

        Raises:
            QuantizationError: The policy has not one pair a layer, or one that was not calibrated for.
        """
        self._check(policy)

        def made(name: str, tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if meta else tensor.clone()

        network, inputs = copied(self.model, made), dict[str, Quantizer]()
        with torch.device("meta" if meta else "cpu"):
            for number, site in enumerate(self.plan.sites):
                layer = network.get_submodule(site.name)
                # One without quantizers too: its weights have one name at all bits.
                found = self.quantizers(policy, number, layer)
                if "input" in found:
                    found["input"] = inputs.setdefault(site.source, found["input"])
                network.set_submodule(site.name, QuantizedLayer(layer, **found))
        if not meta:
            own = dict(self._holder.named_parameters())
            entries = self.entries(policy)
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if name in entries:
                        parameter.copy_(own[name][list(entries[name][0])])
        return network.eval()

    def shared(self) -> nn.Module:
        """Return the model with the scales of every width: what all networks are slices of; not to be run."""
        return copy.deepcopy(self._holder)

    def entries(self, policy: Policy) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Return which scales and zero points of `shared` a policy uses, by name of the parameter."""
        found: dict[str, dict[int, Sequence[int]]] = {}
        for number, site in enumerate(self.plan.sites):
            for part, grid in self._grids(policy, number).items():
                widths, count = {
                    "weight": (self.weight_widths, self._weight_scales[number]),
                    "input": (self.activation_widths, 1),
                    "output": ((OUTPUT_BITS,), 1),
                }[part]
                at = widths.index(grid.bits) * count
                for name in ("scale", "zero_point"):
                    found[f"{site.name}.{part}.{name}"] = {0: range(at, at + count)}
        return found

    @cached_property
    def _weight_scales(self) -> tuple[int, ...]:
        layers = (self.model.get_submodule(site.name) for site in self.plan.sites)
        return tuple(scales_of(self.scheme, layer)[0] for layer in layers)

    def _check(self, policy: Policy) -> None:
        if len(policy) != len(self.plan.sites):
            raise QuantizationError(
                f"a policy must have {len(self.plan.sites)} pairs of bits, one a layer, got {len(policy)}"
            )
        for site, (weights, inputs) in zip(self.plan.sites, policy, strict=True):
            known = (*self.weight_widths, FULL_PRECISION), (*self.activation_widths, FULL_PRECISION)
            if weights not in known[0] or inputs not in known[1]:
                raise QuantizationError(
                    f"layer {site.name} cannot have {weights} bits of weights and {inputs} of inputs; it was "
                    f"calibrated for {known[0]} and {known[1]}"
                )

    # Costs -------------------------------------------------------------------------------------------

    def operations(self, policy: Policy) -> tuple[OpSpec, ...]:
        """Return what the network of a policy runs and what it costs: layers, the rest, conversions."""
        layers = (op for site, bits in zip(self.plan.sites, policy, strict=True) for op in site.at(bits))
        conversions = (one for number in range(len(policy)) for one in self.conversions_after(policy, number))
        first = (one for source in self._by_source for one in self.conversion_before(policy, source))
        return (*layers, *self.plan.others, *first, *conversions)

    def conversions_after(self, policy: Policy, number: int) -> tuple[OpSpec, ...]:
        """Return what makes floats of the integers that a layer gives, if somebody has to."""
        site = self.plan.sites[number]
        floats_itself = any(getattr(op, "activation", "none") not in FUSED for op in site.ops)
        if not self.gives_integers(policy, number) or self.hands_on(policy, number) or floats_itself:
            return ()
        return tuple(Conversion("dequantize", *op.out_shape) for op in site.ops)

    def conversion_before(self, policy: Policy, source: str) -> tuple[OpSpec, ...]:
        """Return what makes the integers that layers read, if the layer before does not give them."""
        sites, reads = self.plan.sites, self._by_source[source][0]
        number = sites.index(reads)
        if not self.outputs or policy[number][1] == FULL_PRECISION:
            return ()
        makers = [n for n, site in enumerate(sites) if site.reader == source]
        if any(self.gives_integers(policy, maker) for maker in makers):
            return ()
        return tuple(Conversion("quantize", *op.in_shape) for op in reads.ops)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the weights, the scales of all widths, and how they are used."""
        digest = hashlib.sha256(repr((self.scheme, self.outputs, self.gradient, self.widths)).encode())
        for name, tensor in (*self._holder.named_parameters(), *self._holder.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


FUSED = ("none", "relu", "relu6")
"""Activations that a layer of integers has for nothing; others are computed on floats after it."""


def folded(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model with the batch norms of the plan folded into the layers before them."""
    found = copy.deepcopy(model).eval()
    fold(found, {site.name: site.norm for site in plan.sites if site.norm})
    return found


def fold(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Fold batch norms into layers, in place: name of a layer to that of the norm that alone reads it."""
    for name, norm_name in norms.items():
        layer, norm = model.get_submodule(name), cast(Any, model.get_submodule(norm_name))
        if isinstance(layer, nn.Linear):
            fused: nn.Module = fuse_linear_bn_eval(layer, norm)
        else:
            fused = fuse_conv_bn_eval(cast(Any, layer), norm, isinstance(layer, nn.ConvTranspose2d))
        model.set_submodule(name, fused)
        model.set_submodule(norm_name, nn.Identity())
