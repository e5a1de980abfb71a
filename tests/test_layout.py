"""How the repository is put together: three packages, light imports, pins."""

import ast
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import autocompress
import search_spaces
import strategies

ROOT = Path(__file__).parents[1]
PACKAGES = (autocompress, search_spaces, strategies)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "ray", "optuna", "onnx", "onnxruntime", "sklearn", "scipy", "pandas"}
# What spaces, strategies and everyone's first import need; other rooms load what they use.
CORE = (
    "atomic",
    "budget",
    "cost",
    "errors",
    "evaluator",
    "exact",
    "knapsack",
    "labels",
    "milp",
    "multi_knapsack",
    "program",
    "hypervolume",
    "rewards",
    "ops",
    "penalty",
    "plugins",
    "ratios",
    "space",
    "strategy",
    "trial",
)


# Strategies whose business are gradients, which are imported when a recipe names them; modules of a space.
WITH_TORCH = {
    *(
        f"strategies.{name}"
        for name in (
            "relaxed",
            "darts",
            "pc_darts",
            "p_darts",
            "collapse",
            "gumbel",
            "proxyless",
            "dmcp",
            "amc",
            "haq",
            "walking",
        )
    ),
    "search_spaces.darts_modules",
    "search_spaces.channels",  # it is made of a user's PyTorch model
    "search_spaces.bits",
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted(Path(package.__path__[0]).rglob("*.py"))]


# Packages ----------------------------------------------------------------------------------------------


def test_the_three_packages_come_from_one_folder_and_are_typed() -> None:
    folders = {Path(package.__path__[0]).resolve().parent for package in PACKAGES}
    assert folders == {ROOT}
    assert all((ROOT / package.__name__ / "py.typed").is_file() for package in PACKAGES)


def test_the_installed_version_is_that_of_the_package_and_of_the_project() -> None:
    assert importlib.metadata.version("autocompress") == autocompress.__version__ == PROJECT["version"]


@pytest.mark.parametrize("group", ["autocompress.search_spaces", "autocompress.strategies"])
def test_every_entry_point_of_ours_is_installed_and_resolves(group: str) -> None:
    installed = {
        point.name: point
        for point in importlib.metadata.entry_points(group=group)
        if point.dist is not None and point.dist.name == "autocompress"
    }
    assert {name: point.value for name, point in installed.items()} == PROJECT["entry-points"][group]
    for point in installed.values():
        assert callable(point.load())


def test_the_command_is_installed_and_resolves() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="autocompress")
    assert callable(command.load())


@pytest.mark.parametrize(
    "path", [path for path in sources() if path.name != "__init__.py"], ids=lambda path: path.stem
)
def test_every_module_says_what_it_is_and_is_named_after_it(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "base", "common", "manager", "misc"}
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


# Imports -----------------------------------------------------------------------------------------------


def loaded_by(*modules: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after importing these."""
    code = f"import sys, json, {', '.join(modules)}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(result.stdout)} & HEAVY


def test_the_core_and_all_plug_ins_of_ours_import_without_any_heavy_library() -> None:
    plug_ins = [
        module.name
        for package in (search_spaces, strategies)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if module.name not in WITH_TORCH
    ]
    assert len(plug_ins) >= 3
    assert loaded_by("autocompress", *(f"autocompress.{name}" for name in CORE), *plug_ins) == set()


def test_the_check_for_heavy_libraries_sees_one() -> None:
    assert "scipy" in loaded_by("scipy.optimize")


# Versions ----------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stated = [line.partition("#")[0].strip() for line in lines]
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in stated if line]
    assert all(matches), "constraints.txt holds pins only"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    stated = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, stated):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert Version(version) in requirement.specifier


def test_the_pins_are_what_ci_relies_on() -> None:
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    # Its match for this torch does not import on a CPU build.
    assert "torchvision" not in pinned
