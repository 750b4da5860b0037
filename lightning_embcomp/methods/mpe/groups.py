"""Which group each row of a table belongs to, in a few bits per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcomp.methods.mpe.functional import GRANULE, group_bounds

_SHIFT = GRANULE.bit_length() - 1
_MOST_GROUPS = 2**15  # of a table, numbered by int16
_NO_LOOKUP = 63  # shifts every id to 0


class GroupBounds:
    """How the rows of several whole tables are cut into groups.

    Args:
        rows: Rows of each table.
        owned: Tables that have groups.
        largest: Rows of the largest group of each owned table; its number of rows for a single group.

    Raises:
        ValueError: If a table would have more groups than int16 numbers.

    Example:
        >>> bounds = GroupBounds([1000, 5, 100], owned=[0, 2], largest=[256, 64])
        >>> bounds.of_table(2), bounds.sizes().tolist()
        (slice(6, 8, None), [64, 64, 128, 256, 256, 232, 64, 36])
    """

    def __init__(self, rows: Sequence[int], owned: Sequence[int], largest: Sequence[int]) -> None:
        self.bounds: dict[int, Tensor] = {}
        self.first: dict[int, int] = {}
        table_of: list[int] = []
        for t, most in sorted(zip(owned, largest, strict=True)):
            n = rows[t]
            bounds = torch.tensor([0, n] if most >= n else group_bounds(n, most))
            if bounds.numel() > _MOST_GROUPS:
                raise ValueError(f"table {t} would have {bounds.numel() - 1} groups; {_MOST_GROUPS - 1} are the most")
            self.bounds[t], self.first[t] = bounds, len(table_of)
            table_of += [t] * (bounds.numel() - 1)
        self.table = torch.tensor(table_of)
        self._sizes = torch.cat([bounds.diff() for bounds in self.bounds.values()])

    def carry(self, device: torch.device) -> None:
        """Move the tables and sizes of the groups; the bounds are the host's."""
        self.table, self._sizes = self.table.to(device), self._sizes.to(device)

    def of_table(self, table: int) -> slice:
        """Its groups among those of all tables."""
        first = self.first[table]
        return slice(first, first + self.bounds[table].numel() - 1)

    def sizes(self) -> Tensor:
        """Rows of every group, int64 ``(G,)``."""
        return self._sizes

    def by_rank(self, table: int) -> Tensor:
        """Group of each row of a table within it, most frequent row first, int64 ``(R,)``."""
        bounds = self.bounds[table]
        return torch.repeat_interleave(torch.arange(bounds.numel() - 1), bounds.diff())

    def by_frequency(self, table: int, counts: Tensor) -> Tensor:
        """Group of each row of a table within it, int16 ``(R,)``.

        Args:
            table: Index of the table.
            counts: Occurrences of each row.
        """
        found = torch.empty(counts.numel(), dtype=torch.int16)
        found[torch.argsort(counts, descending=True, stable=True)] = self.by_rank(table).to(torch.int16)
        return found

    def sum_rows(self, table: int, values: Tensor, group: Tensor | None = None) -> Tensor:
        """Sums over the groups of a table of one value per row.

        Args:
            table: Index of the table.
            values: ``(R,)``.
            group: Group of each row within its table; None where groups are ranges of ids.
        """
        of_row = self.by_rank(table) if group is None else group.long()
        return values.new_zeros(self.bounds[table].numel() - 1).index_add_(0, of_row, values)


@dataclass(frozen=True, kw_only=True)
class TablePart:
    """The rows of a table that an engine holds.

    Args:
        table: Index of the whole table.
        rows: Rows of the part.
        first_row: Its first row in the whole table.
        first_column: Its first column in the whole table.
        dim: Its columns.
    """

    table: int
    rows: int
    first_row: int = 0
    first_column: int = 0
    dim: int


