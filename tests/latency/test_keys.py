"""Keys are read back into the operations they were written from; anything else is refused, and fast."""

import inspect
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import TableError
from autocompress.latency.keys import KINDS, LONGEST_KEY, parse_block, parse_op
from autocompress.ops import (
    ACTIVATIONS,
    SEPARATOR,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    OpSpec,
    SqueezeExcite,
    block_key,
)
from autocompress.quantize.ops import Conversion, Quantized

sizes = st.integers(1, 10**12 - 1)
few = st.integers(1, 7)
activations = st.sampled_from(sorted(ACTIVATIONS))


@st.composite
def convolutions(draw: st.DrawFn) -> OpSpec:
    groups = draw(st.integers(1, 10**6 - 1))
    return Conv2d(
        groups * draw(few),
        groups * draw(few),
        draw(sizes),
        draw(sizes),
        kernel=draw(few),
        stride=draw(few),
        groups=groups,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(activations),
    )


operations: st.SearchStrategy[OpSpec] = st.one_of(
    convolutions(),
    st.builds(SqueezeExcite, sizes, sizes, sizes, sizes),
    st.builds(GlobalAvgPool, sizes, sizes, sizes),
    st.builds(MaxPool, sizes, st.integers(7, 999), st.integers(7, 999), kernel=few, stride=few),
    st.builds(Linear, sizes, sizes, bias=st.booleans(), activation=activations),
    st.builds(Add, sizes, sizes, sizes),
    st.builds(Conversion, st.sampled_from(["quantize", "dequantize"]), sizes, sizes, sizes, st.just(4)),
    st.builds(Quantized, convolutions(), st.integers(2, 16), st.integers(2, 16)),
)


@given(operations)
def test_a_key_is_read_back_into_the_operation_it_was_written_from(op: OpSpec) -> None:
    found = parse_op(op.key)
    assert found == op
    assert type(found) is type(op)
    # `True` equals 1: a number where a truth value belongs would be seen in the representation only.
    assert repr(found) == repr(op)


@given(st.lists(operations, min_size=1, max_size=5))
def test_the_key_of_a_block_is_read_back_into_its_operations(ops: list[OpSpec]) -> None:
    assert parse_block(block_key(ops)) == tuple(ops)


def test_every_kind_of_operation_is_known() -> None:
    ours = {kind for kind in OpSpec.__subclasses__() if kind.__module__ == OpSpec.__module__}
    kinds = {kind for kind in ours if not inspect.isabstract(kind)}
    assert set(KINDS.values()) == {*kinds, Conversion}


@dataclass(frozen=True)
class Own(OpSpec):
    channels: int

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return self.channels, 1, 1

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 0

    @property
    def params(self) -> int:
        return 0

    def module(self) -> None:  # type: ignore[override]
        raise NotImplementedError


@dataclass(frozen=True)
class Derived(Conv2d):
    pass


@pytest.mark.parametrize("op", [Own(3), Derived(3, 8, 4, 4)])
def test_an_operation_of_a_users_own_is_refused(op: OpSpec) -> None:
    with pytest.raises(TableError, match=rf"'{type(op).__name__}.*' is no key of an operation of Conv2d"):
        parse_op(op.key)
    with pytest.raises(TableError, match="is no key"):
        parse_block(SEPARATOR.join((Add(1, 1, 1).key, op.key)))


