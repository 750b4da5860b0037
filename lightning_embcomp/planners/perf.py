"""Time of lookups in shards of compressed tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    Shard,
    SharderDataMap,
    ShardingOption,
    Topology,
)

from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.rules import DATA_PARALLEL, ENGINE_TYPES, as_table_wise, name_of


class CompressedPerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimate of time, with the bytes that lookups in compressed tables read.

    A lookup reads the stored columns of its row, and a block of the router. Everything else, above all what travels
    between ranks, is as for the plain table.

    Args:
        topology: Ranks and their bandwidths.
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
        """Fill in the time of every shard, in milliseconds per step.

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
                self._copies(option, footprint, sharder_data_map)
                continue
            factors = [lookup_factor(option, shard, footprint) for shard in option.shards]
            found: dict[float, list[Perf]] = {}
            for value in {factor for factor in factors if factor is not None}:
                self._scaled(value).estimate([option], sharder_data_map)
                found[value] = [shard.perf for shard in option.shards if shard.perf is not None]
            for i, (shard, factor) in enumerate(zip(option.shards, factors, strict=True)):
                if factor is not None:
                    shard.perf = found[factor][i]

    def _copies(self, option: ShardingOption, footprint: TableFootprint, sharder_data_map: SharderDataMap) -> None:
        """Time of copies of a table, each of which is trained on the gathered samples of all ranks."""
        whole = as_table_wise(option)
        factor = lookup_factor(whole, whole.shards[0], footprint)
        assert factor is not None
        self._scaled(factor).estimate([whole], sharder_data_map)
        one = whole.shards[0].perf
        assert one is not None
        for shard in option.shards:
            shard.perf = Perf(
                fwd_compute=one.fwd_compute / self._topology.world_size,
                fwd_comms=0.0,
                bwd_compute=one.fwd_compute + one.bwd_compute,
                bwd_comms=one.bwd_comms + one.input_dist_comms,
            )

    def _scaled(self, factor: float) -> Any:  # noqa: ANN401 - TorchRec's estimator behind its estimator
        """TorchRec's estimator, with the bytes that lookups read multiplied by a factor."""
        config = EmbeddingPerfEstimatorFactory.create(
            DEFAULT_PERF_ESTIMATOR, topology=self._topology, constraints=self._constraints
        ).config
        scaled = copy.copy(config)
        scaled.coefficients = _scale_lookups(config.coefficients, factor)
        return EmbeddingPerfEstimatorFactory.create_with_config(
            scaled, topology=self._topology, constraints=self._constraints
        )


def lookup_factor(option: ShardingOption, shard: Shard, footprint: TableFootprint) -> float | None:
    """Bytes that a lookup in a compressed shard reads, over those of the plain one.

    Args:
        option: The table and how it is sharded.
        shard: Rows and columns of the shard.
        footprint: What the table takes.

    Returns:
        The factor, above 1 where the router costs more than pruning saves; None if the shard cannot exist.
    """
    rows, dim = option.tensor.shape
    chunks = footprint.chunks_of(dim, shard.offset[1], shard.size[1])
    if chunks is None:
        return None
    plain = shard.size[1] * option.tensor.element_size()
    return footprint.read(rows, chunks) + footprint.lookup_bytes / plain


def _scale_lookups(coefficients: Any, factor: float) -> Any:  # noqa: ANN401 - several dataclasses of TorchRec
    """Copy of TorchRec's coefficients with every ``lookup_size_multiplier`` multiplied."""
    changed: dict[str, Any] = {}
    for field in fields(coefficients):
        value = getattr(coefficients, field.name)
        if field.name == "lookup_size_multiplier":
            changed[field.name] = value * factor
        elif is_dataclass(value) and not isinstance(value, type):
            changed[field.name] = _scale_lookups(value, factor)
    return replace(coefficients, **changed)
