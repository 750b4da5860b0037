"""Assembly on CPU: every output row is written once, in one pass over the bags, with no intermediate copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.intrinsics import load_f32, store_f32
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, RoutedBatch

_BAGS_PER_THREAD = 4096
_FAST = {"contract", "reassoc", "nsz"}


@threaded(fastmath=_FAST)
def _assemble(
    out: Any,
    pooled: Any,
    offsets: Any,
    bags: Any,
    chunk_bag: Any,
    chunk_class_bag: Any,
    class_bag: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    width: Any,
    mean: Any,
    class_width: Any,
    first_run: Any,
    run_column: Any,
    run_length: Any,
) -> None:
    classes = class_width.shape[0]
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        cursor = chunk_class_bag[chunk].copy()
        last = chunk_class_bag[chunk + 1]
        feature = 0
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            while bag >= bag_start[feature + 1]:
                feature += 1
            row = out[bag - bag_start[feature] + row_start[feature], column[feature] : column[feature] + width[feature]]
            scale = np.float32(1.0)
            if mean[feature]:
                scale = np.float32(1.0) / np.float32(max(1, offsets[bag + 1] - offsets[bag]))
            clean = False
            for c in range(classes):
                at = cursor[c]
                if at == last[c] or bags[at] != bag:
                    continue
                cursor[c] = at + 1
                source = (at - class_bag[c]) * class_width[c]
                if not clean and first_run[c + 1] - first_run[c] == 1 and run_column[first_run[c]] == 0:
                    length = run_length[first_run[c]]
                    for d in range(length):
                        row[d] = load_f32(pooled[c], source + d) * scale
                    for d in range(length, row.shape[0]):
                        row[d] = np.float32(0.0)
                    clean = True
                    continue
                if not clean:
                    row[:] = np.float32(0.0)
                    clean = True
                for run in range(first_run[c], first_run[c + 1]):
                    target = run_column[run]
                    for d in range(run_length[run]):
                        row[target + d] += load_f32(pooled[c], source + d) * scale
                    source += run_length[run]
            if not clean:
                row[:] = np.float32(0.0)


@threaded(fastmath=_FAST)
def _disassemble(
    grad: Any,
    parts: Any,
    offsets: Any,
    bags: Any,
    chunk_bag: Any,
    chunk_class_bag: Any,
    class_bag: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    mean: Any,
    class_width: Any,
    first_run: Any,
    run_column: Any,
    run_length: Any,
) -> None:
    classes = class_width.shape[0]
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        for c in range(classes):
            feature = 0
            for at in range(chunk_class_bag[chunk, c], chunk_class_bag[chunk + 1, c]):
                bag = bags[at]
                while bag >= bag_start[feature + 1]:
                    feature += 1
                row = grad[bag - bag_start[feature] + row_start[feature]]
                scale = np.float32(1.0)
                if mean[feature]:
                    scale = np.float32(1.0) / np.float32(max(1, offsets[bag + 1] - offsets[bag]))
                target = (at - class_bag[c]) * class_width[c]
                for run in range(first_run[c], first_run[c + 1]):
                    source = column[feature] + run_column[run]
                    for d in range(run_length[run]):
                        store_f32(parts[c], target + d, row[source + d] * scale)
                    target += run_length[run]


@numba.njit(cache=True, boundscheck=False, fastmath=_FAST, inline="always")
def _norms_of_bag(row: Any, first: Any, width: Any, length: Any, mean: Any, out: Any) -> None:
    parts = out.shape[0]
    if length == 0:
        out[:] = np.float32(0.0)
        return
    scale = np.float32(1.0) / np.float32(length) if mean else np.float32(1.0)
    part_width = width // parts
    for part in range(parts):
        total = np.float32(0.0)
        for d in range(first, first + part_width):
            total += row[d] * row[d]
        out[part] = np.sqrt(total) * scale
        first += part_width


@threaded(fastmath=_FAST)
def _bag_norms(
    grad: Any,
    norms: Any,
    offsets: Any,
    chunk: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    width: Any,
    mean: Any,
    by_row: Any,
) -> None:
    for c in numba.prange(chunk.shape[0] - 1):
        if by_row:
            # Every feature has one bag per output row: go along the rows, as the gradient lies in memory.
            for r in range(chunk[c], chunk[c + 1]):
                for f in range(column.shape[0]):
                    bag = bag_start[f] + r
                    length = offsets[bag + 1] - offsets[bag]
                    _norms_of_bag(grad[r], column[f], width[f], length, mean[f], norms[bag])
            continue
        f = 0
        for bag in range(chunk[c], chunk[c + 1]):
            while bag >= bag_start[f + 1]:
                f += 1
            row = grad[bag - bag_start[f] + row_start[f]]
            _norms_of_bag(row, column[f], width[f], offsets[bag + 1] - offsets[bag], mean[f], norms[bag])


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)


def assemble(
    pooled: Sequence[Tensor | None], offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.assemble.reference.assemble`."""
    pooled = [None if rows is None else rows.detach().float().contiguous() for rows in pooled]
    # Columns between features are never written by the kernel, so only an exact tiling may start uninitialised.
    tiled = int(layout.width.sum()) == layout.shape[1] or layout.row_start.any()
    out = (torch.empty if tiled else torch.zeros)(layout.shape, dtype=torch.float32)
    _assemble(
        batch.chunk_bag.numel() - 1,
        out.numpy(),
        _addresses(pooled),
        offsets.contiguous().numpy(),
        batch.bags.numpy(),
        batch.chunk_bag.numpy(),
        batch.chunk_class_bag.numpy(),
        np.array(batch.bag_start[:-1], np.int64),
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.width.numpy(),
        layout.mean.numpy(),
        columns.width.numpy(),
        columns.first_run.numpy(),
        columns.column.numpy(),
        columns.length.numpy(),
    )
    return out


def disassemble(
    grad: Tensor, offsets: Tensor, batch: RoutedBatch, layout: BagLayout, columns: ClassColumns
) -> list[Tensor | None]:
    """Numba twin of :func:`lightning_embcomp.kernels.assemble.reference.disassemble`."""
    parts: list[Tensor | None] = []
    for row_class, width in enumerate(columns.width.tolist()):
        bags = batch.bag_start[row_class + 1] - batch.bag_start[row_class]
        parts.append(torch.empty(bags, width) if bags else None)
    _disassemble(
        batch.chunk_bag.numel() - 1,
        grad.detach().float().contiguous().numpy(),
        _addresses(parts),
        offsets.contiguous().numpy(),
        batch.bags.numpy(),
        batch.chunk_bag.numpy(),
        batch.chunk_class_bag.numpy(),
        np.array(batch.bag_start[:-1], np.int64),
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.mean.numpy(),
        columns.width.numpy(),
        columns.first_run.numpy(),
        columns.column.numpy(),
        columns.length.numpy(),
    )
    return parts


def bag_norms(grad: Tensor, offsets: Tensor, layout: BagLayout, parts: int) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.assemble.reference.bag_norms`."""
    bags, rows = offsets.numel() - 1, layout.shape[0]
    norms = torch.empty(bags, parts)
    by_row = bool((layout.bag_start.diff() == rows).all()) and not bool(layout.row_start.any())
    threads = threads_for(bags, _BAGS_PER_THREAD)
    chunk = np.linspace(0, rows if by_row else bags, threads + 1).astype(np.int64)
    _bag_norms(
        threads,
        grad.detach().float().contiguous().numpy(),
        norms.numpy(),
        offsets.contiguous().numpy(),
        chunk,
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.width.numpy(),
        layout.mean.numpy(),
        by_row,
    )
    return norms
