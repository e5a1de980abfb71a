"""A compression policy tuned by Ray Tune: how large the sub-network is, and how it is finetuned.

python examples/tune_policy_with_ray.py           # minutes on 2 cores; killed, it goes on when run again
python examples/tune_policy_with_ray.py --smoke   # checks that it runs

A policy is a point of a search space of its own, priced by the MACs of the sub-network it makes. One of our
strategies proposes policies within the budget, Ray Tune finetunes several at a time and stops the poor ones
early (ASHA), by their accuracy on the validation part. The test part is read once, after everything.
"""

import itertools
import os

# Read by Ray when it is imported or started. Tune would write its state every ten seconds: what ended in the
# last of them before a kill would be done again.
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn

from autocompress import stages
from autocompress.budget import Budget, Constraints
from autocompress.cost import operation_cost
from autocompress.distill.losses import hinton
from autocompress.elastic.supernet import resize
from autocompress.machine import cores
from autocompress.ops import Ops
from autocompress.optuna_bridge import StrategySampler, distributions
from autocompress.recipe import FinetuneSettings, parse_recipe
from autocompress.run import Run, Shown
from autocompress.space import Architecture, Block, Choice, Option, SearchSpace
from autocompress.training.evaluate import Scored, evaluate
from autocompress.training.loop import Position, run_epochs
from strategies.evolution import AgingEvolution

SHAPE = {"resolution": (24, 28, 32), "depth": (2, 3, 4), "kernel": (3, 5), "expand": (3, 4, 6)}
FINETUNING = {
    "temperature": (1.0, 2.0, 4.0, 8.0),
    "alpha": (0.0, 0.3, 0.6, 0.9),
    "learning_rate": (0.005, 0.02, 0.05, 0.1, 0.2),
}
Policy = Mapping[str, Option]
Report = Callable[[int, float], None]
"""Told the epoch, counted from 1, and the validation accuracy after it."""


def network_of(space: SearchSpace, policy: Policy) -> Architecture:
    """Return the sub-network of a policy: the same depth, kernel and width everywhere."""
    return space.architecture(
        {choice.name: policy[choice.name.rpartition(".")[2]] for choice in space.choices}
    )


def operations_of(space: SearchSpace, *shape: Option) -> Ops:
    """Return all operations of the sub-network of a policy, for its price."""
    arch = network_of(space, dict(zip(SHAPE, shape, strict=True)))
    return tuple(op for _, ops in space.operations(space.encode([arch])) for op in ops)


def policy_space(space: SearchSpace) -> SearchSpace:
    """Make the space of policies for the sub-networks of another one."""
    choices = tuple(Choice(name, options) for name, options in {**SHAPE, **FINETUNING}.items())
    return SearchSpace("policy", choices, (Block("network", tuple(SHAPE), partial(operations_of, space)),))


