"""Progress of long stages, as a callback: stages report, the command line shows."""

from typing import Protocol


class Progress(Protocol):
    """Called as a stage advances; must be cheap."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total` steps, with what is worth knowing now."""


def silent(done: int, total: int, note: str = "") -> None:
    """Show nothing."""
