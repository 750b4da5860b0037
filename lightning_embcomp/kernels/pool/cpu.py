"""Direct pooling on CPU: one pass over the bags, sums in registers, rows prefetched a few ids ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import WEIGHT_KIND, threaded, threads_for
from lightning_embcomp.kernels.intrinsics import zero_bytes
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.vectors import BLOCKS, block_table, sum_rows

_AHEAD = 16
_LINE = 64
_BAGS_PER_THREAD = 2048


@threaded(fastmath={"contract", "nsz"})
def _pool(
    kind: Any,
    lanes: Any,
    weighted: Any,
    target: Any,
    stride: Any,
    place: Any,
    blocks: Any,
    block_stride: Any,
    zeros: Any,
    lines: Any,
    id_class: Any,
    id_slot: Any,
    weights: Any,
    offsets: Any,
    chunk_bag: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    width: Any,
    mean: Any,
) -> None:
    group = len(lanes) * BLOCKS
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        feature = 0
        end = np.int64(offsets[chunk_bag[chunk + 1]])
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            while bag >= bag_start[feature + 1]:
                feature += 1
            row = target + 4 * ((bag - bag_start[feature] + row_start[feature]) * stride + column[feature])
            columns = width[feature]
            first, last = np.int64(offsets[bag]), np.int64(offsets[bag + 1])
            if first == last:
                zero_bytes(row, 4 * columns)
                continue
            scale = np.float32(1.0)
            if mean[feature]:
                scale = np.float32(1.0) / np.float32(last - first)
            for start in range(0, columns, group):
                # Later passes find the rows in the cache.
                sum_rows(
                    kind,
                    lanes,
                    weighted,
                    row + 4 * start,
                    (columns - start) // len(lanes),
                    scale,
                    place,
                    blocks + 16 * (start // len(lanes)),  # two int64 per block
                    block_stride,
                    zeros,
                    id_class,
                    id_slot,
                    weights,
                    first,
                    last,
                    end,
                    _AHEAD,
                    lines if start == 0 else 0,
                )


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
    item = tables[0].element_size()
    width = layout.width.numpy()
    table = block_table([table.data_ptr() for table in tables], item, columns, width)
    row_class, slot = routes.row_class.contiguous(), routes.slot.contiguous()
    given = None if weights is None else weights.detach().float().contiguous()
    _pool(
        threads,
        WEIGHT_KIND[tables[0].dtype],
        (0,) * table.lanes,
        () if given is None else (0,),
        out.data_ptr(),
        out.shape[1],
        table.place.ctypes.data,
        table.blocks.ctypes.data,
        2 * table.blocks.shape[1],
        table.zeros,
        -(-int(table.place[:, 1].max()) // _LINE),
        row_class.data_ptr(),
        slot.data_ptr(),
        0 if given is None else given.data_ptr(),
        offsets.contiguous().numpy(),
        chunk_bag,
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        width,
        layout.mean.numpy(),
    )
    return out
