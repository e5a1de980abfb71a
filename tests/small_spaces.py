"""Random small spaces for hypothesis, and slow second implementations of what spaces and costs say."""

import itertools
import zlib
from functools import partial

import numpy as np
from hypothesis import strategies as st

from autocompress.cost import AdditiveCost, Cost, Factor, MaximumCost
from autocompress.ops import Linear, Ops
from autocompress.space import Block, Choice, Codes, SearchSpace

Condition = tuple[str, tuple[int, ...]]


@st.composite
def spaces(draw: st.DrawFn, max_choices: int = 5) -> SearchSpace:
    """Up to five choices of up to three options, conditions on earlier choices, nested too, and blocks."""
    choices: list[Choice] = []
    for position in range(draw(st.integers(1, max_choices))):
        options = tuple(range(10, 10 + draw(st.integers(1, 3))))
        conditions: list[Condition] = []
        parents = st.lists(st.integers(0, position - 1), max_size=2, unique=True) if position else st.just([])
        for parent in draw(parents):
            kept = draw(st.sets(st.sampled_from(choices[parent].options), min_size=1))
            conditions.append((choices[parent].name, tuple(sorted(kept))))
        choices.append(Choice(f"c{position}", options, active_when=tuple(conditions)))
    blocks = []
    for number in range(draw(st.integers(1, 3))):
        some = draw(st.lists(st.sampled_from([choice.name for choice in choices]), unique=True, max_size=2))
        names = draw(st.permutations(sorted(with_ancestors(choices, some))))
        salt = draw(st.integers(0, 1000))
        blocks.append(Block(f"b{number}", tuple(names), partial(_operations, tuple(choices), names, salt)))
    return SearchSpace("small", tuple(choices), tuple(blocks))


def with_ancestors(choices: list[Choice], names: list[str]) -> set[str]:
    """A block that depends on a choice must know whether it has an effect."""
    by_name = {choice.name: choice for choice in choices}
    result: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        result.add(name)
        todo += [parent for parent, _ in by_name[name].active_when]
    return result


def has_effect(by_name: dict[str, Choice], given: dict[str, int], name: str) -> bool:
    """The definition, recursively, one choice at a time."""
    return all(
        has_effect(by_name, given, parent) and given[parent] in allowed
        for parent, allowed in by_name[name].active_when
    )


def network_of(space: SearchSpace, row: tuple[int, ...]) -> frozenset[tuple[str, int]]:
    """What a row stands for: the choices that have an effect, with their options."""
    by_name = {choice.name: choice for choice in space.choices}
    given = {choice.name: choice.options[code] for choice, code in zip(space.choices, row, strict=True)}
    return frozenset((name, option) for name, option in given.items() if has_effect(by_name, given, name))


def every_row(space: SearchSpace) -> Codes:
    """All combinations of options, also those that are not canonical, `(product of counts, choices)`."""
    rows = list(itertools.product(*(range(len(choice.options)) for choice in space.choices)))
    return np.array(rows, dtype=np.int64)


def _operations(choices: tuple[Choice, ...], names: list[str], salt: int, *setting: int) -> Ops:
    """Operations that differ with every choice that has an effect; sometimes none."""
    given = dict(zip(names, setting, strict=True))
    by_name = {choice.name: choice for choice in choices}
    known = sorted((name, option) for name, option in given.items() if has_effect(by_name, given, name))
    number = zlib.crc32(repr((salt, known)).encode())
    return tuple(Linear(1 + number // 4**k % 16, 1 + number // 64**k % 64) for k in range(number % 3))


@st.composite
def costs(draw: st.DrawFn, metric: str = "latency_ms") -> AdditiveCost:
    """Random factors over up to three of up to five choices, in milliseconds with no round numbers."""
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    return draw(costs_over(counts, metric))


@st.composite
def maxima(draw: st.DrawFn, metric: str = "peak_activation_bytes") -> MaximumCost:
    """As `costs`, of which the greatest counts."""
    counts = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=5)))
    return draw(maxima_over(counts, metric))


@st.composite
def maxima_over(
    draw: st.DrawFn, counts: tuple[int, ...], metric: str = "peak_activation_bytes"
) -> MaximumCost:
    """Random factors over these choices, of few different values: the greatest is often reached twice."""
    scope_list, rng = draw(_scopes(counts))
    factors = tuple(
        Factor(s, rng.integers(1, 9, size=[counts[p] for p in s]).astype(float)) for s in scope_list
    )
    return MaximumCost(metric, counts, float(rng.integers(1, 5)), factors)


@st.composite
def _scopes(draw: st.DrawFn, counts: tuple[int, ...]) -> tuple[list[tuple[int, ...]], np.random.Generator]:
    scopes = st.sets(st.integers(0, len(counts) - 1), min_size=1, max_size=min(3, len(counts)))
    scope_list = draw(st.lists(scopes.map(lambda scope: tuple(sorted(scope))), max_size=4, unique=True))
    return scope_list, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


@st.composite
def costs_over(draw: st.DrawFn, counts: tuple[int, ...], metric: str = "latency_ms") -> AdditiveCost:
    """Random factors over these choices."""
    scope_list, rng = draw(_scopes(counts))
    factors = tuple(Factor(s, rng.exponential(size=[counts[position] for position in s])) for s in scope_list)
    return AdditiveCost(metric, counts, float(rng.exponential()), factors)


def all_codes(counts: tuple[int, ...]) -> Codes:
    """Every row of options, shape `(product of counts, choices)`."""
    return np.array(list(itertools.product(*map(range, counts))), dtype=np.int64)


def slow_cost(cost: Cost, row: tuple[int, ...]) -> float:
    """The definition: the constant and one entry of every factor, added up or the greatest of them."""
    parts = [cost.constant]
    for factor in cost.factors:
        parts.append(float(factor.values[tuple(row[position] for position in factor.positions)]))
    return max(parts) if isinstance(cost, MaximumCost) else sum(parts)
