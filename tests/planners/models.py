"""Small collections and machines for planning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from lightning_embcomp.planners import CompressionAwarePlanner, TableFootprint
from lightning_embcomp.planners.options import Machine
from lightning_embcomp.strategies.sharders import BagSharder

with warnings.catch_warnings():  # torch.distributed.optim scripts its optimizers
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

MIB = 2**20


def bags(
    sizes: Mapping[str, tuple[int, int]],
    optimizer: type[torch.optim.Optimizer] | None = RowWiseAdagrad,
    device: str = "meta",
) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"])
        for name, (rows, dim) in sizes.items()
    ]
    module = EmbeddingBagCollection(tables=configs, device=torch.device(device))
    if optimizer is not None:
        apply_optimizer_in_backward(optimizer, module.parameters(), {"lr": 0.1})
    return module


def constraints(names: Sequence[str], *types: str) -> dict[str, ParameterConstraints]:
    return {
        name: ParameterConstraints(sharding_types=list(types), compute_kernels=["fused", "dense"]) for name in names
    }


def planner(
    topology: Topology, footprints: Mapping[str, TableFootprint] | None = None, **kwargs: Any
) -> CompressionAwarePlanner:
    return CompressionAwarePlanner(topology, footprints=footprints, stats=[], debug=False, **kwargs)


def torchrec_planner(topology: Topology, **kwargs: Any) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology, storage_reservation=FixedPercentageStorageReservation(0.15), stats=[], debug=False, **kwargs
    )


def options(module: nn.Module, machine: Machine, footprints: Mapping[str, TableFootprint]) -> dict[str, ShardingOption]:
    """Ways of sharding the one table of a module, by sharding type."""
    found = planner(machine.topology(), footprints, batch_size=8)._enumerator.enumerate(module, [BagSharder()])
    return {option.sharding_type: option for option in found}
