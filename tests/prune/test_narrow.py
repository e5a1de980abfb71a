"""The laws of narrow models, over a zoo of awkward networks and random widths."""

import copy
import io
import pickle
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from prune.zoo import ZOO, images, macs_of, model, params_of, run, seeded, source
from torch import Tensor, nn

from autocompress.errors import ConversionError
from autocompress.prune.network import NarrowNetwork
from autocompress.prune.source import Source, Widths

NAMES = sorted(ZOO)
DRAWS = 8


# Of the network that the zoo has for odd padding.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Draw(NamedTuple):
    ranked: Source
    widths: Widths
    built: nn.Module


@cache
def drawn(name: str) -> list[Draw]:
    """Random widths of random rankings, and the least of all."""
    rng = np.random.default_rng(sum(name.encode()))
    found = []
    for draw in range(DRAWS):
        ranked = source(name).ranked({group.name: rng.random(len(group)) for group in source(name).groups})
        widths = tuple(
            int(rng.integers(least, full + 1)) for least, full in zip(ranked.least, ranked.full, strict=True)
        )
        widths = widths if draw else ranked.least
        found.append(Draw(ranked, widths, ranked.narrowed(widths)))
    return found


def test_there_are_over_two_hundred_draws() -> None:
    assert len(NAMES) * DRAWS >= 200


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_network_computes_what_the_masked_one_does(name: str) -> None:
    batch = images(name)
    for ranked, widths, built in drawn(name):
        expected, found = run(ranked.masked(widths), batch), run(built, batch)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), widths


@pytest.mark.parametrize("name", NAMES)
def test_masking_changes_the_output(name: str) -> None:
    """The law above would hold too if nothing were ever removed."""
    built = drawn(name)[0].built
    assert not torch.allclose(run(built, images(name)), run(source(name).model, images(name)), rtol=1e-3)
    assert params_of(built) < params_of(model(name))


