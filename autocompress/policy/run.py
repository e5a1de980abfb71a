"""A whole tuning in a run directory: policies are tried, the best is compared on the test part and exported.

`recipe.yaml` (resolved), `inputs.json` (of which weights and data it is), `original.json` (what the network
costs as it was brought), `structures/KEY/` (what each structure costs), `trials/KEY/` (each policy), `tune/`
(Ray's own records), `result.json`, `best/` (the exported network), `report.json` and `report.md` last of all.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autocompress.atomic import read_json, write_json, write_text
from autocompress.distributed.connect import check_cores
from autocompress.distributed.tune import tune
from autocompress.errors import BudgetError, RecipeError, StorageError
from autocompress.export.manifest import MANIFEST
from autocompress.latency.measure import Measurement, measure_networks
from autocompress.latency.runtime import pinned, prepare_onnx
from autocompress.plugins import load_space_factory, load_strategy_for
from autocompress.policy.mildest import is_single
from autocompress.policy.passes import Policy, Setting, apply, is_off, policy_text, structure_of
from autocompress.policy.recipe import PolicyRecipe
from autocompress.policy.trial import (
    REPORT,
    TRIALS,
    WEIGHTS,
    WHOLE,
    Job,
    attempt,
    costs_of,
    key_of,
    limits_of,
    original_costs,
    policy_of,
)
from autocompress.prune.beforehand import describe_score
from autocompress.prune.load import arguments_of
from autocompress.recipe import parsed, read_yaml
from autocompress.result import SearchResult, load_result
from autocompress.run import Shown
from autocompress.space import Architecture, SearchSpace
from autocompress.training.checkpoint import weights_fingerprint
from autocompress.training.evaluate import Scored, evaluate
from autocompress.trial import Outcome, Trial

RESULT, REPORT_PAGE, BEST, INPUTS = "result.json", "report.md", "best", "inputs.json"
ORIGINAL, SINGLE = "as you brought it", "best single pass"
CONFIRMED = 5
"""The best policies that are measured again, together; the first of these that holds the budget is taken."""
LATENCY = "latency_ms"
RANDOM_DRAWS = 50
"""Policies that are drawn at most for the random baseline; what does not fit is not trained."""
COMPARED_RUNS = 200
SAME_LAYERS = ("prune", "distill")
"""Passes after which the network has the layers that it had, with fewer channels."""


@dataclass(frozen=True)
class Session:
    """Latencies of networks that were measured together, interleaved, and of the original.

    Attributes:
        measured: By the key of their structure.
    """

    measured: Mapping[str, Measurement]

    def of(self, policy: Policy) -> Measurement:
        """Return the latency of a policy; of one in which everything is off, the original's."""
        return self.measured[key_of(structure_of(policy))]

    def share(self, policy: Policy) -> float:
        """Return it as share of the original's."""
        return self.of(policy).median_ms / self.of([]).median_ms


def space_of(recipe: PolicyRecipe) -> SearchSpace:
    """Return the space of the policies of a recipe.

    Raises:
        PolicyError: There is no such pass or setting, or nothing may be chosen.
    """
    return load_space_factory("policy")(passes=recipe.passes)


def check(job: Job) -> Job:
    """Refuse what can be refused before anything is measured or written; return the job, all of it loaded.

    Raises:
        AutocompressError: Model, weights, data, task, target, strategy or workers cannot be.
    """
    recipe, settings = job.recipe, job.recipe.tune
    load_strategy_for(settings.strategy, settings.options, key="tune.options.")
    check_cores(settings.workers, recipe.threads, settings.address)
    job.load()
    return job


def begin(folder: Path, recipe: PolicyRecipe) -> Job:
    """Open or start a run directory; to be called with the folder held.

    Raises:
        RecipeError: The folder holds another run, or weights or data are others than when it began.
    """
    import yaml

    path = folder / "recipe.yaml"
    content = recipe.model_dump(mode="json")
    job = check(Job(recipe, folder.resolve()))  # Ray takes a relative path for an address
    inputs = {"weights": weights_fingerprint(job.model), "data": job.data.fingerprint}
    if path.exists():
        # What has been added to recipes since has its default.
        there = parsed(PolicyRecipe, read_yaml(path), f"recipe {path}").model_dump(mode="json")
        if keys := [key for key in content if there[key] != content[key]]:
            raise RecipeError(
                f"{folder} holds a tuning by another recipe: {', '.join(keys)} differ; take another directory"
            )
        before = read_json(folder / INPUTS, StorageError, "inputs of a tuning")
        if keys := [key for key in inputs if before.get(key) != inputs[key]]:
            raise RecipeError(
                f"{folder} holds a tuning with other {' and '.join(keys)}, at the same paths: take another "
                "directory"
            )
    else:
        write_json(folder / INPUTS, inputs)
        write_text(path, yaml.safe_dump(content, sort_keys=False))
    return job


