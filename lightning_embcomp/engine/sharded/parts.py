"""Which parts of its tables a process holds, by TorchRec's plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import PoolingType

from lightning_embcomp.compat import copies_leave_ddp_out
from lightning_embcomp.engine.layout import LogicalTable, Shard

ROW_WISE = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
COLUMN_WISE = (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value)
SUPPORTED = (ShardingType.TABLE_WISE.value, ShardingType.DATA_PARALLEL.value, *ROW_WISE, *COLUMN_WISE)


class UnsupportedShardingError(ValueError):
    """A plan shards a table in a way that engines cannot follow."""


@dataclass(frozen=True)
class LocalTable:
    """A part of a table in a lookup.

    Args:
        table: Index of the whole table in its collection.
        logical: The part.
        features: Names of the features that look it up, as many as the lookup has outputs for it.
        mean: Whether the lookup averages bags; shards by rows sum, and TorchRec divides later.
    """

    table: int
    logical: LogicalTable
    features: tuple[str, ...]
    mean: bool


def check_plan(tables: Sequence[LogicalTable], plan: Mapping[str, ParameterSharding]) -> None:
    """Refuse plans that engines cannot follow.

    Raises:
        UnsupportedShardingError: With the table, and what to change.
    """
    for table in tables:
        sharding = plan[table.name]
        if sharding.sharding_type not in SUPPORTED:
            raise UnsupportedShardingError(
                f"table {table.name!r} is planned {sharding.sharding_type}, which the engine cannot follow: allow"
                f" {', '.join(SUPPORTED)} only"
            )
        copied = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        if copied and not copies_leave_ddp_out(ShardedEmbeddingBagCollection):
            raise UnsupportedShardingError(
                f"table {table.name!r} is planned data_parallel, but copies of compressed tables need TorchRec 1.7 or"
                " newer: allow other sharding types for it"
            )
        for shard in getattr(sharding.sharding_spec, "shards", None) or () if table.chunks > 1 else ():
            first, width = shard.shard_offsets[1], shard.shard_sizes[1]
            if first % table.chunk_width or width % table.chunk_width:
                raise UnsupportedShardingError(
                    f"table {table.name!r} is planned with columns {first} to {first + width} on one rank, which cuts"
                    f" through its chunks of {table.chunk_width} columns: use more chunks, shard it by rows or as a"
                    f" whole, or set min_partition to a multiple of {table.chunk_width}"
                )


def local_tables(
    configs: Sequence[GroupedEmbeddingConfig],
    tables: Sequence[LogicalTable],
    numbers: Sequence[int],
    sharding_type: str,
) -> list[LocalTable]:
    """Parts that one lookup of this process holds, in the order of its features.

    Args:
        configs: TorchRec's groups of the lookup.
        tables: Whole tables of the collection.
        numbers: Number of each whole table's first row in the collection.
        sharding_type: TorchRec's name.
    """
    index = {table.name: t for t, table in enumerate(tables)}
    found: list[LocalTable] = []
    for config in configs:
        for part in config.embedding_tables:
            t = index[part.name]
            logical = _logical(part, tables[t], numbers[t], sum(local.table == t for local in found))
            mean = part.pooling == PoolingType.MEAN and sharding_type not in ROW_WISE
            found.append(LocalTable(t, logical, tuple(part.embedding_names), mean))
    return found


def _logical(part: ShardedEmbeddingTable, whole: LogicalTable, number: int, before: int) -> LogicalTable:
    row, column = part.local_metadata.shard_offsets if part.local_metadata is not None else (0, 0)
    uncut = whole.chunks == 1
    shard = Shard(rows=whole.rows, dim=whole.dim, first_row=row, first_column=column, uncut=uncut, number=number + row)
    return LogicalTable(
        name=whole.name + (f"@{column}" if before else ""),
        rows=part.local_rows,
        dim=part.local_cols,
        chunks=1 if uncut else part.local_cols // whole.chunk_width,
        layout=whole.layout,
        shard=shard,
    )
