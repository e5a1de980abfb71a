"""A run directory: everything of one run, each stage whole or resumable.

`recipe.yaml` (resolved), `environment.json` (when it was begun), `latency_table.json`, `supernet.pt`,
`trials.log` (an Optuna journal), `result.json`, `networks/KEY-SETTINGS/` for each network that was
finetuned and exported, with its `report-SEARCH.json`, and `report.md`; `kept/STAGE-SETTINGS/` for what stages
made with former settings.
"""

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

from autocompress import __version__, kept
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
PROBLEM = ("data", "task", "space")
"""What a run directory is about: another one is another directory."""

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
        recipe: What to do; `None` continues the run that is there. Where its settings of a stage differ from
            those that the run was made with (`former`), what they made is put aside (`aside`: stage and
            folder), and found again when they come back.

    Raises:
        RecipeError: There is no recipe, or the directory holds one of another problem.
        StorageError: The directory cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe | None = None) -> None:
        """Open or start the run."""
        self.folder = folder
        self.aside: dict[str, Path] = {}
        self.former: Recipe | None = None
        path = folder / "recipe.yaml"
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"a run needs a directory, but {folder} is a file")
        written = load_recipe(path) if path.exists() else None
        if recipe is not None:
            recipe = with_absolute_paths(recipe, Path.cwd())
        elif written is None:
            raise RecipeError(
                f"{folder} holds no run (no recipe.yaml); start one with `autocompress run RECIPE`"
            )
        else:
            recipe = written
        self.recipe = recipe
        if self.recipe != written:
            strategy_factory(self.recipe)  # a directory is not started with a recipe that cannot run
        wanted = digests(self.recipe)
        if self.recipe != written or not kept.settled(folder, wanted):
            with self.locked():
                if written is None:
                    write_json(folder / "environment.json", environment())
                else:
                    refuse_other(folder, written, self.recipe)
                self.aside = kept.settle(folder, wanted)
                if self.recipe != written:
                    self.former = written
                    _write_recipe(path, self.recipe)

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
            "train": digests(recipe)["train"],
        }
        return self.folder / "networks" / f"{arch.key}-{kept.digest(settings)}"

    def report_path(self, arch: Architecture) -> Path:
        """Return the path of the comparison of one network with those that its search is compared with."""
        compared = [digests(self.recipe)["search"], self.recipe.random_networks, self.recipe.passes]
        return self.network_folder(arch) / f"report-{kept.digest(compared)}.json"

    def read(self, name: str) -> Any:
        """Read a JSON file of the run.

        Raises:
            StorageError: It is absent or damaged.
        """
        return read_json(self.folder / name, _made_again, "file of the run")

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


def digests(recipe: Recipe) -> dict[str, str]:
    """Return a digest of the inputs of every stage; data, task and space are those of the directory.

    Raises:
        PluginError: There is no such space, or no such strategy.
    """
    profile = kept.digest([_plain(recipe.target), _plain(recipe.profile)])
    search = _plain(recipe.search)
    del search["address"]  # where, not what
    train: list[Any] = [_plain(recipe.train), recipe.threads]
    if is_differentiable(recipe):
        # The supernet is trained for one search.
        train += [profile, search]
    elif _looks_at_images(recipe):
        train += [recipe.search.seed]
    found = {"profile": profile, "train": kept.digest(train)}
    if recipe.search.reward == "distilled":
        search["finetune"] = recipe.finetune.model_dump(mode="json", exclude={"epochs"})
    return {**found, "search": kept.digest([found, search])}


def _looks_at_images(recipe: Recipe) -> bool:
    """Whether the space is made with training images, which the seed of the search draws."""
    parameters = inspect.signature(load_space_factory(recipe.space.name)).parameters
    return bool({"calibration", "sample"} & set(parameters))


def _plain(settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = settings.model_dump(mode="json")
    return plain


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


def refuse_other(folder: Path, there: Recipe, here: Recipe) -> None:
    """Refuse a recipe of another problem than that of a run which has begun.

    Raises:
        RecipeError: It is; names up to five keys.
    """
    # As they stand in files: a tuple and a list of arguments are the same there.
    first, second = (_flat(recipe.model_dump(mode="json", include={*PROBLEM})) for recipe in (there, here))
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    files = ["networks", kept.KEPT, *(name for names in kept.FILES.values() for name in names)]
    if not keys or not any((folder / name).exists() for name in files):
        return
    shown = "; ".join(
        f"{key} is {first.get(key, 'not set')} there, {second.get(key, 'not set')} here" for key in keys[:5]
    )
    raise RecipeError(
        f"{folder} holds a run of another problem: {shown}; take another directory, or continue that run "
        f"with `autocompress resume {folder}`"
    )


def _flat(payload: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(payload, dict):
        return {prefix: json.dumps(payload)}
    result: dict[str, Any] = {}
    for key, value in payload.items():
        result.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return result
