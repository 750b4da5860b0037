"""Row updates in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble.reference import place, runs_of
from lightning_embcomp.kernels.count.reference import count_rows, row_gain
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.rule import UpdateRule


def update_rows(
    tables: Sequence[Tensor],
    states: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    grad: Tensor,
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
    logical: Tensor | None = None,
    counts: RowCounts | None = None,
) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.update.update_rows`."""
    if counts is not None:
        assert logical is not None
        count_rows(counts, logical, offsets, layout)
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=grad.device), offsets.long().diff())
    for row_class, (table, state, rule) in enumerate(zip(tables, states, rules, strict=True)):
        mine = (routes.row_class == row_class).nonzero().flatten()
        if mine.numel() == 0:
            continue
        feature, row, scale = place(bag[mine], offsets, layout)
        if weights is not None:
            scale = scale * weights[mine]
        pieces = []
        for _, column, length in runs_of(columns, row_class):
            span = layout.column[feature].unsqueeze(1) + column + torch.arange(length, device=grad.device)
            pieces.append(grad[row.unsqueeze(1), span] * scale.unsqueeze(1))
        slots, occurrence = torch.unique(routes.slot[mine].long(), return_inverse=True)
        summed = grad.new_zeros(slots.numel(), table.shape[1]).index_add_(0, occurrence, torch.cat(pieces, 1))
        if rule.kind == "sgd":
            rate = torch.full((slots.numel(), 1), rule.learning_rate, device=grad.device)
            if counts is not None and logical is not None:
                first = torch.full_like(slots, mine.numel()).scatter_reduce(
                    0, occurrence, torch.arange(mine.numel(), device=grad.device), "amin"
                )
                _scale(rate, counts, layout.table[feature[first]], logical[mine][first].long())
            table[slots] -= rate * summed
            continue
        assert state is not None
        squares = summed.square()
        state[slots] += squares.mean(1) if rule.kind == "rowwise_adagrad" else squares
        root = state[slots].sqrt() + rule.eps
        table[slots] -= rule.learning_rate * summed / (root.unsqueeze(1) if root.dim() == 1 else root)


def _scale(rate: Tensor, counts: RowCounts, table_of_row: Tensor, rows: Tensor) -> None:
    """Give every row the rate that its counter asks for."""
    for t in table_of_row.unique().tolist():
        mine = table_of_row == t
        gain = row_gain(counts, t, rows[mine])
        if gain is not None:
            rate[mine] = (rate[mine] * gain.unsqueeze(1)).clamp(max=float(counts.cap[t]))
