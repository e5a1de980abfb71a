"""From the key of a row back to its operations, for the kinds of `autocompress.ops`; nothing is evaluated."""

import dataclasses
import re
from functools import lru_cache
from typing import Any, Final

from autocompress.errors import SpaceError, TableError
from autocompress.ops import (
    SEPARATOR,
    Add,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Ops,
    OpSpec,
    SqueezeExcite,
)
from autocompress.quantize.ops import Conversion, Quantized

KINDS: Final[dict[str, type[OpSpec]]] = {
    kind.__name__: kind for kind in (Conv2d, SqueezeExcite, GlobalAvgPool, MaxPool, Linear, Add, Conversion)
}
# One repetition only: nested ones take exponential time on a key that somebody made up.
FORM: Final = re.compile(r"(\w+)\(([\w=,]*)\)")
BITS: Final = re.compile(r"(\w+\([\w=,]*\))@w([1-9]\d?)a([1-9]\d?)")
LONGEST_KEY: Final = 10_000


@lru_cache(maxsize=100_000)
def parse_op(key: str) -> OpSpec:
    """Return the operation that has this key.

    Raises:
        TableError: The key is of another kind of operation, or not as `OpSpec.key` writes it.
    """
    bits = BITS.fullmatch(key) if len(key) <= LONGEST_KEY else None
    if bits is not None:
        return Quantized(parse_op(bits[1]), int(bits[2]), int(bits[3]))
    match = FORM.fullmatch(key) if len(key) <= LONGEST_KEY else None
    kind = KINDS.get(match[1]) if match else None
    if match is None or kind is None:
        raise TableError(f"{key[:100]!r} is no key of an operation of {', '.join(KINDS)}")
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for part in filter(None, match[2].split(",")):
        name, _, text = part.partition("=")
        if name not in known or name in values:
            raise TableError(
                f"{key[:100]!r}: {name!r} is unknown or there twice; allowed: {', '.join(known)}"
            )
        values[name] = _value(text, known[name])
    try:
        op = kind(**values)
    except (TypeError, SpaceError) as error:
        raise TableError(f"{key[:100]!r} is no operation: {error}") from None
    if op.key != key:
        raise TableError(f"{key[:100]!r} is not as it would be written: {op.key!r}")
    return op


def parse_block(key: str) -> Ops:
    """Return the operations of a row.

    Raises:
        TableError: As `parse_op`.
    """
    return tuple(parse_op(part) for part in key.split(SEPARATOR))


def _value(text: str, wanted: object) -> Any:
    """Return the value of a field of this type; one of another type stays a text, which no field takes."""
    if wanted is bool:
        return text == "True"  # anything else is not as it would be written
    # Twelve digits: no width or size is longer, and Python refuses to read thousands.
    return int(text) if wanted is int and text.isdecimal() and len(text) <= 12 else text
