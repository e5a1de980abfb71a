"""Run a recipe in processes that kill themselves at given moments, with SIGKILL; a program of its own.

Usage: `python killed_runs.py RECIPE JOBS`, where JOBS is a JSON list of `[folder, stage, moments]`. For each
job the stages up to the named one (a key of `LAST`) are run in the folder once for each moment, killed
there, and once more to the end. A moment is the number of an event, counted from 0 in each process, or the
beginning of an event's name. Events are `TITLE:DONE` for each progress that a stage tells, and `FILE<` and
`FILE>` before and after a file takes its name. Everything is imported once; each run is a fork.

What the profile had measured when it was killed is kept as `killed.jsonl` beside its samples; the names of
the events of the last run of each job are written to its `events.txt`.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import onnxruntime  # noqa: F401
import optuna  # noqa: F401
import sklearn.datasets

import autocompress.distill.finetune
import autocompress.export.export  # noqa: F401
from autocompress import stages, tolerance
from autocompress.latency.profile import SAMPLES_FILE
from autocompress.progress import Progress
from autocompress.recipe import load_recipe
from autocompress.run import Run, Shown

LAST = {"profile": stages.profile, "export": stages.export, "smallest": tolerance.smallest}


def main(recipe: Path, jobs: list[tuple[str, str, list[str]]]) -> None:
    sklearn.datasets.load_digits()
    for name, last, moments in jobs:
        for moment in [*moments, ""]:
            child = os.fork()
            if not child:
                _run(Path(name), recipe, last, moment)
            _, status = os.waitpid(child, 0)
            ended = os.waitstatus_to_exitcode(status)
            if ended != (-signal.SIGKILL if moment else 0):
                sys.exit(f"{name}: the run to be killed at {moment!r} ended with {ended}")
            if moment.startswith("profile"):
                shutil.copy(Path(name) / SAMPLES_FILE, Path(name) / "killed.jsonl")


def _run(folder: Path, recipe: Path, last: str, moment: str) -> NoReturn:
    """Run, and end this process without what libraries do at its exit: their threads did not come along."""
    try:
        events = _watch(moment)
        run = Run(folder, load_recipe(recipe))
        with run.locked():
            LAST[last](run, Shown(stage=_stage))
        (folder / "events.txt").write_text("".join(event + "\n" for event in events))
        os._exit(0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(1)


_happens: Callable[[str], None]


def _watch(moment: str) -> list[str]:
    """Note events from here on, and kill this process at one of them."""
    events: list[str] = []

    def happens(event: str) -> None:
        if moment and (moment == str(len(events)) or event.startswith(moment)):
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(event)

    def noted(function: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def both(self: Path, target: Path) -> Path:
            happens(f"{target.name}<")
            result = function(self, target)
            happens(f"{target.name}>")
            return result

        return both

    global _happens
    _happens = happens
    Path.replace, Path.rename = noted(Path.replace), noted(Path.rename)  # type: ignore[method-assign, assignment]
    return events


@contextmanager
def _stage(title: str) -> Iterator[Progress]:
    def progress(done: int, total: int, note: str = "") -> None:
        _happens(f"{title}:{done}")

    yield progress


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
