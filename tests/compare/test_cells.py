"""Cells hold what a search found, are run once, and go on after a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from autocompress.compare.cells import Cell, cell_path, make_strategy, read_cell, run_cell, run_cells
from autocompress.compare.problem import Contestant, Problem, ProblemSource, parse_contestant
from autocompress.differentiable import Differentiable
from autocompress.engine import search
from autocompress.errors import (
    EvaluationError,
    PluginError,
    RecipeError,
    StorageError,
    StrategyError,
    TrainingError,
)
from autocompress.space import Codes
from autocompress.testing.toys import ToyEvaluator, toy_constraints, toy_problem
from autocompress.trial import Batch
from strategies.darts import Darts
from strategies.evolution import AgingEvolution
from strategies.random_search import RandomSearch

TOY = ProblemSource("autocompress.testing.toys:toy_problem", {"blocks": 4})
RANDOM, SMALL = Contestant("random", "random"), parse_contestant("evolution:population=6:sample_size=3")


class Breaking:
    """A strategy that asks two networks and fails then, until somebody mends it."""

    mended = False

    def __init__(self, constraints: Any, *, seed: int, objective: str = "accuracy") -> None:
        self._random, self._left = RandomSearch(constraints, seed=seed), 2

    def ask(self, n: int) -> Codes:
        self._left -= 1
        if self._left < 0 and not self.mended:
            raise RuntimeError("no idea")
        return self._random.ask(n)

    def tell(self, batch: Batch) -> None:
        pass


class Inheriting(AgingEvolution):  # type: ignore[misc]  # users derive from final classes too
    """A strategy that hands the options it does not know to its base class."""

    def __init__(self, constraints: Any, strength: int = 1, **options: Any) -> None:
        super().__init__(constraints, **options)
        self.strength, self.given = strength, options


class TakesNothing:
    pass


class Raising:
    def __init__(self, constraints: Any, *, seed: int, objective: str) -> None:
        raise KeyError("weights")


def makes_nothing(constraints: Any, *, seed: int, objective: str) -> None:
    pass


def takes_little(constraints: Any) -> RandomSearch:
    return RandomSearch(constraints, seed=0)


def takes_anything(constraints: Any, **options: Any) -> Any:
    return RandomSearch(constraints, seed=options["seed"])


def without_times(cells: Sequence[Cell]) -> list[Any]:
    return [(c.label, c.seed, c.scores, c.evaluation_s, c.best, c.error) for c in cells]


def test_a_cell_is_what_a_search_finds() -> None:
    problem = toy_problem(blocks=4)
    cell = run_cell(problem, RANDOM, 3, 25)
    expected = search(
        RandomSearch(problem.constraints, seed=3), problem.constraints, problem.evaluator, evaluations=25
    )
    assert cell.scores == tuple(trial.metrics["accuracy"] for trial in expected.trials)
    assert cell.best == expected.best().architecture.to_json()
    assert cell.evaluation_s == (6.0,) * 25  # simulated: one a gene
    assert 0 < cell.strategy_s < 5


def test_failed_evaluations_are_marked_and_seconds_are_measured_where_nothing_is_simulated() -> None:
    constraints = toy_constraints(blocks=4)
    problem = Problem("toy", constraints, ToyEvaluator(constraints.space, failing=True))
    cell = run_cell(problem, RANDOM, 0, 25)
    assert 0 < sum(score is None for score in cell.scores) < 25
    assert all((s == 0) == (score is None) for s, score in zip(cell.evaluation_s, cell.scores, strict=True))
    assert max(cell.evaluation_s) < 1


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cells_are_the_same_in_other_processes_and_run_once(tmp_path: Path, jobs: int) -> None:
    told: list[tuple[int, int]] = []
    cells = run_cells(
        TOY, [RANDOM, SMALL], range(2), 20, tmp_path, jobs=jobs,
        progress=lambda done, total, note="": told.append((done, total)),
    )  # fmt: skip
    wanted = [run_cell(TOY.make(), c, seed, 20) for seed in range(2) for c in (RANDOM, SMALL)]
    assert without_times(cells) == without_times(wanted)
    assert told == [(done, 4) for done in range(5)]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    more = run_cells(TOY, [RANDOM, SMALL], range(3), 20, tmp_path)
    assert without_times(more[:4]) == without_times(cells)
    assert len(more) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert not list(tmp_path.rglob("*.log"))


def test_a_strategy_that_fails_is_a_cell_with_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    broken = Contestant("breaking", f"{__name__}:Breaking")
    cells = run_cells(TOY, [broken, RANDOM], [0], 5, tmp_path)
    assert cells[0].error == "StrategyError: strategy Breaking failed to ask: RuntimeError: no idea"
    assert len(cells[1].scores) == 5


def test_a_search_that_failed_is_run_again_and_pays_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Contestant("breaking", f"{__name__}:Breaking")
    run_cells(TOY, [broken, RANDOM], [0], 5, tmp_path)
    kept = cell_path(tmp_path, RANDOM, 0).stat().st_mtime_ns
    monkeypatch.setattr(Breaking, "mended", True)
    paid: list[Codes] = []

    def counting(self: ToyEvaluator, codes: Codes) -> dict[str, Any]:
        paid.append(codes)
        return original(self, codes)

    original = ToyEvaluator.__call__
    monkeypatch.setattr(ToyEvaluator, "__call__", counting)
    cells = run_cells(TOY, [broken, RANDOM], [0], 5, tmp_path)
    assert (cells[0].error, cells[0].scores) == ("", cells[1].scores)
    assert len(paid) == 3
    assert cell_path(tmp_path, RANDOM, 0).stat().st_mtime_ns == kept
    assert not list(tmp_path.rglob("*.log"))


class Silent(Breaking):
    """A strategy that never proposes anything."""

    def ask(self, n: int) -> Codes:
        return self._random.ask(n)[:0]


def test_a_search_without_a_score_is_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Contestant("silent", f"{__name__}:Silent")
    (cell,) = run_cells(TOY, [silent], [0], 5, tmp_path)
    assert cell.error == "StrategyError: strategy 'silent' proposed no network that fits the limits"
    with monkeypatch.context() as broken:
        broken.setattr(ToyEvaluator, "__call__", lambda self, codes: 1 / 0)
        (cell,) = run_cells(TOY, [RANDOM], [0], 5, tmp_path)
    assert cell.error.startswith(
        "EvaluationError: not one of 5 evaluations gave a score, the last one failed with: ZeroDivisionError"
    )
    (cell,) = run_cells(TOY, [RANDOM], [0], 5, tmp_path)
    assert (cell.error, len(cell.scores)) == ("", 5)
    assert None not in cell.scores


def test_a_search_of_another_length_is_refused(tmp_path: Path) -> None:
    run_cells(TOY, [RANDOM], [0], 5, tmp_path)
    with pytest.raises(
        StorageError, match=r"0.json is a search of 5 evaluations, not 6; use another --output"
    ):
        run_cells(TOY, [RANDOM], [0], 6, tmp_path)


TRAINED: dict[str, Any] = {}


def trained_problem(returns: Any = 7.5) -> Problem:
    """The toy with a training that says how long it took, or fails if it is to."""

    def train_together(strategy: Differentiable, *, seed: int, checkpoint: Path | None) -> Any:
        TRAINED.update(strategy=strategy, seed=seed, checkpoint=checkpoint)
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text("half way")
        if returns == "fails":
            raise TrainingError("the loss is nan")
        return returns

    toy = toy_problem(blocks=4)
    return replace(toy, train_together=train_together)


DARTS = Contestant("darts", "darts", {"candidates": 3})


def test_a_differentiable_strategy_is_trained_before_it_is_asked() -> None:
    cell = run_cell(trained_problem(), DARTS, 3, 5)
    assert isinstance(TRAINED["strategy"], Darts)
    assert (TRAINED["seed"], TRAINED["checkpoint"]) == (3, None)
    assert len(cell.scores) == 3
    assert cell.training_s == 7.5
    assert 7.5 < cell.strategy_s < 12.5
    assert run_cell(trained_problem(), RANDOM, 3, 5).training_s == 0


def test_a_training_is_kept_beside_the_journal_until_its_search_has_ended(tmp_path: Path) -> None:
    source = ProblemSource(f"{__name__}:trained_problem")
    (cell,) = run_cells(source, [DARTS], [1], 5, tmp_path)
    assert cell.training_s == 7.5
    assert TRAINED["checkpoint"] == cell_path(tmp_path, DARTS, 1).with_suffix(".pt")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_strategy_that_cannot_be_trained_is_a_cell_with_its_error_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    source = ProblemSource(f"{__name__}:trained_problem", {"returns": "fails"})
    cells = run_cells(source, [DARTS, RANDOM], [0], 5, tmp_path)
    assert cells[0].error == (
        "StrategyError: strategy 'darts' cannot be trained: TrainingError: the loss is nan"
    )
    assert len(cells[1].scores) == 5
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("returns", [None, "7.5", -1, float("nan")])
def test_a_problem_that_does_not_say_how_long_it_trained_is_refused(returns: Any) -> None:
    with pytest.raises(PluginError, match=r"train_together of problem 'toy .*' must return its seconds"):
        run_cell(trained_problem(returns), DARTS, 0, 5)


def test_a_problem_without_training_refuses_differentiable_strategies() -> None:
    with pytest.raises(StrategyError, match=r"'darts' is trained .* 'toy .*' has no train_together .*--run"):
        make_strategy(toy_problem(blocks=4), DARTS, 0)


class Threads(ToyEvaluator):
    """Scores nothing, but notes the threads it has."""

    seen: ClassVar[list[int]] = []

    def __call__(self, codes: Codes) -> dict[str, Any]:
        self.seen.append(torch.get_num_threads())
        return super().__call__(codes)


def greedy_problem() -> Problem:
    torch.set_num_threads(3)
    constraints = toy_constraints(blocks=2)
    return Problem("greedy", constraints, Threads(constraints.space))


@pytest.mark.usefixtures("one_thread")
def test_every_search_has_as_many_threads_whatever_its_problem_takes(tmp_path: Path) -> None:
    run_cells(ProblemSource(f"{__name__}:greedy_problem"), [RANDOM], range(2), 2, tmp_path, threads=1)
    assert Threads.seen == [1] * 4


KILLED = """
import sys
from pathlib import Path
import autocompress.testing.toys as toys
from autocompress.compare.cells import run_cells
from autocompress.compare.problem import Contestant, ProblemSource, parse_contestant
import time
original = toys.ToyEvaluator.__call__
def slow(self, codes):
    time.sleep(0.05)
    with open(sys.argv[1] + "/paid", "a") as file:
        file.write("x")
    return original(self, codes)
