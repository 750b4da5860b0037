"""Find what a module keeps of its tables outside of its submodules, where no engine can take their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_embcomp.errors import SetupError
from lightning_embcomp.tables import HostView

# What nn.Module registers is replaced; saved hyperparameters only say how the module was built.
_KNOWN = {"_modules", "_parameters", "_buffers", "_hparams", "_hparams_initial"}
_DEPTH = 3  # parameter groups are lists in dicts in a list


def check_references(root: nn.Module, hosts: Sequence[HostView]) -> None:
    """Refuse tables that attributes of a module refer to behind PyTorch's back: they would go on using the plain ones.

    Args:
        root: The module.
        hosts: The modules that are to be replaced.

    Raises:
        SetupError: If a list, tuple, set or dict, a kept bound method or a plain attribute of any submodule holds one
            of the modules or weights.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.user = nn.Embedding(5, 4)
        ...         self.tables = [self.user]
        >>> from lightning_embcomp.tables import find_hosts
        >>> model = Model()
        >>> check_references(model, find_hosts(model))
        Traceback (most recent call last):
            ...
        lightning_embcomp.errors.SetupError: table 'user' is also kept in tables[0], which would go on using the plain \
table: keep modules in nn.ModuleList or nn.ModuleDict, look methods and weights up where they are used, or leave the \
table out of the callback
    """
    targets: dict[int, str] = {}
    inside: set[int] = set()
    for host in hosts:
        inside.update(id(module) for module in host.module.modules())
        for part in (*host.module.modules(), *host.module.parameters()):
            targets.setdefault(id(part), host.tables[0].name)
        targets.update({id(table.weight): table.name for table in host.tables})
    for path, module in root.named_modules() if targets else ():
        if id(module) in inside:
            continue
        for name, value in vars(module).items():
            for where, found in _kept(name, value, _DEPTH) if name not in _KNOWN else ():
                if id(found) in targets:
                    raise SetupError(
                        f"table {targets[id(found)]!r} is also kept in {f'{path}.{where}'.lstrip('.')}, which would go"
                        " on using the plain table: keep modules in nn.ModuleList or nn.ModuleDict, look methods and"
                        " weights up where they are used, or leave the table out of the callback"
                    )


def _kept(where: str, value: Any, depth: int) -> Iterator[tuple[str, object]]:  # noqa: ANN401 - any attribute
    """A value, what its method is bound to, and what is in it if it is a container."""
    yield where, value
    owner = getattr(value, "__self__", None) if callable(value) and not isinstance(value, nn.Module) else None
    if owner is not None:
        yield where, owner
    if isinstance(value, partial) and depth:
        yield from _kept(where, value.func, depth - 1)
    if depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _kept(f"{where}[{key!r}]", item, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(value):
            yield from _kept(f"{where}[{i}]", item, depth - 1)