def run_policies(job: Job, shown: Shown) -> dict[str, Any]:
    """Tune, compare and export, from where an earlier call stopped; return the report.

    Raises:
        BudgetError: No policy that was tried fits; names the smallest costs.
        AutocompressError: Something cannot be done; what was finished stays.
    """
    page = job.folder / REPORT
    if page.exists():
        # The test part is not read again, whatever became of the export.
        found: dict[str, Any] = read_json(page, StorageError, "report of a tuning")
        _finish(job, found)
        return found
    space, whole = space_of(job.recipe), original_costs(job)
    limits = limits_of(job)
    brought = evaluate(job.model, job.data.validation, job.task.score)
    for line in describe_score(brought, job.data.in_shape[1:], job.data, job.task):
        shown.say(line)
    shown.say(f"it costs {_costs_text(whole)}; limits: {_costs_text(limits)}")
    with shown.stage("tune policies") as progress:
        tune(job, space, progress)
    path = job.folder / RESULT
    if path.exists():
        # Random policies may have been tried since: they are no trials of the tuning.
        result = load_result(path, space)
    else:
        result = gather(job, space)
        result.save(path)
    counted = {o: sum(t.outcome == o for t in result.trials) for o in Outcome}
    shown.say(
        f"{len(result.trials)} policies: {counted[Outcome.MEASURED]} finetuned to the end, "
        f"{counted[Outcome.INFEASIBLE]} over the budget, {counted[Outcome.FAILED]} that cannot be"
    )
    if why := _failures(result):
        shown.say(why)
    if not result.measured:
        raise BudgetError(_why_none(job, result))
    with shown.stage("random policies under the same budget") as progress:
        drawn = _random(job, space, progress)
    ranked = [_policy(job, trial) for trial in _ranked(result)]
    singles = [policy for policy in ranked if is_single(policy)][:CONFIRMED]
    best = [policy for policy in ranked if policy in ranked[:CONFIRMED] or policy in singles]
    session = measured_together(job, [*best, *drawn])
    policies = {"tuned": _first_that_holds(job, session, best)}
    if singles:
        policies[SINGLE] = _first_that_holds(job, session, singles)
    policies |= {f"random policy {number}": policy for number, policy in enumerate(drawn, start=1)}
    report = compare(job, policies, session)
    write_json(page, report)
    _finish(job, report)
    return report


def _ranked(result: SearchResult) -> list[Trial]:
    """Return the policies that were finetuned, the best first; of equals that of the least latency."""
    return sorted(result.measured, key=lambda t: (-t.metrics[result.objective], t.costs[LATENCY], t.number))


def _first_that_holds(job: Job, session: Session, ranked: Sequence[Policy]) -> Policy:
    """Return the first policy that holds a latency budget in a session of measurements; else the first.

    What held it when it was tried, on a machine that is never quite the same, may not do so again.
    """
    limit = limits_of(job).get(LATENCY, math.inf) / original_costs(job)[LATENCY]
    return next((policy for policy in ranked if session.share(policy) <= limit), ranked[0])


def _finish(job: Job, report: Mapping[str, Any]) -> None:
    """Export the tuned network, and write the report as a page, where that is not done."""
    if not (job.folder / BEST / MANIFEST).exists():
        policy = report["rows"][1]["policy"]
        trials = load_result(job.folder / RESULT, space_of(job.recipe)).measured
        best = next(trial for trial in trials if key_of(_policy(job, trial)) == key_of(policy))
        _export(job, best.architecture, _policy(job, best), report)
    write_text(job.folder / REPORT_PAGE, markdown(report))


def gather(job: Job, space: SearchSpace) -> SearchResult:
    """Return the policies that were tried, in the order in which they ended, without those stopped early."""
    metric = job.task.metric
    trials = []
    paths = sorted(
        (job.folder / TRIALS).glob(f"*/{REPORT}"), key=lambda path: (path.stat().st_mtime_ns, path)
    )
    for number, path in enumerate(paths):
        report = read_json(path, StorageError, "report of a policy")
        scores: dict[str, float] = {}
        outcome = Outcome.FAILED if "error" in report else Outcome.INFEASIBLE
        if report["fits"]:
            outcome = Outcome.MEASURED
            scores = {metric: report["score"], f"{metric}_error": report["standard_error"]}
        arch = space.architecture(_settings(space, report["policy"]))
        trials.append(Trial(number, arch, report.get("costs", {}), scores, outcome, report.get("error", "")))
    described = {"name": space.name, "settings": dict(space.settings), "fingerprint": space.fingerprint}
    return SearchResult(described, metric, limits_of(job), trials, asked=len(trials))


