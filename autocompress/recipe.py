"""Recipes: everything a run needs to know, read from YAML; the stages take its parts as their settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autocompress.budget import Budget, limits_of
from autocompress.errors import RecipeError

Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
# Not strict: YAML reads 3e-5 as text, only 3.0e-5 as a number.
Fraction = Annotated[float, Field(ge=0, le=1)]
Address = Annotated[str, Field(pattern=r"^(auto|[^\s/:]+:\d{1,5})$")]
"""Of a Ray cluster."""
_Kind = TypeVar("_Kind", bound=BaseModel)


def default_budget() -> dict[str, float | str]:
    """Return the budget of those who name none."""
    return {"latency_ms": "60%"}


class Settings(BaseModel):
    """A part of a recipe: frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must not be true or false, which is also how YAML reads yes, no, on and off")
        return value


class DataSettings(Settings):
    """Which data set, and how much of its training part is held out."""

    source: str = "digits"
    """`digits`, `fashion_mnist`, `cifar10`, `folder`, or `module:function`."""
    folder: Path | None = None
    validation: Annotated[float, Field(gt=0)] = 0.2
    """Share (below 1) or number of training images that are held out and drive every decision."""
    limit: Positive | None = None
    """Use only so many training images, the held-out ones included."""
    seed: Count = 0

    @field_validator("validation")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("a share must be below 1, a number of images whole")
        return value


class TaskSettings(Settings):
    """What is learned: names known to `autocompress.training.task`, or `module:function`."""

    loss: str = "cross_entropy"
    metric: str = "accuracy"
    distillation: str = "soft_cross_entropy"


class SpaceSettings(Settings):
    """Which search space, and the arguments of its constructor."""

    name: str = "mobilenet_v3"
    arguments: dict[str, Any] = Field(default_factory=dict)


class TargetSettings(Settings):
    """What the network will run on."""

    name: str = "onnxruntime-cpu"
    threads: Positive = 1
    batch: Positive = 1


class ProfileSettings(Settings):
    """How the latency table is measured."""

    table: Path | None = None
    """An existing table of this target: taken as it is if it was measured for this space and lacks no row.
    Otherwise its rows are kept, missing ones measured, and the correction is fitted anew to this space."""
    measured: Literal["here", "elsewhere", "nowhere"] = "here"
    """`elsewhere`: the table is of another device, such as an imported one. It must have every row, nothing
    is measured here, and the comparison shows predictions only. `nowhere`: nothing is known of time, and
    budgets are on other costs."""
    networks: Annotated[int, Field(ge=8, strict=True)] = 40
    """Whole sub-networks that are measured to correct and to check the table."""
    granularity: Literal["auto", "block", "op"] = "auto"
    """What is summed to price a network; `auto` measures both and takes what predicts networks better."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Half-width of the confidence interval of a median, as a share of it, at which measuring stops."""
    min_rounds: Positive = 24
    max_rounds: Positive = 40
    widths: Literal["all", "grid"] = "all"
    """`grid` is for spaces of channel counts: it measures some widths of every layer and prices the others
    between them, piecewise linearly along the steps of the device."""
    knots: Annotated[int, Field(ge=2, strict=True)] = 6
    """Measured widths an axis of such a grid."""
    seed: Count = 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_rounds > self.max_rounds:
            raise ValueError(f"min_rounds ({self.min_rounds}) must not exceed max_rounds ({self.max_rounds})")
        if self.measured == "elsewhere" and self.table is None:
            raise ValueError("measured: elsewhere needs table: the latency table of the other device")
        if self.measured == "nowhere" and self.table is not None:
            raise ValueError("measured: nowhere takes no table; a table of another device is of elsewhere")
        return self


