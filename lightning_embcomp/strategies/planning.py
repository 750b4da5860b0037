"""Decide which process holds which part of which table."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan, ShardingPlanner, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from lightning_embcomp.strategies.discovery import Shardable
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.options import COLUMN_WISE, column_width, fused_optimizer_name
from lightning_embcomp.strategies.sharders import SharderByModule

PlannerFactory = Callable[..., ShardingPlanner]
"""Builds a planner: called with ``topology``, ``constraints``, ``batch_size`` and ``storage_reservation``."""

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
_DENSE = EmbeddingComputeKernel.DENSE.value
_FUSED = EmbeddingComputeKernel.FUSED.value
_RESERVED = 0.15
"""Part of the memory left to the dense model, activations and buffers."""
_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan must keep to.

    Args:
        sharding: Allowed sharding types by a glob of table names; the first glob that matches counts.
        fused_params: Arguments for tables without an optimizer of their own.
        hbm: Device memory per process, in bytes; what the device has by default.
        ddr: Host memory per process, in bytes; the machine's over its processes by default.
        batch_size: Rows of a batch per process, for estimates of time and memory; 512 by default.
    """

    sharding: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_params: Mapping[str, Any] | None = None
    hbm: int | None = None
    ddr: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table as the planner sees it."""

    path: str
    name: str
    weight: torch.Tensor
    sharder: ModuleSharder[nn.Module]
    own: bool  # sharded by a default sharder, whose kernels are ours to choose
    optimizer: str | None  # name of the fused optimizer

    @property
    def fused(self) -> bool:
        """Whether the optimizer runs inside the backward pass."""
        return self.optimizer is not None


def make_plan(
    root: nn.Module,
    found: Mapping[str, Shardable],
    defaults: Mapping[type[nn.Module], ModuleSharder[nn.Module]],
    device: torch.device,
    settings: PlanSettings,
    planner: ShardingPlanner | PlannerFactory | None = None,
) -> ShardingPlan:
    """Plan the collections of a module; all processes call it, and get the same plan.

    Tables with a fused optimizer get its kernel. Others, trained from ``configure_optimizers``, get the dense kernel,
    whose gradients reach it: FBGEMM's fused one would train them with an SGD that nobody asked for. The planner does
    not count those gradients, which take as much memory as the weights.

    Args:
        root: The module.
        found: Its collections, by path.
        defaults: Sharders for those that have none of their own.
        device: Device of this process.
        settings: What the plan must keep to.
        planner: A planner, or what builds one; TorchRec's by default.

    Raises:
        ShardingError: If a setting matches no table or asks for what cannot work, or no plan fits.
    """
    tables = list(_tables(found, defaults, settings.fused_params))
    _check_kernels(tables, device)
    constraints = _constraints(tables, device.type, settings)
    if not isinstance(planner, ShardingPlanner):
        factory: PlannerFactory = planner or EmbeddingShardingPlanner
        built = factory(
            topology=_topology(device, settings),
            constraints=constraints,
            batch_size=settings.batch_size or _BATCH,
            # TorchRec's default one guesses from the first embedding collection, and warns; a plain share is clear.
            storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED),
        )
    elif settings.sharding:
        raise ShardingError(
            "sharding=... has no effect beside a planner that is already built: give it to the planner as constraints,"
            " or give the planner's class instead of an instance"
        )
    else:
        built = planner
    sharders = _by_type(found, defaults)
    plan, failure = None, None
    if dist.get_rank() == 0:
        try:
            plan = built.plan(root, sharders)
        except PlannerError as error:
            # Planners of others say themselves what is missing.
            failure = _no_plan(error, tables, device) if type(error) is PlannerError else str(error)
        except Exception as error:
            # Told to the others before it is raised here: TorchRec's collective_plan would leave them waiting.
            dist.broadcast_object_list([None, f"process 0 could not plan: {error!r}"], src=0)
            raise
    shared: list[Any] = [plan, failure]
    dist.broadcast_object_list(shared, src=0)
    plan, failure = shared
    if plan is None:
        raise ShardingError(failure)
    _finish(plan, tables)
    return plan


def fused_tables(
    found: Mapping[str, Shardable],
    defaults: Mapping[type[nn.Module], ModuleSharder[nn.Module]],
    fused_params: Mapping[str, Any] | None,
) -> list[str]:
    """Names of the tables whose optimizer runs inside the backward pass."""
    return [table.name for table in _tables(found, defaults, fused_params) if table.fused]


def check_earlier_plans(
    plans: Mapping[str, Mapping[str, ParameterSharding]], settings: PlanSettings, others: Mapping[str, Any]
) -> None:
    """Refuse settings that come too late for collections which an earlier run has sharded.

    Args:
        plans: Plans of these collections, by path.
        settings: What is asked for now.
        others: Plans of collections that were sharded under these settings.

    Raises:
        ShardingError: If a table is sharded in another way than is asked for, or a setting matches no table.
    """
    choices = {name: choice for plan in plans.values() for name, choice in plan.items()}
    names = [*choices, *(name for plan in others.values() for name in plan)]
    for pattern in settings.sharding if plans else ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise _matches_nothing(pattern, names)
    for name, choice in choices.items():
        asked = _asked(name, settings)
        if asked is not None and choice.sharding_type not in asked:
            raise ShardingError(
                f"sharding asks for {', '.join(asked)} for table {name!r}, which an earlier run of this module has"
                f" sharded {choice.sharding_type}: tables stay as they are. Leave the setting out, or save a checkpoint"
                " and load it into a new module"
            )


def _asked(name: str, settings: PlanSettings) -> tuple[str, ...] | None:
    """Sharding types that were asked for a table."""
    return next((kinds for glob, kinds in settings.sharding.items() if fnmatch.fnmatchcase(name, glob)), None)


def _matches_nothing(pattern: str, names: Iterable[str]) -> ShardingError:
    return ShardingError(f"sharding={{{pattern!r}: ...}} matches no table; there are {', '.join(names)}")


def _tables(
    found: Mapping[str, Shardable],
    defaults: Mapping[type[nn.Module], ModuleSharder[nn.Module]],
    fused_params: Mapping[str, Any] | None,
) -> Iterable[_Table]:
    for path, shardable in found.items():
        sharder = shardable.sharder or defaults[type(shardable.module)]
        own = shardable.sharder is None
        for name, weight in sharder.shardable_parameters(shardable.module).items():
            optimizer = fused_optimizer_name(shardable.module, weight, fused_params if own else None)
            yield _Table(path=path, name=name, weight=weight, sharder=sharder, own=own, optimizer=optimizer)


def _check_kernels(tables: Iterable[_Table], device: torch.device) -> None:
    """Refuse tables without a kernel: FBGEMM's dense one for single rows damages memory on the CPU."""
    for table in tables:
        if device.type == "cpu" and table.own and not table.fused and table.sharder.module_type is EmbeddingCollection:
            raise ShardingError(
                f"table {table.name!r} of the EmbeddingCollection {table.path!r} has no optimizer of its own, and"
                " FBGEMM has no kernel on the CPU that hands gradients of single rows to configure_optimizers: give it"
                " one (apply_optimizer_in_backward, or fused_params={'optimizer': 'sgd', 'learning_rate': ...})"
            )