CONV = "Conv2d(in_channels=4,out_channels=8,height=5,width=5"


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("", "is no key"),
        ("Conv2d", "is no key"),
        ("Conv2d(", "is no key"),
        (f"{CONV},kernel=3)\n", "is no key"),
        (f" {CONV})", "is no key"),
        (f"{CONV}) > {CONV})", "is no key"),
        (f"{CONV},kernel=1.5)", "is no key"),
        (f"{CONV},kernel=-1)", "is no key"),
        (f"{CONV},kernel=__import__('os').abort())", "is no key"),
        (f"{CONV},{'kernel=3,' * LONGEST_KEY})", "is no key"),
        ("object()", "is no key of an operation of Conv2d, SqueezeExcite, GlobalAvgPool, MaxPool"),
        ("Conv2d()", "is no operation: .*missing 4 required"),
        (f"{CONV},dilation=2)", "'dilation' is unknown or there twice; allowed: in_channels, out"),
        (f"{CONV},height=5)", "'height' is unknown or there twice"),
        (f"{CONV},__class__=3)", "'__class__' is unknown"),
        (f"{CONV},kernel)", "is no operation: Conv2d.kernel must be an integer >= 1, got ''"),
        (f"{CONV},kernel=0)", "kernel must be an integer >= 1, got 0"),
        (f"{CONV},kernel=three)", "kernel must be an integer >= 1, got 'three'"),
        (f"{CONV},kernel=True)", "kernel must be an integer >= 1, got 'True'"),
        (f"{CONV},kernel={'9' * 13})", "kernel must be an integer >= 1, got '9999"),
        (f"{CONV},groups=3)", "groups must divide"),
        (f"{CONV},activation=gelu)", "activation must be one of .*got 'gelu'"),
        ("Add(channels=True,height=1,width=1)", "channels must be an integer >= 1, got 'True'"),
        # An operation, but written otherwise: two keys of one operation would be two rows.
        (f"{CONV},)", "is not as it would be written"),
        (f"{CONV},kernel=1)", "is not as it would be written"),
        (f"{CONV},kernel=03)", "is not as it would be written"),
        (f"{CONV},kernel=٣)", "is not as it would be written"),
        (f"{CONV},bias=False)", "is not as it would be written"),
        (f"{CONV},bias=1)", "is not as it would be written"),
        (f"{CONV},norm=0)", "is not as it would be written"),
        (f"{CONV},bias=anything)", "is not as it would be written"),
        (f"{CONV},stride=2,kernel=3)", "is not as it would be written"),
    ],
)
def test_what_is_no_key_is_refused_and_said(key: str, match: str) -> None:
    with pytest.raises(TableError, match=match) as caught:
        parse_op(key)
    assert len(str(caught.value)) < 500


alphabet = st.sampled_from([*"(),=> _1x9T\n٣", "Conv2d", "Linear(", "in_channels=", "kernel=3,", "bias=True"])


def read_or_refuse(key: str) -> None:
    """`TableError` is the only error, and what is read is written as it was."""
    try:
        op = parse_op(key)
    except TableError:
        return
    assert isinstance(op, OpSpec)
    assert op.key == key


@given(st.one_of(st.text(), st.lists(alphabet, max_size=20).map("".join)))
def test_a_text_is_an_operation_or_refused(text: str) -> None:
    read_or_refuse(text)
    read_or_refuse(f"Conv2d({text})")


@given(st.data(), operations)
def test_a_damaged_key_is_an_operation_or_refused(data: st.DataObject, op: OpSpec) -> None:
    key = op.key
    start = data.draw(st.integers(0, len(key)))
    end = data.draw(st.integers(start, len(key)))
    read_or_refuse(key[:start] + data.draw(st.one_of(alphabet, st.text(max_size=3))) + key[end:])


@pytest.mark.parametrize(
    "inside", ["aaa=aaa" * 1000 + "!", "a=a" * 3000, "a=a," * 2400, "," * 9000, "a" * 9000, "=" * 9000]
)
def test_a_malicious_key_is_refused_at_once(inside: str) -> None:
    """Some milliseconds; nested repetitions of a pattern would take longer than anybody lives."""
    started = time.process_time()
    with pytest.raises(TableError):
        parse_op(f"Conv2d({inside})")
    assert time.process_time() - started < 1


def test_a_key_is_never_longer_than_it_may_be() -> None:
    longest = Conv2d(*[10**12 - 1] * 4, kernel=10**12 - 1, stride=10**12 - 1, bias=True, norm=False)
    assert len(replace(longest, activation="hard_sigmoid", groups=10**12 - 1).key) < LONGEST_KEY / 10
