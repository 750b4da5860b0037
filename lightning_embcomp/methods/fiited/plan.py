"""From utilities to a plan: the chunks that each row keeps, and the codes that say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.kernels.decide import count_cells, decide
from lightning_embcomp.methods.fiited.functional import (
    BINS,
    NOT_FINITE,
    Cells,
    allocate,
    bin_values,
    chunk_factors,
    with_hysteresis,
)

ReadRows = Callable[[int, int], Tensor]
"""Maps a row range to present codes, uint8 ``(n,)``, or utilities, bfloat16 ``(n, parts)``."""


class NonFiniteUtilityError(RuntimeError):
    """Utilities of a table are NaN or infinite: gradients were."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A table that competes for bytes.

    Args:
        table: The logical table.
        codes: Its present codes.
        utility: Its utilities.
        chunk_bytes: Bytes of one chunk of one row.
        row_bytes: Bytes that a row with any live chunk costs beside its chunks (row-wise optimizer state).
        floor: Utility that every row is credited with beside what was measured.
        weight: Factor on its utilities, so that tables compare.
    """

    table: LogicalTable
    codes: ReadRows
    utility: ReadRows
    chunk_bytes: int
    row_bytes: int
    floor: float = 0.0
    weight: float = 1.0


class TablePlan:
    """New codes of one table, from a lookup table over (state, utility) and one partly filled cell.

    A *state* is the present code of a row (layout ``prefix``) or whether a chunk is live (layout ``chunks``).

    Args:
        table: The logical table.
        utility: Its utilities.
        keep: Chunks to keep, as :func:`lightning_embcomp.kernels.decide.decide` takes them.
        partial: Cell of which only the first rows get one chunk more, as ``decide`` takes it.
    """

    def __init__(
        self, table: LogicalTable, utility: ReadRows, keep: Tensor, partial: tuple[int, int, int, int]
    ) -> None:
        self._table, self._utility, self._keep, self._partial = table, utility, keep, partial
        self._seen = 0

    def begin(self) -> None:
        """Start at the first row."""
        self._seen = 0

    def codes(self, start: int, stop: int, current: Tensor) -> Tensor:
        """New codes of the rows, uint8."""
        utility, prefix = self._utility(start, stop), self._table.layout == "prefix"
        codes, self._seen = decide(current, utility, self._keep, self._partial, self._seen, prefix=prefix)
        return codes


class EnginePlan:
    """The plans of all tables of one engine, in the engine's order."""

    def __init__(self, tables: Sequence[TablePlan]) -> None:
        self._tables = list(tables)

    def begin(self) -> None:
        """Start at the first row of every table."""
        for table in self._tables:
            table.begin()

    def codes(self, table: int, start: int, stop: int, current: Tensor) -> Tensor:
        """New codes of the rows of a table."""
        return self._tables[table].codes(start, stop, current)


@dataclass(frozen=True)
class _TableCells:
    """Histogram cells of one table: (part, state, bin, chunk) with how many chunks each holds."""

    part: Tensor
    state: Tensor
    bin: Tensor
    chunk: Tensor
    cells: Cells
    n_states: int
    parts: int


def solve(contenders: Sequence[Contender], budget: int, *, falloff: float, hysteresis: float) -> list[TablePlan]:
    """Spend a byte budget on the most useful chunks of all given tables.

    Args:
        contenders: Tables that share the budget.
        budget: Bytes for weights, plus row-wise state where ``row_bytes`` counts it.
        falloff: Worth of a chunk relative to the one before it, layout ``prefix``.
        hysteresis: Margin in favour of live chunks.

    Returns:
        One plan per contender.

    Raises:
        NonFiniteUtilityError: If a table's utilities are not finite.
    """
    per_table = [_cells(contender, falloff, hysteresis) for contender in contenders]
    everything = Cells(
        value=torch.cat([c.cells.value for c in per_table]),
        cost=torch.cat([c.cells.cost for c in per_table]),
        count=torch.cat([c.cells.count for c in per_table]),
        live=torch.cat([c.cells.live for c in per_table]),
        order=torch.cat([c.cells.order for c in per_table]),
    )
    kept = allocate(everything, budget)
    plans, first = [], 0
    for contender, cells in zip(contenders, per_table, strict=True):
        plans.append(_table_plan(contender, cells, kept[first : first + cells.part.numel()]))
        first += cells.part.numel()
    return plans


def mean_utility(contender: Contender) -> float:
    """Mean utility of a table's rows, over all parts."""
    total = 0.0
    for start, stop in slabs(contender.table.rows):
        total += float(contender.utility(start, stop).double().sum())
    return total / contender.table.rows


def _cells(contender: Contender, falloff: float, hysteresis: float) -> _TableCells:
    table = contender.table
    prefix = table.layout == "prefix"
    parts, n_states = (1, table.codes) if prefix else (table.chunks, 2)
    counts = torch.zeros(parts, n_states, BINS, dtype=torch.int64)
    for start, stop in slabs(table.rows):
        count_cells(contender.codes(start, stop), contender.utility(start, stop), counts, prefix=prefix)
    if bool(counts[:, :, NOT_FINITE:].any()):
        raise NonFiniteUtilityError(
            f"utilities of table {table.name!r} are not finite: a gradient was NaN or infinite since the last"
            " pruning event. Lower the learning rate, or look for bad values in the batches"
        )
    part_of, state_of, bin_of = counts.nonzero(as_tuple=True)
    count_of = counts[part_of, state_of, bin_of]
    steps = table.chunks if prefix else 1
    chunk = torch.arange(steps).repeat(part_of.numel())
    expanded = [cell.repeat_interleave(steps) for cell in (part_of, state_of, bin_of, count_of)]
    part, state, bin_, count = expanded
    factor = chunk_factors(steps, falloff)[chunk] if prefix else torch.ones(chunk.numel(), dtype=torch.float64)
    live = chunk < state if prefix else state == 1
    # Row-wise state is paid with a row's first chunk. Without prefixes any chunk may be the first: charge each, so that
    # the budget holds.
    pays_for_row = (chunk == 0) if prefix else torch.ones_like(live)
    cells = Cells(
        value=with_hysteresis((bin_values()[bin_] + contender.floor) * contender.weight * factor, live, hysteresis),
        cost=contender.chunk_bytes + contender.row_bytes * pays_for_row.long(),
        count=count,
        live=live,
        order=chunk,
    )
    return _TableCells(part, state, bin_, chunk, cells, n_states, parts)


def _table_plan(contender: Contender, cells: _TableCells, kept: Tensor) -> TablePlan:
    keep = torch.zeros(cells.parts, cells.n_states, BINS, dtype=torch.uint8)
    whole = kept == cells.cells.count
    keep.index_put_(
        (cells.part[whole], cells.state[whole], cells.bin[whole]),
        torch.ones(int(whole.sum()), dtype=torch.uint8),
        accumulate=True,
    )
    partial = (-1, 0, 0, 0)
    for i in ((kept > 0) & ~whole).nonzero().flatten().tolist():
        partial = (int(cells.part[i]), int(cells.state[i]), int(cells.bin[i]), int(kept[i]))
    return TablePlan(contender.table, contender.utility, keep, partial)
