"""What modules of a network read and gave on some images, caught by hooks that are gone afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autocompress.errors import QuantizationError


class _Enough(Exception):  # noqa: N818 - nothing is wrong: the rest of the network need not run
    """Ends a forward pass."""


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and each module back into its own at the end."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def submodule(network: nn.Module, name: str) -> nn.Module:
    """Return a module of a network.

    Raises:
        QuantizationError: There is none of that name.
    """
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"the network has no module {name!r}") from error


def calls(network: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, int]:
    """Return how often modules run in one pass, in the order of their first call.

    Args:
        network: In evaluation mode.
        names: Of the modules.
        image: A batch.

    Raises:
        QuantizationError: A module is absent, or is not run.
    """
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = found.get(name, 0) + 1

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.callback(submodule(network, name).register_forward_pre_hook(count(name)).remove)
        network(image)
    idle = [name for name in names if name not in found]
    if idle:
        raise QuantizationError(f"modules {idle} are not run in a forward pass")
    return found


def captured(
    network: nn.Module, name: str, images: Tensor, *, what: Literal["input", "output"], batch: int
) -> Tensor:
    """Return what a module reads or gives, over all images: `(images, ...)`.

    The pass ends there, so that nothing behind the module runs, or writes over its output in place. The
    module has to run once in a pass; `calls` tells.

    Args:
        network: In evaluation mode.
        name: Of the module.
        images: `(images, ...)`.
        what: Which of both.
        batch: Images at once.

    Raises:
        QuantizationError: The module is absent, reads something else than one tensor, or does not give one
            tensor.
    """
    found: list[Tensor] = []

    def keep(value: object) -> None:
        if not isinstance(value, Tensor):
            raise QuantizationError(
                f"the {what} of {name!r} must be one tensor, got {type(value).__name__}; choose modules that "
                "read one tensor and give one"
            )
        found.append(value.detach())
        raise _Enough

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep(args[0] if len(args) == 1 and not named else (*args, *named.values()))

    def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        keep(output)

    module = submodule(network, name)
    if what == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            for part in batches(images, batch):
                try:
                    network(part)
                except _Enough:
                    continue
    finally:
        handle.remove()
    return torch.cat(found)


def batches(images: Tensor, batch: int) -> Iterator[Tensor]:
    """Yield `(batch, ...)` parts of `(images, ...)` in order; the last one can be smaller.

    Raises:
        QuantizationError: There are no images.
    """
    if len(images) == 0:
        raise QuantizationError("images must not be empty")
    for start in range(0, len(images), batch):
        yield images[start : start + batch]
