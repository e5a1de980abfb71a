"""The laws of the supernet of any search space, as tests to inherit.

```python
class TestMySpace(ElasticContract):
    def space(self) -> SearchSpace:
        return my_space(width=0.25, resolutions=(32, 64))
```

Choose small settings: every law runs several whole networks. The supernet is `space().supernet()`, so that
spaces with elastic layers of their own are tested as they are.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.elastic.extract import active_masks, extract, only_active
from autocompress.elastic.importance import sort_channels
from autocompress.elastic.layers import ElasticConv2d, ElasticLayer, memory_format, slot
from autocompress.elastic.mixture import Gate, run_mixture
from autocompress.elastic.recalibrate import recalibrate
from autocompress.elastic.supernet import Statistics, Supernet
from autocompress.errors import SpaceError
from autocompress.network import module_name
from autocompress.ops import Add, Conv2d
from autocompress.space import Architecture, SearchSpace

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class ElasticContract(ABC):
    """Derive, name it `Test...`, and implement `space`."""

    @abstractmethod
    def space(self) -> SearchSpace:
        """Return the space, small enough for a forward pass of a few milliseconds."""

    # What the laws are tried on -----------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Sums over several threads may be added in another order at each run."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def supernet(self) -> Supernet:
        """A supernet none of whose parameters is at its special first value: scales of 0 hide errors."""
        supernet = self.space().supernet()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in supernet.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                inputs = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.add_(noise, alpha=0.1 / math.sqrt(inputs))
        return supernet.eval()

    def architectures(self) -> list[Architecture]:
        """Return the largest and the smallest network, and some others."""
        space = self.space()
        sampled = space.sample(4, np.random.default_rng(3))
        return list(dict.fromkeys(space.decode(np.vstack([space.largest(), space.smallest(), sampled]))))

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """Return random images of the largest network's resolution."""
        space = self.space()
        shape = space.operations(space.largest())[0][1][0].in_shape
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))

    def own_images(self, arch: Architecture, batch: int) -> Tensor:
        """Return random images of the resolution of one network."""
        space = self.space()
        shape = space.operations(space.encode([arch]))[0][1][0].in_shape
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))

    def statistics(self, supernet: Supernet, arch: Architecture) -> Statistics:
        """Return batch-norm statistics of a network from a few random images."""
        keep = memory_format(supernet.parameters())
        return recalibrate(supernet, arch, [self.images(8).contiguous(memory_format=keep)])

    # Extraction ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("form", list(FORMATS))
    def test_a_slice_equals_the_extracted_network_bit_for_bit(
        self, supernet: Supernet, form: str, batch: int
    ) -> None:
        """Law: what was searched is what is deployed."""
        keep = FORMATS[form]
        supernet.to(memory_format=keep)  # type: ignore[call-overload]
        for arch in self.architectures():
            statistics = self.statistics(supernet, arch)
            network = extract(supernet, arch, statistics)
            assert not network.training
            images = self.own_images(arch, batch).contiguous(memory_format=keep)
            with torch.no_grad():
                outputs = supernet(images, arch, statistics=statistics)
                assert torch.equal(outputs, network(images)), arch.to_json()

    @pytest.mark.parametrize("form", list(FORMATS))
    def test_extraction_keeps_the_memory_format_and_shares_no_memory(
        self, supernet: Supernet, form: str
    ) -> None:
        """Law: a network of its own, laid out as the supernet is."""
        supernet.to(memory_format=FORMATS[form])  # type: ignore[call-overload]
        mine = {parameter.untyped_storage().data_ptr() for parameter in supernet.parameters()}
        for arch in self.architectures():
            network = extract(supernet, arch)
            assert network.training
            for parameter in network.parameters():
                assert parameter.requires_grad
                assert parameter.untyped_storage().data_ptr() not in mine
                if parameter.dim() == 4:
                    assert parameter.is_contiguous(memory_format=FORMATS[form])

    def test_an_extracted_network_has_the_parameters_that_its_operations_state(
        self, supernet: Supernet
    ) -> None:
        """Law: the price of an architecture is that of the network that comes out."""
        space = self.space()
        for arch in self.architectures():
            stated = sum(op.params for _, ops in space.operations(space.encode([arch])) for op in ops)
            assert sum(parameter.numel() for parameter in extract(supernet, arch).parameters()) == stated

    def test_outputs_have_the_shape_of_the_last_operation(self, supernet: Supernet) -> None:
        """Law: images of any resolution are brought to the architecture's own."""
        space = self.space()
        for arch in self.architectures():
            outputs = supernet(self.images(2), arch)
            assert outputs.flatten(1).shape == (
                2,
                math.prod(space.operations(space.encode([arch]))[-1][1][-1].out_shape),
            )
            assert outputs.isfinite().all()

    # Slices -------------------------------------------------------------------------------------------

    def test_at_full_size_the_weight_of_a_convolution_is_the_parameter(self, supernet: Supernet) -> None:
        """Law: the largest network pays nothing for being elastic."""
        (largest,) = self.space().decode(self.space().largest())
        for _, layers in supernet.plan(largest):
            for layer, op in layers:
                if isinstance(layer, ElasticConv2d) and isinstance(op, Conv2d):
                    size = op.out_channels, op.in_channels // op.groups, op.kernel, op.kernel
                    if layer.weight.shape == size:
                        weight = layer.sliced(op)["conv.weight"]
                        assert weight.data_ptr() == layer.weight.data_ptr()
                        assert weight.stride() == layer.weight.stride()

    def test_what_a_network_does_not_use_gets_no_gradient(self, supernet: Supernet) -> None:
        """Law: no gradient at all, or exactly zero outside of the slice."""
        for arch in self.architectures():
            supernet.zero_grad(set_to_none=True)
            self._backward(supernet, arch)
            masks = active_masks(supernet, [arch])
            for name, parameter in supernet.named_parameters():
                if name not in masks:
                    assert parameter.grad is None, name
                elif parameter.grad is not None:
                    assert not parameter.grad[~masks[name]].any(), name

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_what_no_network_used_does_not_move(self, supernet: Supernet, kind: str) -> None:
        """Law: neither weight decay nor momentum of earlier steps moves an inactive weight."""
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            supernet.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
        )
        if kind == "adamw":
            optimizer = torch.optim.AdamW(supernet.parameters(), lr=0.1, weight_decay=0.1)
        # The largest first, so that there is momentum everywhere.
        for arch in self.architectures():
            before = copy.deepcopy(dict(supernet.named_parameters()))
            optimizer.zero_grad(set_to_none=True)
            self._backward(supernet, arch)
            torch.nn.utils.clip_grad_norm_(supernet.parameters(), 1.0)
            with only_active(supernet, optimizer, [arch]):
                optimizer.step()
            masks = active_masks(supernet, [arch])
            for name, parameter in supernet.named_parameters():
                still = ~masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
                assert torch.equal(parameter[still], before[name][still]), name
            assert any(not torch.equal(p, before[name]) for name, p in supernet.named_parameters())

    def _backward(self, supernet: Supernet, arch: Architecture) -> None:
        outputs = supernet(self.images(4), arch)
        outputs.square().mean().backward()

    # Statistics ---------------------------------------------------------------------------------------

    def test_recalibration_changes_nothing_and_repeats(self, supernet: Supernet) -> None:
        """Law: statistics are returned, not written; there is no buffer to write them to."""
        assert list(supernet.buffers()) == []
        before = copy.deepcopy(supernet.state_dict())
        for arch in self.architectures():
            once, again = self.statistics(supernet, arch), self.statistics(supernet, arch)
            assert list(once) == list(again)
            for name, (mean, variance) in once.items():
                assert torch.equal(mean, again[name][0])
                assert torch.equal(variance, again[name][1])
                assert (variance >= 0).all()
        assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())

    def test_running_one_network_leaves_no_trace_in_the_next(self, supernet: Supernet) -> None:
        """Law: there is no active sub-network."""
        archs, images = self.architectures(), self.images(2)
        statistics = {arch: self.statistics(supernet, arch) for arch in archs}
        with torch.no_grad():
            first = [supernet(images, arch, statistics=statistics[arch]) for arch in archs]
            second = [supernet(images, arch, statistics=statistics[arch]) for arch in reversed(archs)]
        for one, other in zip(first, reversed(second), strict=True):
            assert torch.equal(one, other)

    def test_a_step_of_training_is_seen_by_the_next_evaluation(self, supernet: Supernet) -> None:
        """Law: nothing that is kept for speed outlives the weights it was made of."""
        for arch in self.architectures():
            statistics, images = self.statistics(supernet, arch), self.own_images(arch, 2)
            images = images.contiguous(memory_format=memory_format(supernet.parameters()))
            with torch.no_grad():
                supernet(images, arch, statistics=statistics)
                for parameter in supernet.parameters():
                    parameter.mul_(0.9)
                network = extract(supernet, arch, statistics)
                assert torch.equal(supernet(images, arch, statistics=statistics), network(images))

    # The whole ----------------------------------------------------------------------------------------

    def test_a_one_hot_gate_is_the_plain_choice(self, supernet: Supernet) -> None:
        """Law: differentiable strategies train the network that they will derive.

        In 64-bit floats: sums over channels that are zero round otherwise, and the batch norms of two
        images make much of it.
        """
        images, supernet = self.images(2).double(), copy.deepcopy(supernet).double()
        variables = self.space().variables
        if not variables.keys() & self.space().positions.keys():
            pytest.skip(
                "mixtures of this space are of edges that no choice has: a law of the space's own tests"
            )
        tried = 0
        for arch in self.architectures():
            for name, option in arch.settings:
                if name not in variables:
                    continue
                choice = self.space().choices[self.space().positions[name]]
                gate = torch.zeros(len(choice.options))
                gate[choice.code(option)] = 1
                gated = self._gated(supernet, images, arch, {name: gate})
                if gated is not None:
                    with torch.no_grad():
                        plain = supernet(images, arch)
                    torch.testing.assert_close(gated, plain, rtol=1e-6, atol=1e-8)
                    tried += 1
        assert tried, "none of the choices can be gated"

    def _gated(
        self, supernet: Supernet, images: Tensor, arch: Architecture, gates: dict[str, Tensor]
    ) -> Tensor | None:
        try:
            with torch.no_grad():
                given = {name: Gate.all(weights) for name, weights in gates.items()}
                return run_mixture(supernet, images, arch, given)
        except SpaceError as error:
            if "cannot be gated" in str(error):  # resolution and the like
                return None
            raise

    def test_sorting_channels_leaves_the_function_of_the_largest_network(self, supernet: Supernet) -> None:
        """Law: width sorting only renames channels."""
        (largest,) = self.space().decode(self.space().largest())
        images = self.images(4)
        with torch.no_grad():
            before = supernet(images, largest)
            sort_channels(supernet)
            torch.testing.assert_close(supernet(images, largest), before, rtol=1e-4, atol=1e-5)

    def test_a_copy_and_a_state_dict_are_the_same_supernet(self, supernet: Supernet) -> None:
        """Law: a trained supernet can be stored and loaded."""
        loaded = self.space().supernet()
        loaded.load_state_dict(supernet.state_dict())
        images = self.images(2)
        with torch.no_grad():
            for arch in self.architectures():
                outputs = supernet(images, arch)
                assert torch.equal(loaded.eval()(images, arch), outputs)
                assert torch.equal(copy.deepcopy(supernet)(images, arch), outputs)

    def test_an_architecture_of_another_space_is_refused(self, supernet: Supernet) -> None:
        """Law: a wrong architecture is an error, not some network."""
        arch = self.architectures()[0]
        other = Architecture(f"not {arch.space}", arch.settings)
        with pytest.raises(SpaceError):
            supernet(self.images(1), other)

    def test_making_a_supernet_leaves_the_global_random_state(self) -> None:
        """Law: the same weights at every call, and nobody else's random numbers change."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            before = torch.get_rng_state()
            first = self.space().supernet().state_dict()
            assert torch.equal(torch.get_rng_state(), before)
            torch.rand(3)
            second = self.space().supernet().state_dict()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_every_operation_of_every_block_has_a_layer(self, supernet: Supernet) -> None:
        """Law: the supernet serves every setting of every block, not only those that were drawn here."""
        space = self.space()
        for block in space.blocks:
            for setting in space.covering_settings(block):
                ops = block.operations(*setting)
                for position, op in enumerate(ops):
                    if isinstance(op, Add):
                        continue
                    places = cast(nn.ModuleDict, supernet.layers[module_name(block.name)])
                    layer = cast(ElasticLayer, places[slot(position, op)])
                    shapes = {key: tensor.shape for key, tensor in layer.sliced(op).items()}
                    with torch.device("meta"):
                        expected = {key: tensor.shape for key, tensor in op.module().named_parameters()}
                    assert shapes == expected, op.key

    def test_the_parts_of_a_block_cost_what_it_does(self) -> None:
        """Law: MACs and parameters of the priced blocks add up to those of the network."""
        space = self.space()
        for codes in space.sample(50, np.random.default_rng(11)):
            for metric in ("macs", "params"):
                built = [getattr(op, metric) for _, ops in space.operations(codes) for op in ops]
                priced = [getattr(op, metric) for _, ops in space.priced_operations(codes) for op in ops]
                assert sum(priced) == sum(built)
