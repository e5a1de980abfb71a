"""What every test module shares: threads and hypothesis."""

import os

# Before anything imports torch. Two workers with one thread each use two cores; threads of OpenMP that spin
# while they wait take the time of those that work (up to ten times, measured on two busy cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator

import pytest
from hypothesis import settings

# Other work on the machine must not make a test red, and a red test must be red again at the next run.
settings.register_profile("autocompress", deadline=None, derandomize=True)
settings.load_profile("autocompress")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Hold PyTorch at one thread: sums of floats depend on the number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