class OptimizerSettings(Settings):
    """Optimizer, learning rate and its schedule: linear warm-up, then cosine to zero."""

    epochs: Positive = 30
    batch_size: Positive = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    """Not applied to biases and batch norm."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    gradient_clip: Annotated[float, Field(gt=0)] = 5.0
    """Largest norm of the gradient."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    shift: Count = 2
    """Random shift of the images, in pixels."""
    cutout: Count = 0
    """Side in pixels of a square that is set to the mean colour in every training image (DeVries & Taylor,
    2017); 16 for images of 32 pixels in DARTS."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` times a few steps and takes the faster one, once for a run."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    seed: Count = 0


class Phase(Settings):
    """One phase of progressive shrinking."""

    epochs: Positive
    elastic: tuple[str, ...] = ()
    """Last parts of the names of the choices that vary, such as `kernel`; others stay at their largest."""
    networks: Positive = 1
    """Random sub-networks a step."""


class TrainSettings(OptimizerSettings):
    """How the supernet is trained."""

    epochs: Count = 30
    """0 leaves the weights as they are: for a model that brings trained ones (space `channels`)."""
    schedule: Literal["sandwich", "progressive", "single_path", "fair"] = "sandwich"
    """`single_path` trains one uniformly random network a step (SPOS), `fair` as many as the choice with the
    most options has, with each option of a choice equally often (FairNAS); both on the labels alone."""
    random_networks: Count = 2
    """Random sub-networks a step of the sandwich, besides the largest and the smallest."""
    phases: tuple[Phase, ...] = ()
    """Of progressive shrinking, after `epochs` epochs of the largest network, which is then the teacher."""
    proxy: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the space under which the supernet is built instead, with strategies by gradients: cells
    are searched in fewer layers and channels, `{channels: 16, layers: 8}`, than their networks will have."""

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if (self.schedule == "progressive") != bool(self.phases):
            raise ValueError("phases belong to schedule 'progressive', which needs at least one")
        if self.phases and not self.epochs:
            raise ValueError("epochs must be at least 1 with schedule 'progressive'")
        return self

    @model_validator(mode="after")
    def _networks(self) -> Self:
        # Compared with the default, since a run's own recipe names every setting.
        default = type(self).model_fields["random_networks"].default
        if self.schedule in ("single_path", "fair") and self.random_networks != default:
            raise ValueError(
                f"random_networks ({self.random_networks}) belongs to schedule 'sandwich'; leave it out with "
                f"{self.schedule!r}, which sets the number of networks itself"
            )
        return self


class SearchSettings(Settings):
    """How the supernet is searched."""

    budget: dict[str, float | str] = Field(default_factory=default_budget)
    """Metric to limit: `latency_ms`, `macs` (or `flops`), `params`, `size_bytes`; a number or text such as
    "60%" of the largest network, "300M". Also all in one text, "latency_ms=60%,macs=300M"."""
    confidence: Annotated[float, Field(gt=0, lt=1)] | None = None
    """If given, a network fits a latency budget only if its measured latency will hold it with this
    probability, by the table's own errors on whole networks; otherwise its prediction is compared."""
    strategy: str = "predictor"
    """A name of `autocompress list strategies`, or `module:attribute`; `docs/strategies.md` compares them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the strategy."""
    evaluations: Positive = 100
    """Evaluations of supernet slices."""
    reward: Literal["slice", "distilled"] = "slice"
    """What a network is scored by: as the slice it is, or after a short finetuning with distillation, by the
    settings of `finetune`. An evaluation is then a training (docs/distillation.md)."""
    reward_epochs: Positive = 1
    """Of that finetuning."""
    warm_start: Literal["none", "uniform", "synflow", "naswot", "params", "macs"] = "uniform"
    """What is evaluated first: the uniform-scaled networks that fit; with the name of a zero-cost proxy also
    those that it likes best of some random ones."""
    workers: Positive = 1
    """Processes that evaluate sub-networks at the same time, by Ray; 1 starts none. A strategy is then asked
    for as many networks at a time, which is another search than with one."""
    worker_threads: Positive | None = None
    """Of each of them; by default they share the cores of this machine, and on a cluster each has one."""
    asking: Literal["batch", "asynchronous"] = "batch"
    """When workers are given networks: `batch` asks for as many as there are workers, and again when all are
    evaluated; `asynchronous` for one as soon as the oldest is, with two a worker under way."""
    address: Address | None = None
    """Of a Ray cluster that evaluates, `host:port` or `auto`; docs/ray.md."""
    calibration_images: Positive = 512
    """Training images for the batch-norm statistics of a sub-network."""
    seed: Count = 0

    @model_validator(mode="after")
    def _of_workers(self) -> Self:
        if self.workers == 1 and self.address is None:
            for name, value in (("worker_threads", None), ("asking", "batch")):
                if getattr(self, name) != value:
                    raise ValueError(f"{name} belongs to several workers, got {getattr(self, name)!r} with 1")
        return self

    @model_validator(mode="after")
    def _of_the_reward(self) -> Self:
        # Compared with the default, since a run's own recipe names every setting.
        if self.reward == "slice" and self.reward_epochs != type(self).model_fields["reward_epochs"].default:
            raise ValueError(
                f"reward_epochs ({self.reward_epochs}) belongs to reward 'distilled'; a slice is not trained"
            )
        return self

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = limits_of(value)
        # Before any conversion, which would take `yes` for 1.
        if isinstance(value, Mapping):
            Budget.of(value)
        return value


