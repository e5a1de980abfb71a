"""A tuning in its run directory: what was tried stays what was tried, whatever comes after it."""

from pathlib import Path

import pytest
from policy.test_trial import job_of, recipe

from autocompress.policy.run import run_policies
from autocompress.policy.trial import Job, policy_of, try_policy
from autocompress.run import Shown

__all__ = ["recipe"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_random_policies_are_no_trials_of_a_tuning_that_was_stopped_after_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(recipe, random_policies=2)

    def tune(job: Job, *_: object) -> None:
        try_policy(job, policy_of(job.recipe, {"0.prune.ratio": 0.4}))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.policy.run.tune", tune)
    with monkeypatch.context() as patch:
        patch.setattr("autocompress.policy.run.compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_policies(job, Shown())
    before = (job.folder / "result.json").read_bytes()
    assert len(list(job.folder.glob("trials/*/report.json"))) > 1
    report = run_policies(job, Shown())
    assert (job.folder / "result.json").read_bytes() == before
    assert [row["name"] for row in report["rows"]][:2] == ["as you brought it", "tuned"]
