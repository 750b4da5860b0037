"""Collections that the user's module has sharded with TorchRec: their lookups are exchanged for ``COUNTER_SGD``."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.sharded_counter_sgd import (
    ShardedCollection,
    counter_state,
    find_sharded,
    learning_rate,
    replace_sharded,
    restore_steps,
    shard_with_counter_sgd,
    steps_done,
)
from lightning_embcomp.methods.frequency_lr.functional import decile_means
from lightning_embcomp.tables import HostView, TableView, find_hosts, select_tables

_SAMPLED_ROWS = 1 << 14


def build_sharded(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Call ``configure_model`` where several processes run and the module has no tables yet: it may shard them."""
    if callable(getattr(trainer.strategy, "shard", None)):
        return  # the strategy shards, once the tables have engines
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if trainer.world_size > 1 and distributed and is_overridden("configure_model", pl_module):
        if not find_hosts(pl_module) and not find_sharded(pl_module):
            pl_module.configure_model()


def select_sharded(root: nn.Module, patterns: Sequence[str], who: str) -> list[ShardedCollection]:
    """Sharded collections whose tables the patterns choose.

    Args:
        root: Module to search.
        patterns: Globs, as in :func:`~lightning_embcomp.tables.select_tables`.
        who: Name of the caller for errors.

    Raises:
        ValueError: If the patterns choose a part of a collection, or tables that are sharded and others that are not.
    """
    # Those that have engines are not the module's own.
    sharded = [each for each in find_sharded(root) if not isinstance(each.module, EngineHost)]
    if not sharded:
        return []
    hosts = [
        HostView(path=each.path, module=each.module, tables=tuple(_view(each, name) for name in each.tables))
        for each in sharded
    ]
    chosen = {table.name for table in select_tables([*find_hosts(root), *hosts], patterns, who)}
    found = [each for each in sharded if any(each.table_path(name) in chosen for name in each.tables)]
    paths = {each.table_path(name) for each in found for name in each.tables}
    if found and paths != chosen:
        odd = sorted(paths ^ chosen)[0]
        raise ValueError(
            f"{who}: the optimizer of a sharded collection changes as a whole, and sharded and other tables need a"
            f" callback each, but the globs draw a line at table {odd!r}"
        )
    return found


def _view(collection: ShardedCollection, name: str) -> TableView:
    config = next(config for config in collection.module._embedding_bag_configs if config.name == name)
    return TableView(host=collection.path, key=name, rows=config.num_embeddings, dim=config.embedding_dim, weight=None)


class ShardedRates:
    """Puts ``COUNTER_SGD`` under sharded collections, and reads its counters.

    Args:
        root: The module that holds them.
        collections: The collections.
        half_life: Steps after which a step counts half; None for no end.
        warmup_steps: Steps of row-wise Adagrad at the start.
    """

    def __init__(
        self, root: nn.Module, collections: Sequence[ShardedCollection], *, half_life: int | None, warmup_steps: int
    ) -> None:
        self.modules = []
        for collection in collections:
            module = shard_with_counter_sgd(collection, half_life=half_life, warmup_steps=warmup_steps)
            replace_sharded(root, collection, module)
            self.modules.append(module)

    def holds(self, collections: Sequence[ShardedCollection]) -> bool:
        """Whether these collections are the ones that were put in place."""
        return [collection.module for collection in collections] == self.modules

    def steps_done(self) -> int:
        """Steps of the fused optimizers."""
        return max(steps_done(module) for module in self.modules)

    def restore_steps(self, steps: int) -> None:
        """Go on counting steps."""
        for module in self.modules:
            restore_steps(module, steps)

    def rate_deciles(self) -> Tensor:
        """Mean rate in the popularity deciles of the rows of this process that were seen, from a sample."""
        counts, rates = [], []
        for module in self.modules:
            for state in counter_state(module):
                counter = state["row_counter"].flatten()
                counter = counter[:: max(1, counter.numel() // _SAMPLED_ROWS)].double()
                counts.append(counter[counter > 0])
                rates.append((learning_rate(module) or 0.0) * counts[-1].rsqrt())
        if not counts or not sum(c.numel() for c in counts):
            return torch.empty(0)
        return decile_means(torch.cat(counts), torch.cat(rates))

    def bytes_per_row(self) -> float:
        """Bytes of state per local row."""
        states = [state for module in self.modules for state in counter_state(module)]
        rows = sum(state["row_counter"].numel() for state in states)
        held = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
        return held / max(1, rows)
