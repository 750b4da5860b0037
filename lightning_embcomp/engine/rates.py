"""Step sizes of single rows: what counters say, brought to the kernels and to rows that another optimizer trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.engine.attached import TableState
from lightning_embcomp.engine.counters import RowCounters
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from lightning_embcomp.engine.row_class import FusedRows
from lightning_embcomp.kernels.count import RowCounts, count_rows, decode, nearest_code
from lightning_embcomp.kernels.count.encoding import ENCODING_OF
from lightning_embcomp.kernels.types import BagLayout

if TYPE_CHECKING:
    from lightning_embcomp.engine.routed import RoutedEmbeddings


class RateSource(Protocol):
    r"""Stored counts of a table, and the number by which their inverse root is multiplied."""

    def stored(self, table: int) -> Tensor:
        """Counters of a table, as they are stored."""

    def gains(self, tables: np.ndarray) -> np.ndarray | float:
        r"""Factor g of the multiplier :math:`g / \sqrt{c}` of the rate, for a stored count c, in this step.

        Args:
            tables: Table indices ``(n,)``.

        Returns:
            One number, or one per table.
        """

    def floor(self) -> float:
        """Least stored count that a multiplier is computed from: one lookup."""


class RunningRates:
    r"""Step sizes from running counters: :math:`1 / \sqrt{N}`, or :math:`\sqrt{t / (T N)}` with a horizon T.

    Args:
        counters: The counters.
        horizon: Steps T of the whole run; None for the form that needs none.
    """

    def __init__(self, counters: RowCounters, horizon: int | None = None) -> None:
        self.counters = counters
        self.horizon = horizon

    def stored(self, table: int) -> Tensor:
        """The running counters."""
        values = self.counters.values[table]
        assert values is not None
        return values

    def gains(self, tables: np.ndarray) -> np.ndarray | float:
        """Undoes the inflation of counters with a half-life; with a horizon √(t/T)."""
        inflation = 2.0 ** (self.counters.exponent / 2)
        return inflation if self.horizon is None else inflation * math.sqrt(max(1, self.counters.step) / self.horizon)

    def floor(self) -> float:
        """One lookup of today."""
        return 2.0**self.counters.exponent


class KnownFrequencies(TableState):
    r"""Step sizes from frequencies that are known: :math:`1 / \sqrt{T p}`; nothing is counted.

    A row stores p over the smallest p of its table, so that one byte will do; parts of a table have that number in
    common.

    Args:
        rows: Logical rows of each table.
        log: Whether to store 1 byte per row, within 4 % of p, instead of 4.
        horizon: Steps T of the whole run.
        device: Where the frequencies live, the CPU by default; the units are the host's.
    """

    movable = True

    def __init__(self, rows: Iterable[int], *, log: bool, horizon: int = 1, device: torch.device | None = None) -> None:
        self.rows = tuple(rows)
        self.log = log
        self.device = device or torch.device("cpu")
        self.horizon = horizon
        self.values: dict[int, Tensor] = {}
        self.units: dict[int, Tensor] = {}

    def carry(self, device: torch.device) -> None:
        """Move the frequencies; the host reads the units in every step."""
        self.device = device
        self.values = {table: values.to(device) for table, values in self.values.items()}

    def set_table(self, table: int, frequency: Tensor, unit: Tensor) -> None:
        """Set the frequencies of a table.

        Args:
            table: Table index.
            frequency: Lookups per step, positive, float64 ``(rows,)``, in host memory.
            unit: The smallest one of the whole table, float64 scalar, in host memory.
        """
        ratio = frequency / unit
        self.values[table] = (nearest_code(ratio) if self.log else ratio.float()).to(self.device)
        self.units[table] = unit.reshape(1).clone()

    def frequency(self, table: int) -> Tensor:
        """Lookups per step as they are stored, float64 ``(rows,)``."""
        return decode(self.values[table]) * float(self.units[table])

    def stored(self, table: int) -> Tensor:
        """Frequencies over the smallest one."""
        return self.values[table]

    def gains(self, tables: np.ndarray) -> np.ndarray | float:
        """1 / √(T p) of the rarest row of each table."""
        return 1.0 / np.sqrt(self.horizon * np.array([float(self.units[t]) for t in tables]))

    def floor(self) -> float:
        """The rarest row."""
        return 1.0

    def tensors(self, table: int) -> dict[str, Tensor]:
        """Relative frequencies and the smallest one."""
        if table not in self.values:
            return {}
        return {self.tensor_name: self.values[table], "unit": self.units[table]}

    @property
    def tensor_name(self) -> str:
        """Names the encoding in checkpoints."""
        return "log" if self.log else "real"

    def row_tensors(self, table: int) -> frozenset[str]:
        """The relative frequencies."""
        return frozenset((self.tensor_name,)) if table in self.values else frozenset()


@dataclass
class TableRates:
    """Where the step sizes of a table come from.

    Args:
        source: Counters or known frequencies.
        cap: Largest rate of a row.
    """

    source: RateSource
    cap: float = math.inf


class RowCounting:
    """Counting and step sizes of an engine, as the kernels of one step need them.

    Args:
        tables: Number of tables.
        first_row: Number of each table's first row.
    """

    def __init__(self, first_row: Iterable[int]) -> None:
        self.first_row = torch.tensor(list(first_row), dtype=torch.int64)
        self.counters: RowCounters | None = None
        self.rates: dict[int, TableRates] = {}
        self.changed()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors at other addresses.
        return {**self.__dict__, "_arrays": None, "_running": None, "_tables_of_source": []}

    @property
    def active(self) -> bool:
        """Whether there is anything to count or to scale."""
        return self.counters is not None or bool(self.rates)

    def changed(self) -> None:
        """Forget what was prepared, after counters or rates were set."""
        self._arrays: RowCounts | None = None
        self._running: RowCounts | None = None
        self._counted = np.empty(0)
        self._tables_of_source: list[tuple[RateSource, np.ndarray]] = []

    def count(self, indices: Tensor, offsets: Tensor, layout: BagLayout, *, moving: bool, deferred: bool) -> RowCounts:
        """Go on to the next step.

        Args:
            indices: Logical ids.
            offsets: Bag boundaries.
            layout: Features of the bags.
            moving: Whether the pass is one of training.
            deferred: Whether the caller hands the result to a kernel that counts, so that this need not be done here.

        Returns:
            Counters and rates of the step, with what is left to count.
        """
        counters = self.counters
        moving = moving and counters is not None
        if moving:
            assert counters is not None
            counters.begin_step()
        counts = self._prepare()
        if moving and (self._running is not None or not deferred):
            assert counters is not None
            count_rows(self._set_increment(self._running or counts, counters), indices, offsets, layout)
            moving = False
        if moving and counters is not None:
            self._set_increment(counts, counters)
        else:
            counts.increment.zero_()
        for source, tables in self._tables_of_source:
            counts.gain.numpy()[tables] = source.gains(tables)
            counts.floor.numpy()[tables] = source.floor()
        return counts

    def _prepare(self) -> RowCounts:
        """Counters and caps, which stay the same from step to step."""
        if self._arrays is not None:
            return self._arrays
        size = self.first_row.numel()
        stored = [self._stored(t) for t in range(size)]
        cap = [self.rates[t].cap if t in self.rates else math.inf for t in range(size)]
        self._arrays = self._build(stored, torch.tensor(cap, dtype=torch.float32))
        running: list[Tensor | None] = [None] * size if self.counters is None else self.counters.values
        self._counted = np.array([float(values is not None) for values in running])
        apart = any(values is not None and values is not stored[t] for t, values in enumerate(running))
        # Counters beside those that the rates of their table come from take a pass of their own.
        self._running = self._build(running, torch.full((size,), math.inf)) if apart else None
        sources = {id(rates.source): rates.source for rates in self.rates.values()}
        self._tables_of_source = [
            (source, np.array([t for t, rates in self.rates.items() if rates.source is source]))
            for source in sources.values()
        ]
        return self._arrays

    def _set_increment(self, counts: RowCounts, counters: RowCounters) -> RowCounts:
        counts.seed.fill_(counters.step)
        np.multiply(self._counted, 2.0**counters.exponent, out=counts.increment.numpy())
        return counts

    def _stored(self, table: int) -> Tensor | None:
        if table in self.rates:
            return self.rates[table].source.stored(table)
        return None if self.counters is None else self.counters.values[table]

    def _build(self, stored: Iterable[Tensor | None], cap: Tensor) -> RowCounts:
        tensors = tuple(stored)
        counted = self.counters is not None and self.counters.settings.counted == "occurrence"
        return RowCounts(
            tables=tensors,
            address=torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64),
            encoding=torch.tensor([0 if t is None else ENCODING_OF[t.dtype] for t in tensors], dtype=torch.int64),
            first_row=self.first_row,
            increment=torch.zeros(len(tensors), dtype=torch.float64),
            occurrences=torch.full((len(tensors),), int(counted), dtype=torch.int64),
            gain=torch.zeros(len(tensors)),
            cap=cap,
            floor=torch.ones(len(tensors), dtype=torch.float64),
            seed=torch.zeros(1, dtype=torch.int64),
        )


def set_rates(engine: RoutedEmbeddings, table: int, rates: TableRates, name: str) -> None:
    """Give the rows of a table step sizes of their own.

    Args:
        engine: The engine.
        table: Table index.
        rates: Where the step sizes come from.
        name: Name of the table for the message.

    Raises:
        UnsupportedOptimizerError: If an optimizer other than SGD is fused into the backward pass, or the kernels that
            know of counters cannot run it.
    """
    for rows in engine.classes:
        if isinstance(rows, FusedRows):
            _check_fused(rows, name)
    engine.counting.rates[table] = rates
    engine.counting.changed()


def _check_fused(rows: FusedRows, name: str) -> None:
    kind = rows.optimizer.kind
    if kind != "sgd":
        raise UnsupportedOptimizerError(
            f"table {name!r} is trained by {kind}, which already divides the step of a row by the root of what it has"
            " seen: a multiplier by frequency on top would do so twice. Use SGD for the tables (and tune its rate"
            " anew), or leave the table out"
        )
    if rows.optimizer.options.get("stochastic_rounding"):
        raise UnsupportedOptimizerError(
            f"table {name!r} is rounded stochastically, which rows with rates of their own cannot be: leave"
            " stochastic_rounding out, or leave the table out"
        )
    if rows.direct_rule() is None:
        extra = sorted(set(rows.optimizer.options) - rows.optimizer.direct_options)
        if not extra:
            raise UnsupportedOptimizerError(
                f"table {name!r} has placement={rows.placement.kind!r} on {rows.device}, where FBGEMM updates its rows;"
                " rows with rates of their own need placement='managed' or 'device'"
            )
        raise UnsupportedOptimizerError(
            f"table {name!r} has fused SGD with option {extra[0]!r}, which only FBGEMM's own kernel runs. Use"
            " backend='fbgemm' (12 bytes of state per row) where FBGEMM has it, or plain SGD"
        )
