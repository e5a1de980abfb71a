"""From data and a budget to an exported network, as Python: every stage is a function.

python examples/01_quickstart.py           # two minutes on 2 cores
python examples/01_quickstart.py --smoke   # checks that it runs
"""

import sys
from pathlib import Path

from autocompress import stages
from autocompress.describe import describe_costs
from autocompress.recipe import parse_recipe
from autocompress.run import Run, Shown

smoke = "--smoke" in sys.argv
recipe = parse_recipe(
    {
        "data": {"source": "digits"},
        "space": {"name": "mobilenet_v3", "arguments": {"preset": "tiny"}},
        "train": {"epochs": 1 if smoke else 20, "learning_rate": 0.2},
        "profile": {"max_rounds": 4, "min_rounds": 4} if smoke else {},
        "search": {
            # Four rounds of measuring are too few for a budget on latency.
            "budget": {"macs": "2M"} if smoke else {"latency_ms": "60%", "macs": "2M"},
            "evaluations": 12 if smoke else 80,
        },
        "finetune": {"epochs": 1 if smoke else 10},
        "export": {"formats": ["safetensors"] if smoke else ["onnx", "torch_export", "safetensors"]},
    }
)
run, shown = Run(Path("runs/quickstart"), recipe), Shown(say=print)

table = stages.profile(run, shown)  # measures this machine, or reads what was measured
supernet = stages.train(run, shown)  # trains, or goes on, or reads the trained one
result = stages.search(run, shown)

best = result.best()
print("best:", describe_costs(best.costs), best.metrics)
print("Pareto front:", [(t.costs["latency_ms"], t.metrics["accuracy"]) for t in result.pareto()])
print(result.to_frame()[["key", "outcome", "latency_ms", "macs", "accuracy"]].head())

network, scored = stages.finetune(run, shown, best.architecture)
print(f"finetuned: {scored.mean:.4f} on {scored.count} held-out images, 95 % interval {scored.interval}")
print("exported to", stages.export(run, shown, best.architecture))
