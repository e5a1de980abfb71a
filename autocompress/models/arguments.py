"""What the factories of networks refuse."""

from collections.abc import Mapping

from autocompress.errors import SpaceError


def check_counts(counts: Mapping[str, int]) -> None:
    """Check numbers of channels, classes or blocks, by name.

    Raises:
        SpaceError: One is no integer of at least 1.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SpaceError(f"{name} must be an integer >= 1, got {count!r}")
