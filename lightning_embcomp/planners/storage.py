"""Bytes of shards of compressed tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator, _calculate_storage_specific_sizes
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Shard,
    SharderDataMap,
    ShardingOption,
    Storage,
    Topology,
)

from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.rules import DATA_PARALLEL, ENGINE_TYPES, as_table_wise, fused_optimizer, name_of

_STATE_BYTES = 4  # optimizer state is float32


class CompressedStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate of bytes, with what compressed tables take in the place of plain weights and state.

    What ids and pooled rows take on their way stays as it is. Tables that are not compressed keep TorchRec's estimate
    to the byte; note that it leaves out optimizer state of fused collections and of ``fused_params``.

    Args:
        topology: Ranks and their memory.
        constraints: TorchRec's constraints.
        footprints: What compressed tables take, by unique name.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        *,
        footprints: Mapping[str, TableFootprint],
    ) -> None:
        super().__init__(topology, constraints)
        self._footprints = footprints

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fill in the bytes of every shard.

        Args:
            sharding_options: Options, changed in place.
            sharder_data_map: TorchRec's facts about the sharders.
        """
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            footprint = self._footprints.get(name_of(option), TableFootprint())
            if footprint.is_plain or option.sharding_type not in ENGINE_TYPES:
                continue
            if option.sharding_type == DATA_PARALLEL:
                # Every copy is trained on the samples of all ranks, so that as much is on its way as for one shard.
                whole = as_table_wise(option)
                super().estimate([whole], sharder_data_map)
                self._compress(whole, footprint)
                for shard in option.shards:
                    shard.storage = copy.copy(whole.shards[0].storage)
            else:
                self._compress(option, footprint)

    def _compress(self, option: ShardingOption, footprint: TableFootprint) -> None:
        on_device = self._topology.compute_device != "cpu"
        for shard, plain in zip(option.shards, _plain_bytes(option), strict=True):
            needed = shard_bytes(option, shard, footprint)
            assert shard.storage is not None
            if needed is not None:
                more = needed - plain
                shard.storage += Storage(hbm=more if on_device else 0, ddr=0 if on_device else more)


def shard_bytes(option: ShardingOption, shard: Shard, footprint: TableFootprint) -> int | None:
    """Bytes of weights, optimizer state, router and statistics of a shard.

    Args:
        option: The table and how it is sharded.
        shard: Rows and columns of the shard.
        footprint: What the table takes.

    Returns:
        Bytes; None if the shard cuts through a column chunk, so that it cannot exist.
    """
    rows, dim = option.tensor.shape
    part_rows, columns = shard.size
    chunks = footprint.chunks_of(dim, shard.offset[1], columns)
    if chunks is None:
        return None
    stored = footprint.stored(rows, shard.offset[0], part_rows, chunks)
    weights = part_rows * columns * sum(stored) / len(stored)
    stored_rows = part_rows * max(stored)
    optimizer = fused_optimizer(option.module[1], option.tensor)
    needed = (
        weights * option.tensor.element_size()
        + _state_numbers(optimizer, option.name, weights, stored_rows) * _STATE_BYTES
        + stored_rows * footprint.state_bytes
        + part_rows * footprint.row_bytes
    )
    return math.ceil(round(needed, 3))  # shares are floating-point numbers


def _state_numbers(
    optimizer: type[torch.optim.Optimizer] | None, table: str, weights: float, stored_rows: float
) -> float:
    if optimizer is None:
        return 0.0
    spec = FusedOptimizerSpec.from_torch(optimizer, {}, table)
    return spec.per_row * stored_rows + spec.per_weight * weights


def _plain_bytes(option: ShardingOption) -> list[int]:
    """Weights and optimizer state of each shard as TorchRec counted them."""
    found: list[int] = _calculate_storage_specific_sizes(
        storage=option.tensor.numel() * option.tensor.element_size(),
        shape=option.tensor.shape,
        shard_sizes=[shard.size for shard in option.shards],
        sharding_type=option.sharding_type,
        optimizer_class=getattr(option.tensor, "_optimizer_classes", [None])[0],
    )
    return found
