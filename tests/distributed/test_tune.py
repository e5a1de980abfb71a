"""Policies on Ray Tune: as many as were asked for, none twice, whatever fails is isolated."""

import json
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from policy.test_trial import job_of, recipe

from autocompress.distributed.tune import PROGRESS, _told, fits, tune, worth
from autocompress.errors import AutocompressError, RecipeError
from search_spaces.policy import policy

__all__ = ["recipe"]


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/report.json"))]


@pytest.mark.slow
def test_policies_are_tried_within_the_budget_and_a_second_call_tries_none_again(recipe: Path) -> None:
    job = job_of(recipe, trials=5, strategy="random")
    space = policy(job.recipe.passes)
    told: list[int] = []
    tune(job, space, lambda done, total, text="": told.append(done))
    first = reports(job.folder)
    assert 2 <= len(first) <= 5
    assert told[-1] == 5
    assert any(report["fits"] and 0 < report["score"] <= 1 for report in first)
    assert all(report["fits"] == (report["excess"] <= 0) for report in first)
    ages = {path: path.stat().st_mtime_ns for path in job.folder.glob("trials/*/report.json")}
    tune(job, space)
    assert {path: path.stat().st_mtime_ns for path in job.folder.glob("trials/*/report.json")} == ages


def test_more_workers_than_cores_are_refused_before_ray_starts(recipe: Path) -> None:
    job = job_of(recipe, workers=1000)
    with pytest.raises(AutocompressError, match="1000 workers of 1 threads need 1000 cores, but"):
        tune(job, policy(job.recipe.passes))


def test_what_does_not_fit_is_worth_less_the_further_it_is_off() -> None:
    good = {"fits": True, "score": 0.1}
    near, far, broken = ({"fits": False, "excess": 0.1}, {"fits": False, "excess": 3.0}, {"fits": False})
    assert worth(good) > worth(near) > worth(far) > worth(broken)
    # Metrics may be below 0, such as the negative squared error.
    poor, poorer, worst = ({"fits": True, "score": score} for score in (-0.5, -5.0, -1e300))
    assert worth(good) > worth(poor) > worth(poorer) > worth(worst) > worth({"fits": False, "excess": 0.0})
    assert [fits({"worth": worth(report)}) for report in (good, poor, worst, near, broken)] == [True] * 3 + [
        False
    ] * 2
    assert not fits(None)


def test_progress_that_cannot_be_pickled_is_told_all_the_same() -> None:
    """Bars on a terminal hold locks, and Ray pickles what it is told to call."""
    told: list[tuple[int, int]] = []
    lock = threading.RLock()

    def progress(done: int, total: int, text: str = "") -> None:
        with lock:
            told.append((done, total))

    shown = PROGRESS.set(progress)
    try:
        callback = pickle.loads(pickle.dumps(_told(4)))
        # The last one has only just ended: Ray tells it before it counts as finished.
        results = (("a", 0.5, True), ("b", -2.0, True), ("c", 0.1, False), ("d", 0.1, False))
        trials = [
            SimpleNamespace(trial_id=name, last_result={"worth": value}, is_finished=lambda done=done: done)
            for name, value, done in results
        ]
        callback.on_trial_complete(1, trials, trials[-1])
    finally:
        PROGRESS.reset(shown)
    assert told == [(2, 4)]


@pytest.mark.slow
def test_records_of_ray_that_were_cut_off_are_put_aside_and_no_policy_is_tried_again(recipe: Path) -> None:
    job = job_of(recipe, trials=2, strategy="random")
    space = policy(job.recipe.passes)
    (job.folder / "tune").mkdir()
    (job.folder / "tune" / "tuner.pkl").touch()  # opened, and killed before anything was written
    tune(job, space)
    first = reports(job.folder)
    assert any(report["fits"] for report in first)
    assert (job.folder / "tune.1" / "tuner.pkl").exists()
    (job.folder / "tune" / "tuner.pkl").write_bytes(b"")
    ages = {path: path.stat().st_mtime_ns for path in job.folder.glob("trials/*/report.json")}
    tune(job, space)
    now = {path: path.stat().st_mtime_ns for path in job.folder.glob("trials/*/report.json")}
    assert {path: now[path] for path in ages} == ages


@pytest.mark.slow
def test_a_policy_that_cannot_be_is_reported_and_the_others_go_on(recipe: Path) -> None:
    job = job_of(recipe, trials=3, strategy="random", budget={"params": "100%"})
    passes = ({"prune": {"ratio": [0.9999, 0.1, 0.2]}}, {"distill": {"epochs": 1}})
    job = type(job)(job.recipe.model_copy(update={"passes": passes}), job.folder)
    tune(job, policy(passes))
    found = reports(job.folder)
    (failed,) = (report for report in found if "error" in report)
    assert "cannot leave 0% of the MACs" in failed["error"]
    assert any(report["fits"] for report in found)


def test_options_that_the_strategy_has_not_are_refused(recipe: Path) -> None:
    job = job_of(recipe, strategy="random", options={"speed": 3})
    with pytest.raises(RecipeError, match=r"tune.options.speed: strategy 'random' takes"):
        tune(job, policy(job.recipe.passes))
