"""From utilities to a plan: the chunks that each row keeps, and the codes that say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_embcomp.engine.group import Group
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
class Rows:
    """Rows of a table that this process decides about.

    Args:
        count: How many.
        codes: Their present codes.
        utility: Their utilities.
        counts: Whether no other process counts the same rows.
    """

    count: int
    codes: ReadRows
    utility: ReadRows
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A table that competes for bytes.

    Args:
        table: The logical table.
        rows: What this process holds of it; parts of the rows are nowhere counted twice.
        owners: Ranks that count its rows, by rising row number.
        chunk_bytes: Bytes of one chunk of one row.
        row_bytes: Bytes that a row with any live chunk costs beside its chunks (row-wise optimizer state).
        floor: Utility that every row is credited with beside what was measured.
        weight: Factor on its utilities, so that tables compare.
    """

    table: LogicalTable
    rows: Sequence[Rows]
    owners: Sequence[int] = (0,)
    chunk_bytes: int
    row_bytes: int
    floor: float = 0.0
    weight: float = 1.0


class CodePlan(Protocol):
    """New codes of one table or part of it, slab by slab in rising order."""

    def begin(self) -> None:
        """Start at the first row."""

    def codes(self, start: int, stop: int, current: Tensor) -> Tensor:
        """New codes of the rows, uint8."""


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
        self._keep = self._keep.to(current.device)  # once
        codes, self._seen = decide(current, utility, self._keep, self._partial, self._seen, prefix=prefix)
        return codes


class KnownCodes:
    """Codes of a whole table that were decided before, for one part of its columns.

    Args:
        codes: Codes of the whole table, uint8 ``(rows,)``.
        first_chunk: Chunks before the part.
        largest: Largest code of the part.
    """

    def __init__(self, codes: Tensor, first_chunk: int, largest: int) -> None:
        self._codes, self._first_chunk, self._largest = codes, first_chunk, largest

    def begin(self) -> None:
        """Nothing to reset."""

    def codes(self, start: int, stop: int, current: Tensor) -> Tensor:
        """Codes of the part, uint8."""
        codes = self._codes[start:stop].to(current.device)
        return (codes.short() - self._first_chunk).clamp(0, self._largest).to(torch.uint8)


class EnginePlan:
    """The plans of all tables of one engine, in the engine's order."""

    def __init__(self, tables: Sequence[CodePlan]) -> None:
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
    shape: tuple[int, ...]


def total_utility(contender: Contender) -> float:
    """Sum of the utilities of the rows that this process counts, over all parts."""
    return sum(
        float(rows.utility(start, stop).double().sum())
        for rows in contender.rows
        for start, stop in slabs(rows.count if rows.counts else 0)
    )


@dataclass(frozen=True)
class _Decision:
    """What a table keeps: whole cells, and of one cell the chunks of the first rows."""

    keep: Tensor
    partial: tuple[int, int, int, int]


def solve(
    contenders: Sequence[Contender], budget: int, group: Group, *, falloff: float, hysteresis: float
) -> list[list[TablePlan]]:
    """Spend a byte budget on the most useful chunks of all given tables.

    Args:
        contenders: Tables that share the budget.
        budget: Bytes for weights, plus row-wise state where ``row_bytes`` counts it.
        group: Processes that hold rows of the tables; all of them decide the same.
        falloff: Worth of a chunk relative to the one before it, layout ``prefix``.
        hysteresis: Margin in favour of live chunks.

    Returns:
        One plan per contender and part of its rows.

    Raises:
        NonFiniteUtilityError: If a table's utilities are not finite.
    """
    local = [_count(contender) for contender in contenders]
    counts = group.sum(torch.cat([count.flatten() for count in local])).split([count.numel() for count in local])
    per_table = [
        _cells(contender, count.view_as(mine), falloff, hysteresis)
        for contender, count, mine in zip(contenders, counts, local, strict=True)
    ]
    everything = Cells(
        value=torch.cat([c.cells.value for c in per_table]),
        cost=torch.cat([c.cells.cost for c in per_table]),
        count=torch.cat([c.cells.count for c in per_table]),
        live=torch.cat([c.cells.live for c in per_table]),
        order=torch.cat([c.cells.order for c in per_table]),
    )
    kept = allocate(everything, budget).split([c.part.numel() for c in per_table])
    decisions = [_decide(cells, mine) for cells, mine in zip(per_table, kept, strict=True)]
    before = _rows_before(contenders, local, decisions, group)
    return [
        _plans(contender, decision, first)
        for contender, decision, first in zip(contenders, decisions, before, strict=True)
    ]


def _count(contender: Contender) -> Tensor:
    """Chunks of the rows of this process by part, state and utility."""
    table = contender.table
    prefix = table.layout == "prefix"
    counts = torch.zeros(*((1, table.codes) if prefix else (table.chunks, 2)), BINS, dtype=torch.int64)
    for rows in contender.rows:
        for start, stop in slabs(rows.count if rows.counts else 0):
            codes = rows.codes(start, stop)
            counts = counts.to(codes.device)
            count_cells(codes, rows.utility(start, stop), counts, prefix=prefix)
    return counts.cpu()


def _cells(contender: Contender, counts: Tensor, falloff: float, hysteresis: float) -> _TableCells:
    table = contender.table
    prefix = table.layout == "prefix"
    if bool(counts[:, :, NOT_FINITE:].any()):
        raise NonFiniteUtilityError(
            f"utilities of table {table.label!r} are not finite: a gradient was NaN or infinite since the last"
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
    return _TableCells(part, state, bin_, chunk, cells, tuple(counts.shape))


def _decide(cells: _TableCells, kept: Tensor) -> _Decision:
    keep = torch.zeros(cells.shape, dtype=torch.uint8)
    whole = kept == cells.cells.count
    keep.index_put_(
        (cells.part[whole], cells.state[whole], cells.bin[whole]),
        torch.ones(int(whole.sum()), dtype=torch.uint8),
        accumulate=True,
    )
    partial = (-1, 0, 0, 0)
    for i in ((kept > 0) & ~whole).nonzero().flatten().tolist():
        partial = (int(cells.part[i]), int(cells.state[i]), int(cells.bin[i]), int(kept[i]))
    return _Decision(keep, partial)


def _rows_before(
    contenders: Sequence[Contender], local: Sequence[Tensor], decisions: Sequence[_Decision], group: Group
) -> list[int]:
    """Rows of each table's partly kept cell that other processes hold before those of this one."""
    cells = [decision.partial[:3] for decision in decisions]
    mine = torch.tensor([int(count[cell]) for count, cell in zip(local, cells, strict=True)])
    by_rank = group.gather(mine)
    found = []
    for i, contender in enumerate(contenders):
        owners = list(contender.owners)
        earlier = owners[: owners.index(group.rank)] if group.rank in owners else []
        found.append(int(by_rank[earlier, i].sum()))
    return found


def _plans(contender: Contender, decision: _Decision, before: int) -> list[TablePlan]:
    part, state, bin_, kept = decision.partial
    partial = (part, state, bin_, max(0, kept - before))
    return [TablePlan(contender.table, rows.utility, decision.keep, partial) for rows in contender.rows]