def finetune(
    run: Run, policy: Policy, epochs: int, checkpoint: Path, report: Report = lambda epoch, accuracy: None
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Finetune the sub-network of a policy with distillation, from its checkpoint if there is one.

    Returns:
        The network, and its forward pass on images of any size.
    """
    supernet = stages.train(run, Shown())  # reads the trained one
    arch = network_of(run.space, policy)
    network, size = stages.extract_recalibrated(run, supernet, arch), stages.resolution(run, arch)
    largest = run.space.decode(run.space.largest())[0]
    teacher, its_size = stages.extract_recalibrated(run, supernet, largest), stages.resolution(run, largest)
    settings = FinetuneSettings(epochs=epochs, **{name: policy[name] for name in FINETUNING})
    loss_on_labels = run.task.training_loss(settings.label_smoothing)
    unreported: list[float] = []

    def forward(images: Tensor) -> Tensor:
        return network(resize(images, size))

    def compute(images: Tensor, targets: Tensor, step: int) -> float:
        outputs = forward(images)
        with torch.no_grad():
            target = teacher(resize(images, its_size))
        on_labels = loss_on_labels(outputs, targets)
        distilled = hinton(outputs, target, settings.temperature)
        ((1 - settings.alpha) * on_labels + settings.alpha * distilled).backward()
        return float(on_labels.detach())

    def validate(epoch: int, position: Position) -> None:
        unreported[:] = [score(network, forward, run).mean]
        position.scores.append([epoch + 1, "network", *unreported])

    def before_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
        # The checkpoint of the epoch before is on disk only now.
        if unreported:
            report(epoch, unreported.pop())

    position = run_epochs(
        network, run.data, settings, compute, epochs=epochs,
        identity={"settings": settings.model_dump(mode="json"), "architecture": arch.key},
        checkpoint=checkpoint, validate=validate, before_epoch=before_epoch,
    )  # fmt: skip
    report(epochs, position.scores[-1][2])
    return network.eval(), forward


def score(network: nn.Module, forward: Callable[[Tensor], Tensor], run: Run) -> Scored:
    """Score a network on the validation part, in training or not."""
    training = network.training
    network.eval()
    found = evaluate(forward, run.data.validation, run.task.score)
    network.train(training)
    return found


def trial(policy: dict[str, Any], *, folder: Path, epochs: int) -> None:
    """Finetune by one policy as a trial of Ray Tune, from the last checkpoint that Tune has of it."""
    with tempfile.TemporaryDirectory() as scratch:
        start = tune.get_checkpoint()
        if start is not None:
            with start.as_directory() as saved:
                shutil.copytree(saved, scratch, dirs_exist_ok=True)

        def report(epoch: int, accuracy: float) -> None:
            reached = {"epoch": epoch, "accuracy": accuracy}
            tune.report(reached, checkpoint=tune.Checkpoint.from_directory(scratch))

        finetune(Run(folder), policy, epochs, Path(scratch) / "network.pt", report)


class Printed(tune.Callback):
    """Prints each policy when its trial ends."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print what was tried and how it did."""
        number, last = trial.experiment_tag.partition("_")[0], trial.last_result
        print(
            f"{number:>3s} {trial.config} accuracy {last['accuracy']:.4f} after {last['epoch']} epochs",
            flush=True,
        )


def uniform_policy(budget: Constraints) -> Policy:
    """Return what one would do without tuning: the largest network that fits, and the default finetuning."""
    defaults = {name: getattr(FinetuneSettings(), name) for name in FINETUNING}
    shapes = (dict(zip(SHAPE, shape, strict=True)) for shape in itertools.product(*SHAPE.values()))
    codes = budget.space.encode([budget.space.architecture({**shape, **defaults}) for shape in shapes])
    codes = codes[budget.feasible(codes)]
    largest = int(budget.price(codes)["macs"].argmax())
    return dict(budget.space.decode(codes)[largest].settings)


smoke = "--smoke" in sys.argv
trials, epochs, randoms = (3, 2, 1) if smoke else (16, 9, 3)
recipe = parse_recipe(
    {
        "data": {"source": "digits", "limit": 400 if smoke else None},
        "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny"}},
        "train": {"epochs": 1 if smoke else 12, "learning_rate": 0.2},
        "threads": 1,
    }
)
run = Run(Path("runs/policy-smoke" if smoke else "runs/policy").resolve(), recipe)
stages.train(run, Shown(say=print))  # trains, or goes on, or reads the trained one
policies = policy_space(run.space)
budget = Budget.parse("macs=50%").resolve(policies, [operation_cost(policies, "macs")])
uniform = uniform_policy(budget)

optuna.logging.set_verbosity(optuna.logging.ERROR)
ray.init(
    address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
)
trainable = partial(trial, folder=run.folder, epochs=epochs)
experiment = run.folder / "tune"
if tune.Tuner.can_restore(str(experiment)):
    tuner = tune.Tuner.restore(str(experiment), trainable, resume_errored=True)
    print(f"goes on in {experiment}, where {len(tuner.get_results())} trials were begun")
else:
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                distributions(policies),
                sampler=StrategySampler(budget, AgingEvolution, seed=0, options={"population": 8}),
                points_to_evaluate=[uniform],
                metric="accuracy",
                mode="max",
            ),
            # Of three policies that come so far one goes on; before, a small learning rate looks best.
            scheduler=ASHAScheduler(
                time_attr="epoch", max_t=epochs, grace_period=min(3, epochs), reduction_factor=3
            ),
            metric="accuracy",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=cores(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=experiment.name,
            storage_path=str(run.folder),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[Printed()],
            verbose=0,
        ),
    )
best = tuner.fit().get_best_result()
ray.shutdown()

compared: dict[str, Policy] = {"tuned": best.config, "uniform": uniform}
drawn = policies.decode(budget.sample(randoms, np.random.default_rng(1)))
compared |= {f"random {number}": dict(row.settings) for number, row in enumerate(drawn, start=1)}
networks = {
    name: finetune(run, policy, epochs, run.folder / f"{name}.pt") for name, policy in compared.items()
}
for name, (network, forward) in networks.items():
    macs = float(budget.price(policies.encode([policies.architecture(compared[name])]))["macs"][0])
    validation, test = score(network, forward, run), evaluate(forward, run.data.test, run.task.score)
    low, high = test.interval
    print(
        f"{name:8s} {macs / 1e6:.2f} M MACs, validation {validation.mean:.4f}, "
        f"test {test.mean:.4f} ({low:.4f}-{high:.4f}) {dict(compared[name])}"
    )
print(
    f"{trials} policies were compared on {validation.count} digits, which flatters the tuned one there; on "
    f"{test.count} test digits, differences within the 95 % intervals say nothing."
)