class DistillTerm(Settings):
    """One loss of distillation; `docs/distillation.md` has them all."""

    loss: str
    """`kd`, `at`, `sp`, ..."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """By default the published one. `kd` and `topk` have none: they mix with the loss on labels by `alpha`;
    with a weight they are added to it."""
    layers: tuple[str, ...] = ()
    """Names of the student's layers, as in `named_modules()`; found by their maps by default."""
    teacher_layers: tuple[str, ...] = ()
    """Of the teacher, in the same order; by default the same names."""
    start: Fraction | None = None
    """Share of the training from which on it counts."""
    end: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training after which it counts no more."""
    beside: Literal["all", "nothing"] = "all"
    """`nothing`: while it counts, nothing else does, the labels neither."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the loss, such as `{temperature: 2}`."""

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if self.start is not None and self.start >= self.end:
            raise ValueError(
                f"start must be below end, got {self.start:g} and {self.end:g}: it would never count"
            )
        return self


class TeacherSettings(Settings):
    """A trained model that teaches."""

    model: str
    """`file.py:factory` or `module:factory`; this runs that code."""
    weights: Path | None = None
    """Its state dict; without, those that the factory gives it."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the factory."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share among several."""


SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "eskd": [{"loss": "kd", "end": 0.66}],
    "fitnets": [{"loss": "hint", "end": 0.3, "beside": "nothing"}, {"loss": "kd", "start": 0.3}],
}
"""Names of losses with a schedule: early-stopped distillation (Cho & Hariharan, 2019), and FitNets in two
stages (Romero et al., 2015)."""


