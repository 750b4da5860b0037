"""State of frequency-aware learning rates over the engines of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.engine.counter_sgd import use_counter_sgd
from lightning_embcomp.engine.counters import CounterConflictError, CounterSettings, share_counters
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.rates import KnownFrequencies, RunningRates, TableRates, set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.count import decode
from lightning_embcomp.methods.frequency_lr.config import Form
from lightning_embcomp.methods.frequency_lr.functional import decile_means, lookup_frequency

FREQUENCY = "frequency"
"""Name of known frequencies among what is attached to an engine."""
_SAMPLED_ROWS = 1 << 14


@dataclass(frozen=True)
class RatedTable:
    """A table whose rows get step sizes of their own.

    Args:
        engine: The engine that stores it.
        index: Its index there.
        name: Its name for people.
    """

    engine: RoutedEmbeddings
    index: int
    name: str

    @property
    def logical(self) -> LogicalTable:
        """The logical table."""
        return self.engine.tables[self.index]


class FrequencyRates:
    """Gives the rows of some tables step sizes that fall with their frequency.

    Args:
        tables: The tables.
        form: Where the frequency comes from.
        counter: What is counted and how it is stored; of known frequencies only how they are stored.
        max_rate: Largest rate of a row; None for no limit.
        owner: Name of the callback, for messages.

    Raises:
        CounterConflictError: If another method counts otherwise.
        UnsupportedOptimizerError: If the fused optimizer of a table is not SGD.
    """

    def __init__(
        self,
        tables: Sequence[RatedTable],
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
        self._sources: dict[tuple[int, int], RunningRates | KnownFrequencies] = {}
        for engine in {id(table.engine): table.engine for table in self.tables}.values():
            mine = [table for table in self.tables if table.engine is engine]
            source = self._source(engine, [table.index for table in mine], owner)
            for table in mine:
                self._sources[id(engine), table.index] = source
                set_rates(engine, table.index, TableRates(source, self.cap), table.name)

    def _source(self, engine: RoutedEmbeddings, tables: Sequence[int], owner: str) -> RunningRates | KnownFrequencies:
        if self.form != "known":
            horizon = 1 if self.form == "horizon" else None  # the true one is set when it is known
            return RunningRates(share_counters(engine, tables, self.counter, owner), horizon)
        log = self.counter.encoding == "log"
        held = engine.attached.get(FREQUENCY)
        if isinstance(held, KnownFrequencies):
            found = held
        else:
            found = KnownFrequencies((t.rows for t in engine.tables), log=log)
            engine.attach(FREQUENCY, found)
        if found.log != log:
            raise CounterConflictError(
                f"{owner} and another callback on the same embedding collection store known frequencies differently:"
                " use the same counter.encoding, or put their tables into collections of their own"
            )
        for t in tables:
            found.set_table(t, torch.ones(engine.tables[t].rows, dtype=torch.float64))
        return found

    def set_horizon(self, steps: int) -> None:
        """Set the number of steps of the run; has no effect on the form that needs none."""
        for source in self._sources.values():
            if self.form != "running":
                source.horizon = steps

    def set_occurrences(self, table: RatedTable, counts: Tensor, steps_per_epoch: float) -> None:
        """Set known frequencies.

        Args:
            table: The table.
            counts: Occurrences of each row per epoch, ``(rows,)``.
            steps_per_epoch: Steps that an epoch has.
        """
        source = self._sources[id(table.engine), table.index]
        assert isinstance(source, KnownFrequencies)
        presence = self.counter.counted == "presence"
        source.set_table(table.index, lookup_frequency(counts, steps_per_epoch, presence=presence))
        table.engine.counting.changed()

    def multipliers(self, table: RatedTable, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Counts as they are stored, and multipliers before the cap, of some rows; float64 ``(n,)`` each."""
        source = self._sources[id(table.engine), table.index]
        stored = decode(source.stored(table.index)[rows])
        return stored, float(np.ravel(source.gains(np.array([table.index])))[0]) * stored.clamp(
            min=source.floor()
        ).rsqrt()

    def rate_deciles(self, rates: Sequence[float]) -> Tensor:
        """Mean rate in the popularity deciles of a sample of the rows that were seen.

        Args:
            rates: Rate of each table before multipliers.

        Returns:
            float64 tensor, from the rarest tenth to the most frequent; empty before any row was seen.
        """
        total = sum(table.logical.rows for table in self.tables)
        stride = max(1, total // _SAMPLED_ROWS)
        counts, found = [], []
        for table, rate in zip(self.tables, rates, strict=True):
            rows = torch.arange(0, table.logical.rows, stride)
            stored, multiplier = self.multipliers(table, rows)
            # Comparable between tables: what a row is looked up, by the multiplier that follows from it.
            counts.append(torch.where(stored > 0, multiplier**-2, 0.0))
            found.append((rate * multiplier).clamp(max=self.cap))
        popularity, effective = torch.cat(counts), torch.cat(found)
        seen = popularity > 0
        return decile_means(popularity[seen], effective[seen]) if bool(seen.any()) else torch.empty(0)

    def bytes_per_row(self) -> float:
        """Bytes that the method holds per logical row, from the storages."""
        held = rows = 0
        for table in self.tables:
            stored = self._sources[id(table.engine), table.index].stored(table.index)
            held += stored.numel() * stored.element_size()
            rows += table.logical.rows
        return held / rows


class FbgemmRates:
    """Lets FBGEMM's ``COUNTER_SGD`` train the rows of some engines.

    Args:
        tables: The tables: all of each engine.
        half_life: Steps after which a step counts half; None for no end.
        warmup_steps: Steps of row-wise Adagrad at the start.
        owner: Name of the callback, for messages.

    Raises:
        UnsupportedOptimizerError: If the fused optimizer of a table is not SGD.
        ValueError: If an engine holds tables that are not to change.
    """

    def __init__(self, tables: Sequence[RatedTable], *, half_life: int | None, warmup_steps: int, owner: str) -> None:
        self.tables = list(tables)
        self.engines = list({id(table.engine): table.engine for table in tables}.values())
        for engine in self.engines:
            mine = {table.index: table.name for table in tables if table.engine is engine}
            missing = [table.name for t, table in enumerate(engine.tables) if t not in mine]
            if missing:
                raise ValueError(
                    f"{owner}: backend='fbgemm' changes the optimizer of a whole embedding collection, but table"
                    f" {missing[0]!r} is not selected: select it too, or put it into a collection of its own"
                )
            use_counter_sgd(engine, mine[0], half_life=half_life, warmup_steps=warmup_steps)

    def rate_deciles(self, rates: Sequence[float]) -> Tensor:
        """As :meth:`FrequencyRates.rate_deciles`."""
        rate_of = {id(table.engine): rate for table, rate in zip(self.tables, rates, strict=True)}
        counts, found = [], []
        for engine in self.engines:
            for state in engine.get_optimizer_state():
                stride = max(1, state["row_counter"].numel() // _SAMPLED_ROWS)
                counter = state["row_counter"][::stride].double()
                counts.append(counter[counter > 0])
                found.append(rate_of[id(engine)] * counter[counter > 0].rsqrt())
        popularity = torch.cat(counts)
        return decile_means(popularity, torch.cat(found)) if popularity.numel() else torch.empty(0)

    def bytes_per_row(self) -> float:
        """As :meth:`FrequencyRates.bytes_per_row`."""
        states = [
            tensor for engine in self.engines for state in engine.get_optimizer_state() for tensor in state.values()
        ]
        return sum(t.numel() * t.element_size() for t in states) / sum(table.logical.rows for table in self.tables)
