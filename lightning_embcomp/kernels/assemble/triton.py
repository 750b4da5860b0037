"""Assembly on CUDA: every output row is written once; a map from bag to class entry replaces a search.

``assemble`` writes the output row of each bag, and 4 bytes per class of the map, which it reads again, and reads the
pooled columns of each listed bag of a class. ``disassemble`` reads the columns of each listed bag from the gradient
and writes them. ``bag_norms`` reads the gradient. All of it streams, so memory bandwidth bounds it. No atomics: sums
run over the classes in their order.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.triton import (
    addresses,
    constant,
    count_at_most,
    logical_column,
    place_of,
    places,
    steps_for,
    stored_column,
    stored_runs,
    tile,
    widths_and_runs,
)
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, RoutedBatch

_ENTRIES = 256


@triton.jit
def _scale(offsets, bag, there, mean, feature):
    length = tl.load(offsets + bag + 1, there, other=1) - tl.load(offsets + bag, there, other=0)
    averaged = tl.load(mean + feature, there, other=0) != 0
    return tl.where(averaged, 1.0 / tl.maximum(length, 1).to(tl.float32), 1.0), length


@triton.jit
def _map_bags(bags_of, class_bag, entry_of, entries, classes, bags, steps: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = at < entries
    c = count_at_most(class_bag + 1, classes, at, steps)
    bag = tl.load(bags_of + at, there, other=0)
    tl.store(entry_of + c * bags + bag, (at - tl.load(class_bag + c, there, other=0)).to(tl.int32), there)


@triton.jit
def _assemble(
    out,
    stride,
    pooled,
    offsets,
    entry_of,
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
    classes,
    runs,
    steps: tl.constexpr,
    block_bags: tl.constexpr,
    block_columns: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * block_bags + tl.arange(0, block_bags)
    there = bag < bags
    feature, target = place_of(bag, there, bag_start, row_start, column, stride, features, steps)
    scale, _ = _scale(offsets, bag, there, mean, feature)
    columns = tl.load(width + feature, there, other=0)
    for start in range(0, tl.max(columns, 0), block_columns):
        d = start + tl.arange(0, block_columns)[None, :]
        total = tl.zeros([block_bags, block_columns], tl.float32)
        mine = entry_of + bag
        for c in range(classes):
            entry = tl.load(mine, there, other=-1).to(tl.int64)
            mine += bags
            rows = tl.load(pooled + c).to(tl.pointer_type(tl.float32))
            row_class = tl.zeros([1, 1], tl.int64) + c
            stored = stored_column(d, row_class, row_class >= 0, first_run, run_column, run_length, runs)
            at = entry[:, None] * tl.load(class_width + c) + stored
            total += tl.load(rows + at, (entry[:, None] >= 0) & (stored >= 0), other=0.0)
        tl.store(out + target[:, None] + d, total * scale[:, None], there[:, None] & (d < columns[:, None]))


@triton.jit
def _disassemble(
    grad,
    stride,
    parts,
    offsets,
    bags_of,
    class_bag,
    bag_start,
    row_start,
    column,
    width,
    mean,
    class_width,
    first_run,
    run_column,
    run_length,
    entries,
    features,
    classes,
    runs,
    class_steps: tl.constexpr,
    steps: tl.constexpr,
    block_bags: tl.constexpr,
    block_columns: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block_bags + tl.arange(0, block_bags)
    there = at < entries
    c = count_at_most(class_bag + 1, classes, at, class_steps)
    bag = tl.load(bags_of + at, there, other=0).to(tl.int64)
    feature, source = place_of(bag, there, bag_start, row_start, column, stride, features, steps)
    scale, _ = _scale(offsets, bag, there, mean, feature)
    columns = tl.load(class_width + c, there, other=0)
    rows = tl.load(parts + c, there, other=0).to(tl.pointer_type(tl.float32))
    rows += (at - tl.load(class_bag + c, there, other=0)) * columns
    for start in range(0, tl.max(columns, 0), block_columns):
        s = start + tl.arange(0, block_columns)[None, :]
        kept = there[:, None] & (s < columns[:, None])
        d = logical_column(s, c[:, None], there[:, None], first_run, run_column, run_length, runs)
        part = tl.load(grad + source[:, None] + d, kept, other=0.0).to(tl.float32)
        tl.store(rows[:, None] + s, part * scale[:, None], kept)


@triton.jit
def _bag_norms(
    grad,
    stride,
    norms,
    offsets,
    bag_start,
    row_start,
    column,
    width,
    mean,
    bags,
    features,
    parts,
    steps: tl.constexpr,
    block_bags: tl.constexpr,
    block_columns: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * block_bags + tl.arange(0, block_bags)
    there = bag < bags
    feature, source = place_of(bag, there, bag_start, row_start, column, stride, features, steps)
    scale, length = _scale(offsets, bag, there, mean, feature)
    columns = tl.load(width + feature, there, other=0) // parts
    for part in range(parts):
        squares = tl.zeros([block_bags], tl.float32)
        for start in range(0, tl.max(columns, 0), block_columns):
            d = start + tl.arange(0, block_columns)[None, :]
            kept = there[:, None] & (d < columns[:, None])
            at = source[:, None] + part * columns[:, None] + d
            values = tl.load(grad + at, kept, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, 1)
        norm = tl.where(length > 0, tl.sqrt(squares) * scale, 0.0)
        tl.store(norms + bag * parts + part, norm, there)


def assemble(
    pooled: Sequence[Tensor | None], offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.assemble.reference.assemble`."""
    device, classes = offsets.device, columns.width.numel()
    bags, entries, features = offsets.numel() - 1, batch.bags.numel(), layout.table.numel()
    rows = [None if part is None else part.detach().float().contiguous() for part in pooled]
    out = torch.zeros(layout.shape, dtype=torch.float32, device=device)  # nothing writes between features
    if bags <= 0:
        return out
    entry_of = torch.full((classes * bags,), -1, dtype=torch.int32, device=device)
    if entries:
        starts = constant(batch.bag_start, torch.int64, device)
        grid = (triton.cdiv(entries, _ENTRIES),)
        _map_bags[grid](batch.bags, starts, entry_of, entries, classes, bags, steps_for(classes), _ENTRIES)
    widths, runs = widths_and_runs(columns)
    block_bags, block_columns = tile(widths)
    _assemble[(triton.cdiv(bags, block_bags),)](
        out,
        layout.shape[1],
        addresses(rows, device),
        offsets.contiguous(),
        entry_of,
        *places(layout),
        *stored_runs(columns),
        bags,
        features,
        classes,
        runs,
        steps_for(features),
        block_bags,
        block_columns,
    )
    return out