class FinetuneSettings(OptimizerSettings):
    """How the winner is finetuned with knowledge distillation from the largest sub-network."""

    epochs: Positive = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.02
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0
    alpha: Fraction = 0.9
    """Weight of the distillation loss; the loss on the labels has `1 - alpha`."""
    distill: tuple[DistillTerm, ...] = (DistillTerm(loss="kd"),)
    """What is learned from the teacher: names with `+` between them, as `kd+at`; `none`; or a list of names
    and of terms, `[kd, {loss: at, weight: 500}]`."""
    teachers: tuple[TeacherSettings, ...] = ()
    """Who teaches instead of the largest network, on images of the data's size; several are an ensemble."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a path of a cell is dropped for an image, at the end of training, to which it rises
    linearly from 0; 0.2 in DARTS. Only for networks of cells: those that have a `DropPath`."""
    auxiliary: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss of an auxiliary classifier after two thirds of the blocks, in training only (Szegedy
    et al., 2015); 0.4 in DARTS. Only for labels that are classes."""

    @field_validator("distill", mode="before")
    @classmethod
    def _distill(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [] if value.strip() == "none" else value.split("+")
        if not isinstance(value, (list, tuple)):
            raise ValueError("takes names of losses, such as kd or kd+at, or none")
        terms: list[Any] = []
        for term in value:
            name = term.strip() if isinstance(term, str) else None
            terms += [term] if name is None else SCHEDULES.get(name, [{"loss": name}])
        return terms


class QuantizeSettings(Settings):
    """What is done to a network of few bits before finetuning, without labels (space `bits`)."""

    rounding: Literal["nearest", "adaround", "brecq"] = "nearest"
    """How weights are rounded: to the nearest level, or as keeps what a layer gives, or a block."""
    steps: Positive = 1000
    """Of the optimizer that learns rounding, for each layer or block."""
    images: Positive = 512
    """Training images that it looks at."""
    biases: Literal["kept", "corrected"] = "kept"
    """Corrected ones are shifted so that means of channels are as in floating point."""


class ToleranceSettings(Settings):
    """Instead of a budget that is known: the smallest cost whose score loses no more than this."""

    drop: Annotated[float, Field(gt=0)]
    """How much of the largest network's validation score may be lost, in units of the metric: 0.01 is one
    point of accuracy. Scores are those of finetuned networks."""
    metric: str = "latency_ms"
    """The cost that is made small."""
    probes: Positive = 6
    """Budgets that are tried at most, each with a search and a finetuning of its own."""

    @field_validator("metric")
    @classmethod
    def _a_cost(cls, value: str) -> str:
        (limit,) = Budget.of({value: "100%"}).limits
        return limit.metric


class ExportSettings(Settings):
    """Which formats are written."""

    formats: Annotated[tuple[Literal["onnx", "torch_export", "safetensors"], ...], Field(min_length=1)] = (
        "onnx",
        "torch_export",
        "safetensors",
    )


class Recipe(Settings):
    """A whole run, from data and budget to an exported network."""

    data: DataSettings = DataSettings()
    task: TaskSettings = TaskSettings()
    space: SpaceSettings = SpaceSettings()
    target: TargetSettings = TargetSettings()
    profile: ProfileSettings = ProfileSettings()
    train: TrainSettings = TrainSettings()
    search: SearchSettings = SearchSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    passes: tuple[dict[str, dict[str, str | int | float]], ...] = ()
    """What is done to the finetuned network before it is exported, in this order: `[{quantize: {bits: 8}},
    {distill: {epochs: 2}}]`; docs/policies.md has the passes."""
    export: ExportSettings = ExportSettings()
    tolerance: ToleranceSettings | None = None
    """If given, budgets are tried until the smallest cost within this loss of the score is found;
    `search.budget` then holds the limits that hold all the same, by default none."""
    random_networks: Positive = 3
    """Random networks at the same budget in the final comparison."""
    threads: Positive | None = None
    """Threads of training and search; by default as many as make steps faster. A target has its own."""

    @field_validator("passes", mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        for entry in value if isinstance(value, (list, tuple)) else ():
            if not isinstance(entry, dict):
                raise ValueError(
                    f"each pass is its name with its settings, {{quantize: {{bits: 8}}}}, not {entry!r}"
                )
            for name, settings in entry.items():
                for key, setting in (settings or {}).items() if isinstance(settings, dict | None) else ():
                    if isinstance(setting, (list, tuple)):
                        raise ValueError(
                            f"{name}.{key} has one value here; lists are searched by `autocompress tune`"
                        )
        return value

    @field_validator("passes")
    @classmethod
    def _one_each(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for entry in value:
            if len(entry) != 1:
                raise ValueError(f"each pass is one name with its settings, got {sorted(entry)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_limit_but_the_tolerance(cls, payload: Any) -> Any:
        tolerance = payload.get("tolerance") if isinstance(payload, dict) else None
        search = payload.get("search", {}) if tolerance else None
        if isinstance(tolerance, dict) and isinstance(search, dict) and "budget" not in search:
            metric = tolerance.get("metric", ToleranceSettings.model_fields["metric"].default)
            return {**payload, "search": {**search, "budget": {metric: "100%"}}}
        return payload


def parse_recipe(payload: Any, source: str = "the recipe") -> Recipe:
    """Check a recipe that was read from YAML or made by hand.

    Raises:
        RecipeError: Each finding with the path of its key, the value and what is allowed.
    """
    return parsed(Recipe, payload, source)


def parsed(kind: type[_Kind], payload: Any, source: str) -> _Kind:
    """Check settings of any kind that were read from YAML or made by hand.

    Raises:
        RecipeError: Each finding with the path of its key, the value and what is allowed.
    """
    if payload is None:
        payload = {}
    if not isinstance(payload, dict):
        raise RecipeError(f"{source} must be a mapping of {', '.join(kind.model_fields)}, got {payload!r}")
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        lines = [_explain(finding, kind) for finding in error.errors()]
        raise RecipeError(f"{source} is not valid:\n  " + "\n  ".join(lines)) from None


# What the lists of a recipe hold.
LISTS: dict[Any, Any] = {"phases": Phase, "distill": DistillTerm, "teachers": TeacherSettings}


def _explain(finding: Any, kind: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in finding["loc"]) or "(top)"
    if finding["type"] == "extra_forbidden":
        model: Any = kind
        for part in finding["loc"][:-1]:
            annotation = model.model_fields[part].annotation if isinstance(part, str) else model
            model = LISTS.get(part, annotation)
        return f"{path}: unknown key; allowed here: {', '.join(sorted(model.model_fields))}"
    return f"{path}: {finding['msg']}, got {finding['input']!r}"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; relative paths in it are relative to the file.

    Raises:
        RecipeError: The file is absent, no YAML, or not a valid recipe.
    """
    return with_absolute_paths(parse_recipe(read_yaml(path), f"recipe {path}"), path.parent)


