"""Objects with tensors beside their pickle: equal to what was packed, on the very memory that was given."""

import copy
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.distributed.shared import SMALL_BYTES, packed, unpacked

LARGE = SMALL_BYTES // 4 + 3


def returned(content: object) -> object:
    return unpacked(*packed(content))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(LARGE),
        torch.randn(LARGE)[1:-1],
        torch.randn(2, 8, 40, 40).contiguous(memory_format=torch.channels_last),
        torch.randn(100, 300).t(),
        torch.randn(100, 300)[:, ::2],
        torch.randn(1, 300).expand(100, 300),
        torch.randn(LARGE, dtype=torch.float64),
        torch.randn(2 * LARGE).to(torch.bfloat16),
        torch.arange(2 * LARGE),
        torch.randn(5 * LARGE) > 0,
        torch.randn(LARGE, dtype=torch.complex64),
        torch.randn(LARGE, requires_grad=True),
        torch.randn(3),
        torch.tensor(2.5),
        torch.zeros(0, 4),
    ],
)
def test_a_tensor_comes_back_as_it_was(tensor: Tensor) -> None:
    found = returned(tensor)
    assert isinstance(found, Tensor)
    assert torch.equal(found, tensor)
    assert (found.dtype, found.shape, found.requires_grad) == (
        tensor.dtype,
        tensor.shape,
        tensor.requires_grad,
    )


def test_the_order_of_axes_in_memory_is_kept() -> None:
    found = returned(torch.randn(2, 8, 40, 40).contiguous(memory_format=torch.channels_last))
    assert isinstance(found, Tensor)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_large_tensors_are_on_the_memory_that_was_given_and_small_ones_are_not() -> None:
    content, buffers = packed({"large": torch.ones(LARGE), "small": torch.ones(3)})
    assert len(content) < SMALL_BYTES
    (memory,) = buffers
    shared = np.array(memory)
    found = unpacked(content, [shared])
    shared.view(np.float32)[5] = 7.0
    assert found["large"][5] == 7.0
    found["small"] += 1  # counters and statistics may be written to


def test_a_network_computes_the_same_keeps_tied_weights_and_is_trained_on_a_copy() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 80), nn.BatchNorm1d(80)).eval()
    network[2].weight = network[0].weight
    content, buffers = packed(network)
    for buffer in buffers:
        buffer.flags.writeable = False
    found = unpacked(content, buffers)
    images = torch.randn(4, 80)
    assert torch.equal(found(images), network(images))
    assert found[0].weight is found[2].weight
    assert isinstance(found[0].weight, nn.Parameter)
    taught = copy.deepcopy(found).train()
    optimizer = torch.optim.SGD(taught.parameters(), lr=0.1)
    taught(images).sum().backward()
    optimizer.step()
    assert not torch.equal(taught[0].weight, network[0].weight)
    assert torch.equal(found[0].weight, network[0].weight)


WRITES = """
import mmap, sys
import numpy as np
import torch
from autocompress.distributed.shared import packed, protect, unpacked
content, buffers = packed([torch.ones(50_000), torch.ones(3)])
memory = np.frombuffer(mmap.mmap(-1, buffers[0].nbytes), dtype=np.uint8)
memory[:] = buffers[0]
protect([memory])
large, small = unpacked(content, [memory])
small += 1
print(float(large.sum()), flush=True)
large[25_000] += 1
print("written", flush=True)
"""


def test_protected_memory_is_read_and_ends_who_writes_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, text=True, check=False)
    assert done.stdout == "50000.0\n"
    assert done.returncode == -signal.SIGSEGV


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises(TypeError, match="pickle"):
        packed((torch.ones(LARGE), threading.Lock()))
