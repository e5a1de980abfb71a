"""Sub-networks evaluated in several processes: Ray workers that share one copy of the evaluator.

```python
with RayEvaluator(SupernetEvaluator(...), workers=4) as evaluator:
    result = search(strategy, constraints, evaluator, evaluations=400)
```

Ray is imported and started when the evaluator is entered, not before, and stopped when it is left. A Ray that
runs already is used and left as it was. A row gives the same bits as in this process with as many threads;
but a search asks its strategy for `workers` rows at a time, and another number of them may be other rows.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Self, final

import numpy as np

from autocompress.cost import Values
from autocompress.distributed.connect import connected
from autocompress.distributed.shared import Bytes, packed, protect, unpacked
from autocompress.errors import AutocompressError, EvaluationError
from autocompress.evaluator import Evaluator, check_evaluator, evaluated, unless_broken
from autocompress.proposals import check_count
from autocompress.space import Codes

MAX_DEATHS = 8
"""A row whose worker died so often is given up. Where workers are killed at random, one evaluation in five,
that is the fate of three rows in a million."""
MAX_DEATHS_IN_A_ROW = 3 * MAX_DEATHS
"""If so many die and no row is evaluated meanwhile, the evaluator is broken, not a row."""
QUEUED = 2
"""Rows that a worker has at most: while one is evaluated, the next is on its way."""
STARTS_WITHIN_S = 600.0


@final
class RayEvaluator:
    """A paid evaluator whose rows are evaluated by worker processes, one row at a time each.

    The evaluator is put into Ray's object store once, with its weights and data as arrays (`shared`): workers
    of a machine read them in the same memory. A worker that dies (out of memory, killed) is replaced, and its
    rows are evaluated again.
    """

    def __init__(
        self, evaluator: Evaluator, *, workers: int, threads: int = 1, address: str | None = None
    ) -> None:
        """Remember what to start; starts nothing.

        Args:
            evaluator: Paid and picklable, such as a `SupernetEvaluator`. It must not write to its own
                tensors, which are read-only in workers; one that trains does so on a copy.
            workers: Processes, and rows at a time.
            threads: Of PyTorch in each of them.
            address: Of a running Ray cluster that has autocompress installed everywhere: `host:port`, or
                `auto` for the one on this machine. By default the Ray of this process is used, and started
                if there is none.

        Raises:
            RecipeError: `workers` or `threads` is not an integer of at least 1.
            AutocompressError: The evaluator is free: its rows are evaluated all at once, which is faster.
        """
        check_evaluator(evaluator)
        if not evaluator.paid:
            raise AutocompressError(
                f"RayEvaluator spreads paid evaluations, one row a task, but {type(evaluator).__name__} is "
                "free (a table, a predictor): use it as it is"
            )
        self.workers = check_count("workers", workers)
        self._threads = check_count("threads", threads)
        self._evaluator, self._address = evaluator, address
        self._pool: _Pool | None = None
        self._open = ExitStack()

    @property
    def paid(self) -> bool:
        """True: only paid evaluators are worth processes."""
        return True

    def __enter__(self) -> Self:
        """Start Ray, if need be, and the workers.

        Raises:
            AutocompressError: Ray is not there, no cluster answers at the address, there are too few cores
                for workers and threads, the evaluator cannot be pickled or unpickled, or it does not fit
                into the object store; nothing is left running.
        """
        if self._pool is not None:
            raise AutocompressError("this RayEvaluator is open already; make another one")
        with ExitStack() as opened:
            ray = connected(opened, workers=self.workers, threads=self._threads, address=self._address)
            pool = _Pool(ray, self._evaluator, self.workers, self._threads)
            opened.callback(pool.stop)
            pool.start()
            self._pool, self._open = pool, opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the workers, and Ray if it was started here."""
        self._pool = None
        self._open.close()

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        """Return each metric as `(n,)` for `codes (n, choices)`; no metric for no rows.

        Raises:
            EvaluationError: A row could not be evaluated; the first of them.
            AutocompressError: The evaluator is not open.
        """
        rows = []
        for found in self.each(codes):
            if isinstance(found, Exception):
                raise found
            rows.append(found)
        return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}

    def each(self, codes: Codes) -> Iterator[Mapping[str, float] | Exception]:
        """Yield the metrics of every row of `codes (n, choices)`, in their order, or why there are none.

        Raises:
            AutocompressError: The evaluator is not open, or the wrapped one says that it is broken.
        """
        self._running()
        return self._each(codes)

    def _each(self, codes: Codes) -> Iterator[Mapping[str, float] | Exception]:
        try:
            for index in range(len(codes)):
                self.submit(codes[index : index + 1])
            for _ in range(len(codes)):
                yield self.result()
        finally:
            self.cancel()

    def submit(self, row: Codes) -> None:
        """Have `row (1, choices)` evaluated.

        Raises:
            AutocompressError: The evaluator is not open.
        """
        self._running().submit(row)

    def result(self) -> Mapping[str, float] | Exception:
        """Wait for the row that was submitted first of those whose result was not taken, and take it.

        Raises:
            AutocompressError: The evaluator is not open, or the wrapped one says that it is broken.
        """
        return self._running().result()

    def cancel(self) -> None:
        """Forget all rows whose results were not taken; also of an evaluator that is not open."""
        if self._pool is not None:
            self._pool.cancel()

    def _running(self) -> "_Pool":
        if self._pool is None:
            raise AutocompressError(
                "a RayEvaluator works only while it is open: `with RayEvaluator(...) as evaluator: ...`"
            )
        return self._pool


