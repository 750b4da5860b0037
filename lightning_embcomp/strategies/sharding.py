"""Shard the collections of a module in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.modules.utils import reset_module_states_post_sharding

from lightning_embcomp.strategies.discovery import Shardable, mark_sharded
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.weights import (
    free_table,
    initialise_pieces,
    local_pieces,
    scatter_rows,
    shared_seed,
    table_initialisers,
    table_tensors,
)


def shard_in_place(
    root: nn.Module,
    found: Mapping[str, Shardable],
    plan: ShardingPlan,
    defaults: Mapping[type[nn.Module], ModuleSharder[nn.Module]],
    device: torch.device,
) -> None:
    """Replace collections by their sharded counterparts, which take over their weights.

    Tables with values hand those of process 0 to the shards, and their memory is given back. Tables on the meta device
    exist nowhere in full: each process initialises its share. A sharder with a true attribute ``carries_weights``
    sees to the values itself. All processes call this.

    Args:
        root: The module.
        found: Its collections, by path.
        plan: TorchRec's plan for them.
        defaults: Sharders for those that have none of their own.
        device: Device of this process.

    Raises:
        ShardingError: If a table's weights are also used elsewhere in the module, or the root itself is a collection.
    """
    _check_untied(root, found)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    seed = shared_seed()
    done: dict[int, nn.Module] = {}
    for path, shardable in found.items():
        if not path:
            raise ShardingError("the module itself is a collection: put it inside a LightningModule")
        module = shardable.module
        if id(module) not in done:
            sharder = shardable.sharder or defaults[type(module)]
            module_plan: Any = plan.get_plan_for_module(path)
            # TorchRec's constructors write into the dictionaries that users hand to apply_optimizer_in_backward.
            for weight in module.parameters():
                if hasattr(weight, "_optimizer_kwargs"):
                    weight._optimizer_kwargs = [dict(kwargs) for kwargs in weight._optimizer_kwargs]
            on_meta = any(weight.is_meta for weight in module.parameters())
            with _left_alone(module) if on_meta and shardable.sharder is None else nullcontext():
                sharded: nn.Module = sharder.shard(module, module_plan, env, device, path)
            mark_sharded(sharded)
            if not getattr(sharder, "carries_weights", False):
                _carry_weights(module, sharded, path, seed)
            done[id(module)] = sharded
        parent, _, name = path.rpartition(".")
        root.get_submodule(parent).register_module(name, done[id(module)])
    # Modules that are not sharded themselves may have cached the layout of unsharded rows.
    reset_module_states_post_sharding(root)


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Keep TorchRec from copying tables on the meta device, whatever the module says of its device."""
    device = module.__dict__.get("_device")
    try:
        if device is not None:
            module.__dict__["_device"] = torch.device("meta")
        yield
    finally:
        if device is not None:
            module.__dict__["_device"] = device


def _carry_weights(module: nn.Module, sharded: nn.Module, path: str, seed: int) -> None:
    initialisers = table_initialisers(module)
    whole = {key: (name, tensor) for key, name, tensor in table_tensors(module.state_dict(keep_vars=True))}
    shards = {key: tensor for key, _, tensor in table_tensors(sharded.state_dict())}
    if whole.keys() != shards.keys():
        raise ShardingError(
            f"the tables of {path!r} have other keys when they are sharded: {sorted(whole.keys() ^ shards.keys())}; a"
            " sharder that keeps values elsewhere sets carries_weights = True"
        )
    for key, (name, tensor) in whole.items():
        pieces = local_pieces(shards[key])
        if tensor.is_meta:
            initialise_pieces(initialisers[name], pieces, f"{path}.{name}", seed)
        else:
            scatter_rows(tensor, pieces)
    for _, tensor in whole.values():
        free_table(tensor)


def _check_untied(root: nn.Module, found: Mapping[str, Shardable]) -> None:
    """Refuse tables whose weights are also used elsewhere: they would go on with values of their own."""
    inside = {id(module) for shardable in found.values() for module in shardable.module.modules()}
    tables = {
        id(parameter): f"{path}.{name}"
        for path, shardable in found.items()
        for name, parameter in shardable.module.named_parameters()
    }
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items() if id(module) not in inside else ():
            if parameter is not None and id(parameter) in tables:
                raise ShardingError(
                    f"{f'{path}.{name}'.lstrip('.')} is the same tensor as table {tables[id(parameter)]}, which is to"
                    " be spread over processes: give one of them weights of its own"
                )


def materialise(root: nn.Module, device: torch.device) -> None:
    """Allocate what is still on the meta device after sharding, and initialise it by ``reset_parameters``.

    Args:
        root: The module.
        device: Where to allocate.

    Raises:
        ShardingError: If a module on the meta device has no ``reset_parameters``.

    Example:
        >>> linear = nn.Linear(2, 2, device="meta")
        >>> materialise(linear, torch.device("cpu"))
        >>> linear.weight.device.type
        'cpu'
    """
    for path, module in root.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if not any(tensor is not None and tensor.is_meta for tensor in own):
            continue
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None:
            raise ShardingError(
                f"{path or type(module).__name__} is on the meta device and a {type(module).__name__} has no"
                " reset_parameters that could give it values: build it on a real device, or define that method"
            )
        module.to_empty(device=device, recurse=False)
        reset()
