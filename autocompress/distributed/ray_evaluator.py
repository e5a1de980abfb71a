"""Sub-networks evaluated in several processes: Ray workers that share one copy of the evaluator.

```python
with RayEvaluator(SupernetEvaluator(...), workers=4) as evaluator:
    result = search(strategy, constraints, evaluator, evaluations=400)
```

Ray is imported and started when the evaluator is entered, not before, and stopped when it is left. A Ray that
runs already is used and left as it was. A row gives the same bits as in this process with as many threads;
but a search asks its strategy for `workers` rows at a time, and another number of them may be other rows.
"""

import socket
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Self, final

import numpy as np

from autocompress.cost import Values
from autocompress.errors import AutocompressError, EvaluationError
from autocompress.evaluator import Evaluator, evaluated
from autocompress.machine import cores
from autocompress.proposals import check_count
from autocompress.space import Codes

MAX_DEATHS = 2
"""A row whose worker died so often is given up: it may need more memory than there is."""
ANSWERS_WITHIN_S, STARTS_WITHIN_S = 10.0, 600.0


@final
class RayEvaluator:
    """A paid evaluator whose rows are evaluated by worker processes, one row at a time each.

    The evaluator with its weights and data is put into Ray's object store once; each worker takes its copy
    from there. A worker that dies (out of memory, killed) is replaced, and its row evaluated again.
    """

    def __init__(
        self, evaluator: Evaluator, *, workers: int, threads: int = 1, address: str | None = None
    ) -> None:
        """Remember what to start; starts nothing.

        Args:
            evaluator: Paid and picklable, such as a `SupernetEvaluator`.
            workers: Processes, and rows at a time.
            threads: Of PyTorch in each of them.
            address: Of a running Ray cluster that has autocompress installed everywhere: `host:port`, or
                `auto` for the one on this machine. By default the Ray of this process is used, and started
                if there is none.

        Raises:
            RecipeError: `workers` or `threads` is not an integer of at least 1.
            AutocompressError: The evaluator is free: its rows are evaluated all at once, which is faster.
        """
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
            AutocompressError: There are too few cores for workers and threads, no cluster at the address, or
                the evaluator cannot be pickled or unpickled; nothing is left running.
        """
        if self._pool is not None:
            raise AutocompressError("this RayEvaluator is open already; make another one")
        with ExitStack() as opened:
            pool = _Pool(self._connected(opened), self._evaluator, self.workers, self._threads)
            opened.callback(pool.stop)
            pool.start()
            self._pool, self._open = pool, opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the workers, and Ray if it was started here."""
        self._pool = None
        self._open.close()

    def _connected(self, opened: ExitStack) -> Any:
        """Return the module of Ray, connected; what was started is stopped with `opened`."""
        import ray

        needed = self.workers * self._threads
        wanted = f"{self.workers} workers of {self._threads} threads need {needed} cores"
        if ray.is_initialized():
            if self._address is not None:
                raise AutocompressError(
                    f"Ray is initialised in this process already: leave out address, got {self._address!r}"
                )
        else:
            if self._address is None and needed > cores():
                raise AutocompressError(
                    f"{wanted}, but this process may use {cores()}: take fewer workers or threads"
                )
            opened.callback(ray.shutdown, wait_for_processes=True)
            self._start(ray, needed)
        there = int(ray.cluster_resources().get("CPU", 0))
        if needed > there:
            raise AutocompressError(f"{wanted}, but this Ray has {there}: take fewer workers or threads")
        return ray

    def _start(self, ray: Any, needed: int) -> None:
        """Start Ray here, or connect to the one at the address."""
        where: dict[str, Any] = {"address": self._address}
        if self._address is None:
            where = {"address": "local", "num_cpus": needed, "include_dashboard": False}
        else:
            _check_answers(self._address)
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **where)
        except Exception as error:  # Ray raises plain ones too, when a busy machine takes it over 30 s
            what = "started" if self._address is None else f"reached at {self._address!r}"
            raise AutocompressError(f"Ray cannot be {what}: {error}") from error

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
        if self._pool is None:
            raise AutocompressError(
                "a RayEvaluator works only while it is open: `with RayEvaluator(...) as evaluator: ...`"
            )
        return self._pool.each(codes)


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens: Ray tries to reach it for minutes, and complains."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise AutocompressError(f"address must be host:port or 'auto', got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise AutocompressError(f"nothing answers at address {address!r}: {error}") from None


@final
class _Pool:
    """Running workers and the one copy of the evaluator that they are made from."""

    def __init__(self, ray: Any, evaluator: Evaluator, workers: int, threads: int) -> None:
        self._ray, self._count, self._threads = ray, workers, threads
        try:
            self._evaluator = ray.put(evaluator)
        except Exception as error:  # noqa: BLE001  (pickling runs code of the evaluator's own)
            # Ray's own message is a page long.
            raise AutocompressError(
                f"evaluator {type(evaluator).__name__} cannot be pickled for other processes: "
                f"{error.__cause__ or error}"
            ) from None
        self._workers: list[Any] = []

    def start(self) -> None:
        """Start the workers and wait for them."""
        self._workers = [self._worker() for _ in range(self._count)]
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
        del self._evaluator

    def _worker(self) -> Any:
        # Ray would restart actors of its own accord too; but only here is known how often a row was tried.
        actor = self._ray.remote(num_cpus=self._threads)(_Worker)
        return actor.remote(self._evaluator, self._threads)

    def each(self, codes: Codes) -> Iterator[Mapping[str, float] | Exception]:
        """Yield what is known of each row in order; whoever is free takes the next row."""
        exceptions = self._ray.exceptions
        waiting, idle = deque(range(len(codes))), list(range(len(self._workers)))
        running: dict[Any, tuple[int, int]] = {}
        found: dict[int, Mapping[str, float] | Exception] = {}
        deaths: Counter[int] = Counter()
        for row in range(len(codes)):
            while row not in found:
                while waiting and idle:
                    index, worker = waiting.popleft(), idle.pop()
                    task = self._workers[worker].evaluate.remote(codes[index : index + 1])
                    running[task] = index, worker
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                index, worker = running.pop(done)
                try:
                    found[index] = self._ray.get(done)
                except (exceptions.RayActorError, exceptions.OutOfMemoryError) as error:
                    self._ray.kill(self._workers[worker])
                    self._workers[worker] = self._worker()
                    deaths[index] += 1
                    if deaths[index] < MAX_DEATHS:
                        waiting.appendleft(index)
                    else:
                        found[index] = EvaluationError(f"its worker died {deaths[index]} times: {error}")
                idle.append(worker)
            known = found.pop(row)
            if isinstance(known, AutocompressError) and not isinstance(known, EvaluationError):
                raise known
            yield known


class _Worker:
    """The evaluator in a process of its own."""

    def __init__(self, evaluator: Evaluator, threads: int) -> None:
        import torch

        # Sums of floats depend on the number.
        torch.set_num_threads(threads)
        self._evaluator = evaluator

    def ready(self) -> None:
        """Return once the evaluator is there."""

    def evaluate(self, codes: Codes) -> Mapping[str, float] | Exception:
        """Return the metrics of one row, or why there are none."""
        return evaluated(self._evaluator, codes)
