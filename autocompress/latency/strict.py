"""JSON read strictly: every value is checked where it is taken, and what is wrong is named by its path."""

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from autocompress.errors import TableError


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False  # an integer of more than 308 digits


@dataclass(frozen=True)
class Node:
    """A value of a JSON file with its path, for messages."""

    value: Any
    path: str

    def wrong(self, rule: str) -> TableError:
        """Return the error that says what the value must be."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return TableError(f"{self.path or 'the file'} must be {rule}, got {shown}")

    def object(
        self, names: Iterable[str] | None = None, *, optional: Container[str] = ()
    ) -> dict[str, "Node"]:
        """Return the members; with `names`, exactly these, of which `optional` ones may be absent."""
        if not isinstance(self.value, dict):
            raise self.wrong("a JSON object")
        result = {name: self.member(name) for name in self.value}
        if names is not None:
            names = list(names)
            for name in names:
                if name not in result and name not in optional:
                    raise TableError(f"{self.member(name).path} is missing")
            for name in result:
                if name not in names:
                    allowed = ", ".join(names)
                    raise TableError(f"{self.member(name).path} is not known; allowed: {allowed}")
        return result

    def member(self, name: str) -> "Node":
        """Return a member; an absent one is `None`."""
        value = self.value.get(name) if isinstance(self.value, dict) else None
        return Node(value, f"{self.path}.{name}" if self.path else name)

    def list(self) -> list["Node"]:
        """Return the entries."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Node(value, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def number(self, minimum: float = 0.0) -> float:
        """Return a finite number that is at least `minimum`."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self.wrong("a finite number")
        if value < minimum:
            raise self.wrong(f"at least {minimum:g}")
        return float(value)

    def integer(self, minimum: int = 0) -> int:
        """Return an integer that is at least `minimum`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < minimum:
            raise self.wrong(f"an integer >= {minimum}")
        return self.value

    def equal(self, *allowed: Any) -> Any:
        """Return the value if it is one of `allowed`."""
        if isinstance(self.value, bool | list | dict) or self.value not in allowed:
            raise self.wrong(" or ".join(repr(value) for value in allowed))
        return self.value

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self.wrong("a text")
        return self.value
