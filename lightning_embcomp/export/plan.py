"""Which served table every logical row goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcomp.engine.precision import FULL_WIDTH
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.rows import RowFormat
from lightning_embcomp.export.tables import ExportTable

MAX_RUNS = 1024
"""Tables with more runs of equal rows than this keep a code per row: a lookup searches the runs."""
_MAX_FORMATS = 255
_ROWWISE = 16  # marks rows that are rounded for themselves; shared widths are 1 to 8
_KINDS = 17


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Where the rows of one table go.

    Args:
        formats: Format of the rows with each code from 1 on; rows of code 0 are not stored.
        codes: Code of every row, uint8 ``(R,)``.
        run_end: Row after each run of equal codes, int64 ``(n,)``; empty if there are too many runs.
        run_code: Code of each run, uint8 ``(n,)``.
    """

    formats: tuple[RowFormat, ...]
    codes: Tensor
    run_end: Tensor
    run_code: Tensor

    @property
    def planes(self) -> int:
        """Bits of a code; 0 where runs are kept instead."""
        return 0 if self.run_end.numel() else max(1, len(self.formats).bit_length())


def plan_table(table: ExportTable, bits: int) -> TablePlan:
    """Give every row its format.

    Args:
        table: The table.
        bits: Bits of rows that were not rounded in training.

    Returns:
        The plan. Neighbours of one format become runs; only a table whose rows are mixed keeps a code per row.

    Raises:
        ExportError: If the table mixes too many formats.
    """
    keys = torch.empty(table.rows, dtype=torch.int16)
    for start, stop in slabs(table.rows):
        keys[start:stop] = _keys(table, start, stop)
    present = torch.unique(keys)
    live = present[present > 0].tolist()
    if len(live) > _MAX_FORMATS:
        raise ExportError(f"table {table.name!r} mixes {len(live)} kinds of rows, more than {_MAX_FORMATS}")
    code_of = torch.zeros(int(present.max()) + 1 if present.numel() else 1, dtype=torch.uint8)
    for code, key in enumerate(live, start=1):
        code_of[key] = code
    codes = torch.empty(table.rows, dtype=torch.uint8)
    for start, stop in slabs(table.rows):
        codes[start:stop] = code_of[keys[start:stop].long()]
    formats = tuple(_format(table, key, bits) for key in live)
    run_code, counts = torch.unique_consecutive(codes, return_counts=True)
    run_end = counts.cumsum(0)
    if run_end.numel() > max(1, min(MAX_RUNS, table.rows // 128)):
        run_end, run_code = run_end[:0], run_code[:0]
    return TablePlan(formats=formats, codes=codes, run_end=run_end, run_code=run_code)


def classes_of(plans: Sequence[TablePlan]) -> list[RowFormat]:
    """Formats in use, sorted: each becomes one served table."""
    return sorted({row_format for plan in plans for row_format in plan.formats})


def _keys(table: ExportTable, start: int, stop: int) -> Tensor:
    """Kept columns and width of rows as one number each; 0 for rows without storage."""
    if table.read_codes is None:
        kept = torch.full((stop - start,), len(table.kept) - 1, dtype=torch.int16)
    else:
        kept = table.read_codes(start, stop).to(torch.int16)
    if table.precision is None:
        return torch.where(kept > 0, kept * _KINDS + _ROWWISE, 0).to(torch.int16)
    width = table.precision.bits_of(start, stop).to(torch.int16)
    kind = torch.where(width == FULL_WIDTH, _ROWWISE, width)
    return torch.where((kept > 0) & (width > 0), kept * _KINDS + kind, 0).to(torch.int16)


def _format(table: ExportTable, key: int, bits: int) -> RowFormat:
    kept, kind = divmod(key, _KINDS)
    shared = kind != _ROWWISE
    return RowFormat(dim=table.dim, columns=table.kept[kept], bits=kind if shared else bits, shared=shared)