@final
class _Pool:
    """Running workers and the one copy of the evaluator that they are made from.

    A row has a number, counted from 0; `_loads` are the tasks of each worker, the one that runs first.
    """

    def __init__(self, ray: Any, evaluator: Evaluator, workers: int, threads: int) -> None:
        self._ray, self._count, self._threads = ray, workers, threads
        name = type(evaluator).__name__
        try:
            content = packed(evaluator)
        except Exception as error:  # noqa: BLE001  (pickling runs code of the evaluator's own)
            raise AutocompressError(
                f"evaluator {name} cannot be pickled for other processes: {error}"
            ) from None
        try:
            self._content = ray.put(content)
        except Exception as error:  # noqa: BLE001  (a full store, a full disk: Ray has several for that)
            size = (len(content[0]) + sum(map(len, content[1]))) / 1e6
            raise AutocompressError(
                f"evaluator {name} ({size:.0f} MB) does not fit into Ray's object store: {error}; take fewer "
                "validation images, or a larger store (ray start --object-store-memory, room in /dev/shm)"
            ) from None
        self._workers: list[Any] = []
        self._loads: list[list[Any]] = []
        self._rows: dict[Any, tuple[int, Codes]] = {}
        self._waiting: deque[tuple[int, Codes]] = deque()
        self._found: dict[int, Mapping[str, float] | Exception] = {}
        self._deaths: Counter[int] = Counter()
        self._in_a_row = 0
        self._submitted = self._taken = 0

    def start(self) -> None:
        """Start the workers and wait for them."""
        self._workers = [self._worker() for _ in range(self._count)]
        self._loads = [[] for _ in self._workers]
        try:
            self._ray.get([worker.ready.remote() for worker in self._workers], timeout=STARTS_WITHIN_S)
        except self._ray.exceptions.GetTimeoutError:
            raise AutocompressError(
                f"{self._count} workers did not start within {STARTS_WITHIN_S:g} s: something else may have "
                "the cores of this Ray"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise AutocompressError(f"a worker cannot start or unpickle the evaluator: {error}") from None

    def stop(self) -> None:
        """Kill the workers and let go of the evaluator."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()
        del self._content

    def _worker(self) -> Any:
        # Ray would restart actors of its own accord too; but only here is known how often a row was tried.
        actor = self._ray.remote(num_cpus=self._threads)(_Worker)
        return actor.remote(self._content, self._threads)

    def submit(self, row: Codes) -> None:
        """Have a row evaluated when a worker is free."""
        self._waiting.append((self._submitted, row))
        self._submitted += 1
        self._feed()

    def result(self) -> Mapping[str, float] | Exception:
        """Return what is known of the first row whose result was not taken, once it is."""
        if self._taken == self._submitted:
            raise AutocompressError("no row was submitted whose result is not taken yet")
        while self._taken not in self._found:
            self._collect()
        known = self._found.pop(self._taken)
        self._taken += 1
        return unless_broken(known)

    def cancel(self) -> None:
        """Forget what was submitted; workers end the rows they have."""
        self._waiting.clear()
        self._found.clear()
        self._taken = self._submitted

    def _feed(self) -> None:
        """Give what waits to the workers that have least to do."""
        while self._waiting:
            worker = min(range(self._count), key=lambda worker: len(self._loads[worker]))
            if len(self._loads[worker]) >= QUEUED:
                return
            number, row = self._waiting.popleft()
            task = self._workers[worker].evaluate.remote(row)
            self._loads[worker].append(task)
            self._rows[task] = number, row

    def _collect(self) -> None:
        """Wait until a row is evaluated, or its worker is dead."""
        exceptions = self._ray.exceptions
        (done,), _ = self._ray.wait(list(self._rows), num_returns=1)
        worker = next(w for w, load in enumerate(self._loads) if done in load)
        try:
            found = self._ray.get(done)
        except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
            self._replace(worker, error)
        else:
            self._loads[worker].remove(done)
            self._note(done, found)
        self._feed()

    def _note(self, task: Any, found: Mapping[str, float] | Exception) -> None:
        number, _ = self._rows.pop(task)
        self._in_a_row = 0
        if number >= self._taken:
            self._found[number] = found

    def _replace(self, worker: int, error: Exception) -> None:
        """Start another worker instead of a dead one, and have its rows evaluated again.

        Tasks of a worker run one after another: what it died of is the first without a result.
        """
        exceptions = self._ray.exceptions
        lost = []
        for task in self._loads[worker]:
            try:
                self._note(task, self._ray.get(task, timeout=0))
            except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.GetTimeoutError):
                lost.append(self._rows.pop(task))
        self._ray.kill(self._workers[worker])
        self._workers[worker], self._loads[worker] = self._worker(), []
        (number, _), *_ = lost
        self._deaths[number] += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_DEATHS_IN_A_ROW:
            raise AutocompressError(
                f"workers died {self._in_a_row} times and evaluated nothing meanwhile: {_why(error)}"
            )
        if self._deaths[number] >= MAX_DEATHS:
            lost = lost[1:]
            if number >= self._taken:
                text = f"its worker died {self._deaths[number]} times: {_why(error)}"
                self._found[number] = EvaluationError(text)
        self._waiting.extendleft(row for row in reversed(lost) if row[0] >= self._taken)


def _why(error: Exception) -> str:
    said, _, _ = str(error).partition("\n")
    # What follows in Ray's own is a page of guesses.
    return (
        f"{said} (if memory ran out, take fewer workers; an evaluator that writes to its own weights or data "
        "ends its process, since they are shared: let it work on a copy)"
    )


class _Worker:
    """The evaluator in a process of its own."""

    def __init__(self, content: tuple[bytes, list[Bytes]], threads: int) -> None:
        import torch

        # Sums of floats depend on the number.
        torch.set_num_threads(threads)
        protect(content[1])
        self._evaluator: Evaluator = unpacked(*content)

    def ready(self) -> None:
        """Return once the evaluator is there."""

    def evaluate(self, codes: Codes) -> Mapping[str, float] | Exception:
        """Return the metrics of one row, or why there are none."""
        return evaluated(self._evaluator, codes)
