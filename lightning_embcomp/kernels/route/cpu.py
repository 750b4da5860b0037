"""Routing on CPU: one pass finds class and slot, a second writes the class lists; threads own ranges of bags."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.intrinsics import load_i32, load_u8, load_u64, popcount, prefetch_address
from lightning_embcomp.kernels.route.reference import IdOutOfRangeError
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes, RoutedBatch, RouterTensors

_AHEAD = 16  # ids between a prefetch and its use: about the misses that a core keeps in flight
_BAGS_PER_THREAD = 4096  # below this a second thread costs more than it saves


@numba.njit(inline="always")
def _read_plane(word: Any, bit: Any, plane: Any, code: Any, same: Any) -> Any:
    """Add one plane to a row's code, and to the mask of the rows of its block that have the same code."""
    is_set = (word >> bit) & np.uint64(1)
    return code | np.int64(is_set) << plane, same & (word ^ (is_set - np.uint64(1)))


@threaded()
def _find(
    ids: Any,
    offsets: Any,
    chunk_bag: Any,
    bag_start: Any,
    table_of: Any,
    words: Any,
    start: Any,
    stride: Any,
    planes: Any,
    rows: Any,
    class_of_code: Any,
    codes: Any,
    id_class: Any,
    id_slot: Any,
    bad: Any,
) -> None:
    """Fill class and slot of each id. No branch depends on a code: codes of neighbouring ids cannot be predicted."""
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        for feature in range(table_of.shape[0]):
            table = table_of[feature]
            bit_planes, limit = planes[table], np.uint64(rows[table])
            blocks, block_bytes = words + 8 * start[table], 8 * stride[table]
            bases, classes = 8 * bit_planes - 4, class_of_code + codes * table
            first = offsets[max(bag_start[feature], chunk_bag[chunk])]
            last = offsets[max(bag_start[feature], min(bag_start[feature + 1], chunk_bag[chunk + 1]))]
            for i in range(first, last):
                # A prefetch never faults, so ids need not be checked before it.
                near = np.int64(ids[np.uint64(min(i + _AHEAD, last - 1))])
                prefetch_address(blocks + (near >> 6) * block_bytes)
                row = np.int64(ids[np.uint64(i)])
                if np.uint64(row) >= limit:
                    if bad[chunk] < 0:
                        bad[chunk] = i
                    id_class[i] = NO_CLASS
                    continue
                block = blocks + (row >> 6) * block_bytes
                bit = np.uint64(row & 63)
                code, same = _read_plane(load_u64(block, 0), bit, 0, np.int64(0), ~np.uint64(0))
                if bit_planes > 1:
                    code, same = _read_plane(load_u64(block, 1), bit, 1, code, same)
                if bit_planes > 2:  # four chunks have three planes: a loop over them would cost more than they do
                    code, same = _read_plane(load_u64(block, 2), bit, 2, code, same)
                for plane in range(3, bit_planes):
                    code, same = _read_plane(load_u64(block, plane), bit, plane, code, same)
                rank = popcount(same & ((np.uint64(1) << bit) - np.uint64(1)))
                id_class[np.uint64(i)] = load_u8(classes, code)
                # Of code 0, which has no slot, this reads a plane.
                id_slot[np.uint64(i)] = load_i32(block + bases, code) + np.int32(rank)


@threaded()
def _count(offsets: Any, chunk_bag: Any, id_class: Any, id_count: Any, bag_count: Any) -> None:
    """Count the ids and non-empty bags of each class, per thread."""
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        last_bag = np.full(id_count.shape[1], -1, np.int64)
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            for i in range(offsets[bag], offsets[bag + 1]):
                row_class = id_class[i]
                if row_class == NO_CLASS:
                    continue
                id_count[chunk, row_class] += 1
                if last_bag[row_class] != bag:
                    last_bag[row_class] = bag
                    bag_count[chunk, row_class] += 1


@threaded()
def _fill(
    offsets: Any,
    chunk_bag: Any,
    id_class: Any,
    id_slot: Any,
    id_start: Any,
    chunk_class_id: Any,
    chunk_class_bag: Any,
    slots: Any,
    positions: Any,
    out_offsets: Any,
    bags: Any,
) -> None:
    """Write the class lists; every thread knows where its part of each class begins."""
    classes = chunk_class_id.shape[1]
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        last_bag = np.full(classes, -1, np.int64)
        next_id = chunk_class_id[chunk].copy()
        next_bag = chunk_class_bag[chunk].copy()
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            for i in range(offsets[bag], offsets[bag + 1]):
                row_class = id_class[i]
                if row_class == NO_CLASS:
                    continue
                at = next_id[row_class]
                if last_bag[row_class] != bag:
                    last_bag[row_class] = bag
                    bags[next_bag[row_class]] = bag
                    out_offsets[next_bag[row_class] + row_class] = at - id_start[row_class]
                    next_bag[row_class] += 1
                slots[at] = id_slot[i]
                positions[at] = i
                next_id[row_class] = at + 1