toys.ToyEvaluator.__call__ = slow
run_cells(ProblemSource("autocompress.testing.toys:toy_problem", {"blocks": 4}),
          [parse_contestant("evolution:population=6:sample_size=3")], [0], 40, Path(sys.argv[1]))
"""


def test_a_comparison_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    paid = tmp_path / "paid"
    deadline = time.monotonic() + 60
    while (not paid.exists() or len(paid.read_text()) < 8) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = len(paid.read_text())
    assert 8 <= before < 40
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    # At most the evaluation that the kill hit is paid for twice.
    assert 40 <= len(paid.read_text()) <= 41
    assert without_times([read_cell(cell_path(tmp_path, SMALL, 0), 40)]) == without_times(
        [run_cell(toy_problem(blocks=4), SMALL, 0, 40)]
    )


SLOW_PROBLEM = """
import time
from pathlib import Path
from autocompress.compare.problem import Problem
from autocompress.testing.toys import ToyEvaluator, toy_constraints

class Slow(ToyEvaluator):
    def __call__(self, codes):
        time.sleep(0.2)
        with open("paid", "a") as file:
            file.write("x")
        return super().__call__(codes)

def made():
    constraints = toy_constraints(blocks=4)
    return Problem("slow", constraints, Slow(constraints.space), simulated=True)
