"""Labels and tensors of them, against slower ways to the same."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.prune.label_tensor import (
    axes_of,
    compact,
    concatenated,
    fixed,
    resized,
    rows,
    spread,
    values,
)
from autocompress.prune.labels import FIXED, Reason, Unions

ONE, OTHER = Reason("one"), Reason("other")
COUNT = 12

pairs = st.lists(st.tuples(st.integers(0, COUNT), st.integers(0, COUNT)), max_size=15)


# Unions ------------------------------------------------------------------------------------------------


def closure(joined: list[tuple[int, int]]) -> list[set[int]]:
    """The classes of labels by repeated merging; those joined with `FIXED` are not merged with each other."""
    classes = [{label} for label in range(1, COUNT + 1)]
    for one, other in joined:
        if FIXED not in (one, other):
            met = [members for members in classes if one in members or other in members]
            classes = [members for members in classes if members not in met] + [set().union(*met)]
    return classes


@given(pairs, st.lists(st.integers(1, COUNT), max_size=3))
def test_joined_labels_have_the_smallest_as_their_root(
    joined: list[tuple[int, int]], kept: list[int]
) -> None:
    unions = Unions()
    assert unions.fresh(COUNT).tolist() == list(range(1, COUNT + 1))
    for one, other in joined:
        unions.join(np.array([one]), np.array([other]), ONE)
    unions.fix(np.array(kept, dtype=np.int64), OTHER)
    classes = closure(joined)
    for members in classes:
        assert {unions.root(label) for label in members} == {min(members)}
    touched = {label for pair in joined if FIXED in pair for label in pair} | set(kept)
    stays = {min(members) for members in classes if members & touched}
    assert unions.stays.keys() == stays
    assert FIXED not in unions.stays


@given(pairs)
def test_joining_all_at_once_is_joining_one_by_one(joined: list[tuple[int, int]]) -> None:
    once, each = Unions(), Unions()
    labels = once.fresh(COUNT)
    each.fresh(COUNT)
    table = np.array(joined, dtype=np.int64).reshape(-1, 2)
    once.join(table[:, 0], table[:, 1], ONE)
    for row in table:
        each.join(row[:1], row[1:], ONE)
    assert once.roots(labels).tolist() == each.roots(labels).tolist()
    assert once.stays == each.stays


def test_the_first_reason_is_the_one_that_is_kept() -> None:
    unions = Unions()
    unions.fresh(4)
    unions.fix(np.array([3]), ONE)
    unions.fix(np.array([3, 2]), OTHER)
    unions.join(np.array([2]), np.array([3]), OTHER)
    unions.join(np.array([FIXED]), np.array([4]), OTHER)
    unions.join(np.array([FIXED]), np.array([3]), OTHER)
    assert unions.stays == {2: OTHER, 4: OTHER}
    assert unions.root(3) == 2
    unions.join(np.array([1]), np.array([4]), ONE)
    assert unions.stays == {2: OTHER, 1: OTHER}


def test_roots_keep_the_shape() -> None:
    unions = Unions()
    labels = unions.fresh(6).reshape(2, 3)
    unions.join(labels[0], labels[1], ONE)
    assert unions.roots(labels).tolist() == [[1, 2, 3], [1, 2, 3]]


# Tensors of labels -------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Labels that depend on some axes only, as a whole tensor."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    held = [size if draw(st.booleans()) else 1 for size in shape]
    seed = draw(st.integers(0, 99))
    own = torch.randint(0, 4, held, generator=torch.Generator().manual_seed(seed))
    return own.expand(shape).contiguous()


@given(tensors())
def test_compact_labels_are_the_same_and_depend_on_the_fewest_axes(labels: Tensor) -> None:
    found = compact(labels)
    assert torch.equal(found, labels)
    depends = [axis for axis in range(labels.dim()) if (labels != labels.narrow(axis, 0, 1)).any()]
    assert axes_of(found) == depends
    assert values(found).tolist() == sorted(set(labels.flatten().tolist()))


@given(tensors())
def test_rows_are_the_different_labels_at_each_position(labels: Tensor) -> None:
    for axis in range(labels.dim()):
        found = rows(compact(labels), axis)
        for at in range(labels.shape[axis]):
            assert set(found[at].tolist()) == set(labels.select(axis, at).flatten().tolist())


@given(tensors(), tensors(), st.integers(0, 3))
def test_a_concatenation_is_that_of_the_whole_tensors(one: Tensor, other: Tensor, axis: int) -> None:
    axis %= one.dim()
    other = other.flatten()[:1].expand(one.shape).contiguous()
    expected = torch.cat([one, other], axis)
    for at in (axis, axis - one.dim()):
        found = concatenated([compact(one), compact(other)], at, expected.shape)
        assert torch.equal(found, expected)


def test_labels_of_a_map_of_another_size() -> None:
    labels = spread(np.array([4, 5, 6]), 1, (2, 3, 8, 8))
    found = resized(labels, (2, 3, 1, 5))
    assert found is not None
    assert torch.equal(found, spread(np.array([4, 5, 6]), 1, (2, 3, 1, 5)))
    assert resized(labels, (2, 4, 8, 8)) is None
    assert fixed((2, 3)).tolist() == [[FIXED] * 3] * 2
