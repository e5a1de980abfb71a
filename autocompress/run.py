"""A run directory: everything of one run, each stage whole or resumable.

`recipe.yaml` (resolved), `environment.json` (when it was begun), `latency_table.json`, `supernet.pt`,
`trials.log` (an Optuna journal), `result.json`, `networks/KEY-SETTINGS/` for each network that was
finetuned and exported, `report.json` and `report.md`; `searches/N/` for searches that a later one put aside.
"""

import hashlib
import inspect
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress import __version__
from autocompress.atomic import locked, read_json, remove_leftovers, write_json, write_text
from autocompress.errors import RecipeError, SpaceError, StorageError
from autocompress.plugins import load_space_factory, load_strategy, load_strategy_for
from autocompress.progress import Progress, silent
from autocompress.recipe import Recipe, load_recipe, with_absolute_paths
from autocompress.space import Architecture, SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

    from autocompress.strategy import Strategy
    from autocompress.training.data import DataSet
    from autocompress.training.task import Loss, Task

SAMPLE_BATCH, SAMPLE_BATCHES = 64, 8
"""Training images that a space may look at, to see which channels of a model matter."""
SEARCHED = ("trials.log", "result.json")
# What says that a stage has begun: its part of the recipe can be changed until then.
BEGUN = {
    "profile": ("latency_samples.jsonl", "latency_table.json"),
    "train": ("supernet.pt",),
    "search": SEARCHED,
    # Networks have a folder for each setting of these, and an export of other formats replaces the last one.
    "quantize": (),
    "finetune": (),
    "export": (),
    "random_networks": ("networks",),
}

VERSIONED = ("torch", "numpy", "scipy", "optuna", "onnx", "onnxruntime", "scikit-learn")


@contextmanager
def _silent_stage(title: str) -> Iterator[Progress]:
    yield silent


@dataclass
class Shown:
    """How stages show themselves; the default shows nothing.

    Attributes:
        stage: Opens a stage of this title and gives its progress.
        say: Shows a line.
    """

    stage: Callable[[str], AbstractContextManager[Progress]] = _silent_stage
    say: Callable[[str], None] = lambda text: None