def _constraints(tables: Iterable[_Table], device_type: str, settings: PlanSettings) -> dict[str, ParameterConstraints]:
    tables = list(tables)
    names = [table.name for table in tables]
    for pattern in settings.sharding:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise _matches_nothing(pattern, names)
    constraints: dict[str, ParameterConstraints] = {}
    for table in tables:
        asked = _asked(table.name, settings)
        kinds = _allowed_types(table, asked, device_type, settings)
        if table.name in constraints:  # the planner knows names only
            kinds = [kind for kind in kinds if kind in (constraints[table.name].sharding_types or ())]
        cut = asked is not None and any(kind in COLUMN_WISE for kind in kinds)
        constraints[table.name] = ParameterConstraints(
            sharding_types=kinds,
            # TorchRec's planner takes no dense kernel but for copies; `_finish` puts it where it belongs.
            compute_kernels=[_FUSED, _DENSE] if table.own and not table.fused else None,
            min_partition=column_width(table.weight.shape[1], dist.get_world_size()) if cut else None,
        )
    return constraints


def _allowed_types(table: _Table, asked: tuple[str, ...] | None, device_type: str, settings: PlanSettings) -> list[str]:
    offered = table.sharder.sharding_types(device_type)
    if asked is not None:
        missing = [kind for kind in asked if kind not in offered]
        if missing:
            raise ShardingError(
                f"sharding: table {table.name!r} cannot be sharded {missing[0]} on {device_type} as a"
                f" {table.sharder.module_type.__name__}; it can be {', '.join(offered)}"
            )
        if table.own and table.fused and _DATA_PARALLEL in asked:
            raise ShardingError(
                f"sharding: table {table.name!r} cannot be data_parallel, since its copies would ignore the fused"
                " optimizer without a word. Choose another sharding type, or train it from configure_optimizers"
            )
        return list(asked)
    left_out = {ShardingType.GRID_SHARD.value}
    if device_type == "cpu":
        left_out.add(ShardingType.TABLE_ROW_WISE.value)
    if table.fused:
        left_out.add(_DATA_PARALLEL)
        if "rowwise" in (table.optimizer or "").lower().replace("_", ""):
            # Every column shard would keep an accumulator of its own, and train differently than the whole table.
            left_out.update(COLUMN_WISE)
    return [kind for kind in offered if kind not in left_out]


