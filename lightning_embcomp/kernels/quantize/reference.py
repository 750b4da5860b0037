"""Rounding in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.quantize.types import PASS, Rounding, RoundingGradients


def round_rows(rows: Tensor, rounding: Rounding) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.quantize.round_rows`."""
    mine = rounding.group >= 0
    group = rounding.group.clamp(min=0)
    total = torch.zeros_like(rows)
    for k in range(rounding.widths.numel()):
        share = rounding.shares[group, k].unsqueeze(1)
        total += torch.where(share > 0, share * _candidate(rows, rounding, group, k)[0], 0.0)
    return torch.where(mine.unsqueeze(1), total, rows)


def round_rows_backward(
    grad: Tensor, rows: Tensor, rounding: Rounding, all_candidates: bool
) -> tuple[Tensor, RoundingGradients]:
    """Plain twin of :func:`lightning_embcomp.kernels.quantize.round_rows_backward`."""
    sums = RoundingGradients(
        shares=torch.zeros_like(rounding.shares),
        errors=torch.zeros_like(rounding.shares),
        steps=torch.zeros_like(rounding.steps),
        offset=torch.zeros_like(rounding.offset),
    )
    mine = rounding.group >= 0
    row_grad = torch.where(mine.unsqueeze(1), 0.0, grad)
    rows, grad, group = rows[mine], grad[mine], rounding.group[mine]
    table = rounding.table[group]
    inner = torch.zeros_like(grad)
    as_is = (grad * rows).sum(1)
    for k, width in enumerate(rounding.widths.tolist()):
        value, inside, by_step = _candidate(rows, rounding, group, k)
        share = rounding.shares[group, k].unsqueeze(1)
        used = share > 0
        inner += torch.where(used & inside, share * grad, 0.0)
        if all_candidates:
            rounded = (grad * value).sum(1)
            sums.shares[:, k].index_add_(0, group, rounded)
            sums.errors[:, k].index_add_(0, group, (rounded - as_is).square())
        if 0 < width < PASS:
            shared = torch.where(used, share * grad, 0.0)
            sums.steps[:, k].index_add_(0, table, (shared * by_step).sum(1))
            sums.offset.index_add_(0, table, torch.where(inside, 0.0, shared))
    row_grad[mine] = inner
    return row_grad, sums


def _candidate(rows: Tensor, rounding: Rounding, group: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value of a candidate, whether the row is inside its range, and the derivative of the value by the step."""
    width = int(rounding.widths[k])
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    if width == 0:
        return torch.zeros_like(rows), ~everywhere, torch.zeros_like(rows)
    if width == PASS:
        return rows, everywhere, torch.zeros_like(rows)
    table = rounding.table[group]
    step, offset = rounding.steps[table, k].unsqueeze(1), rounding.offset[table]
    low, high = -(2.0 ** (width - 1)), 2.0 ** (width - 1) - 1
    scaled = (rows - offset) / step
    inside = (scaled >= low) & (scaled <= high)
    level = scaled.clamp(low, high).round()
    return level * step + offset, inside, torch.where(inside, level - scaled, level)