def _settings(space: SearchSpace, policy: Sequence[Any]) -> dict[str, Setting]:
    """Return the choices of a policy, those of passes that are turned off left out."""
    found: dict[str, Setting] = {}
    for choice in space.choices:
        number, _, setting = choice.name.split(".")
        if all(found.get(parent) in allowed for parent, allowed in choice.active_when):
            found[choice.name] = policy[int(number)][1][setting]
    return found


def _why_none(job: Job, result: SearchResult) -> str:
    """Return what to say where no policy was finetuned."""
    limits, priced = limits_of(job), [trial for trial in result.trials if trial.costs]
    text = f"no policy that was tried fits {_costs_text(limits)}"
    if priced:
        least = {metric: min(trial.costs[metric] for trial in priced) for metric in limits}
        text += f"; the smallest seen are {_costs_text(least)}"
        text += "; allow stronger settings in passes or a looser budget, in a new run directory"
    return f"{text}. {_failures(result)}" if _failures(result) else text


def _failures(result: SearchResult) -> str:
    """Return how many policies cannot be, and why most of them; empty where all can."""
    errors = Counter(trial.error for trial in result.trials if trial.error)
    if not errors:
        return ""
    return f"{errors.total()} of {len(result.trials)} cannot be, mostly: {errors.most_common(1)[0][0]}"


def _policy(job: Job, trial: Trial) -> Policy:
    return policy_of(job.recipe, dict(trial.architecture.settings))


def _random(job: Job, space: SearchSpace, progress: Any) -> list[Policy]:
    """Return random policies that fit, each tried: what tuning has to beat."""
    rng = np.random.default_rng([job.recipe.tune.seed, 1])
    wanted = job.recipe.tune.random_policies
    found: dict[str, Policy] = {}
    for row in space.sample(RANDOM_DRAWS, rng):
        if len(found) == wanted:
            break
        (arch,) = space.decode(row[None])
        policy = policy_of(job.recipe, dict(arch.settings))
        if attempt(job, policy)["fits"]:
            found[key_of(policy)] = policy
            progress(len(found), wanted, "")
    return list(found.values())


def network_of(job: Job, policy: Policy) -> nn.Module:
    """Return the network of a policy that was tried, with the weights it ended with.

    Raises:
        StorageError: Its weights are gone or damaged.
    """
    network = apply(job.model, structure_of(policy), job.context())
    path = job.folder / TRIALS / key_of(policy) / WEIGHTS
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StorageError(f"{path} is damaged ({error}); remove its folder, and tune again") from None
    return network.eval()


def measured_together(job: Job, policies: Iterable[Policy]) -> Session:
    """Measure networks of policies that were tried, interleaved beside the original."""
    keys = sorted({key_of(structure_of(policy)) for policy in policies})
    files = {key: job.folder / "structures" / key / "network.onnx" for key in keys}
    files[key_of([])] = job.folder / WHOLE
    with pinned(job.target):
        runs = {key: prepare_onnx(path, job.target) for key, path in files.items()}
        return Session(measure_networks(runs, target=job.target, count=COMPARED_RUNS))


def compare(job: Job, policies: Mapping[str, Policy], session: Session | None = None) -> dict[str, Any]:
    """Score networks on the test part, read once here, beside the original.

    Args:
        job: Their tuning.
        policies: Which were tried, by the names of their rows.
        session: Their latencies; measured here by default.
    """
    session = session or measured_together(job, policies.values())
    rows = []
    for name in (ORIGINAL, *policies):
        policy = policies.get(name, [])
        network = network_of(job, policy) if name in policies else job.model
        costs = costs_of(job, policy) if name in policies else original_costs(job)
        latency = session.of(policy)
        rows.append(
            {
                "name": name,
                "policy": [[key, dict(settings)] for key, settings in policy],
                "costs": costs,
                LATENCY: {"median": latency.median_ms, "low": latency.low_ms, "high": latency.high_ms},
                "validation": _scored(job, network, job.data.validation),
                "test": _scored(job, network, job.data.test),
            }
        )
    return {
        "schema": "autocompress.policy",
        "version": 1,
        "metric": job.task.metric,
        "limits": limits_of(job),
        "rows": rows,
    }


