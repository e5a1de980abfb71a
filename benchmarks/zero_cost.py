"""Zero-cost proxies against published ones and against accuracy, on NAS-Bench-201 and CIFAR-10.

python benchmarks/zero_cost.py [--quick] [--repeats NETWORKS] [--output FILE]

Networks: a random sample (seed 0) of the 725 whose proxies NASLib published; Kendall's tau, with a 95 %
bootstrap interval over the networks. Accuracy: 200 epochs, validation. Every network is initialised under
its own seed here and there, so that agreement of the data-dependent proxy is bounded by its noise.
"""

import csv
import multiprocessing
import os
from functools import lru_cache

import numpy as np
from record import SHARED, Figure, cifar10_folder, parser, report
from scipy.stats import kendalltau

from autocompress.cost import Values
from autocompress.evaluation.zero_cost import NetworkProxy, Proxy, zero_cost_proxy
from autocompress.space import Codes, SearchSpace
from autocompress.training.data import load_data
from autocompress.training.evaluate import calibration_batches
from search_spaces.nas_bench_201 import from_arch_str, nas_bench_201

TABLE = SHARED / "nas_bench_201/zero_cost_proxies_cifar10.csv"
PUBLISHED: dict[Proxy, str] = {"synflow": "synflow", "naswot": "nwot", "params": "params", "macs": "flops"}
IMAGES, DRAWS = 32, 2000


@lru_cache(maxsize=1)
def proxies() -> tuple[SearchSpace, dict[str, NetworkProxy]]:
    """Return the space and the proxies that build networks; made once a process."""
    import torch

    torch.set_num_threads(1)
    space = nas_bench_201()
    data = load_data("cifar10", folder=cifar10_folder(), limit=2000)
    images = calibration_batches(data, IMAGES, seed=0)[0]
    found = {name: zero_cost_proxy(name, space, images=images) for name in ("synflow", "naswot")}
    return space, {name: proxy for name, proxy in found.items() if isinstance(proxy, NetworkProxy)}


def scores(row: Codes) -> list[float]:
    """Return synflow and NASWOT of one network."""
    return [float(proxy(row[None])[name][0]) for name, proxy in proxies()[1].items()]


def tau(first: Values, second: Values) -> tuple[float, float, float]:
    """Return Kendall's tau and its bootstrap interval."""
    rng = np.random.default_rng(0)
    taus = []
    for _ in range(DRAWS):
        rows = rng.integers(len(first), size=len(first))
        taus.append(kendalltau(first[rows], second[rows]).statistic)
    low, high = np.quantile(taus, [0.025, 0.975])
    return float(kendalltau(first, second).statistic), float(low), float(high)


def main() -> None:
    """Score the sample and compare."""
    options = parser((__doc__ or "").splitlines()[0], repeats=300).parse_args()
    if not TABLE.exists():
        raise SystemExit(f"this benchmark needs {TABLE}")
    with TABLE.open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    count = 8 if options.quick else min(options.repeats, len(published))
    sample = [published[i] for i in np.random.default_rng(0).permutation(len(published))[:count]]
    space = nas_bench_201()
    rows = space.encode([from_arch_str(space, line["arch_str"]) for line in sample])
    cifar10_folder()  # before the workers would unpack it all at once
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool() as pool:
        own = dict(zip(("synflow", "naswot"), np.array(pool.map(scores, rows)).T, strict=True))
    own |= {name: zero_cost_proxy(name, space)(rows)[name] for name in ("params", "macs")}
    accuracy = np.array([float(line["val_accuracy_200ep_1seed"]) for line in sample])
    figures = []
    for name, column in PUBLISHED.items():
        theirs = np.array([float(line[column]) for line in sample])
        for title, pair in {
            f"{name}, against the published {column}": (own[name], theirs),
            f"{name}, against accuracy": (own[name], accuracy),
            f"published {column}, against accuracy": (theirs, accuracy),
        }.items():
            value, low, high = tau(*pair)
            figures.append(Figure(title, value, "Kendall tau", low, high))
    settings = {"networks": f"{count} of {len(published)}", "images of NASWOT": IMAGES}
    report("zero_cost", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
