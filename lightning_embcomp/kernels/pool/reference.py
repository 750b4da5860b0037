"""Direct pooling in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcomp.kernels.assemble.reference import place, runs_of
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes


def pool(
    tables: Sequence[Tensor],
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
) -> Tensor:
    """Plain twin of :func:`lightning_embcomp.kernels.pool.pool`."""
    out = torch.zeros(layout.shape, dtype=torch.float32, device=offsets.device)
    bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=out.device), offsets.long().diff())
    for row_class, table in enumerate(tables):
        mine = (routes.row_class == row_class).nonzero().flatten()
        feature, row, scale = place(bag[mine], offsets, layout)
        if weights is not None:
            scale = scale * weights[mine]
        values = table[routes.slot[mine].long()] * scale.unsqueeze(1)
        for stored, column, length in runs_of(columns, row_class):
            span = layout.column[feature].unsqueeze(1) + column + torch.arange(length, device=out.device)
            out.index_put_(
                (row.unsqueeze(1).expand_as(span), span), values[:, stored : stored + length], accumulate=True
            )
    return out
