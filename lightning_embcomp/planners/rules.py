"""Which ways of sharding a table keep what was asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.types import ShardingType

from lightning_embcomp.planners.footprint import TableFootprint

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
ENGINE_TYPES = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    DATA_PARALLEL,
)
"""Sharding types of compressed tables."""


def table_name(path: str, name: str) -> str:
    """Unique name of a table: path of its collection, and its own name.

    Example:
        >>> table_name("model.bags", "user"), table_name("", "user")
        ('model.bags.user', 'user')
    """
    return ".".join(part for part in (path, name) if part)


def name_of(option: ShardingOption) -> str:
    """Unique name of an option's table."""
    return table_name(option.path, option.name)


def fused_optimizer(module: nn.Module, weight: torch.Tensor) -> type[torch.optim.Optimizer] | None:
    """Optimizer that runs inside the backward pass of a table; None if nothing on the table says so.

    Args:
        module: Its collection.
        weight: Its weights.
    """
    classes = getattr(weight, "_optimizer_classes", None)
    if classes:
        found: type[torch.optim.Optimizer] = classes[0]
        return found
    of_collection: Any = getattr(module, "optimizer_type", None)
    return of_collection() if callable(of_collection) else None


def refusal(option: ShardingOption, footprint: TableFootprint, has_fused_params: bool) -> str | None:
    """Why a way of sharding a table must not be planned.

    Args:
        option: Table, sharding type, kernel and shards.
        footprint: What the table takes.
        has_fused_params: Whether the sharder has a fused optimizer for tables without one of their own.

    Returns:
        The reason; None if there is none.
    """
    if footprint.is_plain:
        fused = has_fused_params or fused_optimizer(option.module[1], option.tensor) is not None
        ignored = option.sharding_type == DATA_PARALLEL and fused
        return "copies of a data_parallel table ignore the fused optimizer" if ignored else None
    if option.sharding_type not in ENGINE_TYPES:
        return f"compressed tables are sharded {', '.join(ENGINE_TYPES)} only"
    if option.compute_kernel not in (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value):
        return f"compressed tables are not kept in memory by the {option.compute_kernel} kernel"
    dim = option.tensor.shape[1]
    for shard in option.shards:
        if shard.size[1] < dim and not footprint.prefix:
            return "rows that store any subset of their columns cannot be cut by columns"
        if footprint.chunks_of(dim, shard.offset[1], shard.size[1]) is None:
            return f"its shards of {shard.size[1]} columns cut through column chunks of {dim // len(footprint.live)}"
    return None


def is_second_choice(option: ShardingOption, footprint: TableFootprint) -> bool:
    """Whether a way of sharding a compressed table is worse than others without need.

    A row-wise optimizer has one accumulator per row, but every column part would keep its own. One part that holds all
    columns is table-wise by another name, under which some methods refuse it.
    """
    optimizer = fused_optimizer(option.module[1], option.tensor)
    rowwise = optimizer is not None and "rowwise" in optimizer.__name__.lower()
    by_columns = any(shard.size[1] < option.tensor.shape[1] for shard in option.shards)
    all_columns = option.sharding_type == ShardingType.COLUMN_WISE.value and len(option.shards) == 1
    return not footprint.is_plain and (all_columns or (rowwise and by_columns))


def as_table_wise(option: ShardingOption) -> ShardingOption:
    """The same table as one shard, for estimates."""
    whole = copy.deepcopy(option)
    whole.sharding_type = ShardingType.TABLE_WISE.value
    whole.compute_kernel = EmbeddingComputeKernel.FUSED.value
    whole.shards = [Shard(size=list(option.tensor.shape), offset=[0, 0])]
    return whole
