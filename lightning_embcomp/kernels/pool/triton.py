"""Direct pooling on CUDA: a program sums the rows of a few bags side by side, in the order of the batch.

Per id: 5 bytes of route and the stored columns of its row, read once at a random place; per bag two offsets and the
output row, written once. The random rows bound it: full bandwidth for rows of 128 bytes and more, and as many loads in
flight as there are bags, so a single long bag is slow. Indices of classes and columns stay in the first cache.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.triton import (
    TYPES,
    addresses,
    place_of,
    places,
    steps_for,
    stored_column,
    stored_runs,
    tile,
    widths_and_runs,
)
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, IdRoutes

_NO_CLASS: tl.constexpr = tl.constexpr(NO_CLASS)


@triton.jit
def _pool(
    out,
    stride,
    tables,
    id_class,
    id_slot,
    offsets,
    weights,
    bag_start,
    row_start,
    column,
    width,
    mean,
    class_width,
    first_run,
    run_column,
    run_length,
    bags,
    features,
    runs,
    steps: tl.constexpr,
    weighted: tl.constexpr,
    kind: tl.constexpr,
    block_bags: tl.constexpr,
    block_columns: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * block_bags + tl.arange(0, block_bags)
    there = bag < bags
    feature, target = place_of(bag, there, bag_start, row_start, column, stride, features, steps)
    first = tl.load(offsets + bag, there, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, there, other=0) - first
    columns = tl.load(width + feature, there, other=0)
    averaged = tl.load(mean + feature, there, other=0) != 0
    scale = tl.where(averaged & (length > 0), 1.0 / tl.maximum(length, 1).to(tl.float32), 1.0)
    for start in range(0, tl.max(columns, 0), block_columns):
        d = start + tl.arange(0, block_columns)[None, :]
        total = tl.zeros([block_bags, block_columns], tl.float32)
        for k in range(tl.max(length, 0)):
            i = first + k
            c = tl.load(id_class + i, k < length, other=_NO_CLASS).to(tl.int64)
            live = c != _NO_CLASS
            slot = tl.load(id_slot + i, live, other=0).to(tl.int64)
            at = tl.load(tables + c, live, other=0).to(tl.pointer_type(kind))
            at += slot * tl.load(class_width + c, live, other=0)
            stored = stored_column(d, c[:, None], live[:, None], first_run, run_column, run_length, runs)
            row = tl.load(at[:, None] + stored, live[:, None] & (stored >= 0), other=0.0).to(tl.float32)
            if weighted:
                row *= tl.load(weights + i, live, other=0.0).to(tl.float32)[:, None]
            total += row
        tl.store(out + target[:, None] + d, total * scale[:, None], there[:, None] & (d < columns[:, None]))


def pool(
    tables: Sequence[Tensor],
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.pool.reference.pool`."""
    device = offsets.device
    out = torch.empty(layout.shape, dtype=torch.float32, device=device)
    bags, features = offsets.numel() - 1, layout.table.numel()
    if bags <= 0:
        return out
    rows = [table.detach().contiguous() for table in tables]
    widths, runs = widths_and_runs(columns)
    block_bags, block_columns = tile(widths)
    _pool[(triton.cdiv(bags, block_bags),)](
        out,
        layout.shape[1],
        addresses(rows, device),
        routes.row_class,
        routes.slot,
        offsets.contiguous(),
        offsets if weights is None else weights.detach().contiguous(),
        *places(layout),
        *stored_runs(columns),
        bags,
        features,
        runs,
        steps_for(features),
        weights is not None,
        TYPES[rows[0].dtype],
        block_bags,
        block_columns,
    )
    return out
