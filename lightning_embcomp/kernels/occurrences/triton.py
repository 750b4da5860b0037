"""Ids of a batch on CUDA: the bag of each, ids sorted by row, and where the gradient of each lies.

Sorting puts the ids of a row side by side, so that one lane can sum them and change the row once, without atomics and
always with the same result. It is a radix sort: 4 passes over 12 bytes per id where row numbers fit 32 bits, else 8
over 16, and the bound of every kernel that moves little per row. The rest streams 4 to 20 bytes per id.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.triton import constant, count_at_most, place_of, steps_for
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes

_BAGS, _IDS = 128, 512
_NO_CLASS: tl.constexpr = tl.constexpr(NO_CLASS)


@triton.jit
def _spread_bags(offsets, bag_of_id, bags, block: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    first = tl.load(offsets + bag, bag < bags, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, bag < bags, other=0) - first
    for k in range(tl.max(length, 0)):
        tl.store(bag_of_id + first + k, bag.to(tl.int32), k < length)


@triton.jit
def _row_keys(ids, bounds, table_of, start, keys, rows, n, features, steps: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = i < n
    table = tl.load(table_of + count_at_most(bounds + 1, features, i, steps), there, other=0)
    first = tl.load(start + table, there, other=-1)
    row = tl.load(ids + i, there, other=0).to(tl.int64)
    key = first + row
    # Ids out of range are reported later; until then they are left out, or fall on another row.
    key = tl.where((first >= 0) & (row >= 0) & (key < rows), key, -1)
    tl.store(keys + i, key.to(keys.dtype.element_ty), there)


@triton.jit
def _trace(
    offsets,
    weights,
    source,
    scale,
    bag_start,
    row_start,
    column,
    mean,
    stride,
    bags,
    features,
    steps: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Write for every id where its gradient begins, and what it is multiplied by."""
    bag = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = bag < bags
    feature, begin = place_of(bag, there, bag_start, row_start, column, stride, features, steps)
    first = tl.load(offsets + bag, there, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, there, other=0) - first
    averaged = tl.load(mean + feature, there, other=0) != 0
    factor = tl.where(averaged, 1.0 / tl.maximum(length, 1).to(tl.float32), 1.0)
    for k in range(tl.max(length, 0)):
        i = first + k
        share = factor
        if weighted:
            share *= tl.load(weights + i, k < length, other=0.0).to(tl.float32)
        tl.store(source + i, begin, k < length)
        tl.store(scale + i, share, k < length)


@triton.jit
def _slot_keys(id_class, id_slot, first_row, keys, n, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    c = tl.load(id_class + i, i < n, other=_NO_CLASS).to(tl.int64)
    live = c != _NO_CLASS
    key = tl.load(first_row + c, live, other=0) + tl.load(id_slot + i, live, other=0)
    tl.store(keys + i, tl.where(live, key, -1).to(keys.dtype.element_ty), i < n)


def bags_of_ids(offsets: Tensor, ids: int) -> Tensor:
    """Bag of every id, int32 ``(ids,)``; 4 bytes written per id, and an offset read per bag."""
    found = torch.empty(ids, dtype=torch.int32, device=offsets.device)
    bags = offsets.numel() - 1
    if bags > 0 and ids:
        _spread_bags[(triton.cdiv(bags, _BAGS),)](offsets, found, bags, _BAGS)
    return found


def sort_rows(indices: Tensor, offsets: Tensor, layout: BagLayout, start: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Group the ids of a batch by row.

    Args:
        indices: Logical ids, ``(N,)``.
        offsets: Bag boundaries.
        layout: Features of the bags.
        start: Number of the first row of each table, int64 ``(T,)``; negative for tables that are left out.
        rows: One more than the largest number of a row.

    Returns:
        Numbers of the rows, rising, -1 for ids that are left out, and the position of each id; ids of a row stay in
        the order of the batch.
    """
    ids = indices.contiguous()
    keys = torch.empty(ids.numel(), dtype=_key_type(rows), device=ids.device)
    if ids.numel():
        bounds, features = offsets.index_select(0, layout.bag_start), layout.table.numel()
        grid = (triton.cdiv(ids.numel(), _IDS),)
        _row_keys[grid](ids, bounds, layout.table, start, keys, rows, ids.numel(), features, steps_for(features), _IDS)
    return keys.sort(stable=True)


def sort_slots(routes: IdRoutes, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Group the ids of a batch by the row that stores them.

    Args:
        routes: Class and slot of every id.
        tables: Weights of each class.

    Returns:
        As of :func:`sort_rows`; -1 for ids without storage.
    """
    first_row = [0, *accumulate(table.shape[0] for table in tables)]
    n, device = routes.slot.numel(), routes.slot.device
    keys = torch.empty(n, dtype=_key_type(first_row[-1]), device=device)
    if n:
        first_rows = constant(first_row[:-1], torch.int64, device)
        _slot_keys[(triton.cdiv(n, _IDS),)](routes.row_class, routes.slot, first_rows, keys, n, _IDS)
    return keys.sort(stable=True)


def trace_gradients(
    offsets: Tensor, weights: Tensor | None, layout: BagLayout, stride: int, ids: int
) -> tuple[Tensor, Tensor]:
    """Where the gradient of each id begins, and what it is multiplied by.

    Args:
        offsets: Bag boundaries, contiguous.
        weights: Per-sample weights, or None.
        layout: Output position of each bag.
        stride: Columns of the output.
        ids: Ids N of the batch.

    Returns:
        Positions in the output, int64 ``(N,)``, and factors, float32 ``(N,)``.
    """
    source = torch.empty(ids, dtype=torch.int64, device=offsets.device)
    scale = torch.empty(ids, device=offsets.device)
    bags, features = offsets.numel() - 1, layout.table.numel()
    if ids:
        _trace[(triton.cdiv(bags, _BAGS),)](
            offsets,
            offsets if weights is None else weights.detach().contiguous(),
            source,
            scale,
            layout.bag_start,
            layout.row_start,
            layout.column,
            layout.mean,
            stride,
            bags,
            features,
            steps_for(features),
            weights is not None,
            _BAGS,
        )
    return source, scale


def _key_type(rows: int) -> torch.dtype:
    """Smallest dtype of numbers below ``rows``."""
    return torch.int32 if rows < 2**31 else torch.int64
