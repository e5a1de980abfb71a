"""Dropped paths in training: where they are in a network, and how their rate rises."""

from torch import nn

from autocompress.errors import RecipeError
from autocompress.network import DropPath
from autocompress.recipe import FinetuneSettings


def drop_paths(network: nn.Module, settings: FinetuneSettings) -> list[DropPath]:
    """Return every place of a network where a path can be dropped.

    Raises:
        RecipeError: Paths shall be dropped, and there are none.
    """
    found = [module for module in network.modules() if isinstance(module, DropPath)]
    if settings.drop_path and not found:
        raise RecipeError(
            f"finetune.drop_path ({settings.drop_path:g}) drops paths of cells, and this network has none "
            "(no autocompress.network.DropPath in it); set finetune.drop_path to 0"
        )
    return found


def rate_of_epoch(settings: FinetuneSettings, epoch: int) -> float:
    """Return the rate of an epoch, counted from 0: linear from 0, as in the repository of DARTS."""
    return settings.drop_path * epoch / settings.epochs
