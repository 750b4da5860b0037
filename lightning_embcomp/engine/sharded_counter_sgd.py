"""FBGEMM's ``COUNTER_SGD`` for tables that TorchRec has sharded already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lightning_embcomp.engine.counter_sgd import counter_sgd_fused_params
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError

_FUSED_KERNEL = "fused"


@dataclass(frozen=True)
class ShardedCollection:
    """A sharded embedding bag collection of a model.

    Args:
        path: Its path from the root.
        module: The collection.
    """

    path: str
    module: ShardedEmbeddingBagCollection

    @property
    def tables(self) -> tuple[str, ...]:
        """Table names."""
        return tuple(config.name for config in self.module._embedding_bag_configs)

    def table_path(self, table: str) -> str:
        """Unique name of a table."""
        return f"{self.path}.{table}".lstrip(".")


def find_sharded(root: nn.Module) -> list[ShardedCollection]:
    """Collections that TorchRec has sharded, in the order of ``named_modules``."""
    return [
        ShardedCollection(path, module)
        for path, module in root.named_modules()
        if isinstance(module, ShardedEmbeddingBagCollection)
    ]


def shard_with_counter_sgd(
    collection: ShardedCollection, *, half_life: int | None = None, warmup_steps: int = 0
) -> ShardedEmbeddingBagCollection:
    """Build the collection anew, with the same sharding and weights, and ``COUNTER_SGD`` fused in the place of SGD.

    Every process must call it. Counters are part of the fused optimizer's state, and follow their rows through it.

    Args:
        collection: The collection; trained by fused SGD, in shards of any kind but data-parallel.
        half_life: As in :func:`~lightning_embcomp.engine.counter_sgd.counter_sgd_fused_params`.
        warmup_steps: As in :func:`~lightning_embcomp.engine.counter_sgd.counter_sgd_fused_params`.

    Returns:
        The new module, to be put in the place of the old one.

    Raises:
        UnsupportedOptimizerError: If a table is not trained by fused SGD.
    """
    old = collection.module
    for table, sharding in old.module_sharding_plan.items():
        if sharding.compute_kernel != _FUSED_KERNEL:
            raise UnsupportedOptimizerError(
                f"table {collection.table_path(table)!r} is sharded as {sharding.sharding_type} with the"
                f" {sharding.compute_kernel!r} kernel, which takes no notice of fused optimizers: every process holds"
                " the table and an optimizer of configure_optimizers trains it. Shard it table_wise, row_wise or"
                " column_wise with compute_kernel='fused', or leave it out of the callback"
            )
    rates = {_sgd_rate(emb_module, collection) for emb_module in _fused_modules(old)}
    if len(rates) > 1:
        raise UnsupportedOptimizerError(
            f"the tables of {collection.path!r} have different learning rates {sorted(rates)}: put each rate into a"
            " collection of its own"
        )
    params = counter_sgd_fused_params(
        _agreed(rates.pop() if rates else None), half_life=half_life, warmup_steps=warmup_steps
    )
    plain = EmbeddingBagCollection(
        tables=old._embedding_bag_configs, is_weighted=old._is_weighted, device=torch.device("meta")
    )
    new = ShardedEmbeddingBagCollection(
        module=plain,
        table_name_to_parameter_sharding=dict(old.module_sharding_plan),
        env=old._env,
        fused_params=params,
        device=old._device,
        qcomm_codecs_registry=old.qcomm_codecs_registry,
        module_fqn=old._module_fqn,
    )
    new.load_state_dict(old.state_dict())
    new.train(old.training)
    return new


def replace_sharded(root: nn.Module, collection: ShardedCollection, module: ShardedEmbeddingBagCollection) -> None:
    """Put a collection in the place of another."""
    parent, _, name = collection.path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def counter_state(module: ShardedEmbeddingBagCollection) -> list[dict[str, torch.Tensor]]:
    """Local ``COUNTER_SGD`` state of this process, one dict of row-wise tensors per local table."""
    return [state for emb_module in _fused_modules(module) for state in emb_module.get_optimizer_state()]


def steps_done(module: ShardedEmbeddingBagCollection) -> int:
    """Steps of the fused optimizer, which its time stamps refer to; 0 if this process holds no shard."""
    return max((int(emb_module.iter_cpu) for emb_module in _fused_modules(module)), default=0)


def restore_steps(module: ShardedEmbeddingBagCollection, steps: int) -> None:
    """Go on counting steps: TorchRec's checkpoints hold the time stamps of rows, but not the time."""
    for emb_module in _fused_modules(module):
        for name in ("iter", "iter_cpu"):
            counter = getattr(emb_module, name, None)
            if counter is not None:
                counter.fill_(steps)


def learning_rate(module: ShardedEmbeddingBagCollection) -> float | None:
    """Rate of the fused optimizer; None if this process holds no shard."""
    return next((float(emb_module.get_learning_rate()) for emb_module in _fused_modules(module)), None)


def _fused_modules(module: ShardedEmbeddingBagCollection) -> Iterator[Any]:
    for lookup in module._lookups:
        modules: Sequence[Any] = getattr(lookup, "module", lookup)._emb_modules
        for kernel in modules:
            if hasattr(kernel._emb_module, "get_learning_rate"):
                yield kernel._emb_module


def _sgd_rate(emb_module: Any, collection: ShardedCollection) -> float:  # noqa: ANN401
    if emb_module.optimizer != EmbOptimType.EXACT_SGD:
        raise UnsupportedOptimizerError(
            f"the tables of {collection.path!r} are trained by fused {emb_module.optimizer.value}; COUNTER_SGD takes"
            " the place of SGD only. Shard them with fused_params={'optimizer': EmbOptimType.EXACT_SGD, ...} (and tune"
            " the rate anew), or leave them out"
        )
    return float(emb_module.get_learning_rate())


def _agreed(mine: float | None) -> float:
    """The rate that the processes have; those without a shard do not know it."""
    if not torch.distributed.is_initialized():
        assert mine is not None
        return mine
    rates: list[float | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(rates, mine)
    return next(rate for rate in rates if rate is not None)