class Run:
    """A run directory with its recipe; data, task and space are loaded when first asked for.

    Args:
        folder: The directory, made if absent.
        recipe: What to do; `None` continues the run that is there. It may differ from the one that is there
            in the settings of stages that have not begun.

    Raises:
        RecipeError: There is no recipe, or the directory holds another one.
        StorageError: The directory cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe | None = None) -> None:
        """Open or start the run."""
        self.folder = folder
        path = folder / "recipe.yaml"
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"a run needs a directory, but {folder} is a file")
        if recipe is None:
            if not path.exists():
                raise RecipeError(
                    f"{folder} holds no run (no recipe.yaml); start one with `autocompress run RECIPE`"
                )
            recipe = load_recipe(path)
        else:
            recipe = with_absolute_paths(recipe, Path.cwd())
            if not path.exists() or load_recipe(path) != recipe:
                strategy_factory(recipe)  # a directory is not started with a recipe that cannot run
                with self.locked():
                    if path.exists():
                        refuse_other(folder, load_recipe(path), recipe)
                    else:
                        write_json(folder / "environment.json", environment())
                    _write_recipe(path, recipe)
        self.recipe = recipe

    @cached_property
    def data(self) -> "DataSet":
        """The data set."""
        return load_recipe_data(self.recipe)

    @cached_property
    def task(self) -> "Task":
        """Losses and metric."""
        from autocompress.training.task import load_task

        return load_task(self.recipe.task)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, made for the channels and classes of the data unless the recipe says otherwise.

        Raises:
            RecipeError: The space's constructor does not take an argument of the recipe.
        """
        return make_space(self.recipe, lambda: self.data)

    @cached_property
    def supernet_space(self) -> SearchSpace:
        """The space of the supernet: that of the run, or with `train.proxy` the same choices in another size.

        Raises:
            RecipeError: There is a proxy, and the strategy trains no mixture; or it takes no such argument.
            SpaceError: The proxy has other choices.
        """
        return self.smaller({}) if self.recipe.train.proxy else self.space

    def smaller(self, settings: Mapping[str, Any]) -> SearchSpace:
        """Return the space of the supernet with other arguments, and the same choices."""
        proxy = self.recipe.train.proxy
        if proxy and not is_differentiable(self.recipe):
            raise RecipeError(
                f"train.proxy ({proxy}) belongs to strategies by gradients, which train anew what they find; "
                f"{self.recipe.search.strategy!r} returns a slice of the supernet: leave it out"
            )
        merged = {**proxy, **settings}
        made = make_space(self.recipe, lambda: self.data, merged, key="train.proxy")
        if (made.choices, made.edges) != (self.space.choices, self.space.edges):
            raise SpaceError(
                f"space {made.name!r} with {merged} has other choices than the space of the run: a supernet "
                "can differ from it in size only"
            )
        return made

    def path(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.folder / name

    def network_folder(self, arch: Architecture) -> Path:
        """Return the folder of one network of the run, finetuned as the recipe says.

        With other settings it is another folder: nothing is lost, and who goes back to them finds it again.
        """
        recipe = self.recipe
        settings = {
            "finetune": recipe.finetune.model_dump(mode="json"),
            "quantize": recipe.quantize.model_dump(mode="json"),
            # Statistics of batch norm are computed on these images.
            "calibration": [recipe.search.calibration_images, recipe.search.seed],
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / "networks" / f"{arch.key}-{digest}"

    def read(self, name: str) -> Any:
        """Read a JSON file of the run.

        Raises:
            StorageError: It is absent or damaged.
        """
        return read_json(self.folder / name, _made_again, "file of the run")

    def put_search_aside(self) -> Path | None:
        """Move what the search left, and the comparisons that stand on it, into `searches/N`.

        Supernet, table, finetuned and exported networks stay; a new search can have other settings.

        Returns:
            Where it went; `None` if there was no search.
        """
        left = [self.path(name) for name in (*SEARCHED, "selected.json", "report.md")]
        left = [path for path in left if path.exists()]
        if not left:
            return None
        number = 1
        while (folder := self.path("searches") / str(number)).exists():
            number += 1
        write_text(folder / "recipe.yaml", self.path("recipe.yaml").read_text(encoding="utf-8"))
        for report in self.folder.glob("networks/*/report.json"):
            report.replace(folder / f"report-{report.parent.name}.json")
        # The result last: without it, and only then, another search begins.
        for path in sorted(left, key=lambda path: path.name == "result.json"):
            path.replace(folder / path.name)
        return folder

    def take_search_back(self, number: int) -> Path | None:
        """Undo `put_search_aside`: put the present search aside, and a former one in its place.

        Args:
            number: Of the folder in `searches`.

        Returns:
            Where the present search went; `None` if there was none.

        Raises:
            RecipeError: There is no such search.
        """
        folder = self.path("searches") / str(number)
        if not (folder / "recipe.yaml").exists():
            there = sorted(int(p.name) for p in self.path("searches").glob("*") if p.name.isdigit())
            raise RecipeError(f"{folder} holds no search; there are {there or 'none'} in {folder.parent}")
        former = load_recipe(folder / "recipe.yaml")
        aside = self.put_search_aside()
        settings = {key: getattr(former, key) for key in ("search", "random_networks")}
        self.recipe = self.recipe.model_copy(update=settings)
        _write_recipe(self.path("recipe.yaml"), self.recipe)
        for report in folder.glob("report-*.json"):
            report.replace(self.path("networks") / report.stem.removeprefix("report-") / "report.json")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "result.json"):
            if path.name != "recipe.yaml":
                path.replace(self.path(path.name))
        (folder / "recipe.yaml").unlink()
        folder.rmdir()
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            StorageError: Another process is working on it, or the directory cannot be written.
        """
        busy = (
            f"another process is working on {self.folder}: wait until it ends, or stop it and go on with "
            "`autocompress resume`"
        )
        with locked(self.folder, busy):
            for folder in (self.folder, *self.folder.glob("networks/*")):
                remove_leftovers(folder)
            yield


def _made_again(message: str) -> StorageError:
    return StorageError(f"{message}; remove it, and its stage makes it again")


def trains_anew(recipe: Recipe) -> bool:
    """Whether what the strategy finds is no slice that was trained: then it is trained anew."""
    sliced = hasattr(load_strategy(recipe.search.strategy), "taught_gates")  # `differentiable.Sandwiched`
    return is_differentiable(recipe) and not sliced


def is_differentiable(recipe: Recipe) -> bool:
    """Whether the strategy of a recipe is trained together with the supernet."""
    return hasattr(load_strategy(recipe.search.strategy), "architecture_step")


def strategy_factory(recipe: Recipe) -> Callable[..., "Strategy"]:
    """Return what makes the strategy of a recipe; also a check that can be made before any work.

    Raises:
        PluginError: There is no such strategy, or it is none.
        RecipeError: It does not take an option of the recipe.
    """
    return load_strategy_for(recipe.search.strategy, recipe.search.options, key="search.options.")


def load_recipe_data(recipe: Recipe) -> "DataSet":
    """Load the data set of a recipe.

    Raises:
        DataError: It is absent, damaged, or too small for what the recipe asks.
    """
    from autocompress.training.data import load_data_of

    return load_data_of(recipe.data)


def make_space(
    recipe: Recipe,
    data: Callable[[], "DataSet"],
    others: Mapping[str, Any] | None = None,
    *,
    key: str = "space.arguments",
) -> SearchSpace:
    """Make the search space of a recipe.

    Args:
        recipe: Names it and its arguments.
        data: Asked for channels, classes and images if the constructor takes them and the recipe leaves
            them open.
        others: Arguments instead of those of the recipe.
        key: What errors call the arguments.

    Raises:
        RecipeError: The constructor does not take an argument of the recipe.
        PluginError: There is no such space.
    """
    factory = load_space_factory(recipe.space.name)
    parameters = inspect.signature(factory).parameters
    arguments = {**recipe.space.arguments, **(others or {})}
    for name in arguments:
        if name not in parameters:
            allowed = ", ".join(parameters)
            raise RecipeError(f"{key}.{name}: {recipe.space.name} takes {allowed}, not {name!r}")
    if "in_channels" in parameters and "in_channels" not in arguments:
        arguments["in_channels"] = data().in_shape[0]
    if "image" in parameters and "image" not in arguments:
        arguments["image"] = list(data().in_shape)
    if "target" in parameters and "target" not in arguments:
        arguments["target"] = recipe.target.name
    if "calibration" in parameters:
        arguments["calibration"] = _calibration(data(), recipe.search.seed)
    if "sample" in parameters:
        arguments["sample"] = lambda: _sample(recipe, data())
    if "classes" in parameters and "classes" not in arguments:
        arguments["classes"] = data().classes or _outputs(data())
    try:
        space = factory(**arguments)
    except TypeError as error:
        raise RecipeError(f"{key}: {recipe.space.name} refuses {arguments}: {error}") from None
    if not isinstance(space, SearchSpace):
        raise RecipeError(f"space.name: {recipe.space.name} must return a SearchSpace, got {space!r}")
    return space


def _sample(recipe: Recipe, data: "DataSet") -> "tuple[list[tuple[Tensor, Tensor]], Loss]":
    """Return some training images with their targets, in evaluation order, and the loss of the task."""
    from autocompress.training.data import batches
    from autocompress.training.task import load_task

    some = itertools.islice(batches(data.train, SAMPLE_BATCH, seed=recipe.search.seed), SAMPLE_BATCHES)
    return list(some), load_task(recipe.task).training_loss(0.0)


def _calibration(data: "DataSet", seed: int) -> "Iterator[Tensor]":
    """Yield training images, not augmented, in batches; loaded as they are asked for."""
    from autocompress.training.data import batches

    return (images for images, _ in batches(data.train, SAMPLE_BATCH, seed=seed))


def _outputs(data: "DataSet") -> int:
    """Return how many numbers a target has, for data whose targets are no classes.

    Raises:
        RecipeError: Targets are not vectors: what the network must give is for the recipe to say.
    """
    _, target = data.train[0]
    shape = tuple(getattr(target, "shape", ()))
    if len(shape) > 1:
        raise RecipeError(
            f"space.arguments.classes must say how many outputs the network has: targets have shape {shape}"
        )
    return int(shape[0]) if shape else 1


def environment() -> dict[str, Any]:
    """Return what a reader must know of the machine and the versions."""
    return {
        "autocompress": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in VERSIONED},
    }


def _write_recipe(path: Path, recipe: Recipe) -> None:
    import yaml

    payload = recipe.model_dump(mode="json")
    write_text(path, yaml.safe_dump(payload, sort_keys=False))


def refuse_other(folder: Path, there: Recipe, here: Recipe, *, again: tuple[str, ...] = ()) -> None:
    """Refuse a recipe that differs from the one of a run in the settings of a stage that has begun.

    Args:
        folder: The run directory.
        there: Its recipe.
        here: The other recipe.
        again: Stages that are about to begin anew.

    Raises:
        RecipeError: It does; names up to five keys.
    """
    # As they stand in files: a tuple and a list of arguments are the same there.
    first, second = (_flat(recipe.model_dump(mode="json")) for recipe in (there, here))
    keys = []
    for key in sorted(key for key in {*first, *second} if first.get(key) != second.get(key)):
        stage = key.partition(".")[0]
        # What all stages share, data and space above all, is settled by the first of them.
        files = BEGUN.get(stage, [name for names in BEGUN.values() for name in names])
        begun = any((folder / name).exists() for name in files)
        if begun and stage not in again:
            keys.append(key)
    if not keys:
        return
    shown = "; ".join(
        f"{key} is {first.get(key, 'not set')} there, {second.get(key, 'not set')} here" for key in keys[:5]
    )
    way_out = f"take another directory, or continue that run with `autocompress resume {folder}`"
    if all(key.startswith("search.") for key in keys):
        way_out += f", or search its supernet anew with `autocompress search --run {folder} --again`"
    raise RecipeError(f"{folder} holds a run of another recipe: {shown}; {way_out}")


def _flat(payload: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(payload, dict):
        return {prefix: json.dumps(payload)}
    result: dict[str, Any] = {}
    for key, value in payload.items():
        result.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return result
