"""Which group each row of a table belongs to, in a few bits per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.methods.mpe.functional import GRANULE, group_bounds

_SHIFT = GRANULE.bit_length() - 1
_MOST_GROUPS = 2**15  # of a table, numbered by int16
_NO_LOOKUP = 63  # shifts every id to 0


class RowGroups:
    """Groups of the rows of several tables.

    Where ids are numbered by falling frequency, a group is a range of ids and the lookup holds one int16 per 64 rows;
    elsewhere it holds one int16 per row.

    Args:
        rows: Rows of each table.
        owned: Tables that have groups.
        largest: Rows of the largest group of each owned table; its number of rows for a single group.
        counts: Occurrences of each row, for owned tables whose ids are not numbered by falling frequency.
    """

    def __init__(
        self, rows: Sequence[int], owned: Sequence[int], largest: Sequence[int], counts: dict[int, Tensor]
    ) -> None:
        self.bounds: dict[int, Tensor] = {}
        self.first: dict[int, int] = {}
        self._parts: list[Tensor] = []
        self._shift: list[int] = []
        table_of: list[int] = []
        sizes = dict(zip(owned, largest, strict=True))
        for t, n in enumerate(rows):
            if t not in sizes:
                self._append(torch.tensor([-1]), _NO_LOOKUP)
                continue
            bounds = torch.tensor([0, n] if sizes[t] >= n else group_bounds(n, sizes[t]))
            if bounds.numel() > _MOST_GROUPS:
                raise ValueError(f"table {t} would have {bounds.numel() - 1} groups; {_MOST_GROUPS - 1} are the most")
            self.bounds[t], self.first[t] = bounds, len(table_of)
            table_of += [t] * (bounds.numel() - 1)
            if t in counts:
                by_rank = torch.repeat_interleave(torch.arange(bounds.numel() - 1), bounds.diff())
                of_row = torch.empty(n, dtype=torch.int64)
                of_row[torch.argsort(counts[t], descending=True, stable=True)] = by_rank
                self._append(of_row, 0)
            else:
                self._append(torch.bucketize(torch.arange(0, n, GRANULE), bounds[1:-1], right=True), _SHIFT)
        self.table = torch.tensor(table_of)
        self._join()

    def _append(self, groups: Tensor, shift: int) -> None:
        self._parts.append(groups.to(torch.int16))
        self._shift.append(shift)

    def _join(self) -> None:
        starts = [0]
        for part in self._parts:
            starts.append(starts[-1] + part.numel())
        self._start = torch.tensor(starts[:-1])
        self._lookup = torch.cat(self._parts)
        self._parts = [self._lookup[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        self._base = torch.tensor([self.first.get(t, 0) for t in range(len(self._shift))])

    def of_table(self, table: int) -> slice:
        """Its groups among those of all tables."""
        first = self.first[table]
        return slice(first, first + self.bounds[table].numel() - 1)

    def sizes(self) -> Tensor:
        """Rows of every group, int64 ``(G,)``."""
        return torch.cat([bounds.diff() for bounds in self.bounds.values()])

    def sum_rows(self, table: int, values: Tensor) -> Tensor:
        """Sums over the groups of a table of one value per row."""
        per_row = self.per_row(table)
        bounds = self.bounds[table]
        group = torch.repeat_interleave(torch.arange(bounds.numel() - 1), bounds.diff()) if per_row is None else per_row
        return values.new_zeros(bounds.numel() - 1).index_add_(0, group.long(), values)

    def per_row(self, table: int) -> Tensor | None:
        """Group of each row within its table, int16, a live view; None where groups are ranges of ids."""
        return self._parts[table] if table in self.bounds and self._shift[table] == 0 else None

    @property
    def lookup(self) -> Tensor:
        """Groups of all tables, int16."""
        return self._lookup

    def lookup_bytes(self, table: int) -> int:
        """Bytes of the lookup of a table."""
        return self._parts[table].numel() * self._lookup.element_size()

    def set_per_row(self, table: int, present: bool) -> None:
        """Make room for a group per row, or go back to ranges of ids."""
        if present == (self._shift[table] == 0):
            return
        rows = int(self.bounds[table][-1])
        if present:
            self._parts[table] = torch.zeros(rows, dtype=torch.int16)
        else:
            ranges = torch.bucketize(torch.arange(0, rows, GRANULE), self.bounds[table][1:-1], right=True)
            self._parts[table] = ranges.to(torch.int16)
        self._shift[table] = 0 if present else _SHIFT
        self._join()

    def of_ids(self, indices: Tensor, tables: Sequence[int], ids_per_feature: Sequence[int]) -> Tensor:
        """Group of each id of a batch among those of all tables, int64 ``(N,)``; -1 for tables without groups."""
        if len(self.bounds) == 1 and len(tables) == 1:
            t = tables[0]
            return self._lookup[self._start[t] + (indices.long() >> self._shift[t])].long()
        table = torch.tensor(tables).repeat_interleave(torch.tensor(ids_per_feature))
        found = self._lookup[self._start[table] + (indices.long() >> torch.tensor(self._shift)[table])].long()
        return torch.where(found < 0, found, found + self._base[table])