class RowGroups:
    """Groups of the rows that an engine holds.

    Where ids are numbered by falling frequency, a group is a range of ids and the lookup holds one int16 per 64 rows;
    elsewhere it holds one int16 per row.

    Args:
        whole: Groups of the whole tables.
        parts: What the engine holds, table by table.
        groups: Group of each row of a whole table, for those whose ids are not numbered by falling frequency.
        device: Where the lookups are; the CPU by default.
    """

    def __init__(
        self,
        whole: GroupBounds,
        parts: Sequence[TablePart],
        groups: Mapping[int, Tensor],
        device: torch.device | None = None,
    ) -> None:
        self.whole, self.parts = whole, tuple(parts)
        self._device = device or torch.device("cpu")
        self._groups: list[Tensor] = []
        self._shift: list[int] = []
        for e, part in enumerate(self.parts):
            if not self.has(e):
                self._append(torch.tensor([-1]), _NO_LOOKUP)
            elif part.table in groups:
                self._append(groups[part.table][part.first_row : part.first_row + part.rows], 0)
            else:
                self._append(self._ranges(part), _SHIFT)
        self._join()

    def _append(self, groups: Tensor, shift: int) -> None:
        self._groups.append(groups.to(torch.int16))
        self._shift.append(shift)

    def _ranges(self, part: TablePart) -> Tensor:
        """Group of each run of 64 rows that the part touches; the first may start before it."""
        runs = torch.arange(part.first_row // GRANULE * GRANULE, part.first_row + part.rows, GRANULE)
        return torch.bucketize(runs, self.whole.bounds[part.table][1:-1], right=True)

    def _join(self) -> None:
        starts = [0]
        for groups in self._groups:
            starts.append(starts[-1] + groups.numel())
        device = self._device
        self._start = torch.tensor(starts[:-1], device=device)
        self._shifts = torch.tensor(self._shift, device=device)
        self._lookup = torch.cat([groups.to(device) for groups in self._groups])
        self._groups = [self._lookup[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self._base = torch.tensor([self.whole.first.get(part.table, 0) for part in self.parts], device=device)
        # Rows of the first run that other parts hold.
        before = [part.first_row % GRANULE for part in self.parts]
        before = [n if shift == _SHIFT else 0 for n, shift in zip(before, self._shift, strict=True)]
        self._before = torch.tensor(before, device=device)

    def carry(self, device: torch.device) -> None:
        """Move the lookups."""
        self._device = device
        self._join()

    def has(self, table: int) -> bool:
        """Whether a table of the engine has groups."""
        return self.parts[table].table in self.whole.bounds

    def per_row(self, table: int) -> Tensor | None:
        """Group of each row within its table, int16, a live view; None where groups are ranges of ids."""
        return self._groups[table] if self._shift[table] == 0 else None

    def local_bounds(self, table: int) -> Tensor:
        """Bounds of the groups in the rows of the part, where groups are ranges of ids; some may be empty."""
        part = self.parts[table]
        return (self.whole.bounds[part.table] - part.first_row).clamp(0, part.rows)

    @property
    def lookup(self) -> Tensor:
        """Groups of all tables, int16."""
        return self._lookup

    def lookup_bytes(self, table: int) -> int:
        """Bytes of the lookup of a table."""
        return self._groups[table].numel() * self._lookup.element_size()

    def set_per_row(self, table: int, present: bool) -> None:
        """Make room for a group per row, or go back to ranges of ids."""
        if present == (self._shift[table] == 0):
            return
        part = self.parts[table]
        self._groups[table] = (
            torch.zeros(part.rows, dtype=torch.int16) if present else self._ranges(part).to(torch.int16)
        )
        self._shift[table] = 0 if present else _SHIFT
        self._join()

    def of_ids(self, indices: Tensor, table: Tensor | None = None) -> Tensor:
        """Group of each id of a batch among those of all whole tables, int64 ``(N,)``; -1 for tables without groups.

        Args:
            indices: Ids within the parts.
            table: Table of the engine of each id, int64 ``(N,)``; None where it has one.
        """
        if table is None and self.has(0):
            run = (indices.long() + self._before[0]) >> self._shift[0]
            return self._lookup[self._inside(run)].long() + self._base[0]
        if table is None:
            table = torch.zeros_like(indices, dtype=torch.int64)
        run = (indices.long() + self._before[table]) >> self._shifts[table]
        found = self._lookup[self._inside(self._start[table] + run)].long()
        return torch.where(found < 0, found, found + self._base[table])

    def _inside(self, position: Tensor) -> Tensor:
        """Positions in the lookup: a GPU reports ids out of range later."""
        return position if position.device.type == "cpu" else position.clamp(0, self._lookup.numel() - 1)