def disassemble(
    grad: Tensor, offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> list[Tensor | None]:
    """Triton twin of :func:`lightning_embcomp.kernels.assemble.reference.disassemble`."""
    device, (widths, runs) = grad.device, widths_and_runs(columns)
    listed = [last - first for first, last in pairwise(batch.bag_start)]
    parts = [
        torch.empty(bags, width, device=device) if bags else None for bags, width in zip(listed, widths, strict=True)
    ]
    entries, features = batch.bags.numel(), layout.table.numel()
    if not entries:
        return parts
    rows = grad.detach().contiguous()
    block_bags, block_columns = tile(widths)
    _disassemble[(triton.cdiv(entries, block_bags),)](
        rows,
        rows.stride(0),
        addresses(parts, device),
        offsets.contiguous(),
        batch.bags,
        constant(batch.bag_start, torch.int64, device),
        *places(layout),
        *stored_runs(columns),
        entries,
        features,
        len(widths),
        runs,
        steps_for(len(widths)),
        steps_for(features),
        block_bags,
        block_columns,
    )
    return parts


def bag_norms(grad: Tensor, offsets: Tensor, layout: BagLayout, parts: int) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.assemble.reference.bag_norms`."""
    bags, features = offsets.numel() - 1, layout.table.numel()
    norms = torch.empty(bags, parts, device=grad.device)
    if bags <= 0:
        return norms
    rows = grad.detach().contiguous()
    block_bags, block_columns = tile([rows.shape[1] // parts])
    _bag_norms[(triton.cdiv(bags, block_bags),)](
        rows,
        rows.stride(0),
        norms,
        offsets.contiguous(),
        *places(layout),
        bags,
        features,
        parts,
        steps_for(features),
        block_bags,
        block_columns,
    )
    return norms
