"""Laws of search spaces, on random small ones against slow definitions."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_spaces import every_row, network_of, spaces

from autocompress.errors import SpaceError
from autocompress.ops import GlobalAvgPool, Ops
from autocompress.space import Architecture, Block, Choice, SearchSpace

SEEDS = st.integers(0, 2**32 - 1)


def no_operations(*setting: object) -> Ops:
    return ()


def pooled(channels: int) -> Ops:
    return (GlobalAvgPool(channels, 4, 4),)


# `b` needs a = 2, `c` needs b in 2, 3, `d` needs c = 1: 36 genotypes stand for 10 networks.
NESTED = SearchSpace(
    "nested",
    (
        Choice("a", (1, 2)),
        Choice("b", (1, 2, 3), active_when=(("a", (2,)),)),
        Choice("c", (0, 1, 2), active_when=(("b", (2, 3)),)),
        Choice("d", (7, 8), active_when=(("c", (1,)),)),
    ),
    (),
)
# a=1; a=2 and b=1; two values of b times (c=0, c=2, c=1 with two values of d).
NESTED_SIZE = 1 + 1 + 2 * (1 + 1 + 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Size, canonical rows, activity -----------------------------------------------------------------------


def test_the_size_of_a_nested_space_is_the_number_counted_by_hand() -> None:
    assert NESTED.size == NESTED_SIZE == 10


@given(spaces())
def test_size_is_the_number_of_distinct_networks(space: SearchSpace) -> None:
    networks = {network_of(space, tuple(row)) for row in every_row(space).tolist()}
    assert space.size == len(networks)


@given(spaces())
def test_two_rows_are_the_same_network_exactly_if_their_canonical_rows_are_equal(space: SearchSpace) -> None:
    rows = every_row(space)
    canonical = [tuple(row) for row in space.canonical(rows).tolist()]
    networks = [network_of(space, tuple(row)) for row in rows.tolist()]
    assert len(set(zip(networks, canonical, strict=True))) == len(set(networks)) == len(set(canonical))


@given(spaces())
def test_canonical_is_idempotent_and_keeps_every_gene_that_has_an_effect(space: SearchSpace) -> None:
    rows = every_row(space)
    once = space.canonical(rows)
    assert np.array_equal(space.canonical(once), once)
    active = space.active(rows)
    assert np.array_equal(once[active], rows[active])
    assert not once[~active].any()
    assert np.array_equal(space.active(once), active)


@given(spaces())
def test_equal_rows_run_equal_operations(space: SearchSpace) -> None:
    rows = every_row(space)
    for row, canonical in zip(rows, space.canonical(rows), strict=True):
        assert space.operations(row) == space.operations(canonical[None, :])


@given(spaces())
def test_largest_and_smallest_take_the_last_and_first_option_of_every_choice_with_effect(
    space: SearchSpace,
) -> None:
    last = [len(choice.options) - 1 for choice in space.choices]
    largest, smallest = space.largest(), space.smallest()
    assert network_of(space, tuple(largest[0].tolist())) == network_of(space, tuple(last))
    assert smallest.tolist() == [[0] * len(space.choices)]
    assert np.array_equal(space.canonical(largest), largest)


def test_size_is_exact_where_floating_point_is_not() -> None:
    space = SearchSpace("large", tuple(Choice(f"c{i}", (1, 2, 3)) for i in range(60)), ())
    assert space.size == 3**60


# Objects -----------------------------------------------------------------------------------------------


@given(spaces())
def test_encode_is_the_inverse_of_decode_on_canonical_rows(space: SearchSpace) -> None:
    rows = every_row(space)
    architectures = space.decode(rows)
    assert np.array_equal(space.encode(architectures), space.canonical(rows))
    assert len(set(architectures)) == len({a.key for a in architectures}) == space.size


@given(spaces())
def test_an_architecture_holds_exactly_the_choices_with_effect_in_order(space: SearchSpace) -> None:
    rows = every_row(space)
    for row, architecture in zip(rows.tolist(), space.decode(rows), strict=True):
        assert frozenset(architecture.settings) == network_of(space, tuple(row))
        names = [name for name, _ in architecture.settings]
        assert names == sorted(names, key=list(space.positions).index)


@given(spaces())
def test_json_and_pickle_give_the_same_architecture_back(space: SearchSpace) -> None:
    for architecture in space.decode(every_row(space)):
        again = space.from_json(architecture.to_json())
        assert again == pickle.loads(pickle.dumps(architecture)) == architecture
        assert hash(again) == hash(architecture)
        assert space.architecture(dict(architecture.settings)) == architecture


def test_options_may_be_floats_and_texts_and_come_back_as_the_space_has_them() -> None:
    space = SearchSpace("mixed", (Choice("ratio", (0.5, 1, 1.5)), Choice("op", ("3", "skip"))), ())
    architecture = space.from_json('{"choices": {"op": "3", "ratio": 1.0}, "space": "mixed"}')
    assert architecture.settings == (("ratio", 1), ("op", "3"))
    assert architecture.to_json() == '{"choices":{"op":"3","ratio":1},"space":"mixed"}'
    assert architecture["ratio"] == 1


def test_the_key_is_the_digest_of_canonical_json_in_every_process() -> None:
    # printf '%s' '{"choices":{"a":2,"b":1},"space":"nested"}' | sha256sum | cut -c1-16
    key = "fce8a7f76f07ec7c"
    assert NESTED.architecture({"b": 1, "a": 2}).key == key
    code = (
        "from autocompress.space import *\n"
        "space = SearchSpace('nested', (Choice('a', (1, 2)), Choice('b', (1, 2, 3))), ())\n"
        "print(space.architecture({'b': 1, 'a': 2}).key, space.fingerprint)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[0] == key


def test_an_architecture_cannot_be_changed() -> None:
    architecture = NESTED.architecture({"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.space = "other"  # type: ignore[misc]
    with pytest.raises(KeyError, match="b"):
        architecture["b"]


def test_no_architectures_are_no_rows() -> None:
    assert NESTED.encode([]).shape == (0, 4)
    assert NESTED.decode(np.zeros((0, 4), dtype=np.int64)) == []


# Chance ------------------------------------------------------------------------------------------------


@given(spaces(), SEEDS, st.sampled_from(["genes", "networks"]))
def test_samples_are_canonical_rows_of_the_space_and_depend_on_the_seed_alone(
    space: SearchSpace, seed: int, over: Any
) -> None:
    rows = space.sample(20, np.random.default_rng(seed), over=over)
    space.validate(rows)
    assert rows.shape == (20, len(space.choices))
    assert np.array_equal(rows, space.canonical(rows))
    assert np.array_equal(rows, space.sample(20, np.random.default_rng(seed), over=over))


def expected_share(space: SearchSpace, over: str) -> dict[frozenset[tuple[str, int]], float]:
    genotypes = Counter(network_of(space, tuple(row)) for row in every_row(space).tolist())
    if over == "networks":
        return {network: 1 / len(genotypes) for network in genotypes}
    return {network: count / genotypes.total() for network, count in genotypes.items()}


@pytest.mark.parametrize("over", ["genes", "networks"])
def test_samples_are_uniform_over_what_was_asked_for(over: Any, rng: np.random.Generator) -> None:
    rows = NESTED.sample(20_000, rng, over=over)
    drawn = Counter(network_of(NESTED, tuple(row)) for row in rows.tolist())
    share = expected_share(NESTED, over)
    assert set(drawn) == set(share)
    distance = sum((drawn[n] - 20_000 * p) ** 2 / (20_000 * p) for n, p in share.items())
    # A right sampler with another seed fails this once in 10^4 times.
    assert distance < stats.chi2.isf(1e-4, len(share) - 1)


def test_samples_over_networks_are_uniform_in_each_of_several_independent_groups(
    rng: np.random.Generator,
) -> None:
    pair = (Choice("depth", (1, 2)), Choice("kernel", (3, 5, 7), active_when=(("depth", (2,)),)))
    twice = [
        Choice(f"{name}.{choice.name}", choice.options, active_when=tuple((f"{name}.depth", a) for _, a in c))
        for name in ("x", "y")
        for choice, c in ((choice, choice.active_when) for choice in pair)
    ]
    space = SearchSpace("twice", tuple(twice), ())
    assert space.size == (1 + 3) ** 2
    drawn = Counter(map(tuple, space.sample(16_000, rng, over="networks").tolist()))
    assert len(drawn) == 16
    # False alarm once in 10^4 seeds.
    assert sum((count - 1000) ** 2 / 1000 for count in drawn.values()) < stats.chi2.isf(1e-4, 15)


@given(spaces(), SEEDS, st.sampled_from([0.0, 0.1, 1.0]))
def test_mutation_stays_in_the_space_and_changes_every_row(
    space: SearchSpace, seed: int, rate: float
) -> None:
    rows = space.canonical(every_row(space))
    mutants = space.mutate(rows, np.random.default_rng(seed), rate=rate)
    space.validate(mutants)
    assert np.array_equal(mutants, space.canonical(mutants))
    if space.size > 1:
        assert (mutants != rows).any(axis=1).all()
    else:
        assert np.array_equal(mutants, rows)


def test_mutation_at_rate_zero_changes_one_gene_and_at_rate_one_all_of_them(rng: np.random.Generator) -> None:
    space = SearchSpace("flat", tuple(Choice(f"c{i}", (1, 2, 3)) for i in range(10)), ())
    rows = space.sample(500, rng)
    assert (space.mutate(rows, rng, rate=0.0) != rows).sum(axis=1).tolist() == [1] * 500
    assert (space.mutate(rows, rng, rate=1.0) != rows).all()
    # 5000 genes, each changed with probability 0.3, rarely one more in a row without change (0.7^10 = 2.8 %):
    # mean 1514 of 5000, standard deviation 32; six deviations.
    changed = (space.mutate(rows, rng, rate=0.3) != rows).sum()
    assert abs(changed - 1514) < 6 * 33


def test_mutation_reaches_every_other_option_alike(rng: np.random.Generator) -> None:
    space = SearchSpace("one", (Choice("c", (1, 2, 3, 4)),), ())
    rows = np.full((3000, 1), 2, dtype=np.int64)
    drawn = np.bincount(space.mutate(rows, rng)[:, 0], minlength=4)
    assert drawn[2] == 0
    # False alarm once in 10^4 seeds.
    assert ((drawn[[0, 1, 3]] - 1000) ** 2 / 1000).sum() < stats.chi2.isf(1e-4, 2)


@given(spaces(), SEEDS)
def test_a_child_takes_every_gene_with_effect_from_one_of_its_parents(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = space.sample(20, rng), space.sample(20, rng)
    children = space.crossover(first, second, rng)
    assert np.array_equal(children, space.canonical(children))
    inherited = (children == first) | (children == second) | ~space.active(children)
    assert inherited.all()
    assert np.array_equal(space.crossover(first, first, rng), first)


def test_a_child_takes_about_half_of_its_genes_from_each_parent(rng: np.random.Generator) -> None:
    space = SearchSpace("flat", tuple(Choice(f"c{i}", (1, 2)) for i in range(10)), ())
    zeros, ones = np.zeros((1000, 10), dtype=np.int64), np.ones((1000, 10), dtype=np.int64)
    # Binomial(10000, 1/2): standard deviation 50; six deviations.
    assert abs(space.crossover(zeros, ones, rng).sum() - 5000) < 300


@given(spaces())
def test_one_hot_rows_have_a_one_for_each_choice_with_effect_and_differ_by_network(
    space: SearchSpace,
) -> None:
    rows = every_row(space)
    encoded = space.one_hot(rows)
    assert encoded.dtype == np.float32
    assert encoded.shape == (len(rows), sum(len(choice.options) for choice in space.choices))
    assert np.array_equal(encoded.sum(axis=1), space.active(rows).sum(axis=1))
    assert len(np.unique(encoded, axis=0)) == space.size


# Identity of a space -----------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_a_choice_or_an_operation_and_with_nothing_else() -> None:
    choice = Choice("channels", (8, 16))
    space = SearchSpace("s", (choice,), (Block("pool", ("channels",), pooled),))
    same = SearchSpace("s", (choice,), (Block("pool", ("channels",), pooled),), settings={"any": 1})
    assert space.fingerprint == same.fingerprint == pickle.loads(pickle.dumps(space)).fingerprint
    assert space.describe() == {"name": "s", "settings": {}, "fingerprint": space.fingerprint}
    others = [
        SearchSpace("t", (choice,), (Block("pool", ("channels",), pooled),)),
        SearchSpace("s", (Choice("channels", (8, 17)),), (Block("pool", ("channels",), pooled),)),
        SearchSpace("s", (choice,), (Block("pool", ("channels",), no_operations),)),
    ]
    assert len({space.fingerprint, *(other.fingerprint for other in others)}) == 4


# Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", (1,), "a choice needs a name, got ''"),
        ("c", (), "choice 'c' needs at least one option, got none"),
        ("c", (1, 2, 1), r"choice 'c' has an option twice: \(1, 2, 1\)"),
        ("c", (1, 1.0), r"choice 'c' has an option twice: \(1, 1\.0\)"),
        ("c", (False, True), "options of choice 'c' must be .*, got False"),
        ("c", (1, float("nan")), "options of choice 'c' must be .*, got nan"),
        ("c", (np.int64(3),), r"options of choice 'c' must be .*, got np\.int64\(3\)"),
        ("c", ((1, 2),), r"options of choice 'c' must be .*, got \(1, 2\)"),
    ],
)
def test_a_choice_that_is_not_well_formed_is_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Choice(name, options)


def space_of(*choices: Choice, blocks: tuple[Block, ...] = ()) -> SearchSpace:
    return SearchSpace("s", choices, blocks)


@pytest.mark.parametrize(
    ("choices", "blocks", "message"),
    [
        ((), (), "space 's' has no choices"),
        ((Choice("a", (1,)), Choice("a", (2,))), (), "space 's' has choice 'a' twice"),
        (
            (Choice("a", (1,), active_when=(("b", (1,)),)), Choice("b", (1,))),
            (),
            r"choice 'a' depends on 'b', which must stand before it in space 's'; before it stand \[\]",
        ),
        (
            (Choice("a", (1,)), Choice("b", (1,), active_when=(("a", (2,)),))),
            (),
            r"choice 'a' has no option 2; allowed: \[1\]",
        ),
        (
            (Choice("a", (1,)),),
            (Block("x", (), no_operations), Block("x", (), no_operations)),
            r"two blocks of one name: \['x', 'x'\]",
        ),
        (
            (Choice("a", (1,)),),
            (Block("x", ("b",), no_operations),),
            "block 'x' depends on 'b', which is no choice of space 's'",
        ),
        (
            (Choice("a", (1,)),),
            (Block("x", ("a", "a"), no_operations),),
            r"block 'x' names a choice twice: \('a', 'a'\)",
        ),
    ],
)
def test_a_space_that_is_not_well_formed_is_refused(choices: Any, blocks: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace("s", choices, blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": 3}, r"position 0: choice 'a' has no option 3; allowed: \[1, 2\]"),
        ({"a": "1"}, r"position 0: choice 'a' has no option '1'"),
        ({"a": True}, "position 0: choice 'a' has no option True"),
        ({"a": [1]}, r"position 0: choice 'a' has no option \[1\]"),
        ({"a": 1, "z": 1}, r"space 'nested' has no choice 'z'; its choices are \['a', 'b', 'c', 'd'\]"),
        ({"a": 2}, r"position 1: choice 'b' is missing; allowed: \[1, 2, 3\]"),
        ({}, r"position 0: choice 'a' is missing; allowed: \[1, 2\]"),
        ({"a": 1, "b": 9}, r"position 1: choice 'b' has no option 9"),
    ],
)
def test_a_wrong_setting_is_refused_with_choice_position_and_allowed_options(
    settings: Any, message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        NESTED.architecture(settings)
    with pytest.raises(SpaceError, match=message):
        NESTED.encode([Architecture("nested", tuple(settings.items()))])
    with pytest.raises(SpaceError, match=message):
        NESTED.from_json(json.dumps({"space": "nested", "choices": settings}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "an architecture must be JSON"),
        ("[" * 100_000, "an architecture must be JSON"),
        ('{"space": "nested", "choices": {"a": ' + "1" * 5000 + "}}", "an architecture must be JSON"),
        ("[]", 'must be a JSON object {"space"'),
        ('{"space": "nested"}', 'must be a JSON object {"space"'),
        ('{"choices": {}}', "the architecture is of space '', not of 'nested'"),
        ('{"space": "other", "choices": {}}', "the architecture is of space 'other', not of 'nested'"),
        ('{"space": ["nested"], "choices": {}}', r"the architecture is of space \['nested'\]"),
    ],
)
def test_text_that_is_not_an_architecture_of_the_space_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        NESTED.from_json(text)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 3), dtype=np.int64), r"shape \(n, 4\), got \(1, 3\)"),
        (np.zeros(4, dtype=np.int64), r"shape \(n, 4\), got \(4,\)"),
        (np.zeros((1, 4)), "codes must be integers, got float64"),
        (np.array([[0] * 4, [1, 3, 0, 0]]), r"row 1, position 1: choice 'b' takes codes 0\.\.2 .*, got 3"),
        (np.array([[-1, 0, 0, 0]]), r"row 0, position 0: choice 'a' takes codes 0\.\.1 for \[1, 2\], got -1"),
    ],
)
def test_rows_that_are_not_of_the_space_are_refused(codes: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        NESTED.decode(codes)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_mutation_rate_out_of_range_is_refused(rate: float, rng: np.random.Generator) -> None:
    with pytest.raises(SpaceError, match=rf"rate must be in 0\.\.1, got {rate}"):
        NESTED.mutate(NESTED.smallest(), rng, rate=rate)


def test_a_misspelt_distribution_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(SpaceError, match="over must be 'genes' or 'networks', got 'network'"):
        NESTED.sample(1, rng, over="network")  # type: ignore[arg-type]


def test_conditions_too_many_to_count_are_refused_and_do_not_hang() -> None:
    parents = [Choice(f"p{i}", (0, 1)) for i in range(20)]
    child = Choice("child", (0, 1), active_when=tuple((parent.name, (1,)) for parent in parents))
    with pytest.raises(SpaceError, match=r"1048576 joint settings; at most 1000000 can be counted"):
        _ = space_of(*parents, child).size
