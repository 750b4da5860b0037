"""Direct pooling on CPU: one pass over the bags, rows prefetched a few ids ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import WEIGHT_KIND, threaded, threads_for
from lightning_embcomp.kernels.intrinsics import load_f32, load_weight, prefetch_address, store_f32, zero_bytes
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, IdRoutes

_AHEAD = 16
_LINE = 64
_BAGS_PER_THREAD = 2048


@threaded(fastmath={"contract", "nsz"})
def _pool(
    kind: Any,
    item: Any,
    target: Any,
    stride: Any,
    tables: Any,
    id_class: Any,
    id_slot: Any,
    offsets: Any,
    weights: Any,
    chunk_bag: Any,
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
    weighted = weights.shape[0] > 0
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        feature = 0
        end = offsets[chunk_bag[chunk + 1]]
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            while bag >= bag_start[feature + 1]:
                feature += 1
            row = target + 4 * ((bag - bag_start[feature] + row_start[feature]) * stride + column[feature])
            columns = width[feature]
            first, last = offsets[bag], offsets[bag + 1]
            filled = 0  # columns below this hold sums; the rest is zeroed at the end
            for i in range(first, last):
                ahead = i + _AHEAD
                if ahead < end and id_class[ahead] != NO_CLASS:
                    near = id_class[ahead]
                    size = item * class_width[near]
                    address = tables[near] + np.int64(id_slot[ahead]) * size
                    for line in range(0, size, _LINE):
                        prefetch_address(address + line)
                c = id_class[i]
                if c == NO_CLASS:
                    continue
                # Outside the loops over columns: a store might change it, as far as the compiler knows.
                source = tables[c] + np.int64(id_slot[i]) * item * class_width[c]
                factor = weights[i] if weighted else np.float32(1.0)
                if filled == 0 and class_width[c] == columns:
                    # The most frequent case, the first row of a bag, stored whole.
                    for d in range(columns):
                        store_f32(row, d, load_weight(kind, source, d) * factor)
                    filled = columns
                    continue
                for run in range(first_run[c], first_run[c + 1]):
                    low, high = run_column[run], run_column[run] + run_length[run]
                    if low > filled:
                        zero_bytes(row + 4 * filled, 4 * (low - filled))
                        filled = low
                    known = min(high, filled) - low
                    into = row + 4 * low
                    for d in range(known):
                        store_f32(into, d, load_f32(into, d) + load_weight(kind, source, d) * factor)
                    for d in range(max(0, known), run_length[run]):
                        store_f32(into, d, load_weight(kind, source, d) * factor)
                    filled = max(filled, high)
                    source += item * run_length[run]
            if filled < columns:
                zero_bytes(row + 4 * filled, 4 * (columns - filled))
            if mean[feature] and last - first > 1:
                scale = np.float32(1.0) / np.float32(last - first)
                for d in range(filled):
                    store_f32(row, d, load_f32(row, d) * scale)


def pool(
    tables: Sequence[Tensor],
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.pool.reference.pool`."""
    out = torch.empty(layout.shape, dtype=torch.float32)
    threads = threads_for(offsets.numel() - 1, _BAGS_PER_THREAD)
    chunk_bag = np.arange(threads + 1) * (offsets.numel() - 1) // threads
    _pool(
        threads,
        WEIGHT_KIND[tables[0].dtype],
        tables[0].element_size(),
        out.data_ptr(),
        out.shape[1],
        np.array([table.data_ptr() for table in tables], np.int64),
        routes.row_class.numpy(),
        routes.slot.numpy(),
        offsets.contiguous().numpy(),
        np.empty(0, np.float32) if weights is None else weights.detach().contiguous().numpy(),
        chunk_bag,
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
