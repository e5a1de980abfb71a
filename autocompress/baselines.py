"""What a search must beat: networks one would pick without searching, at the same budget."""

import itertools

import numpy as np

from autocompress.budget import Constraints
from autocompress.space import Codes, SearchSpace

# EfficientNet's base coefficients; their product of costs, depth * width^2 * resolution^2, is about 2.
COMPOUND = {"depth": 1.2, "width": 1.1, "expand": 1.1, "resolution": 1.15}
COMPOUND_STEPS = 200
MAX_COMPOUND_EXPONENT = 10.0


# Draws of random networks before cells that are cut in two are given up on.
MAX_ROUNDS = 100


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def relative_networks(space: SearchSpace) -> Codes:
    """Return the networks with the same relative setting for every choice, largest first.

    At setting r in 0..1 every choice takes option `round(r * (options - 1))`; all of 0..1 is covered.

    Returns:
        Distinct canonical codes `(n, choices)`.
    """
    # Where some choice takes its next option; between two of these nothing changes.
    changes = {
        (2 * code + 1) / (2 * (count - 1)) for count in space.counts.tolist() for code in range(count - 1)
    }
    settings = np.array(
        [(a + b) / 2 for a, b in itertools.pairwise(sorted({0.0, 1.0, *changes}, reverse=True))]
    )
    codes = np.floor(settings[:, None] * (space.counts - 1) + 0.5).astype(np.int64)
    return _distinct(space.canonical(codes))


def compound_networks(space: SearchSpace) -> Codes:
    """Return the networks that compound scaling of depth, width and resolution passes, largest first.

    From the largest network down, the number at exponent p is `largest * base^-p`, rounded to the nearest
    option, with the bases of Tan & Le, EfficientNet, ICML 2019, section 3.3: depth 1.2, width (or expansion)
    1.1, resolution 1.15. Choices of other kinds (kernels) are the same relative setting everywhere, each
    setting giving a row of networks of its own. Kinds are told by the last part of a choice's name.

    Returns:
        Distinct canonical codes `(n, choices)`; none if nothing in the space can be scaled so.
    """
    scaled = [
        (position, COMPOUND[_kind(choice.name)], np.array(choice.options, dtype=np.float64))
        for position, choice in enumerate(space.choices)
        if _kind(choice.name) in COMPOUND
        and all(isinstance(option, int | float) for option in choice.options)
    ]
    rows = []
    for start in relative_networks(space) if scaled else ():
        for exponent in np.linspace(0, MAX_COMPOUND_EXPONENT, COMPOUND_STEPS):
            row = start.copy()
            for position, base, options in scaled:
                row[position] = int(np.abs(options - options.max() * base**-exponent).argmin())
            rows.append(row)
    if not rows:
        return np.zeros((0, len(space.choices)), dtype=np.int64)
    return _distinct(space.canonical(np.array(rows)))


def bit_networks(space: SearchSpace) -> list[Codes]:
    """Return the networks with one relative setting for all inputs, another for the rest, a family a setting.

    Inputs cost nothing under a limit on size: to scale their bits down with those of the weights would make a
    uniform network that nobody would take. Inputs are choices whose name ends with `.input`.

    Returns:
        Families of distinct canonical codes `(n, choices)`, largest first; none if there are no such choices.
    """
    inputs = np.array([_kind(choice.name) == "input" for choice in space.choices])
    if not inputs.any() or inputs.all():
        return []
    relative = relative_networks(space)
    settings = _distinct(relative[:, inputs])
    families = []
    for setting in settings:
        family = relative.copy()
        family[:, inputs] = setting
        families.append(_distinct(space.canonical(family)))
    return families


def _distinct(codes: Codes) -> Codes:
    _, first = np.unique(codes, axis=0, return_index=True)
    return codes[np.sort(first)]


def uniform_candidates(constraints: Constraints) -> Codes:
    """Return the uniform-scaled networks that fit the budget and that no other of them clearly beats.

    Of each way of scaling (the same relative setting, that of inputs' bits apart; compound scaling at each
    setting of the other choices) that is the one with the greatest use of the budget. Which of these is best
    is for an evaluation to say.

    Returns:
        Distinct canonical codes `(n, choices)`, `n` may be 0 if even the smallest does not fit.
    """
    space = constraints.space
    families = [relative_networks(space), *bit_networks(space)]
    compound = compound_networks(space)
    if len(compound):
        others = [p for p, c in enumerate(space.choices) if _kind(c.name) not in COMPOUND]
        settings = compound[:, others].max(axis=1) if others else np.zeros(len(compound), dtype=np.int64)
        families += [compound[settings == setting] for setting in np.unique(settings)]
    best = []
    for family in families:
        fitting = family[constraints.feasible(family)]
        if len(fitting):
            best.append(fitting[int(constraints.violation(fitting).argmax())])
    return _distinct(np.array(best)) if best else np.zeros((0, len(space.choices)), dtype=np.int64)


def random_networks(constraints: Constraints, n: int, rng: np.random.Generator, *, at_least: float) -> Codes:
    """Draw networks as `Constraints.sample` does, again where the output does not depend on the input.

    Nobody would train a network that is cut in two: beside it, any search looks good.

    Returns:
        Canonical codes `(n, choices)`; networks that are cut in two only where nothing else was drawn.
    """
    space = constraints.space
    drawn = constraints.sample(n, rng, at_least=at_least)
    for _ in range(MAX_ROUNDS):
        cut = [row for row in range(len(drawn)) if not space.connected(drawn[row])]
        if not cut:
            break
        drawn[cut] = constraints.sample(len(cut), rng, at_least=at_least)
    return drawn
