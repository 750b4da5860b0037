"""How often rows are looked up: one counter per row and engine, shared by every method that needs it.

Counters follow the logical row, not the slot: they stay in place when rows move, and count rows without storage too.
They live in ``engine.attached`` under :data:`COUNTER`, hence are saved, restored and accounted for with their tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_embcomp.engine.attached import TableState
from lightning_embcomp.engine.group import Group
from lightning_embcomp.engine.layout import row_numbers
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.kernels.count import decode, log_values, round_to_code, uniform

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings

COUNTER = "counter"
"""Name of the running counters among what is attached to an engine."""

Encoding = Literal["exact", "log"]
Counted = Literal["presence", "occurrence"]

MAX_LOG_HALF_LIFE = 50_000
"""Counts with a half-life h level off at 1.44 h times the occurrences per step; log counters need room above that, for
some thousand occurrences per step, between two sweeps."""
_SWEEP_AFTER = {torch.float32: 32.0, torch.uint8: 2.0}  # half-lives between sweeps, far from the largest number
_SWEEP_SEED = 1 << 62  # keeps the random bits of a sweep apart from those of a step
_CLOCK = "clock"
_CLOCK_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class CounterSettings:
    """What counters count, and how they store it.

    Args:
        encoding: ``exact`` takes 4 bytes per row: int32, saturating at 2³¹ - 1, or float32 with a half-life. ``log``
            takes 1 byte per row: a probabilistic counter without bias and a standard error of 19 %, which reaches
            1.36 · 10⁹.
        counted: ``presence`` adds one per training step in which a row is looked up, ``occurrence`` one per lookup.
        half_life: Steps after which a lookup counts half; None counts for ever.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> CounterSettings(half_life=1000.0).encoding
        'log'
    """

    encoding: Encoding = "log"
    counted: Counted = "occurrence"
    half_life: float | None = None

    def __post_init__(self) -> None:
        if self.encoding not in ("exact", "log"):
            raise ValueError(f"encoding must be 'exact' or 'log', not {self.encoding!r}")
        if self.counted not in ("presence", "occurrence"):
            raise ValueError(f"counted must be 'presence' or 'occurrence', not {self.counted!r}")
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise ValueError(f"half_life must be a positive number of steps, or None for no end, not {self.half_life}")
        if self.encoding == "log" and self.half_life is not None and self.half_life > MAX_LOG_HALF_LIFE:
            raise ValueError(
                f"log counters hold half-lives up to {MAX_LOG_HALF_LIFE:,} steps, not {self.half_life:,}: use"
                " encoding='exact', or half_life=None"
            )

    @property
    def dtype(self) -> torch.dtype:
        """How a counter is stored."""
        if self.encoding == "log":
            return torch.uint8
        return torch.int32 if self.half_life is None else torch.float32


class CounterConflictError(ValueError):
    """Two methods want one engine's counters to count different things."""


