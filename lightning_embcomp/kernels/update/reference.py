"""Row updates in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble.reference import place, runs_of
from lightning_embcomp.kernels.count.reference import count_rows, row_gain
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.moments.rounding import draws, round_to_half
from lightning_embcomp.kernels.update.rule import FIRST_BY_ROW, UpdateRule


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
    second: Sequence[Tensor | None] | None = None,
    step: int = 1,
) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.update.update_rows`."""
    if counts is not None:
        assert logical is not None
        count_rows(counts, logical, offsets, layout)
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=grad.device), offsets.long().diff())
    second = [None] * len(tables) if second is None else second
    for row_class, (table, state, other, rule) in enumerate(zip(tables, states, second, rules, strict=True)):
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
            change = rate * summed
        elif rule.has_moments:
            assert state is not None and other is not None
            change = rule.learning_rate * _direction(rule, summed, table[slots].float(), slots, state, other, step)
        else:
            assert state is not None
            squares = summed.square()
            state[slots] += squares.mean(1) if rule.kind == "rowwise_adagrad" else squares
            root = state[slots].sqrt() + rule.eps
            change = rule.learning_rate * summed / (root.unsqueeze(1) if root.dim() == 1 else root)
        updated = table[slots].float() - change
        if rule.stochastic_rounding and table.dtype == torch.float16:
            updated = round_to_half(updated, draws(step, row_class, slots, table.shape[1]))
        table[slots] = updated.to(table.dtype)


def _direction(
    rule: UpdateRule, summed: Tensor, weight: Tensor, slots: Tensor, first: Tensor, second: Tensor, step: int
) -> Tensor:
    """Move the moments of rows, and say where their weights go."""
    by_row = rule.number >= FIRST_BY_ROW
    squares = summed.square().mean(1) if by_row else summed.square()
    first[slots] = rule.beta1 * first[slots] + (1.0 - rule.beta1) * summed
    second[slots] = rule.beta2 * second[slots] + (1.0 - rule.beta2) * squares
    correct_first, correct_second = rule.corrections(step)
    root = (second[slots] / correct_second).sqrt() + rule.eps
    direction = first[slots] / correct_first / (root.unsqueeze(1) if by_row else root) + rule.weight_decay * weight
    if rule.kind in ("adam", "partial_rowwise_adam"):
        return direction
    here, there = weight.norm(dim=1, keepdim=True), direction.norm(dim=1, keepdim=True)
    return direction * torch.where((here > 0.0) & (there > 0.0), here / there, 1.0)


def _scale(rate: Tensor, counts: RowCounts, table_of_row: Tensor, rows: Tensor) -> None:
    """Give every row the rate that its counter asks for."""
    for t in table_of_row.unique().tolist():
        mine = table_of_row == t
        gain = row_gain(counts, t, rows[mine])
        if gain is not None:
            rate[mine] = (rate[mine] * gain.unsqueeze(1)).clamp(max=float(counts.cap[t]))
