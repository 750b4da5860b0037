"""Refuse sharding plans that the codecs cannot serve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.types import ParameterSharding, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

_SUMMED = {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}
SUMS_REASON = (
    "pooling rows that lie on several processes ends in a reduce-scatter, which adds what it sends, and {codec} "
    "cannot be added before it is decoded: shard table-wise or column-wise, or choose fp32, fp16 or bf16 in both "
    "directions"
)


class UnsupportedShardingError(ValueError):
    """A sharding that codecs of embedding collectives cannot serve."""


def check_plan(plan: ShardingPlan, module: nn.Module, *, codec: str | None, row_dim: int | None) -> None:
    """Check that the codecs can serve a plan, for every batch size.

    Args:
        plan: Of all embedding modules.
        module: What was planned, before or after sharding: the paths of the plan lead to the embedding modules.
        codec: Name of a codec whose encoding cannot be summed; None if there is none.
        row_dim: Columns per row; None if no codec works on rows.

    Raises:
        UnsupportedShardingError: With module, table and what to change.
    """
    for path, module_plan in plan.plan.items():
        shardings: Mapping[str, ParameterSharding] = module_plan
        found = module.get_submodule(path)
        sequence = isinstance(found, (EmbeddingCollection, ShardedEmbeddingCollection))
        where = f"module {path!r}" if path else "the module"
        for table, sharding in shardings.items():
            if codec is not None and not sequence and sharding.sharding_type in _SUMMED:
                reason = SUMS_REASON.format(codec=f"what {codec!r} sends")
                raise UnsupportedShardingError(
                    f"table {table!r} of {where} is sharded {sharding.sharding_type}: {reason}"
                )
        if row_dim is not None:
            sums = _sent_columns(shardings, {} if sequence else _features(found), each_table=sequence)
            _check_rows(sums, row_dim, where)


def _check_rows(sums: Mapping[str, int], row_dim: int, where: str) -> None:
    for what, columns in sums.items():
        if columns % row_dim:
            raise UnsupportedShardingError(
                f"{what} of {where} sends {columns} columns per sample, not a multiple of row_dim={row_dim}: the "
                f"largest row_dim that fits this module is {math.gcd(*sums.values())}"
            )


def _sent_columns(
    shardings: Mapping[str, ParameterSharding], features: Mapping[str, int], each_table: bool
) -> dict[str, int]:
    """Columns sent per sample by every process and sharding type, which share one exchange; or by every table shard."""
    sums: dict[str, int] = defaultdict(int)
    for table, sharding in shardings.items():
        kind = sharding.sharding_type
        if kind == ShardingType.DATA_PARALLEL.value or kind in _SUMMED and not each_table:
            continue
        for shard in getattr(sharding.sharding_spec, "shards", ()):
            columns = shard.shard_sizes[1]
            if each_table:
                sums[f"table {table!r}"] = math.gcd(sums[f"table {table!r}"], columns)
            else:
                rank = shard.placement.rank()
                sums[f"rank {rank} ({kind})"] += columns * features.get(table, 1)
    return dict(sums)


def _features(module: nn.Module) -> dict[str, int]:
    """Features per table, each of which sends an embedding of its own."""
    if isinstance(module, EmbeddingBagCollection):
        configs = module.embedding_bag_configs()
    else:
        configs = getattr(module, "_embedding_bag_configs", [])  # of sharded collections
    return {config.name: len(config.feature_names) for config in configs}