@pytest.mark.parametrize("name", NAMES)
def test_macs_and_parameters_are_those_that_pytorch_counts(name: str) -> None:
    image = images(name, batch=1)
    whole = Draw(source(name), source(name).full, source(name).model)
    for ranked, widths, built in [*drawn(name), whole]:
        network = NarrowNetwork(name, ranked.digest, widths, ranked)
        assert network.params == params_of(built), widths
        assert network.macs == macs_of(built, image), widths
        assert sum((*network.weight_tensors, *network.other_tensors)) == network.params


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_a_narrow_network_loads_into_the_module_that_is_built(name: str) -> None:
    for ranked, widths, built in drawn(name)[:2]:
        network = NarrowNetwork(name, ranked.digest, widths, ranked)
        fresh = network.module()
        assert all(module.training for module in fresh.modules())
        fresh.load_state_dict(built.state_dict())
        assert torch.equal(run(fresh.eval(), images(name)), run(built, images(name)))
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in network.module().state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in built.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_at_full_width_the_network_is_the_original_bit_for_bit(name: str) -> None:
    whole, original = source(name).narrowed(source(name).full), copy.deepcopy(model(name)).eval()
    assert_same(whole, original)
    assert torch.equal(run(whole, images(name)), run(original, images(name)))
    mine = {parameter.data_ptr() for parameter in source(name).model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in whole.parameters()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers, also those that no state dict has, and what is shared."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(one, kind)(remove_duplicate=False))
        its = dict(getattr(other, kind)(remove_duplicate=False))
        assert mine.keys() == its.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, its[key])
            assert tensor.requires_grad == its[key].requires_grad
            assert tensor.stride() == its[key].stride()
    assert [repr(module) for module in one.modules()] == [repr(module) for module in other.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_layers_say_the_widths_that_they_have(name: str) -> None:
    """Law: what a module prints, and what tools read off it, is true: a copy made from it would load."""
    for draw in drawn(name)[:2]:
        for module in draw.built.modules():
            if isinstance(module, nn.Conv2d) and "parametrizations" not in dict(module.named_children()):
                shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            elif isinstance(module, nn.ConvTranspose2d):
                shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
            elif isinstance(module, nn.Linear):
                shape = (module.out_features, module.in_features)
            elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                assert module.running_mean.shape == (module.num_features,)
                continue
            elif isinstance(module, nn.PReLU):
                shape = (module.num_parameters,)
            else:
                continue
            assert module.weight.shape == shape


# The user's own model ----------------------------------------------------------------------------------


class Hooked(nn.Module):
    """Hooks that change what is computed, buffers that nothing reads, a frozen layer, modes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
        self.register_buffer("seen", torch.arange(4))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.first.register_forward_hook(doubled)
        self.second.register_forward_pre_hook(negated)
        self.head.requires_grad_(False)
        self.norm.eval()
        self.note = {"text": ["kept"]}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.norm(self.first(x)))).mean((2, 3)))


def doubled(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return 2 * found


def negated(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return -given[0]


def test_hooks_buffers_and_attributes_survive() -> None:
    own = seeded(Hooked)
    found = Source(own, torch.zeros(1, 3, 8, 8))
    widths = (3, 2)
    narrow, batch = found.narrowed(widths), torch.randn(2, 3, 8, 8)
    assert torch.allclose(run(narrow, batch), run(found.masked(widths), batch), rtol=1e-5, atol=1e-6)
    plain = seeded(Hooked)
    plain.first._forward_hooks.clear()
    plain.load_state_dict(own.state_dict())
    assert not torch.allclose(run(plain.eval(), batch), run(found.narrowed(found.full), batch))
    assert list(narrow.first._forward_hooks.values()) == [doubled]
    assert list(narrow.second._forward_pre_hooks.values()) == [negated]
    assert torch.equal(narrow.seen, torch.arange(4))
    assert torch.equal(narrow.hidden, torch.ones(3))
    assert torch.equal(NarrowNetwork("", found.digest, widths, found).module().hidden, torch.ones(3))
    assert narrow.note == own.note
    assert narrow.note is not own.note
    assert [p.requires_grad for p in narrow.parameters()] == [p.requires_grad for p in own.parameters()]


def test_the_users_model_is_left_as_it_is() -> None:
    own = seeded(Hooked)
    before = copy.deepcopy(own)
    found = Source(own, torch.zeros(1, 3, 8, 8))
    found.narrowed((3, 2))
    found.masked((3, 2))
    NarrowNetwork("", found.digest, (3, 2), found).module()
    assert_same(own, before)
    assert [module.training for module in own.modules()] == [module.training for module in before.modules()]
    assert [len(m._forward_hooks) for m in own.modules()] == [len(m._forward_hooks) for m in before.modules()]
    assert vars(own).keys() == vars(before).keys()
    assert all(parameter.grad is None for parameter in own.parameters())


def test_what_is_changed_in_a_narrow_model_is_not_changed_in_the_next() -> None:
    found = source("shared")
    for made in (found.narrowed(found.full), found.narrowed((3,)), found.masked((3,))):
        with torch.no_grad():
            for tensor in (*made.parameters(), *made.buffers()):
                if made is not None and tensor.is_floating_point() and tensor.shape:
                    tensor.zero_() if tensor.data_ptr() not in pointers(found.model) else None
    assert_same(found.narrowed(found.full), copy.deepcopy(model("shared")).eval())


def pointers(network: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}


def test_shared_modules_and_tied_parameters_stay_shared() -> None:
    narrow = source("shared").narrowed((3,))
    assert narrow.first.weight is narrow.second.weight
    assert narrow.first.weight.shape == (3, 3)
    with torch.device("meta"):
        empty = NarrowNetwork("", "", (3,), source("shared")).module()
    assert empty.first.weight is empty.second.weight
    fresh = NarrowNetwork("", "", (3,), source("shared")).module()
    assert fresh.first.weight is fresh.second.weight


def test_a_narrow_model_keeps_the_memory_format() -> None:
    found = Source(seeded(ZOO["chunks"][0]).to(memory_format=torch.channels_last), torch.zeros(1, 3, 8, 8))
    for widths in (found.full, found.least):
        weight = found.narrowed(widths).inner[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_narrow_model_can_be_pickled_saved_and_trained() -> None:
    narrow = source("inception").narrowed((3, 2, 4, 5, 1, 3))
    file = io.BytesIO()
    torch.save(narrow.state_dict(), file)
    file.seek(0)
    again = pickle.loads(pickle.dumps(narrow))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(again, images("inception")), run(narrow, images("inception")))
    again.train()(images("inception")).square().mean().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_a_source_can_be_pickled() -> None:
    """Workers get the space, and with it the model."""
    ranked, widths, _ = drawn("resnet")[1]
    again = pickle.loads(pickle.dumps(ranked))
    assert again.digest == ranked.digest
    assert_same(again.narrowed(widths), ranked.narrowed(widths))


# Rankings ----------------------------------------------------------------------------------------------


def test_the_most_important_channels_are_kept() -> None:
    found = source("own")
    scores = {"one": np.array([0, 9, 1, 8, 2, 7, 3, 6.0]), "two": np.arange(6.0)}
    ranked = found.ranked(scores)
    narrow = ranked.narrowed((3, 2))
    assert torch.equal(narrow.one, found.model.one[[1, 3, 5]])
    assert torch.equal(narrow.two, found.model.two[[4, 5]][:, [1, 3, 5]])
    assert torch.equal(narrow.steady, found.model.steady[[1, 3, 5]])
    assert torch.equal(narrow.norm.running_var, found.model.norm.running_var[[4, 5]])
    assert torch.equal(found.narrowed((3, 2)).one, found.model.one[:3])


def test_the_digest_tells_weights_and_rankings_apart() -> None:
    found = source("resnet")
    scores = {group.name: np.arange(len(group), dtype=float) for group in found.groups}
    other = Source(ZOO["resnet"][0](), torch.zeros(1, 3, 8, 8))
    same = Source(model("resnet"), torch.zeros(1, 3, 8, 8))
    assert len({found.digest, found.ranked(scores).digest, other.digest}) == 3
    assert found.digest == same.digest
    assert len(found.digest) == 16
    one, two = (NarrowNetwork("x", s.digest, s.full, s) for s in (found, same))
    assert one == two
    assert hash(one) == hash(two)
    assert one.key == two.key
    assert one != one.at(found.least)


@pytest.mark.parametrize(
    ("scores", "text"),
    [({}, "none"), ({"one": np.zeros(7), "two": np.zeros(6)}, "8 numbers"),
     ({"one": np.full(8, np.nan), "two": np.zeros(6)}, "nan")],
)  # fmt: skip
def test_scores_that_do_not_fit_are_refused(scores: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(ConversionError, match=f"scores of group one must be .*{text}"):
        source("own").ranked(scores)