def _scored(job: Job, network: nn.Module, part: Any) -> dict[str, Any]:
    found: Scored = evaluate(network, part, job.task.score)
    low, high = found.interval
    return {"mean": found.mean, "low": low, "high": high, "count": found.count}


def _export(job: Job, arch: Architecture, policy: Policy, report: Mapping[str, Any]) -> None:
    from autocompress.export.export import export_network
    from autocompress.stages.exporting import QUANTIZED_SAMPLE, preprocessing
    from autocompress.training.data import batches

    network = network_of(job, policy)
    export_network(
        network,
        architecture=arch,
        blocks=[],
        in_shape=job.data.in_shape,
        folder=job.folder / BEST,
        preprocessing=preprocessing(job.data, job.data.in_shape[1:]),
        formats=("onnx", "torch_export", "safetensors"),
        origin=_origin(job, policy),
        sample=next(batches(job.data.validation, QUANTIZED_SAMPLE, seed=None))[0],
        extra={"policy": [[n, dict(s)] for n, s in policy], "costs": dict(report["rows"][1]["costs"])},
    )


def _origin(job: Job, policy: Policy) -> dict[str, Any] | None:
    """Return how the model is made again; `None` if a policy leaves other layers than its factory makes."""
    if any(name not in SAME_LAYERS and not is_off(name, settings) for name, settings in policy):
        return None
    data, recipe = job.data, job.recipe
    channels = data.in_shape[0]
    given = arguments_of(recipe.model, recipe.arguments, classes=data.classes or None, in_channels=channels)
    return {"model": recipe.model, "arguments": given}


def markdown(report: Mapping[str, Any]) -> str:
    """Return a report as a page."""
    metric, rows = report["metric"], report["rows"]
    lines = [
        "# A compression policy",
        "",
        f"Budget: {_costs_text(report['limits'])}. Latencies are medians of runs interleaved in one session, "
        f"also in percent of that of the network as you brought it; {metric} on the test part, read once, "
        "with its 95 % interval.",
        "",
        f"| | {metric}, test | validation | latency, ms | % | MACs, M | parameters, k | ONNX, kB | policy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        test, costs, latency = row["test"], row["costs"], row["latency_ms"]
        cells = [
            row["name"],
            f"{test['mean']:.4f} ({test['low']:.4f} to {test['high']:.4f})",
            f"{row['validation']['mean']:.4f}",
            f"{latency['median']:.3f} ({latency['low']:.3f} to {latency['high']:.3f})",
            f"{100 * _share(report, row):.1f}",
            f"{costs['macs'] / 1e6:.2f}",
            f"{costs['params'] / 1e3:.1f}",
            f"{costs['size_bytes'] / 1e3:.1f}",
            policy_text(row["policy"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(line for note in _notes(report) for line in ("", note)), ""])


def _share(report: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Return the latency of a row in the final session as share of the original's."""
    return float(row["latency_ms"]["median"] / report["rows"][0]["latency_ms"]["median"])


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table should not overlook."""
    first, tuned, *others = report["rows"]
    notes = []
    for other in others:
        if key_of(other["policy"]) == key_of(tuned["policy"]):
            notes.append(f"The tuned policy is the {other['name']}.")
        elif other["validation"]["mean"] > tuned["validation"]["mean"]:
            notes.append(
                f"**The {other['name']} is better on validation than the tuned policy: take more trials.**"
            )
    if not any(row["name"] == SINGLE for row in others):
        notes.append("No pass alone was tried that fits the budget.")
    if _share(report, tuned) >= 1:
        notes.append("**The tuned network is no faster than the one you brought.**")
    now, then = _share(report, tuned), tuned["costs"][LATENCY] / first["costs"][LATENCY]
    limit = report["limits"].get(LATENCY, math.inf) / first["costs"][LATENCY]
    if now > limit:
        notes.append(
            f"**Measured again, the tuned network takes {100 * now:.1f} % of the original's latency, above "
            f"the budget of {100 * limit:.1f} %, and so do the next best; when tried, {100 * then:.1f} %.** "
            "Leave this machine alone while it measures, take more `tune.runs`, or a tighter budget."
        )
    return notes


def _costs_text(costs: Mapping[str, float]) -> str:
    return ", ".join(f"{metric} {value:.6g}" for metric, value in costs.items())
