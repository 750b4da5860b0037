"""TorchRec's planner, for tables that are compressed while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from lightning_embcomp.planners.diagnosis import diagnose, prunable
from lightning_embcomp.planners.enumerator import CompressedEnumerator
from lightning_embcomp.planners.footprint import TableFootprint

RESERVED = 0.15
"""Share of device memory left to the dense model, activations and buffers, as in TorchRec."""


class NoPlanError(PlannerError):
    """The tables do not fit; the message says by how much, and what to change."""


class CompressionAwarePlanner(EmbeddingShardingPlanner):
    """TorchRec's ``EmbeddingShardingPlanner`` with footprints of compressed tables.

    Without footprints it finds TorchRec's plan, but never copies a table with a fused optimizer to all ranks
    (``data_parallel``), where TorchRec would drop that optimizer without a word. With footprints, memory is credited
    where shards are physically smaller: column chunks that are cut, and rows that are not stored, with their optimizer
    state. Router and statistics are charged to every shard.

    Args:
        topology: Ranks and their memory; by default what TorchRec finds in the running process group.
        batch_size: Samples per rank; TorchRec's 512 by default.
        storage_reservation: Memory kept free; by default :data:`RESERVED` of device memory.
        constraints: TorchRec's constraints, by a table's own name.
        footprints: What compressed tables take, by unique name (path of the collection, and the table's own name).
        suggest: Whether to try, where there is no plan, which pruning target would fit; takes some further plans.
        **kwargs: TorchRec's other arguments, such as ``proposer``, ``partitioner``, ``stats`` and ``debug``.

    Raises:
        ValueError: If an ``enumerator`` is given, which would not know the footprints.

    Example:
        >>> import torch
        >>> from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        >>> from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> user = EmbeddingBagConfig(name="user", num_embeddings=10**6, embedding_dim=64, feature_names=["user"])
        >>> model = nn.Sequential(EmbeddingBagCollection(tables=[user], device=torch.device("meta")))
        >>> topology = TopologyFactory.create_topology(
        ...     TrainerConfig(world_size=2), HardwareConfig(ddr_cap_bytes=10**8), KernelConfig(compute_device="cpu"))
        >>> halved = {"0.user": TableFootprint(live=(0.5,))}
        >>> planner = CompressionAwarePlanner(topology, footprints=halved, stats=[], constraints={
        ...     "user": ParameterConstraints(sharding_types=["table_wise"])})
        >>> planner.plan(model, [EmbeddingBagCollectionSharder()]).plan["0"]["user"].ranks
        Traceback (most recent call last):
        ...
        lightning_embcomp.planners.planner.NoPlanError: no plan places the tables on 2 ranks...
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        storage_reservation: StorageReservation | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        footprints: Mapping[str, TableFootprint] | None = None,
        suggest: bool = True,
        **kwargs: Any,  # noqa: ANN401 - TorchRec's
    ) -> None:
        if "enumerator" in kwargs:
            raise ValueError("an enumerator of your own would not know the footprints: leave it out")
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            storage_reservation=storage_reservation or FixedPercentageStorageReservation(percentage=RESERVED),
            constraints=constraints,
            **kwargs,
        )
        self.footprints = dict(footprints or {})
        self._suggest = suggest
        self._enumerator = CompressedEnumerator(self._topology, self._batch_size, self.footprints, constraints)

    @property
    def chosen(self) -> list[ShardingOption]:
        """The chosen way of sharding each table, with bytes and time of every shard; empty before :meth:`plan`."""
        return list(self._best_plan or [])

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Find the fastest plan that fits.

        Args:
            module: The module; its tables may be on the meta device.
            sharders: TorchRec's sharders.

        Returns:
            TorchRec's plan.

        Raises:
            NoPlanError: If none fits.
        """
        try:
            return super().plan(module, sharders)
        except PlannerError as error:
            reserved = self._storage_reservation.last_reserved_topology
            if reserved is None or isinstance(error, NoPlanError):
                raise
            try:
                options = self._enumerator.enumerate(module, sharders)
            except PlannerError:
                raise error from None  # about one table, and clear by itself
            target = self._fitting_target(options, module, sharders) if self._suggest else None
            message = diagnose(options, self._topology, reserved, self.footprints, target)
            raise NoPlanError(message, error.error_type) from error

    def _fitting_target(
        self, options: list[ShardingOption], module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> float | None:
        """The smallest of some pruning targets under which there is a plan."""
        for target, footprints in prunable(options, self.footprints):
            trial = CompressionAwarePlanner(
                self._topology,
                self._batch_size,
                self._storage_reservation,
                self._constraints,
                footprints,
                suggest=False,
                stats=[],
                debug=False,
            )
            try:
                trial.plan(module, sharders)
            except PlannerError:
                continue
            return target
        return None
