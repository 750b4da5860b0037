"""Move whole tables between ranks while training, where the lookups of one rank hold the others up."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fused_embeddingbag import ShardedFusedEmbeddingBagCollection
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
    ShardMetadata,
)
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.strategies.errors import ShardingError
from lightning_embcomp.strategies.fused_state import load_rates, rates
from lightning_embcomp.strategies.optimizers import FusedRates, fused_optimizers
from lightning_embcomp.strategies.strategy import TorchRecStrategy


@dataclass
class _Moving:
    """A collection whose tables can be moved.

    Args:
        module: The sharded collection.
        features: Features of each table.
        counts: Ids of each table since the last check, in this process.
    """

    module: ShardedEmbeddingBagCollection
    features: dict[str, list[str]]
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook."""
        features = args[0] if args else kwargs["features"]
        if not (module.training and torch.is_grad_enabled() and isinstance(features, KeyedJaggedTensor)):
            return
        per_feature = dict(zip(features.keys(), features.length_per_key(), strict=True))
        for table, names in self.features.items():
            self.counts[table] = self.counts.get(table, 0) + sum(per_feature.get(name, 0) for name in names)


class ReshardOnImbalance(pl.Callback):
    """Moves tables to other ranks when one rank looks up far more than the average.

    A plan is made from expected ids per sample. This callback counts them, and where the largest load of a rank is
    more than ``tolerance`` times the mean, places the tables anew, the most used first, without putting more bytes on
    any rank than the fullest one holds now. Values and optimizer state move along; training goes on as it would have.
    The load of a table is its ids times its columns.

    Works on collections whose tables are all sharded ``table_wise`` with an optimizer in the backward pass, which is
    what TorchRec can move. Compressed tables do not move: plan them by what they take, or resume from a checkpoint
    with another plan.

    Logged at every check: ``reshard/imbalance`` (largest over mean load) and ``reshard/moved`` (tables).

    Args:
        every_n_steps: Batches between checks; the ids of all of them count.
        tolerance: Largest over mean load that is left alone, above 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> ReshardOnImbalance(every_n_steps=500).tolerance
        1.2
    """

    def __init__(self, every_n_steps: int = 1000, tolerance: float = 1.2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"ReshardOnImbalance: every_n_steps must be at least 1, not {every_n_steps}")
        if not tolerance > 1:
            raise ValueError(f"ReshardOnImbalance: tolerance must be above 1, not {tolerance}")
        self.every_n_steps = every_n_steps
        self.tolerance = tolerance
        self._moving: dict[str, _Moving] = {}
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # Sharded modules belong to their process; Lightning hangs methods of the module on the callback for logging.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**kept, "_moving": {}, "_handles": []}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that tables can be moved, and start to count.

        Raises:
            ShardingError: With the reason and what to change.
        """
        strategy = trainer.strategy
        if not isinstance(strategy, TorchRecStrategy):
            raise ShardingError("ReshardOnImbalance moves sharded tables: train with strategy='torchrec'")
        check_hash_seed()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, KeyedOptimizer):
                raise ShardingError(
                    "ReshardOnImbalance: configure_optimizers returns an optimizer of TorchRec, which would go on with"
                    " the tables of before: leave the fused optimizers out of it"
                )
        self._moving = {path: _movable(path, module) for path, module in strategy.sharded_modules.items()}
        self._handles = [m.module.register_forward_pre_hook(m.count, with_kwargs=True) for m in self._moving.values()]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever training_step returns
        batch: Any,  # noqa: ANN401 - whatever the loader yields
        batch_idx: int,
    ) -> None:
        """Compare the loads of the ranks now and then, and move tables."""
        if (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps:
            return
        tables = [(path, name) for path, moving in self._moving.items() for name in moving.features]
        configs = {
            (path, config.name): config
            for path, moving in self._moving.items()
            for config in moving.module._embedding_bag_configs
        }
        counted = torch.tensor([self._moving[path].counts.get(name, 0) for path, name in tables], dtype=torch.float64)
        device = trainer.strategy.root_device
        ids = counted.to(device)
        dist.all_reduce(ids)
        loads = [count * configs[key].embedding_dim for count, key in zip(ids.tolist(), tables, strict=True)]
        sizes = [configs[key].num_embeddings * configs[key].embedding_dim for key in tables]
        present = [_rank(self._moving[path].module.module_sharding_plan[name]) for path, name in tables]
        for moving in self._moving.values():
            moving.counts.clear()
        imbalance = _imbalance(loads, present, dist.get_world_size())
        wanted = present
        if imbalance > self.tolerance:
            wanted = place(loads, sizes, present, dist.get_world_size())
        moves = {key: rank for key, rank, now in zip(tables, wanted, present, strict=True) if rank != now}
        for path in sorted({path for path, _ in moves}):  # in the same order on every process
            strategy = trainer.strategy
            assert isinstance(strategy, TorchRecStrategy)
            move_tables(strategy, path, {name: rank for (p, name), rank in moves.items() if p == path})
        pl_module.log_dict({"reshard/imbalance": imbalance, "reshard/moved": float(len(moves))})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._moving = [], {}


def place(loads: Sequence[float], sizes: Sequence[float], present: Sequence[int], ranks: int) -> list[int]:
    """Place tables so that loads are even: the most used first, each on the rank with the least load that has room.

    Args:
        loads: Load of each table.
        sizes: Bytes, or anything in proportion to them.
        present: Rank of each table now; no rank is given more than the fullest one holds.
        ranks: Number of ranks.

    Returns:
        Rank of each table; ``present`` where that is no worse, or there is no room.

    Example:
        >>> place([8, 7, 1, 0], [1, 1, 1, 1], present=[0, 0, 1, 1], ranks=2)
        [0, 1, 1, 0]
    """
    held = [sum(size for size, rank in zip(sizes, present, strict=True) if rank == r) for r in range(ranks)]
    room, load, found = [max(held)] * ranks, [0.0] * ranks, list(present)
    for table in sorted(range(len(loads)), key=lambda t: (-loads[t], -sizes[t])):
        fitting = [r for r in range(ranks) if sizes[table] <= room[r]]
        if not fitting:
            return list(present)
        # Of equal ranks the one that has the table already, so that nothing moves without need.
        best = min(fitting, key=lambda r: (load[r], r != present[table], -room[r]))
        found[table] = best
        load[best] += loads[table]
        room[best] -= sizes[table]
    better = _imbalance(loads, found, ranks) < _imbalance(loads, present, ranks)
    return found if better else list(present)


def move_tables(strategy: TorchRecStrategy, path: str, ranks: Mapping[str, int]) -> None:
    """Move whole tables of a sharded collection to other ranks; all processes call it.

    Args:
        strategy: The strategy that has sharded them.
        path: Path of the collection.
        ranks: New rank of each table to move, by name.

    Raises:
        ShardingError: If TorchRec cannot move them.
    """
    module = _movable(path, strategy.sharded_modules[path]).module
    check_hash_seed()
    device = strategy.root_device
    plan: Any = module.module_sharding_plan
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rates({path: module}))
    changed = {name: _on_rank(plan[name], rank, device) for name, rank in ranks.items()}
    module.update_shards(changed, ShardingEnv.from_process_group(dist.group.WORLD), device)
    # TorchRec 1.8 forgets this: where tables lay in the order of the features, they would get those of others.
    module._has_features_permute = True
    # New tables start with the rate of their first step, and count from zero.
    load_rates({path: module}, {table: entry for of_process in found for table, entry in of_process.items()})
    strategy._rates = FusedRates(fused_optimizers(strategy.sharded_modules.values(), strategy.optimizers))


def check_hash_seed() -> None:
    """Refuse to move tables where processes would not find each other's messages.

    Raises:
        ShardingError: Under gloo without a fixed hash seed, by which TorchRec numbers messages.
    """
    if dist.get_backend() == "gloo" and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ShardingError(
            "moving tables under gloo needs the same hash seed in all processes: start them with PYTHONHASHSEED=0 in"
            " the environment"
        )


def _movable(path: str, module: nn.Module) -> _Moving:
    if isinstance(module, EngineHost):
        raise ShardingError(
            f"the tables of {path!r} are compressed, and do not move while training: plan by what they take, or save a"
            " checkpoint and resume with another plan"
        )
    if type(module) not in (ShardedEmbeddingBagCollection, ShardedFusedEmbeddingBagCollection):
        raise ShardingError(
            f"{path!r} is a {type(module).__name__}; TorchRec moves tables of sharded EmbeddingBagCollections only"
        )
    assert isinstance(module, ShardedEmbeddingBagCollection)
    plan: Any = module.module_sharding_plan
    for name, choice in plan.items():
        if choice.sharding_type != ShardingType.TABLE_WISE.value:
            raise ShardingError(
                f"table {name!r} of {path!r} is sharded {choice.sharding_type}; TorchRec moves whole tables: allow"
                f" table_wise only (sharding={{'*': 'table_wise'}})"
            )
        if choice.compute_kernel == EmbeddingComputeKernel.DENSE.value:
            raise ShardingError(
                f"table {name!r} of {path!r} is trained from configure_optimizers, whose optimizer would go on with the"
                " table of before: give it an optimizer in the backward pass"
            )
    configs: Any = module._embedding_bag_configs
    return _Moving(module, {config.name: list(config.feature_names) for config in configs})


def _on_rank(choice: ParameterSharding, rank: int, device: torch.device) -> ParameterSharding:
    """The same sharding with its one shard on another rank."""
    moved = copy.deepcopy(choice)
    [shard] = getattr(choice.sharding_spec, "shards")  # noqa: B009 - other specs have none
    moved.ranks = [rank]
    moved.sharding_spec = EnumerableShardingSpec(
        [
            ShardMetadata(
                shard_offsets=list(shard.shard_offsets),
                shard_sizes=list(shard.shard_sizes),
                placement=placement(device.type, rank, get_local_size(dist.get_world_size())),
            )
        ]
    )
    return moved


def _rank(choice: ParameterSharding) -> int:
    assert choice.ranks is not None
    return int(choice.ranks[0])


def _imbalance(loads: Sequence[float], placed: Sequence[int], ranks: int) -> float:
    """Largest over mean load of the ranks; 1 where there is none."""
    per_rank = [sum(load for load, at in zip(loads, placed, strict=True) if at == r) for r in range(ranks)]
    total = sum(per_rank)
    return max(per_rank) * ranks / total if total else 1.0
