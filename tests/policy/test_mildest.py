"""Single passes: the mildest that fits, found by bisection, the others off."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from policy.test_trial import job_of, recipe

from autocompress.errors import PolicyError
from autocompress.policy.mildest import is_single, mildest_policies
from autocompress.policy.passes import Policy, is_off, policy_text
from autocompress.policy.trial import Job, policy_of

__all__ = ["recipe"]
pytestmark = pytest.mark.usefixtures("one_thread")

PASSES: list[dict[str, Any]] = [
    {"prune": {"criterion": ["l2", "taylor"], "ratio": [0.8, 0.0, 0.2, 0.6, 0.4]}},
    {"factorize": {"method": ["none", "svd", "tucker"], "ratio": [0.25, 0.75, 0.5]}},
    {"quantize": {"bits": [32, 4, 8]}},
    {"distill": {"epochs": [0, 2], "learning_rate": [0.1, 0.2]}},
]
KINDS = {"svd": 1.05, "tucker": 0.95}
LIMIT = 0.5


def priced(
    recipe: Path, passes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Job, list[Policy]]:
    """Return a job whose policies cost what each pass leaves of 1, and the policies that are priced."""
    payload = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(payload | {"passes": passes}))
    asked: list[Policy] = []

    def costs_of(job: Job, policy: Policy) -> dict[str, float]:
        asked.append(policy)
        left = 1.0
        for name, settings in policy:
            given: dict[str, Any] = dict(settings)
            if name == "prune":
                left *= 1 - given["ratio"]
            elif name == "factorize" and given["method"] != "none":
                left *= given["ratio"] * KINDS[given["method"]]
            elif name == "quantize":
                left *= given["bits"] / 32
        return {"macs": left}

    monkeypatch.setattr("autocompress.policy.mildest.costs_of", costs_of)
    monkeypatch.setattr("autocompress.policy.trial.limits_of", lambda job: {"macs": LIMIT})
    return job_of(recipe), asked


def test_each_pass_is_alone_and_as_mild_as_fits(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, asked = priced(recipe, PASSES, monkeypatch)
    policies = [dict(policy_of(job.recipe, chosen)) for chosen in mildest_policies(job)]
    assert [
        [(name, settings) for name, settings in policy.items() if not is_off(name, settings)]
        for policy in policies
    ] == [
        [(name, settings), ("distill", {"epochs": 2, "learning_rate": 0.1})]
        for name, settings in (
            ("prune", {"criterion": "l2", "ratio": 0.6}),  # .5 is not among the options
            ("factorize", {"method": "tucker", "ratio": 0.5}),  # svd takes 1.05 times that: too much
            ("quantize", {"bits": 8}),
        )
    ]
    assert all(is_single(list(policy.items())) for policy in policies)
    assert len({policy_text(policy) for policy in asked}) < 4 + 6 + 2  # not all that there are


def test_a_pass_that_never_fits_or_cannot_be_is_left_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [{"prune": {"ratio": [0.0, 0.1]}}, {"quantize": {"bits": [32, 8]}}, {"distill": {"epochs": 1}}]
    job, _ = priced(recipe, passes, monkeypatch)
    assert mildest_policies(job) == [{"0.prune.ratio": 0.0, "1.quantize.bits": 8}]

    def broken(job: Job, policy: Policy) -> dict[str, float]:
        raise PolicyError("cannot be")

    monkeypatch.setattr("autocompress.policy.mildest.costs_of", broken)
    assert mildest_policies(job) == []


@pytest.mark.parametrize("most", [0.3, 0.5, 0.7])
def test_settings_too_strong_to_be_made_do_not_hide_those_that_fit(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    passes = [{"prune": {"ratio": [0.0, 0.2, 0.4, 0.55, 0.6, 0.8, 0.9]}}, {"distill": {"epochs": 1}}]
    job, _ = priced(recipe, passes, monkeypatch)

    def limited(job: Job, policy: Policy) -> dict[str, float]:
        if float(dict(policy)["prune"]["ratio"]) > most:
            raise PolicyError("pruning cannot leave so little")
        return {"macs": (1 - float(dict(policy)["prune"]["ratio"])) / 1.2}

    monkeypatch.setattr("autocompress.policy.mildest.costs_of", limited)
    assert mildest_policies(job) == ([] if most < 0.4 else [{"0.prune.ratio": 0.4}])


def test_where_no_pass_fits_alone_the_others_are_added_to_the_nearest(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [
        {"prune": {"ratio": [0.0, 0.2, 0.3, 0.4]}},
        {"factorize": {"method": ["none", "tucker"], "ratio": [0.6, 0.8]}},
        {"distill": {"epochs": 1}},
    ]
    job, _ = priced(recipe, passes, monkeypatch)
    # Factorization leaves .57, pruning .6: the former is kept. With a fifth pruned away it leaves .456.
    assert mildest_policies(job) == [
        {"0.prune.ratio": 0.2, "1.factorize.method": "tucker", "1.factorize.ratio": 0.6}
    ]
    monkeypatch.setattr("autocompress.policy.trial.limits_of", lambda job: {"macs": 0.1})
    assert mildest_policies(job) == []


def test_what_cannot_be_turned_off_stays_and_what_is_fixed_is_no_choice(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [
        {"prune": {"ratio": 0.3}},
        {"factorize": {"method": "svd", "ratio": [0.25, 0.75]}},
        {"quantize": {"bits": [32, 8]}},
        {"distill": {"epochs": 1}},
    ]
    job, _ = priced(recipe, passes, monkeypatch)
    assert mildest_policies(job) == [
        {"1.factorize.ratio": 0.25, "2.quantize.bits": 32},
        {"1.factorize.ratio": 0.25, "2.quantize.bits": 8},
    ]