def read_yaml(path: Path) -> Any:
    """Read a recipe file of any kind.

    Raises:
        RecipeError: It is absent, no YAML, or empty.
    """
    import yaml

    try:
        payload = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    if payload is None:
        raise RecipeError(f"recipe {path} is empty; write one key at least, such as data: {{source: digits}}")
    return payload


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with its paths made absolute; relative ones are taken to be relative to `folder`."""
    updates = absolute_inputs(recipe.data, recipe.target, folder)
    if recipe.profile.table is not None:
        table = (folder / recipe.profile.table.expanduser()).resolve()
        updates["profile"] = recipe.profile.model_copy(update={"table": table})
    if recipe.finetune.teachers:
        teachers = tuple(_absolute(teacher, folder) for teacher in recipe.finetune.teachers)
        updates["finetune"] = recipe.finetune.model_copy(update={"teachers": teachers})
    return recipe.model_copy(update=updates)


def absolute_inputs(data: DataSettings, target: TargetSettings, folder: Path) -> dict[str, Any]:
    """Return the settings of data and target that name files, with absolute paths."""
    updates: dict[str, Any] = {}
    if data.folder is not None:
        place = (folder / data.folder.expanduser()).resolve()
        updates["data"] = data.model_copy(update={"folder": place})
    if target.name.endswith(".json"):
        name = str((folder / Path(target.name).expanduser()).resolve())
        updates["target"] = target.model_copy(update={"name": name})
    return updates


def absolute_model(name: str, folder: Path) -> str:
    """Return `file.py:factory` with the absolute path of the file; `module:factory` as it is."""
    place, _, factory = name.rpartition(":")
    return f"{(folder / Path(place).expanduser()).resolve()}:{factory}" if place.endswith(".py") else name


def _absolute(teacher: TeacherSettings, folder: Path) -> TeacherSettings:
    updates: dict[str, Any] = {"model": absolute_model(teacher.model, folder)}
    if teacher.weights is not None:
        updates["weights"] = (folder / teacher.weights.expanduser()).resolve()
    return teacher.model_copy(update=updates)