def find(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> IdRoutes:
    """Numba twin of :func:`lightning_embcomp.kernels.route.reference.find`."""
    ids, bounds = indices.contiguous().numpy(), offsets.contiguous().numpy()
    id_class, id_slot = np.empty(ids.shape[0], np.uint8), np.empty(ids.shape[0], np.int32)
    class_of_code = router.class_of_code.numpy().astype(np.uint8, order="C")  # -1 becomes NO_CLASS
    chunk_bag = _chunks(bounds)
    bad = np.full(chunk_bag.shape[0] - 1, -1, np.int64)
    _find(
        bad.shape[0],
        ids,
        bounds,
        chunk_bag,
        layout.bag_start.numpy(),
        layout.table.numpy(),
        router.words.data_ptr(),
        router.start.numpy(),
        router.stride.numpy(),
        router.planes.numpy(),
        router.rows.numpy(),
        class_of_code.ctypes.data,
        class_of_code.shape[1],
        id_class,
        id_slot,
        bad,
    )
    if (bad >= 0).any():
        _raise_out_of_range(int(bad[bad >= 0].min()), ids, bounds, layout, router)
    return IdRoutes(row_class=torch.from_numpy(id_class), slot=torch.from_numpy(id_slot))


def _chunks(bounds: np.ndarray) -> np.ndarray:
    """Boundaries of the bags that each thread handles."""
    bags = bounds.shape[0] - 1
    threads = threads_for(bags, _BAGS_PER_THREAD)
    return np.arange(threads + 1) * bags // threads


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Numba twin of :func:`lightning_embcomp.kernels.route.reference.route`."""
    routes = find(indices, offsets, layout, router, classes)
    id_class, id_slot = routes.row_class.numpy(), routes.slot.numpy()
    bounds = offsets.contiguous().numpy()
    chunk_bag = _chunks(bounds)
    id_count, bag_count = (np.zeros((chunk_bag.shape[0] - 1, classes), np.int64) for _ in range(2))
    _count(id_count.shape[0], bounds, chunk_bag, id_class, id_count, bag_count)
    chunk_class_id, id_start = _starts(id_count)
    chunk_class_bag, bag_start = _starts(bag_count)
    slots = np.empty(id_start[-1], np.int32)
    positions = np.empty(id_start[-1], np.int32)
    bags = np.empty(bag_start[-1], np.int32)
    out_offsets = np.empty(bag_start[-1] + classes, np.int32)
    ends = np.arange(classes)
    out_offsets[bag_start[1:] + ends] = np.diff(id_start)
    _fill(
        id_count.shape[0],
        bounds,
        chunk_bag,
        id_class,
        id_slot,
        id_start,
        chunk_class_id,
        chunk_class_bag,
        slots,
        positions,
        out_offsets,
        bags,
    )
    return RoutedBatch(
        slots=torch.from_numpy(slots),
        positions=torch.from_numpy(positions),
        offsets=torch.from_numpy(out_offsets),
        bags=torch.from_numpy(bags),
        id_start=tuple(id_start.tolist()),
        bag_start=tuple(bag_start.tolist()),
        chunk_bag=torch.from_numpy(chunk_bag),
        chunk_class_bag=torch.from_numpy(chunk_class_bag),
    )


def _starts(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First entry of each thread and class, ``(threads + 1, classes)``, and of each class, ``(classes + 1)``."""
    class_start = np.concatenate([[0], count.sum(0).cumsum()])
    within = np.concatenate([np.zeros((1, count.shape[1]), np.int64), count.cumsum(0)])
    return within + class_start[:-1], class_start


def _raise_out_of_range(
    position: int, ids: np.ndarray, bounds: np.ndarray, layout: BagLayout, router: RouterTensors
) -> None:
    bag = int(np.searchsorted(bounds, position, side="right")) - 1
    feature = int(np.searchsorted(layout.bag_start.numpy()[1:], bag, side="right"))
    rows = int(router.rows[layout.table[feature]])
    raise IdOutOfRangeError(position, feature, int(ids[position]), rows)
