"""Figure 1: how many architectures one core prices a second, against looking them up one at a time.

python benchmarks/pricing.py [--quick] [--output FILE]
"""

import numpy as np
from latency_tables import once_for_all_space, price_of
from record import Figure, parser, rate, report, timed, use_one_core

from autocompress.cost import compile_cost

TARGET_PER_SECOND = 2_000_000


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    use_one_core()
    rows, looked_up = (2_000, 20) if options.quick else (200_000, 1_000)
    space = once_for_all_space()
    price, source = price_of(space)
    compiling = timed(lambda: compile_cost(space, price, "latency_ms"), repeats=1 if options.quick else 3)
    cost = compile_cost(space, price, "latency_ms")
    codes = space.sample(rows, np.random.default_rng(0))

    def one_at_a_time() -> list[float]:
        return [sum(price(ops) for _, ops in space.operations(row)) for row in codes[:looked_up]]

    np.testing.assert_allclose(cost.of(codes[:looked_up]), one_at_a_time(), rtol=1e-9)
    together = timed(lambda: cost.of(codes), repeats=options.repeats)
    apart = timed(one_at_a_time, repeats=options.repeats)
    ratio = (rows / together.median) / (looked_up / apart.median)
    figures = [
        rate("priced by the compiled cost", rows, together, "architectures/s", at_least=TARGET_PER_SECOND),
        Figure(
            "the same by processor time",
            rows / together.processor_median,
            "architectures/s",
            rows / together.processor_median,
            rows / together.processor_median,
        ),
        rate("baseline: build OpSpecs, look up one by one", looked_up, apart, "architectures/s"),
        Figure("ratio to the baseline", ratio, "x", ratio, ratio),
        Figure("compile, once", compiling.median, "s", compiling.least, compiling.greatest),
    ]
    milliseconds = cost.of(codes)
    settings = {
        "space": f"{space.name}, width 1.2, 17 resolutions, {len(space.choices)} choices",
        "networks": f"{space.size:.4g}",
        "latency table": source,
        "latency of the space": f"{cost.minimum:.4g} to {cost.maximum:.4g} ms, random genes median "
        f"{np.median(milliseconds):.4g} ms",
        "rows priced together": rows,
        "rows looked up one by one": looked_up,
        "repeats": options.repeats,
        "threads": 1,
    }
    report("pricing", figures, settings=settings, options=options)


if __name__ == "__main__":
    main()
