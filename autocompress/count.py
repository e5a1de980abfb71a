"""Multiply-accumulates and parameters of any PyTorch module, by PyTorch's own counter, with thop beside it.

No counter is right everywhere. PyTorch's sees every convolution and matrix product that runs, whoever calls
it, if fused kernels are kept out of its way; thop sees only layers that it has a rule for, and says nothing
where it has none. Where the two differ by more than `DOUBTFUL`, somebody should look.
"""

import copy
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autocompress.errors import CostError, PluginError

DOUBTFUL = 0.02
"""Relative difference between the two counters above which a warning is due."""

_SHAPE = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)*")


@dataclass(frozen=True)
class Count:
    """What one forward pass costs.

    Attributes:
        macs: Multiply-accumulates of convolutions and matrix products (attention included); everything else
            counts nothing. Of the whole batch.
        params: Distinct parameters, one shared by several layers counted once.
        by_module: MACs of each module that has some, by its dotted name; a parent contains its children.
        thop_macs: What thop says; `None` if it could not run.
        thop_error: Why it could not.
        device: `"meta"`, or `"cpu"` if the forward pass needs values: kernels that fuse a whole LSTM are then
            not counted.
    """

    macs: int
    params: int
    by_module: Mapping[str, int]
    thop_macs: int | None
    thop_error: str
    device: str

    @property
    def doubtful(self) -> bool:
        """Whether thop says something clearly different."""
        if self.thop_macs is None:
            return False
        return abs(self.thop_macs - self.macs) > DOUBTFUL * max(self.macs, self.thop_macs)


def count(module: nn.Module, *inputs: Tensor) -> Count:
    """Count one forward pass in evaluation mode; the module is neither run nor changed.

    A copy without values runs on PyTorch's `meta` device, so that even a large network costs no memory and no
    time. Where the forward pass needs values (loops over contents, tensors made inside on the CPU), a real
    copy runs on the CPU.

    Args:
        module: Any.
        inputs: Of the forward pass, on the CPU.

    Raises:
        CostError: The module cannot run on these inputs.
    """
    device = "meta"
    try:
        counter = _counted(_without_values(module), tuple(x.to("meta") for x in inputs))
    except Exception:  # noqa: BLE001  (whatever a stranger's module raises without values)
        device = "cpu"
        try:
            counter = _counted(copy.deepcopy(module).cpu().eval(), inputs)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
            raise CostError(
                f"{type(module).__name__} cannot run on an input of {shapes}: {type(error).__name__}: {error}"
            ) from error
    # The counter names the root by its class.
    prefix = f"{type(module).__name__}."
    by_module = {
        name.removeprefix(prefix): sum(found.values()) // 2
        for name, found in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    thop_macs, thop_error = _thop(module, inputs)
    return Count(
        macs=counter.get_total_flops() // 2,
        params=sum(parameter.numel() for parameter in module.parameters()),
        by_module=by_module,
        thop_macs=thop_macs,
        thop_error=thop_error,
        device=device,
    )


def _without_values(module: nn.Module) -> nn.Module:
    """Copy a module onto the meta device without ever copying its values."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo).eval()


def _counted(module: nn.Module, inputs: tuple[Tensor, ...]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with _no_fused_attention(), torch.no_grad(), counter:
        module(*inputs)
    return counter


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Keep attention out of kernels that have no formula, or that hide the whole layer (pytorch #195460)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _thop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int | None, str]:
    """Ask thop about a copy: it leaves buffers behind in what it looks at (pytorch-OpCounter #168).

    Returns:
        Its MACs, or `None` and why not.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # It imports a module of Python that is going to be removed.
            warnings.simplefilter("ignore")
            import thop

            macs, _ = thop.profile(copy.deepcopy(module).cpu().eval(), inputs=inputs, verbose=False)
    except Exception as error:  # noqa: BLE001  (a second opinion: whatever goes wrong, the first one stands)
        return None, f"{type(error).__name__}: {error}"
    return int(macs), ""


def parse_shape(text: str) -> tuple[int, ...]:
    """Read `"1x3x224x224"`.

    Raises:
        CostError: It reads otherwise.
    """
    if not _SHAPE.fullmatch(text):
        raise CostError(f"an input reads like 1x3x224x224, every number at least 1, got {text!r}")
    return tuple(int(size) for size in text.split("x"))


def load_module(name: str) -> nn.Module:
    """Make the module that `path/model.py:factory` or `package.module:factory` names; this runs that code.

    Args:
        name: A function or class that is called without arguments, or a module that is there already.

    Raises:
        PluginError: It cannot be imported or called, or gives no module.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise PluginError(f"a network is named as model.py:factory or module:factory, got {name!r}")
    try:
        found = getattr(_imported(place), attribute)
        made = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise PluginError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise PluginError(f"{name} must give a torch.nn.Module, got {type(made).__name__}")
    return made


def _imported(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    # Beside other files of the same folder, as `python model.py` would be.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
