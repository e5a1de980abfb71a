"""Calls in several processes, all of which end at once when their parent is stopped."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from autocompress.errors import EvaluationError


def each(function: Callable[..., None], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[int]:
    """Call a function with each of these arguments, several at a time.

    Args:
        function: Of a module, and so are the arguments plain values: processes get them pickled.
        calls: Arguments.
        jobs: Processes; with 1, and for a single call, it is this one.

    Yields:
        The position of each call as it ends.

    Raises:
        EvaluationError: A process was killed.
    """
    if jobs == 1 or len(calls) <= 1:
        for index, call in enumerate(calls):
            function(*call)
            yield index
        return
    # Forking a process with threads, as PyTorch has, can hang.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            with _interrupts_held():
                futures = {pool.submit(function, *call): index for index, call in enumerate(calls)}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise EvaluationError(
                "a process of the comparison was killed, as it is where memory runs out; what is finished is "
                f"kept: run the same command again, with smaller --jobs than {jobs}"
            ) from error
        except BaseException:
            # The pool would wait for running calls and begin queued ones. (Python 3.14: `terminate_workers`.)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the end; processes started meanwhile never get it.

    It goes to all processes of a terminal: a worker would print its traceback and take the next call.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for more calls for ever."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()
