"""The bits of a model as a space: legal choices, exact prices, slices that are the networks themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_runs import write_model
from quantized_networks import INTEGERS, images, residual, source

from autocompress.budget import Budget
from autocompress.commands.quantize import account
from autocompress.cost import compile_cost, operation_cost
from autocompress.elastic.extract import extract
from autocompress.errors import InfeasibleBudgetError, QuantizationError, SpaceError
from autocompress.exact import separable, solve
from autocompress.latency.energy import EnergyModel
from autocompress.latency.target import load_target, targets
from autocompress.ops import OpSpec
from autocompress.quantize.hawq import expected_losses
from autocompress.quantize.network import QuantizedNetwork, quantized_network_of
from autocompress.quantize.schemes import legal_widths
from autocompress.space import SearchSpace
from search_spaces.bits import bit_space, bits, worth_by_losses
from search_spaces.mobilenet_v3 import mobilenet_v3

SOURCE = source()
SPACE = bit_space(SOURCE)
MIXED = bit_space(source(widths=INTEGERS, outputs=True))


def network(space: SearchSpace, codes: np.ndarray) -> QuantizedNetwork:
    ((_, (op,)),) = space.operations(codes)
    assert isinstance(op, QuantizedNetwork)
    return op


def test_there_is_a_choice_for_weights_and_one_for_each_tensor_that_is_read() -> None:
    names = [choice.name for choice in SPACE.choices]
    assert names == [
        "stem.weight", "stem.input", "left.weight", "left.input", "after.weight", "after.input",
        "right.weight", "swish.weight", "swish.input", "last.weight", "last.input", "fc.weight", "fc.input",
    ]  # fmt: skip
    # The ends have 8 bits.
    assert SPACE.choices[0].options == SPACE.choices[-1].options == (8,)
    assert SPACE.choices[2].options == (2, 4, 8)
    assert SPACE.choices[3].options == (4, 8)


def test_ends_are_open_if_asked_or_if_nothing_is_below() -> None:
    assert bit_space(SOURCE, ends=None).choices[0].options == (2, 4, 8)
    assert all(choice.options == (8, 32) for choice in MIXED.choices)
    assert [choice.name for choice in MIXED.choices] == [
        "stem.bits", "left.bits", "after.bits", "swish.bits", "last.bits", "fc.bits",
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([SPACE, MIXED]))
def test_parts_are_what_the_network_runs(seed: int, space: SearchSpace) -> None:
    codes = space.sample(1, np.random.default_rng(seed))
    op = network(space, codes)
    priced = [part for _, ops in space.priced_operations(codes) for part in ops]

    def keys(ops: list[OpSpec]) -> list[str]:
        return sorted(one.key for one in ops)

    assert keys(priced) == keys(list(op.ops))
    for metric in ("macs", "params", "size_bytes", "bops"):
        assert float(operation_cost(space, metric).of(codes)[0]) == getattr(op, metric), metric


@pytest.mark.parametrize("space", [SPACE, MIXED])
def test_slices_of_the_supernet_are_the_networks(space: SearchSpace) -> None:
    supernet = space.supernet().eval()
    x = images(seed=4)
    for codes in space.sample(4, np.random.default_rng(1)):
        (arch,) = space.decode(codes[None])
        with torch.no_grad():
            sliced = supernet(x, arch, statistics={})
            assert torch.equal(sliced, extract(supernet, arch, {})(x))
            op = network(space, codes[None])
            assert torch.equal(sliced, op.source.network(op.policy)(x))


def test_energy_counts_each_operation_at_its_bits() -> None:
    cost = EnergyModel().cost(SPACE)
    least, most = (float(cost.of(row)[0]) for row in (SPACE.smallest(), SPACE.largest()))
    assert least < most
    op = network(SPACE, SPACE.largest())
    by_hand = sum(EnergyModel().price((one,)) for one in op.ops)
    assert most == pytest.approx(by_hand)


def test_a_budget_below_all_minimum_is_refused_with_the_nearest_one() -> None:
    cost = operation_cost(SPACE, "size_bytes")
    with pytest.raises(InfeasibleBudgetError, match="reachable minimum is size_bytes"):
        Budget.of({"size_bytes": 10}).resolve(SPACE, [cost]).check_feasible()


def test_hawqs_worth_falls_with_the_bits_and_is_additive_over_what_a_choice_decides() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(images(8), torch.randint(5, (8,), generator=generator))]
    for space, found in ((SPACE, SOURCE), (MIXED, quantized_network_of(MIXED).source)):
        of_weights, of_inputs = expected_losses(found, batches, torch.nn.functional.cross_entropy, samples=4)
        worth = worth_by_losses(found, space, of_weights, of_inputs).worth
        assert worth.keys() == {choice.name for choice in space.choices}
        assert all(len(worth[choice.name]) == len(choice.options) for choice in space.choices)
        assert all(losses[32] == 0 for losses in (*of_weights.values(), *of_inputs.values()))
    # Layers `left` and `right` read one tensor: its choice stands for two weights and one input.
    expected = -(of_weights["left"][8] + of_weights["right"][8] + of_inputs["left"][8])
    assert worth["left.bits"] == pytest.approx((expected, 0.0))


def test_squared_errors_of_weights_fall_with_bits_whatever_the_curvature() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(images(8), torch.randint(5, (8,), generator=generator))]
    of_weights, _ = expected_losses(SOURCE, batches, torch.nn.functional.cross_entropy, samples=4)
    for losses in of_weights.values():
        assert abs(losses[2]) > abs(losses[4]) > abs(losses[8])


def test_conversions_are_seen_by_the_exact_solver() -> None:
    """A layer of integers between floats costs two conversions: where they are dear, neighbours join."""
    cost = operation_cost(MIXED, "size_bytes")
    limits = Budget.of({"size_bytes": float(cost.of(MIXED.largest())[0])}).resolve(MIXED, [cost])

    def price(ops: tuple[OpSpec, ...]) -> float:
        return sum(1.0 if "Conversion" in op.key else -0.6 if "@w8" in op.key else 0.0 for op in ops)

    value = compile_cost(MIXED, price, "made up")
    best = solve(value, limits, sense="minimize")
    rows = np.array(list(np.ndindex(*MIXED.counts)))
    assert float(value.of(best.codes)[0]) == pytest.approx(float(value.of(rows).min()))
    assert best.proven
    assert separable(MIXED, [np.zeros(2)] * 6, "zero").of(best.codes)[0] == 0


# From a recipe ------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"{write_model(tmp_path)}:make"


def made(model: str, **changes: object) -> SearchSpace:
    given = {
        "weights": str(Path(model.partition(":")[0]).with_name("weights.safetensors")),
        "image": [1, 8, 8],
        "classes": 10,
        "calibration": [torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))],
        "target": "arm-cpu-low-bit",
        **changes,
    }
    return bits(model, **given)  # type: ignore[arg-type]


def test_a_space_remembers_what_it_was_made_of(model: str) -> None:
    space = made(model, widths=[4, [4, 8], [8, 4], 8])
    assert space.settings["widths"] == [[4, 4], [4, 8], [8, 4], [8, 8]]
    assert space.settings["target"] == "arm-cpu-low-bit"
    assert quantized_network_of(space).source.origin["model"] == model
    assert made(model, widths=[4, [4, 8], [8, 4], 8]).fingerprint == space.fingerprint
    assert made(model, widths=[4, 8]).fingerprint != space.fingerprint


CHOOSING = [
    name
    for name, target in targets().items()
    if target.schemes and (not target.runtime or target.number_format == "float32")
]


@pytest.mark.parametrize("name", CHOOSING)
def test_every_target_with_a_scheme_has_a_space_whose_networks_run(model: str, name: str) -> None:
    space = made(model, target=name)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    op = network(space, space.smallest())
    scheme, legal = legal_widths(load_target(name))
    assert set(op.policy) <= set(legal)
    with torch.no_grad():
        assert torch.isfinite(op.source.network(op.policy)(x)).all()
    assert op.source.scheme == scheme


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"widths": [3, 5], "target": "nvidia-int4"}, QuantizationError, "cannot run widths 3"),
        ({"widths": [4], "target": "onnxruntime-cpu"}, QuantizationError, "it runs 8/8, 32/32"),
        ({"target": "onnxruntime-cpu-int8"}, QuantizationError, "computes everything in int8"),
        ({"target": "qualcomm-adreno"}, QuantizationError, "states no way to quantize"),
        ({"widths": [[4, 8], [8, 4]]}, QuantizationError, "all pairs of some widths"),
        ({"calibration": []}, QuantizationError, "at least one calibration image"),
        ({"calibration_images": 0}, QuantizationError, "at least 1 image, got 0"),
        ({"image": [1, 8]}, SpaceError, "channels, height and width"),
        ({"worth": "trace"}, SpaceError, "worth must be 'hawq' or nothing"),
        ({"worth": "hawq"}, SpaceError, "give a sample"),
        ({"gradient": "straight"}, QuantizationError, "gradient must be one of"),
        ({"activation_ranges": "middle"}, QuantizationError, "method must be one of"),
    ],
)
def test_wrong_arguments_are_refused(
    model: str, changes: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        made(model, **changes)


def test_a_space_of_another_kind_has_no_quantized_network() -> None:
    with pytest.raises(QuantizationError, match="does not quantize a model"):
        quantized_network_of(mobilenet_v3(preset="tiny"))


def test_the_account_of_a_residual_model_is_its_plan() -> None:
    assert account(bit_space(source(residual(), widths=INTEGERS, outputs=True)))[0] == (
        "Residual: 7 layers can be quantized, at bits of weights/inputs 8/8, 32/32 (32 is floating point); "
        "2 batch norms are folded"
    )
