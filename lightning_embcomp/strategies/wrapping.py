"""Wrap the dense rest of a model in DDP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.overrides.distributed import _sync_module_states
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_embcomp.strategies.swapping import without


def sharded_names(root: nn.Module, paths: Iterable[str]) -> set[str]:
    """Names of all parameters and buffers below some modules, as the root knows them.

    Args:
        root: The module.
        paths: Paths of modules inside it.

    Example:
        >>> sorted(sharded_names(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["1"]))
        ['1.bias', '1.weight']
    """
    names: set[str] = set()
    for path in paths:
        for inner, module in root.get_submodule(path).named_modules(prefix=path):
            # What a module registers, and what it says to hold: sharded collections override the latter.
            own = [*module._parameters, *module._buffers]
            own += [name for name, _ in module.named_parameters(recurse=False)]
            names.update(f"{inner}.{name}" for name in own)
        names.update(name for name, _ in root.get_submodule(path).named_parameters(prefix=path))
    return names


def ignore_in_ddp(root: nn.Module, paths: Iterable[str]) -> None:
    """Keep DDP, and Lightning's start values from process 0, away from sharded modules.

    Args:
        root: The module that is to be wrapped.
        paths: Paths of sharded modules inside it.
    """
    names = sorted(sharded_names(root, paths))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(root, names)


def has_dense_parameters(root: nn.Module) -> bool:
    """Whether anything is left for DDP to average, after :func:`ignore_in_ddp`."""
    ignored = set(getattr(root, "_ddp_params_and_buffers_to_ignore", ()))
    return any(p.requires_grad for name, p in _registered_parameters(root) if name not in ignored)


def sync_dense_states(root: nn.Module) -> None:
    """Give all processes the dense parameters and buffers of process 0, as DDP does when it wraps."""
    _sync_module_states(root)


def _registered_parameters(root: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter


def move_dense(root: nn.Module, paths: Iterable[str], device: torch.device) -> None:
    """Move everything but the sharded modules, whose tables have been built where they belong.

    Moving a sharded module would part its parameters from the memory that its lookups read.

    Args:
        root: The module.
        paths: Paths of sharded modules inside it.
        device: Where to move the rest.
    """
    with without(root, paths):
        root.to(device)
