"""State of frequency-aware learning rates over the engines of a model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.engine.counters import (
    CounterConflictError,
    CounterSettings,
    agree_on_time,
    share_counters,
)
from lightning_embcomp.engine.host import EngineHost, HeldTable, TableShard, group_of
from lightning_embcomp.engine.rates import KnownFrequencies, RunningRates, TableRates, set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.count import decode
from lightning_embcomp.methods.frequency_lr.agreement import refused_together
from lightning_embcomp.methods.frequency_lr.config import Form
from lightning_embcomp.methods.frequency_lr.frequencies import FrequencyError
from lightning_embcomp.methods.frequency_lr.functional import decile_means, lookup_frequency

FREQUENCY = "frequency"
"""Name of known frequencies among what is attached to an engine."""
SAMPLED_ROWS = 1 << 14
"""Rows that logged rates are computed from."""


class FrequencyRates:
    """Gives the rows of some tables step sizes that fall with their frequency.

    Every process works on its shards. Engines of a collection count together, also those of this process that hold none
    of the tables.

    Args:
        tables: The tables.
        form: Where the frequency comes from.
        counter: What is counted and how it is stored; of known frequencies only how they are stored.
        max_rate: Largest rate of a row; None for no limit.
        owner: Name of the callback, for messages.

    Raises:
        CounterConflictError: If another method counts otherwise.
        UnsupportedOptimizerError: If the fused optimizer of a table is not SGD.
        ValueError: If another process raised one of these.
    """

    def __init__(
        self,
        tables: Sequence[HeldTable],
        *,
        form: Form,
        counter: CounterSettings,
        max_rate: float | None,
        owner: str,
    ) -> None:
        self.tables = list(tables)
        self.form: Form = form
        self.counter = counter
        self.cap = math.inf if max_rate is None else max_rate
        self.group = group_of(tables)
        self._sources: dict[int, RunningRates | KnownFrequencies] = {}
        self._rates: list[tuple[RoutedEmbeddings, int, TableRates, str]] = []
        hosts = hosts_of(tables)
        with refused_together(self.group):
            for engine in {id(engine): engine for host in hosts for engine in host.engines}.values():
                self._use_engine(engine, owner)
            self.put_on()
        if form != "known":
            agree_on_time([host.engines for host in hosts], self.group)

    def _use_engine(self, engine: RoutedEmbeddings, owner: str) -> None:
        mine = [(shard, table) for table in self.tables for shard in table.shards if shard.engine is engine]
        source = self._source(engine, [shard.index for shard, _ in mine], owner)
        self._sources[id(engine)] = source
        self._rates += [(engine, shard.index, TableRates(source, self.cap), table.name) for shard, table in mine]

    def put_on(self) -> None:
        """Let the rows of the tables follow their multipliers."""
        for engine, index, rates, name in self._rates:
            set_rates(engine, index, rates, name)

    def take_off(self) -> None:
        """Let the rows of the tables learn at the rate of their optimizer again; counters stay."""
        for engine, index, _, _ in self._rates:
            engine.counting.rates.pop(index, None)
            engine.counting.changed()

    def _source(self, engine: RoutedEmbeddings, tables: Sequence[int], owner: str) -> RunningRates | KnownFrequencies:
        if self.form != "known":
            horizon = 1 if self.form == "horizon" else None  # the true one is set when it is known
            return RunningRates(share_counters(engine, tables, self.counter, owner), horizon)
        log = self.counter.encoding == "log"
        held = engine.attached.get(FREQUENCY)
        if isinstance(held, KnownFrequencies):
            found = held
        else:
            found = KnownFrequencies((t.rows for t in engine.tables), log=log, device=engine.options.device)
            engine.attach(FREQUENCY, found)
        if found.log != log:
            raise CounterConflictError(
                f"{owner} and another callback on the same embedding collection store known frequencies differently:"
                " use the same counter.encoding, or put their tables into collections of their own"
            )
        one = torch.ones((), dtype=torch.float64)
        for t in tables:
            found.set_table(t, one.expand(engine.tables[t].rows), one)
        return found

    def set_horizon(self, steps: int) -> None:
        """Set the number of steps of the run; has no effect on the form that needs none."""
        for source in self._sources.values():
            if self.form != "running":
                source.horizon = steps

    def set_occurrences(self, table: HeldTable, counts: Tensor, steps_per_epoch: float) -> None:
        """Set known frequencies; all processes call it, for the same tables in the same order.

        Args:
            table: The table.
            counts: Occurrences of each row of the whole table per epoch, over all processes, ``(rows,)``.
            steps_per_epoch: Steps that an epoch has.

        Raises:
            FrequencyError: If the processes know different numbers.
        """
        self._check_same(table, counts, steps_per_epoch)
        presence = self.counter.counted == "presence"
        frequency = lookup_frequency(counts, steps_per_epoch, presence=presence)
        unit = frequency.min()
        for shard in table.shards:
            source = self._sources[id(shard.engine)]
            assert isinstance(source, KnownFrequencies)
            source.set_table(shard.index, frequency[shard.first_row :][: shard.logical.rows], unit)
            shard.engine.counting.changed()

    def _check_same(self, table: HeldTable, counts: Tensor, steps_per_epoch: float) -> None:
        if self.group.size == 1:
            return
        digest = zlib.crc32(counts.double().contiguous().numpy().data, zlib.crc32(repr(steps_per_epoch).encode()))
        if self.group.gather(torch.tensor([digest])).unique().numel() > 1:
            raise FrequencyError(
                f"frequencies of table {table.name!r} differ between the processes: every process must count the ids of"
                " all of them (not of its part of the data), and plan the same number of batches per epoch"
            )

    def multipliers(self, shard: TableShard, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Counts as they are stored, and multipliers before the cap, of some rows; float64 ``(n,)`` of the host each.

        Args:
            shard: Part of a table.
            rows: Rows of the part.
        """
        source = self._sources[id(shard.engine)]
        counters = source.stored(shard.index)
        stored = decode(counters[rows.to(counters.device)].cpu())
        return stored, float(np.ravel(source.gains(np.array([shard.index])))[0]) * stored.clamp(
            min=source.floor()
        ).rsqrt()

    def rate_deciles(self, rates: Sequence[float]) -> Tensor:
        """Mean rate in the popularity deciles of a sample of the rows that were seen, over all processes.

        Args:
            rates: Rate of each table before multipliers; of tables of which this process holds nothing, any number.

        Returns:
            float64 tensor, from the rarest tenth to the most frequent; empty before any row was seen.
        """
        stride = max(1, sum(table.logical.rows for table in self.tables) // SAMPLED_ROWS)
        sampled = [-(-table.logical.rows // stride) for table in self.tables]
        found = torch.zeros(2, sum(sampled), dtype=torch.float64)
        for table, rate, part in zip(self.tables, rates, found.split(sampled, 1), strict=True):
            for shard in table.primary_shards:
                first = -shard.first_row % stride
                rows = torch.arange(first, max(first, shard.logical.rows), stride)
                stored, multiplier = self.multipliers(shard, rows)
                at = (rows + shard.first_row) // stride
                # Comparable between tables: what a row is looked up, by the multiplier that follows from it.
                part[0, at] = torch.where(stored > 0, multiplier**-2, 0.0)
                part[1, at] = (rate * multiplier).clamp(max=self.cap)
        popularity, effective = self.group.sum(found)
        seen = popularity > 0
        return decile_means(popularity[seen], effective[seen]) if bool(seen.any()) else torch.empty(0)

    def bytes_per_row(self) -> float:
        """Bytes that the method holds per row of the tables over all processes, from the storages."""
        held = 0
        for table in self.tables:
            for shard in table.counted_shards:
                stored = self._sources[id(shard.engine)].stored(shard.index)
                held += stored.numel() * stored.element_size()
        return int(self.group.sum(torch.tensor([held]))) / sum(table.logical.rows for table in self.tables)


def hosts_of(tables: Sequence[HeldTable]) -> list[EngineHost]:
    """The modules that hold some tables, each once."""
    return list({id(table.host): table.host for table in tables}.values())
