"""Look at a model without its sharded parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without(root: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Put empty modules in the place of some submodules inside the block.

    Args:
        root: The module.
        paths: Paths of modules inside it.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> with without(model, ["1"]):
        ...     print(*model.state_dict())
        0.weight 0.bias
        >>> len(model.state_dict())
        4
    """
    places = [(root.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    kept = [(parent, name, parent._modules[name]) for parent, name in places]
    try:
        for parent, name in places:
            parent._modules[name] = nn.Module()
        yield
    finally:
        for parent, name, module in kept:
            parent._modules[name] = module
