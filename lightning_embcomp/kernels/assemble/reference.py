"""Assembly in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.types import BagLayout, ClassColumns, RoutedBatch


def place(bags: Tensor, offsets: Tensor, layout: BagLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return feature, output row and scale of the given bags."""
    feature = torch.searchsorted(layout.bag_start[1:], bags, right=True)
    row = bags - layout.bag_start[feature] + layout.row_start[feature]
    lengths = offsets.long().diff()[bags]
    scale = torch.where(
        layout.mean[feature] == 1, 1.0 / lengths.clamp(min=1), torch.ones_like(lengths, dtype=torch.float)
    )
    return feature, row, scale


def runs_of(columns: ClassColumns, row_class: int) -> list[tuple[int, int, int]]:
    """Return (stored column, logical column, length) of each run of a class."""
    first, last = int(columns.first_run[row_class]), int(columns.first_run[row_class + 1])
    runs, stored = [], 0
    for run in range(first, last):
        length = int(columns.length[run])
        runs.append((stored, int(columns.column[run]), length))
        stored += length
    return runs


def assemble(
    pooled: Sequence[Tensor | None], offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.assemble.assemble`."""
    out = torch.zeros(layout.shape, dtype=torch.float32, device=offsets.device)
    for row_class, rows in enumerate(pooled):
        if rows is None:
            continue
        bags = batch.bags[batch.bag_start[row_class] : batch.bag_start[row_class + 1]].long()
        feature, row, scale = place(bags, offsets, layout)
        for stored, column, length in runs_of(columns, row_class):
            span = layout.column[feature].unsqueeze(1) + column + torch.arange(length, device=out.device)
            part = rows[:, stored : stored + length] * scale.unsqueeze(1)
            out.index_put_((row.unsqueeze(1).expand_as(span), span), part, accumulate=True)
    return out


def disassemble(
    grad: Tensor, offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> list[Tensor | None]:
    """Plain twin of :func:`lightning_embcomp.kernels.assemble.disassemble`."""
    parts: list[Tensor | None] = []
    for row_class in range(columns.width.numel()):
        bags = batch.bags[batch.bag_start[row_class] : batch.bag_start[row_class + 1]].long()
        if bags.numel() == 0:
            parts.append(None)
            continue
        feature, row, scale = place(bags, offsets, layout)
        pieces = []
        for _, column, length in runs_of(columns, row_class):
            span = layout.column[feature].unsqueeze(1) + column + torch.arange(length, device=grad.device)
            pieces.append(grad[row.unsqueeze(1), span] * scale.unsqueeze(1))
        parts.append(torch.cat(pieces, dim=1))
    return parts


def bag_norms(grad: Tensor, offsets: Tensor, layout: BagLayout, parts: int) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.assemble.bag_norms`."""
    bags = torch.arange(offsets.numel() - 1, device=grad.device)
    _, row, scale = place(bags, offsets, layout)
    norms = grad.new_zeros(bags.numel(), parts)
    for feature in range(layout.table.numel()):
        mine = slice(int(layout.bag_start[feature]), int(layout.bag_start[feature + 1]))
        first, width = int(layout.column[feature]), int(layout.width[feature])
        block = grad[row[mine], first : first + width].unflatten(1, (parts, -1))
        norms[mine] = block.float().square().sum(2).sqrt() * scale[mine].unsqueeze(1)
    norms[offsets.long().diff() == 0] = 0
    return norms
