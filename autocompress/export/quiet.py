"""Silence for the exporters of PyTorch, which report on their own affairs."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LEVELS = {
    **dict.fromkeys(("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir"), logging.ERROR),
    # What fails is raised; this is its traceback besides.
    "torch._subclasses": logging.CRITICAL,
}
"""Loggers, and the least that they say."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide deprecation warnings that PyTorch raises at itself, and log records below an error.

    The records say, for example, that torchvision is not installed. Errors are exceptions and come through.
    """
    before = {name: logging.getLogger(name).level for name in LEVELS}
    try:
        for name, level in LEVELS.items():
            logging.getLogger(name).setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quieter() -> Iterator[None]:
    """Hide also what the older exporter says whatever `verbose` is: warnings, and graphs on standard output.

    It writes the whole graph from C++ where it cannot convert an operator (torch 2.13: whether logging was
    enabled is asked of a function that is not called). The file descriptor is that of the whole process.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
