import contextlib
import http.server
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import shaken, small_data

from autocompress.budget import Budget
from autocompress.cost import Values, operation_cost
from autocompress.distributed.ray_evaluator import (
    MAX_DEATHS,
    MAX_DEATHS_IN_A_ROW,
    QUEUED,
    RayEvaluator,
    _Pool,
)
from autocompress.distributed.shared import unpacked
from autocompress.engine import search
from autocompress.errors import AutocompressError, EvaluationError, RecipeError, SpaceError
from autocompress.evaluation.supernet import SupernetEvaluator
from autocompress.evaluator import Evaluator, ParallelEvaluator, evaluated
from autocompress.machine import cores
from autocompress.recipe import TaskSettings
from autocompress.space import Codes
from autocompress.testing.toys import every_network, toy_classifier_space
from autocompress.training.evaluate import calibration_batches
from autocompress.training.task import load_task
from strategies.random_search import RandomSearch

MARK = "AUTOCOMPRESS_TEST_OF_RAY"
ROWS = np.arange(8, dtype=np.int64)[:, None]


class Scripted:
    """Does to each row what its first code says."""

    def __init__(self, folder: Path | None = None, paid: bool = True) -> None:
        self.folder, self.paid = folder, paid

    def __call__(self, codes: Codes) -> dict[str, Values]:
        what = int(codes[0, 0])
        if what == 1:
            raise EvaluationError("no luck")
        if what == 2:
            raise ZeroDivisionError("by zero")
        if what == 3 and self.folder is not None and self._first(self.folder / "died once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 4 and self.folder is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 5:
            raise SpaceError("the evaluator is of another space")
        return {"accuracy": codes[:, 0] / 10, "process": np.full(len(codes), float(os.getpid()))}

    @staticmethod
    def _first(mark: Path) -> bool:
        if mark.exists():
            return False
        mark.touch()
        return True


# Without Ray -------------------------------------------------------------------------------------------


def test_neither_import_nor_construction_loads_ray() -> None:
    code = (
        "import sys\n"
        "from autocompress.distributed.ray_evaluator import RayEvaluator\n"
        "from autocompress.testing.toys import ToyEvaluator, toy_space\n"
        "RayEvaluator(ToyEvaluator(toy_space()), workers=2)\n"
        "print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_is_a_paid_evaluator_of_several_rows_at_a_time_that_pickles() -> None:
    evaluator = pickle.loads(pickle.dumps(RayEvaluator(Scripted(), workers=3)))
    assert isinstance(evaluator, ParallelEvaluator)
    assert (evaluator.paid, evaluator.workers) == (True, 3)


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": True}, {"workers": 1, "threads": 0}])
def test_counts_below_one_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"(workers|threads) must be an integer >= 1, got (0|True)"):
        RayEvaluator(Scripted(), **arguments)


def test_a_free_evaluator_is_refused() -> None:
    with pytest.raises(AutocompressError, match="Scripted is free"):
        RayEvaluator(Scripted(paid=False), workers=1)


def test_it_works_only_while_it_is_open() -> None:
    with pytest.raises(AutocompressError, match="only while it is open"):
        RayEvaluator(Scripted(), workers=1)(ROWS)


def test_more_threads_than_cores_are_refused_before_ray_is_started() -> None:
    import ray

    evaluator = RayEvaluator(Scripted(), workers=cores(), threads=2)
    with pytest.raises(AutocompressError, match=rf"need {2 * cores()} cores, but this process may use"):
        evaluator.__enter__()
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "127.0.0.1:99999", "127.0.0.1", ":1", "ray://there:1"])
def test_an_address_without_ray_is_refused_at_once(address: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but does not listen
        address = address.format(taken.getsockname()[1])
        with pytest.raises(AutocompressError, match=rf"address .*'{address}'"):
            RayEvaluator(Scripted(), workers=1, address=address).__enter__()


def test_another_service_at_the_address_is_refused_at_once() -> None:
    """Ray would wait for minutes."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(AutocompressError, match=rf"what answers at address '{address}' is no Ray"):
            RayEvaluator(Scripted(), workers=1, address=address).__enter__()
        server.shutdown()


def test_a_row_is_metrics_or_the_reason_why_there_are_none() -> None:
    def of(what: int) -> Mapping[str, float] | Exception:
        return evaluated(Scripted(), ROWS[what : what + 1])

    assert of(7) == {"accuracy": 0.7, "process": os.getpid()}
    for what, kind, text in [
        (1, EvaluationError, "no luck"),
        (2, EvaluationError, "ZeroDivisionError: by zero"),
        (5, SpaceError, "another space"),
    ]:
        found = of(what)
        assert type(found) is kind
        assert text in str(found)


class DeadError(Exception):
    """What the Ray below says of a worker that died."""


class FakeRay:
    """Ray in one process, that ends its tasks in random order and kills workers on certain rows.

    As in Ray, tasks of a worker end in the order in which it was given them, and all are lost when it dies.
    """

    exceptions = SimpleNamespace(
        RayActorError=DeadError,
        OutOfMemoryError=MemoryError,
        RayError=DeadError,
        GetTimeoutError=TimeoutError,
    )

    def __init__(self, deadly: Mapping[int, int], seed: int, *, full: bool = False) -> None:
        self.left, self.random, self.full = dict(deadly), random.Random(seed), full
        self.workers: list[Any] = []
        self.owner: dict[int, Any] = {}
        self.started, self.killed, self.most = 0, 0, 0

    def put(self, content: Any) -> Any:
        return content

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        return lambda _: SimpleNamespace(remote=self._worker)

    def _worker(self, content: Any, threads: int) -> Any:
        self.started += 1
        worker = SimpleNamespace(evaluator=unpacked(*content), dead=False, tasks={}, done={})
        worker.ready = SimpleNamespace(remote=lambda: None)
        worker.evaluate = SimpleNamespace(remote=lambda codes: self._submit(worker, codes))
        self.workers.append(worker)
        return worker

    def _submit(self, worker: Any, codes: Codes) -> int:
        task = len(self.owner) + 1000 * self.random.randrange(1_000_000)
        self.owner[task], worker.tasks[task] = worker, codes
        assert len(worker.tasks) <= QUEUED
        self.most = max(self.most, sum(bool(w.tasks) and not w.dead for w in self.workers))
        return task

    def _work(self, worker: Any) -> None:
        """Do the first task of a worker."""
        task, codes = next(iter(worker.tasks.items()))
        row = int(codes[0, 0])
        if self.left.get(row, 0):
            self.left[row] -= 1
            worker.dead = True
            return
        worker.done[task] = evaluated(worker.evaluator, codes)
        del worker.tasks[task]

    def wait(self, tasks: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        assert num_returns == 1
        while True:
            ready = [task for task in tasks if task in self.owner[task].done or self.owner[task].dead]
            # Some end unseen before the one that is waited for.
            if ready and self.random.random() < 0.5:
                done = self.random.choice(ready)
                return [done], [task for task in tasks if task != done]
            busy = [w for w in self.workers if w.tasks and not w.dead]
            if busy:
                self._work(self.random.choice(busy))

    def get(self, task: Any, timeout: float | None = None) -> Any:
        if isinstance(task, list):
            if self.full:
                raise TimeoutError(f"after {timeout}")
            return None
        worker = self.owner[task]
        if task in worker.done:
            return worker.done[task]
        if worker.dead and self.random.random() < 0.5:
            raise DeadError("it died")
        if timeout is None:
            raise DeadError("it died")
        raise TimeoutError("not known yet")

    def kill(self, worker: Any) -> None:
        worker.dead = True
        self.killed += 1


def pool_of(ray: FakeRay, workers: int) -> _Pool:
    pool = _Pool(ray, Scripted(), workers=workers, threads=1)
    pool.start()
    return pool


def results(pool: _Pool, rows: Codes) -> list[Mapping[str, float] | Exception]:
    for index in range(len(rows)):
        pool.submit(rows[index : index + 1])
    return [pool.result() for _ in range(len(rows))]


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_in_their_order_whatever_order_workers_end_in_and_die_in(seed: int) -> None:
    ray = FakeRay({3: 1, 6: MAX_DEATHS}, seed)
    pool = pool_of(ray, 3)
    found = results(pool, ROWS[[7, 3, 6, 0, 1, 7, 0, 7, 7]])
    assert [None if isinstance(f, Exception) else round(10 * f["accuracy"]) for f in found] == [
        7, 3, None, 0, None, 7, 0, 7, 7,
    ]  # fmt: skip
    first, second = (str(f) for f in found if isinstance(f, Exception))
    assert first.startswith(f"its worker died {MAX_DEATHS} times: it died")
    assert second == "no luck"
    assert ray.most == 3
    # Only the row that runs is counted as a death, not the one that waits behind it.
    assert ray.started == 3 + 1 + MAX_DEATHS
    pool.stop()
    assert ray.killed == ray.started


def test_what_waits_behind_a_row_that_kills_is_not_given_up_with_it() -> None:
    found = results(pool_of(FakeRay({6: MAX_DEATHS, 7: 1}, 0), 1), ROWS[[6, 7, 0]])
    assert [isinstance(row, EvaluationError) for row in found] == [True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_one_in_five_killed_loses_no_row(seed: int) -> None:
    class Random(FakeRay):
        def _work(self, worker: Any) -> None:
            if self.random.random() < 0.2:
                worker.dead = True
            else:
                super()._work(worker)

    rows = ROWS[np.random.default_rng(seed).choice([0, 6, 7], 300)]
    found = results(pool_of(Random({}, seed), 4), rows)
    assert [round(10 * f["accuracy"]) for f in found if not isinstance(f, Exception)] == rows[:, 0].tolist()


def test_workers_that_all_die_are_an_error_not_a_loop() -> None:
    ray = FakeRay(dict.fromkeys(range(8), 1000), 0)
    with pytest.raises(AutocompressError, match=rf"workers died {MAX_DEATHS_IN_A_ROW} times and evaluated"):
        results(pool_of(ray, 2), np.repeat(ROWS[:3], 10, axis=0))


def test_what_is_cancelled_is_forgotten_and_others_are_not_mistaken_for_it() -> None:
    pool = pool_of(FakeRay({7: 1}, 0), 2)
    for index in (7, 7, 0, 0, 7):
        pool.submit(ROWS[index : index + 1])
    pool.cancel()
    with pytest.raises(AutocompressError, match="no row was submitted"):
        pool.result()
    found = results(pool, ROWS[[6, 0]])
    assert [f["accuracy"] for f in found if not isinstance(f, Exception)] == [0.6, 0.0]


def test_an_evaluator_that_says_it_is_broken_ends_the_search() -> None:
    pool = pool_of(FakeRay({}, 0), 2)
    for index in (0, 5, 7):
        pool.submit(ROWS[index : index + 1])
    assert pool.result()["accuracy"] == 0.0  # type: ignore[index]
    with pytest.raises(SpaceError, match="another space"):
        pool.result()


def test_workers_that_find_no_free_core_are_an_error_not_a_wait_for_ever() -> None:
    pool = _Pool(FakeRay({}, 0, full=True), Scripted(), workers=2, threads=1)
    with pytest.raises(AutocompressError, match="2 workers did not start within 600 s: something else"):
        pool.start()


# With Ray ----------------------------------------------------------------------------------------------


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[int]]:
    """What tells the processes that inherited this environment, in which workers import what tests import."""
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # not what workers are to have
    monkeypatch.setenv(MARK, mark := f"{os.getpid()}-{time.time_ns()}")
    pattern = f"{MARK}={mark}".encode()

    def running() -> set[int]:
        found = set()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if pattern in environment.read_bytes():
                    found.add(int(environment.parent.name))
        return found - {os.getpid()}

    return running


def soon(holds: Callable[[], bool], *, within_s: float = 60) -> bool:
    """Wait until it holds; say whether it did."""
    end = time.monotonic() + within_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


class Observed:
    """Counts how often it is pickled, and says how many threads it has."""

    paid = True
    pickled = 0

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def __call__(self, codes: Codes) -> Mapping[str, Values]:
        threads = np.full(len(codes), float(torch.get_num_threads()))
        return {**self.evaluator(codes), "threads": threads}

    def __getstate__(self) -> dict[str, Any]:
        Observed.pickled += 1
        return self.__dict__


def test_slices_score_as_in_this_process_and_nothing_of_ray_is_left(
    left: Callable[[], set[int]], one_thread: None, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    space, data = toy_classifier_space(), small_data()
    task = load_task(TaskSettings())
    slices = SupernetEvaluator(shaken(space), data, task, calibration_batches(data, 32))
    local = Observed(slices)
    rows = every_network(space)[::7]
    alone = [evaluated(local, rows[i : i + 1]) for i in range(len(rows))]
    Observed.pickled = 0
    with RayEvaluator(local, workers=2) as evaluator:
        assert left()
        found = list(evaluator.each(rows))
        columns = evaluator(rows[:3])
        constraints = Budget.parse("macs=80%").resolve(space, [operation_cost(space, "macs")])
        result = search(RandomSearch(constraints, seed=0), constraints, evaluator, evaluations=5)
    assert found == alone
    assert columns["accuracy"].tolist() == [row["accuracy"] for row in alone[:3]]  # type: ignore[index]
    assert [trial.metrics for trial in result.trials] == [
        evaluated(local, space.encode([trial.architecture])) for trial in result.trials
    ]
    assert Observed.pickled == 1
    assert not ray.is_initialized()
    assert soon(lambda: not left())
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def own_ray(left: Callable[[], set[int]]) -> Iterator[None]:
    """A Ray of two cores that is not started by the evaluator."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    assert ray.is_initialized()
    ray.shutdown(wait_for_processes=True)
    assert soon(lambda: not left())


@pytest.mark.slow
def test_a_ray_that_runs_is_used_and_left_as_it_was(own_ray: None, tmp_path: Path) -> None:
    import ray

    with RayEvaluator(Scripted(tmp_path), workers=1) as evaluator:
        found = list(evaluator.each(ROWS[[6, 3, 1, 2, 7]]))
    scores = [None if isinstance(row, Exception) else row["accuracy"] for row in found]
    assert scores == [0.6, 0.3, None, None, 0.7]
    reasons = [str(row) for row in found if isinstance(row, EvaluationError)]
    assert reasons == ["no luck", "ZeroDivisionError: by zero"]
    before, after, same = (row["process"] for row in found if not isinstance(row, Exception))
    assert os.getpid() != before != after == same
    assert soon(lambda: ray.available_resources().get("CPU") == 2)
    for mistaken, message in [
        (RayEvaluator(Unsendable(), workers=1), r"Unsendable cannot be pickled .*: no way out$"),
        (RayEvaluator(Scripted(), workers=3), "need 3 cores, but this Ray has 2"),
        (RayEvaluator(Scripted(), workers=1, address="auto"), "leave out address, got 'auto'"),
    ]:
        with pytest.raises(AutocompressError, match=message):
            mistaken.__enter__()


@pytest.mark.slow
def test_a_row_that_kills_its_workers_is_given_up_and_others_are_not(own_ray: None, tmp_path: Path) -> None:
    with RayEvaluator(Scripted(tmp_path), workers=2) as evaluator:
        found = list(evaluator.each(ROWS[[0, 4, 3, 6, 7, 4]]))
    assert [None if isinstance(row, Exception) else row["accuracy"] for row in found] == [
        0, None, 0.3, 0.6, 0.7, None,
    ]  # fmt: skip
    for given_up in (found[1], found[5]):
        assert isinstance(given_up, EvaluationError)
        assert str(given_up).startswith(f"its worker died {MAX_DEATHS} times")
    with pytest.raises(AutocompressError, match=r"cannot start or unpickle (.|\n)*no way in"):
        RayEvaluator(Unreceivable(), workers=1).__enter__()


class Writing:
    """Writes to its own weights."""

    paid = True

    def __init__(self) -> None:
        self.weights = torch.ones(50_000)

    def __call__(self, codes: Codes) -> dict[str, Values]:
        self.weights += 1
        return {"accuracy": np.full(len(codes), float(self.weights.sum()))}


@pytest.mark.slow
def test_an_evaluator_that_writes_to_its_weights_is_found_out(own_ray: None) -> None:
    """Otherwise workers would change each other's."""
    with (
        RayEvaluator(Writing(), workers=2) as evaluator,
        pytest.raises(AutocompressError, match=r"evaluated nothing meanwhile: .* work on a copy"),
    ):
        list(evaluator.each(np.zeros((40, 1), dtype=np.int64)))


class Unsendable(Scripted):
    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("no way out")


class Unreceivable(Scripted):
    def __setstate__(self, state: dict[str, Any]) -> None:
        raise TypeError("no way in")


INTERRUPTED = """
import signal
import time
import numpy as np
from autocompress.distributed.ray_evaluator import RayEvaluator

# Background jobs of shells ignore it, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Slow:
    paid = True
    def __call__(self, codes):
        time.sleep(600)

with RayEvaluator(Slow(), workers=2) as evaluator:
    print("open", flush=True)
    list(evaluator.each(np.zeros((5, 1), dtype=np.int64)))
"""


@pytest.mark.slow
def test_an_interrupt_leaves_no_process(left: Callable[[], set[int]]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert len(left()) > 3
        time.sleep(1)
        # As a terminal does: to all processes of the group.
        os.killpg(process.pid, signal.SIGINT)
        try:
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.kill()
    assert soon(lambda: not left())
