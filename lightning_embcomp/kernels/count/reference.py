"""Counting in plain PyTorch: the definition that the fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.count.encoding import (
    INTEGER,
    LARGEST_INT,
    LOG,
    decode,
    log_values,
    round_to_code,
    uniform,
)
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.types import BagLayout


def count_rows(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.count.count_rows`."""
    table_of_id = _table_of_id(offsets, layout)
    for t, stored in enumerate(counts.tables):
        increment = float(counts.increment[t])
        if stored is None or increment == 0.0:
            continue
        rows, times = torch.unique(indices[table_of_id == t].long(), return_counts=True)
        added = increment * (times.double() if counts.occurrences[t] else torch.ones_like(times, dtype=torch.float64))
        before = stored[rows]
        kind = int(counts.encoding[t])
        after = decode(before) + added
        if kind == LOG:
            last = log_values(after.device)[-1:]
            draw = uniform(int(counts.seed), int(counts.first_row[t]) + rows)
            stored[rows] = round_to_code(torch.minimum(after, last), draw)
        elif kind == INTEGER:
            stored[rows] = after.clamp(max=LARGEST_INT).to(torch.int32)
        else:
            stored[rows] = after.float()


def row_gains(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.count.row_gains`."""
    table_of_id = _table_of_id(offsets, layout)
    gains = torch.ones(indices.numel(), device=indices.device)
    for t in range(len(counts.tables)):
        mine = table_of_id == t
        gain = row_gain(counts, t, indices[mine].long())
        if gain is not None:
            gains[mine] = gain
    return gains


def _table_of_id(offsets: Tensor, layout: BagLayout) -> Tensor:
    return torch.repeat_interleave(layout.table, offsets.long()[layout.bag_start].diff())


def row_gain(counts: RowCounts, table: int, rows: Tensor) -> Tensor | None:
    """Multipliers of the rate for rows of a table, float32, before the cap; None where the plain rate holds."""
    stored = counts.tables[table]
    if stored is None or float(counts.gain[table]) == 0.0:
        return None
    return (float(counts.gain[table]) / decode(stored[rows]).clamp(min=float(counts.floor[table])).sqrt()).float()
