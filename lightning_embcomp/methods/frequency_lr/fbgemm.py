"""FBGEMM's ``COUNTER_SGD`` under the engines of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.counter_sgd import use_counter_sgd
from lightning_embcomp.engine.host import HeldTable, group_of
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.methods.frequency_lr.agreement import refused_together
from lightning_embcomp.methods.frequency_lr.functional import decile_means
from lightning_embcomp.methods.frequency_lr.module import SAMPLED_ROWS, hosts_of

_COUNTER = "row_counter"


class FbgemmRates:
    """Lets FBGEMM's ``COUNTER_SGD`` train the rows of some modules.

    Args:
        tables: The tables: all of each module.
        half_life: Steps after which a step counts half; None for no end.
        warmup_steps: Steps of row-wise Adagrad at the start.
        owner: Name of the callback, for messages.

    Raises:
        UnsupportedOptimizerError: If the fused optimizer of a table is not SGD.
        ValueError: If a module holds tables that are not to change.
    """

    def __init__(self, tables: Sequence[HeldTable], *, half_life: int | None, warmup_steps: int, owner: str) -> None:
        self.tables = list(tables)
        self.group = group_of(tables)
        hosts = hosts_of(tables)
        self.engines = [engine for host in hosts for engine in host.engines]
        with refused_together(self.group):
            for host in hosts:
                mine = {table.index: table.name for table in tables if table.host is host}
                missing = [table.name for t, table in enumerate(host.logical_tables) if t not in mine]
                if missing:
                    raise ValueError(
                        f"{owner}: backend='fbgemm' changes the optimizer of a whole embedding collection, but table"
                        f" {missing[0]!r} is not selected: select it too, or put it into a collection of its own"
                    )
                use_counter_sgd(host, mine[0], half_life=half_life, warmup_steps=warmup_steps)

    def rate_deciles(self, rates: Sequence[float]) -> Tensor:
        """As :meth:`~lightning_embcomp.methods.frequency_lr.module.FrequencyRates.rate_deciles`."""
        rate_of = {
            id(shard.engine): rate for table, rate in zip(self.tables, rates, strict=True) for shard in table.shards
        }
        found = [torch.empty(0, 2, dtype=torch.float64)]
        for engine in self.engines:
            for state, speaks in zip(engine.get_optimizer_state(), self._spoken_for(engine), strict=True):
                stride = max(1, state[_COUNTER].numel() // SAMPLED_ROWS)
                counter = state[_COUNTER][::stride].cpu()[speaks[::stride]].double()
                counter = counter[counter > 0]
                found.append(torch.stack([counter, rate_of[id(engine)] * counter.rsqrt()], 1))
        counts, effective = torch.cat(self.group.gather_uneven(torch.cat(found))).unbind(1)
        return decile_means(counts, effective) if counts.numel() else torch.empty(0)

    def _spoken_for(self, engine: RoutedEmbeddings) -> list[Tensor]:
        """Of each row class of an engine, the rows that no other process reports."""
        found = [torch.zeros(rows.rows, dtype=torch.bool) for rows in engine.classes]
        for shard in (shard for table in self.tables for shard in table.primary_shards if shard.engine is engine):
            for c, mine in enumerate(found):
                first, last = engine.class_span(shard.index, c)
                mine[first:last] = True
        return found

    def bytes_per_row(self) -> float:
        """As :meth:`~lightning_embcomp.methods.frequency_lr.module.FrequencyRates.bytes_per_row`."""
        held = 0
        for shard in (shard for table in self.tables for shard in table.counted_shards):
            for c, state in enumerate(shard.engine.get_optimizer_state()):
                first, last = shard.engine.class_span(shard.index, c)
                held += sum(tensor[first:last].numel() * tensor.element_size() for tensor in state.values())
        return int(self.group.sum(torch.tensor([held]))) / sum(table.logical.rows for table in self.tables)
