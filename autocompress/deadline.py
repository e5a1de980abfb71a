"""A limit on the time that foreign code may take."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_S = 1.0
"""An exception can be lost, in a destructor or a bare `except`: so long after it the next one is raised."""


class _OverError(BaseException):
    """What interrupts the body; no `Exception`, which code that retries what failed would catch."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise in the body once it took so long; in the main thread, where there are interval timers.

    Elsewhere nothing can interrupt it, and it runs without a limit. A timer that is set already stays.

    Raises:
        TimeoutError: The body took longer.
    """
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not able or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise _OverError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _OverError:
        raise TimeoutError(f"took more than {seconds:g} s") from None
    finally:
        # Once more: the first may have been interrupted just before it stopped the timer.
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