class RowCounters(TableState):
    r"""Counters of the logical rows of an engine's tables; tables that nobody asked for have none.

    With a half-life h no row needs a time stamp: step t adds :math:`2^{t/h - r}`, and a stored value stands for itself
    times :math:`2^{r - t/h}`. Before numbers grow too large, a sweep divides all of them and raises r.

    Args:
        rows: Logical rows of each table.
        settings: What is counted.
        owner: Who asked first; for the message of a conflict.
        device: Where the counters live.
        first_row: Number of each table's first row, which seeds random bits; one table after the other by default.
    """

    movable = True

    def __init__(
        self,
        rows: Iterable[int],
        settings: CounterSettings,
        owner: str,
        device: torch.device,
        first_row: Iterable[int] | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.first_row = tuple(accumulate(self.rows, initial=0)) if first_row is None else tuple(first_row)
        self.settings = settings
        self.owner = owner
        self.device = device
        self.step = 0
        self.halvings = 0
        self.values: list[Tensor | None] = [None] * len(self.rows)
        self._clocks: list[Tensor | None] = [None] * len(self.rows)

    @property
    def tensor_name(self) -> str:
        """Names the encoding in checkpoints, so that one is never read as another."""
        return {torch.uint8: "log", torch.int32: "integer", torch.float32: "real"}[self.settings.dtype]

    @property
    def exponent(self) -> float:
        """Binary logarithm of what one lookup adds now."""
        return 0.0 if self.settings.half_life is None else self.step / self.settings.half_life - self.halvings

    def carry(self, device: torch.device) -> None:
        """Move the counters; the clock is the host's."""
        self.device = device
        self.values = [None if values is None else values.to(device) for values in self.values]

    def watch(self, table: int) -> None:
        """Count the rows of a table from now on, if they are not counted yet."""
        if self.values[table] is None:
            self.values[table] = torch.zeros(self.rows[table], dtype=self.settings.dtype, device=self.device)
            self._clocks[table] = torch.zeros(2, dtype=torch.int64)

    def begin_step(self) -> None:
        """Go on to the next step; due sweeps happen here."""
        self.step += 1
        if self.settings.half_life is None or self.exponent < _SWEEP_AFTER[self.settings.dtype]:
            return
        halvings = int(self.exponent)
        for t, values in enumerate(self.values):
            if values is not None:
                _divide(values, halvings, seed=_SWEEP_SEED + self.step, first_row=self.first_row[t])
        self.halvings += halvings

    def counts(self, table: int, rows: Tensor | slice | None = None) -> Tensor:
        """Counts of a table's rows today, float64.

        Args:
            table: Table index.
            rows: Row numbers or a slice of them; all rows by default.

        Returns:
            Lookups counted, each halved once per half-life; 0 for rows never seen.
        """
        values = self.values[table]
        if values is None:
            raise ValueError(f"table {table} is not counted")
        return decode(values if rows is None else values[rows]) * 2.0**-self.exponent

    def tensors(self, table: int) -> dict[str, Tensor]:
        """Counters of a table, and its clock: steps counted, and halvings taken out by sweeps."""
        values, clock = self.values[table], self._clocks[table]
        if values is None or clock is None:
            return {}
        clock[0], clock[1] = self.step, self.halvings
        return {self.tensor_name: values, _CLOCK: clock}

    def row_tensors(self, table: int) -> frozenset[str]:
        """The counters."""
        return frozenset() if self.values[table] is None else frozenset((self.tensor_name,))

    def table_bytes(self, table: int) -> int:
        """Bytes held for a table."""
        values = self.values[table]
        return 0 if values is None else values.numel() * values.element_size() + _CLOCK_BYTES

    def restored(self) -> None:
        """Take over the clock of the checkpoint."""
        clock = next((clock for clock in self._clocks if clock is not None), None)
        if clock is not None:
            self.step, self.halvings = int(clock[0]), int(clock[1])


def share_counters(
    engine: RoutedEmbeddings, tables: Iterable[int], settings: CounterSettings, owner: str
) -> RowCounters:
    """Find the counters of an engine, or start them, and have them count the given tables.

    Args:
        engine: The engine.
        tables: Indices of the tables.
        settings: What is to be counted.
        owner: Who asks.

    Returns:
        The one set of running counters of the engine.

    Raises:
        CounterConflictError: If another method counts otherwise on this engine.
    """
    found = counters_of(engine)
    if found is None:
        found = RowCounters(
            (table.rows for table in engine.tables), settings, owner, engine.options.device, row_numbers(engine.tables)
        )
        engine.attach(COUNTER, found)
        engine.counting.counters = found
    if found.settings != settings:
        raise CounterConflictError(
            f"{owner} and {found.owner} count the rows of one embedding collection, but {owner} asks for {settings} and"
            f" {found.owner} for {found.settings}: use the same, or put their tables into collections of their own"
        )
    for table in tables:
        found.watch(table)
    engine.counting.changed()
    return found


def agree_on_time(engines: Sequence[Sequence[RoutedEmbeddings]], group: Group) -> None:
    """Let the counters of each collection go on from one step, wherever their tables are.

    Engines of a collection make the same steps, but counters that start later than others have missed some. Random
    bits depend on the step, and a checkpoint is read by whoever holds a table then.

    Args:
        engines: Engines of this process by collection; all of them count.
        group: The processes; all of them make this call, with the same number of collections.
    """
    counters = [[found for engine in mine if (found := counters_of(engine)) is not None] for mine in engines]
    times = torch.tensor([max(((c.step, c.halvings) for c in mine), default=(0, 0)) for mine in counters])
    latest = group.gather(times).amax(0).tolist()
    for mine, (step, halvings) in zip(counters, latest, strict=True):
        for found in mine:
            found.step, found.halvings = step, halvings


def counters_of(engine: RoutedEmbeddings) -> RowCounters | None:
    """The running counters of an engine, if somebody asked for them."""
    found = engine.attached.get(COUNTER)
    return found if isinstance(found, RowCounters) else None


def _divide(values: Tensor, halvings: int, seed: int, first_row: int) -> None:
    """Divide stored counts by a power of two, exactly or, for log counters, right on average."""
    if values.dtype != torch.uint8:
        values *= 2.0**-halvings
        return
    divided = log_values(values.device) * 2.0**-halvings
    for start, stop in slabs(values.numel()):
        part = values[start:stop]
        position = torch.arange(first_row + start, first_row + stop, device=values.device)
        part.copy_(round_to_code(divided[part.long()], uniform(seed, position)))
