"""Routing on CPU: one pass finds class and slot, a second writes the class lists; threads own ranges of bags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.intrinsics import popcount, prefetch
from lightning_embcomp.kernels.route.reference import IdOutOfRangeError
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes, RoutedBatch, RouterTensors

_AHEAD = 16  # ids between a prefetch and its use: about the misses that a core keeps in flight
_BAGS_PER_THREAD = 4096  # below this a second thread costs more than it saves


@threaded()
def _find(
    ids: Any,
    offsets: Any,
    chunk_bag: Any,
    bag_start: Any,
    table_of: Any,
    words: Any,
    words32: Any,
    start: Any,
    stride: Any,
    planes: Any,
    rows: Any,
    class_of_code: Any,
    id_class: Any,
    id_slot: Any,
    id_count: Any,
    bag_count: Any,
    bad: Any,
) -> None:
    """Fill class and slot of each id, and per thread the number of ids and non-empty bags of each class."""
    classes = id_count.shape[1]
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        last_bag = np.full(classes, -1, np.int64)
        feature = 0
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            while bag >= bag_start[feature + 1]:
                feature += 1
            table = table_of[feature]
            first_word, words_per_block, bit_planes, limit = start[table], stride[table], planes[table], rows[table]
            for i in range(offsets[bag], offsets[bag + 1]):
                ahead = i + _AHEAD
                if ahead < ids.shape[0]:
                    near = ids[ahead]
                    if near >= 0 and near < limit:
                        prefetch(words, np.intp(first_word + (near >> 6) * words_per_block))
                row = np.int64(ids[i])
                if row < 0 or row >= limit:
                    if bad[chunk] < 0:
                        bad[chunk] = i
                    id_class[i] = NO_CLASS
                    continue
                block = first_word + (row >> 6) * words_per_block
                bit = np.uint64(row & 63)
                code = 0
                same = ~np.uint64(0)
                for plane in range(bit_planes):
                    word = words[block + plane]
                    if (word >> bit) & np.uint64(1):
                        code |= 1 << plane
                        same &= word
                    else:
                        same &= ~word
                row_class = class_of_code[table, code]
                if row_class < 0:
                    id_class[i] = NO_CLASS
                    continue
                rank = popcount(same & ((np.uint64(1) << bit) - np.uint64(1)))
                id_class[i] = row_class
                id_slot[i] = words32[2 * (block + bit_planes) + code - 1] + np.int32(rank)
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
    found = _find_in_chunks(indices, offsets, layout, router, classes)
    return IdRoutes(row_class=torch.from_numpy(found.id_class), slot=torch.from_numpy(found.id_slot))


@dataclass(frozen=True)
class _Found:
    """Result of the first pass: routes of the ids, and counts ``(threads, classes)``."""

    id_class: np.ndarray
    id_slot: np.ndarray
    id_count: np.ndarray
    bag_count: np.ndarray
    chunk_bag: np.ndarray


def _find_in_chunks(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> _Found:
    ids, bounds = indices.contiguous().numpy(), offsets.contiguous().numpy()
    bag_total = bounds.shape[0] - 1
    chunks = threads_for(bag_total, _BAGS_PER_THREAD)
    found = _Found(
        id_class=np.empty(ids.shape[0], np.uint8),
        id_slot=np.empty(ids.shape[0], np.int32),
        id_count=np.zeros((chunks, classes), np.int64),
        bag_count=np.zeros((chunks, classes), np.int64),
        chunk_bag=np.arange(chunks + 1) * bag_total // chunks,
    )
    bad = np.full(chunks, -1, np.int64)
    _find(
        chunks,
        ids,
        bounds,
        found.chunk_bag,
        layout.bag_start.numpy(),
        layout.table.numpy(),
        router.words.numpy().view(np.uint64),
        router.words.numpy().view(np.int32),
        router.start.numpy(),
        router.stride.numpy(),
        router.planes.numpy(),
        router.rows.numpy(),
        router.class_of_code.numpy(),
        found.id_class,
        found.id_slot,
        found.id_count,
        found.bag_count,
        bad,
    )
    if (bad >= 0).any():
        _raise_out_of_range(int(bad[bad >= 0].min()), ids, bounds, layout, router)
    return found


def route(indices: Tensor, offsets: Tensor, layout: BagLayout, router: RouterTensors, classes: int) -> RoutedBatch:
    """Numba twin of :func:`lightning_embcomp.kernels.route.reference.route`."""
    found = _find_in_chunks(indices, offsets, layout, router, classes)
    bounds = offsets.contiguous().numpy()
    chunk_class_id, id_start = _starts(found.id_count)
    chunk_class_bag, bag_start = _starts(found.bag_count)
    slots = np.empty(id_start[-1], np.int32)
    positions = np.empty(id_start[-1], np.int32)
    bags = np.empty(bag_start[-1], np.int32)
    out_offsets = np.empty(bag_start[-1] + classes, np.int32)
    ends = np.arange(classes)
    out_offsets[bag_start[1:] + ends] = np.diff(id_start)
    _fill(
        found.chunk_bag.shape[0] - 1,
        bounds,
        found.chunk_bag,
        found.id_class,
        found.id_slot,
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
        chunk_bag=torch.from_numpy(found.chunk_bag),
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