"""
STOPPED = """
import signal
from pathlib import Path
from autocompress.compare.cells import run_cells
from autocompress.compare.problem import Contestant, ProblemSource

# A shell starts what it runs in the background with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cells = [Contestant("random", "random"), Contestant("elitist", "elitist")]
run_cells(ProblemSource("slow_problem:made"), cells, range(4), 60, Path("cells"), jobs=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_comparison_in_several_processes_stops_at_once_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C goes to all processes of a terminal, a kill to the first only; a cell takes 12 seconds."""
    (tmp_path / "slow_problem.py").write_text(SLOW_PROBLEM)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    paid = tmp_path / "paid"
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while (not paid.exists() or len(paid.read_text()) < 4) and time.monotonic() < deadline:
                time.sleep(0.02)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            # Returns when no process has stderr open any more; at once, but this machine may be busy.
            said = process.communicate(timeout=6)[1]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -number
    assert said.count("Traceback") <= 1, said  # workers print none
    assert len(list(tmp_path.rglob("[0-9].log"))) == 2


def deadly_problem() -> Problem:
    constraints = toy_constraints(blocks=2)
    return Problem("deadly", constraints, Deadly(constraints.space))


class Deadly(ToyEvaluator):
    def __call__(self, codes: Codes) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(codes)


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    source = ProblemSource(f"{Path(__file__).stem}:deadly_problem")
    with pytest.raises(EvaluationError, match=r"killed, as it is where memory .* smaller --jobs than 2"):
        run_cells(source, [RANDOM, SMALL], [0], 5, tmp_path, jobs=2)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"schema": "autocompress.compare.cell", "version": 2}']
)
def test_a_damaged_cell_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "0.json"
    path.write_text(content)
    with pytest.raises(StorageError, match="remove it to run it again"):
        read_cell(path, 5)


@pytest.fixture
def broken_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("made = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_contestants_read_options_as_yaml() -> None:
    assert parse_contestant("random") == Contestant("random", "random", {})
    found = parse_contestant("evolution:population=20:deduplicate=false")
    assert (found.strategy, dict(found.options)) == ("evolution", {"population": 20, "deduplicate": False})


def test_a_strategy_of_ones_own_is_module_and_attribute_with_options_behind_them() -> None:
    assert parse_contestant("strategies.random_search:RandomSearch").strategy == (
        "strategies.random_search:RandomSearch"
    )
    found = parse_contestant(f"{__name__}:Inheriting:population=8:strength=2")
    assert found.strategy == f"{__name__}:Inheriting"
    made = make_strategy(toy_problem(blocks=2), found, 3)
    assert isinstance(made, Inheriting)
    assert (made.strength, made.given) == (2, {"seed": 3, "objective": "accuracy", "population": 8})


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("evolution:20", RecipeError, "name:option=value"),
        ("evolution:a b=1", RecipeError, "name:option=value"),
        ("evolution:population=[", RecipeError, "no YAML"),
        ("evolutoin", PluginError, "did you mean 'evolution'"),
        (
            "evolution:popul=3",
            RecipeError,
            "^--strategies evolution:popul: strategy 'evolution' takes popula",
        ),
        ("evolution:seed=3", RecipeError, "^--strategies evolution:seed: strategy 'evolution' takes popula"),
        (f"{__name__}:Inheriting:popul=3", RecipeError, "Inheriting' takes strength, population, sample_si"),
        (f"{__name__}:takes_anything:seed=3", RecipeError, "takes no options"),
        (f"{__name__}:Breaking:rate=3", RecipeError, "Breaking:rate: strategy .*Breaking' takes no options"),
        (f"{__name__}:TakesNothing", PluginError, "is no strategy: it must take .*, but takes nothing"),
        (f"{__name__}:takes_little", PluginError, "is no strategy: .*, but takes constraints$"),
        ("mine:", PluginError, "a strategy is a name or 'module:attribute', got 'mine:'"),
        (
            "mine:Search:3",
            RecipeError,
            "module:attribute as name of one of your own; got 'mine:Search:3'",
        ),
        ("no_such:Search:rate=3", PluginError, "'no_such:Search' cannot be imported from module 'no_such'"),
        ("broken_module:Search", PluginError, "module 'broken_module' raises ZeroDivisionError: division"),
    ],
)
def test_contestants_that_read_otherwise_are_refused(
    text: str, error: type[Exception], said: str, broken_module: None
) -> None:
    with pytest.raises(error, match=said):
        parse_contestant(text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{__name__}:Raising", "strategy '.*:Raising' cannot be made: KeyError: 'weights'"),
        (f"{__name__}:makes_nothing", "makes_nothing' must make something with ask and tell, got NoneType"),
        (
            "evolution:population=0",
            "strategy 'evolution:population=0': population must be an integer >= 1, g",
        ),
    ],
)
def test_a_strategy_that_cannot_be_made_is_an_error_with_its_name(name: str, said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        make_strategy(toy_problem(blocks=2), parse_contestant(name), 0)


def test_a_strategy_that_takes_anything_is_given_it() -> None:
    found = parse_contestant(f"{__name__}:takes_anything:rate=3")
    assert isinstance(make_strategy(toy_problem(blocks=2), found, 0), RandomSearch)


def raising_problem(blocks: int = 2) -> Problem:
    raise TypeError(f"{blocks} blocks")


def free_problem() -> Problem:
    problem = toy_problem(blocks=2)
    problem.evaluator.paid = False  # type: ignore[misc]
    return problem


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (ProblemSource("toys"), PluginError, "a problem is 'module:function', got 'toys'"),
        (ProblemSource("autocompress.testing.toys:nothing"), PluginError, "cannot be imported"),
        (ProblemSource("no_such_module:nothing"), PluginError, "cannot be imported: No module named"),
        (
            ProblemSource("autocompress.testing.toys:toy_problem", {"size": 3}),
            RecipeError,
            "does not take .*size",
        ),
        (
            ProblemSource("autocompress.testing.toys:toy_space"),
            PluginError,
            "must return .*Problem, got SearchSpace",
        ),
        (ProblemSource("tests_compare_cells:free_problem"), PluginError, "must be paid"),
        (
            ProblemSource("tests_compare_cells:raising_problem", {"blocks": 3}),
            PluginError,
            "'tests_compare_cells:raising_problem' cannot be made: TypeError: 3 blocks",
        ),
        (ProblemSource("broken_module:made"), PluginError, "cannot be imported: ZeroDivisionError: division"),
    ],
)
def test_a_problem_that_cannot_be_made_is_refused(
    source: ProblemSource, error: type[Exception], said: str, broken_module: None
) -> None:
    sys.modules["tests_compare_cells"] = sys.modules[__name__]
    with pytest.raises(error, match=said):
        source.make()


def test_the_optimum_of_the_toy_problem_is_reached_by_enumeration_and_never_exceeded() -> None:
    problem = toy_problem(blocks=2)
    cell = run_cell(problem, RANDOM, 0, 1000)
    assert problem.optimum is not None
    assert np.nanmax(cell.curve(1000)) == pytest.approx(problem.optimum)
