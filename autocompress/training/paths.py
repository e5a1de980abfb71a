"""Which networks a step of supernet training runs: a function of settings and step, whatever ran before.

Sources: Guo et al., Single Path One-Shot (SPOS), ECCV 2020 (uniform paths); Chu et al., FairNAS, ICCV 2021
(strict fairness); those of `training.supernet` for the others. No path is drawn under a budget: SPOS's code
first draws a bin of FLOPs, all bins equally likely, after which genes are not uniform any more.
"""

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import RecipeError
from autocompress.recipe import Phase, TrainSettings
from autocompress.space import Architecture, Codes, SearchSpace

# One stream of random numbers for each purpose, apart from the others at equal seeds and steps.
SAMPLES, SHUFFLES, ORDERS = 1, 2, 3


def phases_of(space: SearchSpace, settings: TrainSettings) -> list[Phase]:
    """Return the phases of a schedule in order, one for all but progressive shrinking.

    Raises:
        RecipeError: A phase names a choice the space does not have.
    """
    kinds = sorted({choice.name.rpartition(".")[2] for choice in space.choices})
    if settings.schedule == "progressive":
        for phase in settings.phases:
            for name in phase.elastic:
                if name not in kinds:
                    raise RecipeError(
                        f"train.phases: the space has no choices named {name!r}; it has {kinds}"
                    )
        return [Phase(epochs=settings.epochs), *settings.phases]
    if settings.epochs == 0:
        # No phase of a recipe has none.
        return [Phase.model_construct(epochs=0)]
    if settings.schedule != "sandwich":
        return [Phase(epochs=settings.epochs, elastic=tuple(kinds))]
    # Without random networks nothing varies: the sandwich is the largest and the smallest alone.
    varying = tuple(kinds) if settings.random_networks else ()
    return [Phase(epochs=settings.epochs, elastic=varying, networks=max(settings.random_networks, 1))]


def networks_of_step(
    space: SearchSpace, settings: TrainSettings, phase: Phase, step: int
) -> list[Architecture]:
    """Return the networks that take part in the gradient of a step, in the order in which they run.

    Args:
        space: Of the supernet.
        settings: Schedule and seed.
        phase: The phase that the step belongs to.
        step: Optimizer steps done before it.
    """
    if settings.schedule == "fair":
        return space.decode(fair_paths(space, step, seed=settings.seed))
    rng = np.random.default_rng((settings.seed, SAMPLES, step))
    rows = restricted_sample(space, phase.elastic, phase.networks, rng)
    if settings.schedule == "sandwich":
        rows = np.vstack([space.largest(), *([rows] if phase.elastic else []), space.smallest()])
    return space.decode(rows)


def restricted_sample(
    space: SearchSpace, elastic: tuple[str, ...], n: int, rng: np.random.Generator
) -> Codes:
    """Draw networks in which only choices of some kinds vary, uniform over their genes.

    Args:
        space: The space.
        elastic: Last parts of the names of the choices that vary; all others are at their largest.
        n: How many.
        rng: Source of randomness.

    Returns:
        Canonical rows `(n, choices)`.
    """
    codes = (rng.random((n, len(space.choices))) * space.counts).astype(np.int64)
    varies = np.array([choice.name.rpartition(".")[2] in elastic for choice in space.choices])
    return space.canonical(np.where(varies, codes, space.counts - 1))


def fair_paths(space: SearchSpace, step: int, *, seed: int) -> Codes:
    """Draw the paths of one step of strictly fair training.

    What is fair is what is drawn (`fair_draws`). A draw for a choice that the rest of its path leaves without
    effect is lost: the few paths of a step in which a block exists cannot hold all of its options. Choices
    are drawn independently, so each option of a conditional choice is lost equally often in expectation.

    Returns:
        Canonical rows `(most options of a choice, choices)`, each uniform over genes by itself.
    """
    return space.canonical(fair_draws(space.counts, step, seed=seed))


def fair_draws(counts: NDArray[np.int64], step: int, *, seed: int) -> Codes:
    """Draw an option of every choice for each path of a step, every option of a choice equally often.

    Where all choices have m options this is FairNAS, algorithm 1: m paths, for each choice a random
    permutation of the options, so that every option of every choice is drawn exactly once. With different
    numbers of options there are as many paths as the most options of a choice. A choice with fewer deals them
    out in a random order, again and again, across steps; after as many steps as it has options they have come
    out even, and the order is drawn anew. Options of a choice are then drawn equally often up to one in every
    step, equally often up to one in the first k steps for every k, and exactly so when their order changes.

    Args:
        counts: Number of options of each choice, `(choices,)`.
        step: Which step.
        seed: Of the whole training.

    Returns:
        Codes `(max(counts), choices)`, not canonical.
    """
    paths = int(counts.max())
    columns = []
    for position, options in enumerate(counts.tolist()):
        number, inside = divmod(step, options)
        order = np.random.default_rng((seed, ORDERS, position, number)).permutation(options)
        columns.append(order.take(inside * paths + np.arange(paths), mode="wrap"))
    # Which option of one choice meets which of another is left to chance.
    rng = np.random.default_rng((seed, SHUFFLES, step))
    shuffled: Codes = rng.permuted(np.stack(columns, axis=1), axis=0)
    return shuffled
