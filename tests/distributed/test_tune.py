"""Policies on Ray Tune: as many as were asked for, none twice, whatever fails is isolated."""

import json
from pathlib import Path
from typing import Any

import pytest
from policy.test_trial import job_of, recipe

from autocompress.distributed.tune import tune, worth
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
