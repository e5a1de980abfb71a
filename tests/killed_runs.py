"""Run a recipe in processes that kill themselves at given moments, with SIGKILL; a program of its own.

Usage: `python killed_runs.py FOLDER RECIPE LAST [MOMENT ...]`. The stages up to LAST (`profile` or `export`)
are run in FOLDER once for each MOMENT, killed there, and once more to the end. A moment is the number of an
event, counted from 0 in each process, or the beginning of an event's name. Events are `TITLE:DONE` for each
progress that stage TITLE tells, and `FILE<` and `FILE>` before and after a file takes its name. Everything is
imported once; each run is a fork. Prints the events of the last run, one a line.

After kill number N the samples of the profile are kept as `samples.N` beside FOLDER.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime  # noqa: F401
import optuna  # noqa: F401
import sklearn.datasets

import autocompress.distill.finetune
import autocompress.export.export  # noqa: F401
from autocompress import stages
from autocompress.latency.profile import SAMPLES_FILE
from autocompress.progress import Progress
from autocompress.recipe import load_recipe
from autocompress.run import Run, Shown

LAST = {"profile": stages.profile, "export": stages.export}


def main(folder: Path, recipe: Path, last: str, moments: list[str]) -> None:
    sklearn.datasets.load_digits()
    for number, moment in enumerate([*moments, ""]):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            events = _watch(moment)
            run = Run(folder, load_recipe(recipe))
            with run.locked():
                LAST[last](run, Shown(stage=_stage))
            os.write(writer, "".join(event + "\n" for event in events).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        if ended != (-signal.SIGKILL if moment else 0):
            sys.exit(f"the run to be killed at {moment!r} ended with {ended}")
        if moment and (folder / SAMPLES_FILE).exists():
            shutil.copy(folder / SAMPLES_FILE, folder.parent / f"samples.{number}")
        sys.stdout.write(text)


_happens: Callable[[str], None]


def _watch(moment: str) -> list[str]:
    """Note events from here on, and kill this process at one of them."""
    events: list[str] = []

    def happens(event: str) -> None:
        if moment and (moment == str(len(events)) or event.startswith(moment)):
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(event)

    global _happens
    _happens = happens
    replace, rename = Path.replace, Path.rename

    def replacing(self: Path, target: Path) -> Path:
        happens(f"{target.name}<")
        result = replace(self, target)
        happens(f"{target.name}>")
        return result

    def renaming(self: Path, target: Path) -> Path:
        happens(f"{target.name}<")
        result = rename(self, target)
        happens(f"{target.name}>")
        return result

    Path.replace, Path.rename = replacing, renaming  # type: ignore[method-assign, assignment]
    return events


@contextmanager
def _stage(title: str) -> Iterator[Progress]:
    def progress(done: int, total: int, note: str = "") -> None:
        _happens(f"{title}:{done}")

    yield progress


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
