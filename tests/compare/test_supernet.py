"""A trained run as a problem: black-box strategies beside those that train a supernet of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import small_recipe, with_table
from typer.testing import CliRunner

from autocompress import stages
from autocompress.cli import app
from autocompress.compare.cells import cell_path, make_strategy, read_cell, run_cell, run_cells
from autocompress.compare.problem import Contestant, ProblemSource
from autocompress.compare.supernet import supernet_problem
from autocompress.errors import RecipeError
from autocompress.run import Run, Shown
from autocompress.training.bilevel import train_relaxed
from strategies.darts import Darts

OPTIONS = {"learning_rate": 0.1, "candidates": 2}
DARTS = Contestant("darts:learning_rate=0.1:candidates=2", "darts", OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one-shot supernet is trained: 160 images, eight steps an epoch for half of them."""
    folder = with_table(tmp_path_factory.mktemp("supernet") / "run")
    stages.train(Run(folder, small_recipe(train={"batch_size": 10})), Shown())
    return folder


def test_darts_and_random_search_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    arguments = (
        "--run", folder, "--strategies", f"random,{DARTS.label}", "--seeds", 1, "--evaluations", 3,
        "--jobs", 1, "--output", tmp_path,
    )  # fmt: skip
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    cell = read_cell(cell_path(tmp_path, DARTS, 0), 3)
    seconds = json.loads((folder / "training.json").read_text())["seconds"]
    for said in (
        f"{DARTS.label}: trained together with a supernet of its own, {cell.training_s:.1f} s a search",
        f"slices of a supernet that was trained before, in {seconds:.1f} s that are in nobody's figures",
        f"{DARTS.label}: 1 of 1 searches ended after 2 of 3 evaluations",
    ):
        assert said in result.stdout
        assert said in (tmp_path / "report.md").read_text()
    assert 0 < cell.training_s < cell.strategy_s
    assert not list(tmp_path.rglob("*.pt"))
    # By hand: a supernet of its own by the seed of the cell, scored as slices of the run's.
    problem, run = supernet_problem(str(folder)), Run(folder)
    strategy = make_strategy(problem, DARTS, 0)
    settings = run.recipe.train.model_copy(update={"seed": 0})
    assert isinstance(strategy, Darts)
    train_relaxed(run.space.supernet(), strategy, run.data, run.task, settings, seed=0)
    derived = np.vstack([strategy.ask(1), strategy.ask(1)])
    assert problem.constraints.feasible(derived).all()
    expected = [float(problem.evaluator(row[None])["accuracy"][0]) for row in derived]
    assert cell.scores == pytest.approx(expected)
    best = json.loads(cell.best)
    assert best in [json.loads(arch.to_json()) for arch in run.space.decode(derived)]


class Interrupted(Darts):  # type: ignore[misc]
    """DARTS that is stopped at a step, as by a kill."""

    steps = 0
    stopped_at = -1

    def architecture_step(self, *arguments: Any) -> None:
        if Interrupted.steps == Interrupted.stopped_at:
            raise KeyboardInterrupt
        Interrupted.steps += 1
        super().architecture_step(*arguments)


def test_a_search_that_was_killed_in_its_training_goes_on_and_finds_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestant = Contestant("interrupted", f"{__name__}:Interrupted", OPTIONS)
    source = ProblemSource("autocompress.compare.supernet:supernet_problem", {"folder": str(folder)})
    whole = run_cell(source.make(), contestant, 1, 3)
    assert Interrupted.steps == 16
    monkeypatch.setattr(Interrupted, "steps", 0)
    with monkeypatch.context() as patch:
        patch.setattr("autocompress.training.loop.CHECKPOINT_SECONDS", -1.0)  # one every step
        patch.setattr(Interrupted, "stopped_at", 11)
        with pytest.raises(KeyboardInterrupt):
            run_cells(source, [contestant], [1], 3, tmp_path)
    (checkpoint,) = tmp_path.rglob("*.pt")
    assert checkpoint == cell_path(tmp_path, contestant, 1).with_suffix(".pt")
    (again,) = run_cells(source, [contestant], [1], 3, tmp_path)
    assert Interrupted.steps == 16  # none was made twice
    assert (again.scores, again.best) == (whole.scores, whole.best)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_seeds_differ_in_what_is_trained(folder: Path) -> None:
    problem = supernet_problem(str(folder))
    assert problem.train_together is not None
    found = []
    for seed in (0, 1):
        # The logits begin alike; what moves them is the seed of the training.
        strategy = make_strategy(problem, DARTS, 0)
        assert isinstance(strategy, Darts)
        assert problem.train_together(strategy, seed=seed, checkpoint=None) > 0
        found.append(strategy.notes)
    assert found[0] != found[1]


def test_seconds_that_a_run_does_not_know_are_said_to_be_unknown(folder: Path) -> None:
    path = folder / "training.json"
    content = path.read_text()
    path.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != "seconds"}))
    try:
        assert "in seconds that are not known" in supernet_problem(str(folder)).prepared
    finally:
        path.write_text(content)


def test_the_supernet_of_a_differentiable_search_is_no_problem_for_others(tmp_path: Path) -> None:
    recipe = small_recipe(search={"strategy": "darts", "options": {"learning_rate": 0.01}})
    Run(with_table(tmp_path), recipe)
    with pytest.raises(RecipeError, match=r"trained together with 'darts', as one mixture: .*--run OTHER"):
        supernet_problem(str(tmp_path))