def _topology(device: torch.device, settings: PlanSettings) -> Topology:
    processes = get_local_size(dist.get_world_size())
    hbm = settings.hbm
    if device.type == "cuda":
        hbm = hbm or torch.cuda.get_device_properties(device).total_memory
    elif hbm is not None:
        raise ShardingError(f"hbm={hbm} has no effect on {device.type}, whose tables are in host memory: give ddr")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=dist.get_world_size(), local_world_size=processes),
        HardwareConfig(hbm_cap_bytes=hbm, ddr_cap_bytes=settings.ddr or memory // processes),
        KernelConfig(compute_device=device.type),
    )


def _by_type(
    found: Mapping[str, Shardable], defaults: Mapping[type[nn.Module], ModuleSharder[nn.Module]]
) -> list[ModuleSharder[nn.Module]]:
    """One sharder for each type, as the planner wants them."""
    sharders: dict[type[nn.Module], dict[int, ModuleSharder[nn.Module]]] = {}
    for shardable in found.values():
        kind = type(shardable.module)
        sharders.setdefault(kind, {})[id(shardable.module)] = shardable.sharder or defaults[kind]
    return [
        next(iter(by_module.values()))
        if len({id(sharder) for sharder in by_module.values()}) == 1
        else SharderByModule(kind, by_module)
        for kind, by_module in sharders.items()
    ]


def _finish(plan: ShardingPlan, tables: Iterable[_Table]) -> None:
    """Choose the kernels of tables without a fused optimizer, and refuse what a planner may have chosen wrongly."""
    for table in tables:
        module_plan = plan.get_plan_for_module(table.path)
        if module_plan is None or table.name not in module_plan:
            raise ShardingError(f"the planner has left out table {table.name!r} of {table.path!r}")
        choice = module_plan[table.name]
        if not table.own:
            continue
        if table.fused and (choice.compute_kernel == _DENSE or choice.sharding_type == _DATA_PARALLEL):
            raise ShardingError(
                f"the planner has placed table {table.name!r} as {choice.sharding_type} with the"
                f" {choice.compute_kernel!r} kernel, which ignores its fused optimizer: constrain it to other types"
            )
        if not table.fused:
            if choice.compute_kernel not in (_FUSED, _DENSE):
                raise ShardingError(
                    f"the planner has given table {table.name!r} the {choice.compute_kernel!r} kernel, which updates"
                    " rows in the backward pass, but the table has no optimizer for it: give it one"
                    " (apply_optimizer_in_backward, or fused_params), or constrain it to compute_kernels=['fused']"
                )
            choice.compute_kernel = _DENSE


def _no_plan(error: PlannerError, tables: Iterable[_Table], device: torch.device) -> str:
    largest = max(tables, key=lambda table: table.weight.numel())
    size = largest.weight.numel() * largest.weight.element_size()
    option = "hbm" if device.type == "cuda" else "ddr"
    return (
        f"no plan places the tables on {dist.get_world_size()} processes. The largest, {largest.name!r}, needs"
        f" {size / 1e9:.3g} GB for weights alone. More processes, a larger {option}=..., row_wise among its allowed"
        f" sharding types, or compressed tables can help. TorchRec says: {str(error).strip()}"
    )
