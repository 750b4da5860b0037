"""Served lookups on CPU, in one call: a first pass finds the address of every row, a second turns rows into sums."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.dequantize.access import read_f16
from lightning_embcomp.kernels.dequantize.sums import (
    BITS_4,
    BITS_8,
    BITS_16,
    BITS_32,
    HEADER,
    INTEGER,
    MATHS,
    NOTHING,
    PART,
    SHIFTED,
    add_columns,
    add_last_columns,
    sum_16_columns,
    sum_32_columns,
    sum_64_columns,
)
from lightning_embcomp.kernels.dequantize.types import ServedClasses, ServedRouter
from lightning_embcomp.kernels.intrinsics import popcount, prefetch, prefetch_address, zero_bytes
from lightning_embcomp.kernels.route.reference import IdOutOfRangeError
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout

_AHEAD = 16
_LINE = 64
_BAGS_PER_THREAD = 2048
_BLOCK = 512
"""Ids whose rows are asked for before the first of them is used; they fit into the first cache."""


@threaded(fastmath=MATHS)
def _pool_served(
    out: Any,
    out_address: Any,
    ids: Any,
    offsets: Any,
    weights: Any,
    chunk_bag: Any,
    table_of: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    width: Any,
    mean: Any,
    first_run: Any,
    run_end: Any,
    run_class: Any,
    run_base: Any,
    hint: Any,
    first_hint: Any,
    hint_shift: Any,
    words: Any,
    words32: Any,
    start: Any,
    stride: Any,
    planes: Any,
    rows: Any,
    class_of_code: Any,
    address: Any,
    class_kind: Any,
    bits: Any,
    row_bytes: Any,
    first_column: Any,
    run_column: Any,
    run_length: Any,
    first_offset: Any,
    offset_address: Any,
    bad: Any,
) -> None:
    weighted = weights.shape[0] > 0
    for chunk in numba.prange(chunk_bag.shape[0] - 1):
        held = 0
        for bag in range(chunk_bag[chunk], chunk_bag[chunk + 1]):
            held = max(held, offsets[bag + 1] - offsets[bag])
        held = max(held, np.int64(_BLOCK))
        id_kind, id_class = np.empty(held, np.uint8), np.empty(held, np.uint8)
        id_address = np.empty(held, np.int64)
        feature = 0
        begin, stop = chunk_bag[chunk], chunk_bag[chunk + 1]
        while begin < stop and bad[chunk] < 0:
            # A block of bags of one feature: find its rows and ask for them, then add them up.
            while begin >= bag_start[feature + 1]:
                feature += 1
            origin = offsets[begin]
            end = begin + 1
            furthest = min(stop, bag_start[feature + 1])
            while end < furthest and offsets[end + 1] - origin <= _BLOCK:
                end += 1
            final = offsets[end]
            table = table_of[feature]
            limit, first_of, runs = rows[table], first_run[table], first_run[table + 1] - first_run[table]
            if runs == 1 and run_class[first_of] != NO_CLASS:
                c = run_class[first_of]
                kind, size = class_kind[c], row_bytes[c]
                base = address[c] + np.int64(run_base[first_of]) * size
                for i in range(origin, final):
                    row_id = np.int64(ids[i])
                    if row_id < 0 or row_id >= limit:
                        if bad[chunk] < 0:
                            bad[chunk] = i
                        row_id = 0
                    at = base + row_id * size
                    id_kind[i - origin] = kind
                    id_class[i - origin] = c
                    id_address[i - origin] = at
                    prefetch_address(at)
                    if (at & (_LINE - 1)) + size > _LINE:
                        for line in range((at & -_LINE) + _LINE, at + size, _LINE):
                            prefetch_address(line)
            elif runs > 0:
                hints, hinted = first_hint[table], hint_shift[table]
                for i in range(origin, final):
                    row_id = np.int64(ids[i])
                    id_kind[i - origin] = NOTHING
                    if row_id < 0 or row_id >= limit:
                        if bad[chunk] < 0:
                            bad[chunk] = i
                        continue
                    run = first_of + hint[hints + (row_id >> hinted)]
                    while row_id >= run_end[run]:
                        run += 1
                    c = run_class[run]
                    if c != NO_CLASS:
                        size = row_bytes[c]
                        at = address[c] + (row_id + run_base[run]) * size
                        id_kind[i - origin] = class_kind[c]
                        id_class[i - origin] = c
                        id_address[i - origin] = at
                        prefetch_address(at)
                        if (at & (_LINE - 1)) + size > _LINE:
                            for line in range((at & -_LINE) + _LINE, at + size, _LINE):
                                prefetch_address(line)
            else:
                words_from, words_per_block, bit_planes = start[table], stride[table], planes[table]
                for i in range(origin, final):
                    row_id = np.int64(ids[i])
                    id_kind[i - origin] = NOTHING
                    if row_id < 0 or row_id >= limit:
                        if bad[chunk] < 0:
                            bad[chunk] = i
                        continue
                    ahead = i + _AHEAD
                    if ahead < ids.shape[0]:
                        near = ids[ahead]
                        if near >= 0 and near < limit:
                            prefetch(words, np.intp(words_from + (near >> 6) * words_per_block))
                    block = words_from + (row_id >> 6) * words_per_block
                    bit = np.uint64(row_id & 63)
                    code = 0
                    same = ~np.uint64(0)
                    for plane in range(bit_planes):
                        word = words[block + plane]
                        is_set = (word >> bit) & np.uint64(1)
                        code |= np.int64(is_set) << plane
                        same &= word ^ (is_set - np.uint64(1))
                    c = class_of_code[table, code]
                    if c != NO_CLASS:
                        rank = popcount(same & ((np.uint64(1) << bit) - np.uint64(1)))
                        slot = np.int64(words32[2 * (block + bit_planes) + code - 1]) + np.int64(rank)
                        size = row_bytes[c]
                        at = address[c] + slot * size
                        id_kind[i - origin] = class_kind[c]
                        id_class[i - origin] = c
                        id_address[i - origin] = at
                        prefetch_address(at)
                        if (at & (_LINE - 1)) + size > _LINE:
                            for line in range((at & -_LINE) + _LINE, at + size, _LINE):
                                prefetch_address(line)
            if bad[chunk] >= 0:
                break

            n, shift, averaged = width[feature], first_offset[table], mean[feature]
            wide = n & ~15
            for bag in range(begin, end):
                line_of = bag - bag_start[feature] + row_start[feature]
                target = out_address + 4 * (line_of * out.shape[1] + column[feature])
                first, last = offsets[bag], offsets[bag + 1]
                shifts, parts, block = np.float32(0.0), 0, 0
                while block < wide:
                    if wide - block >= 64:
                        shifts, parts = sum_64_columns(target, block, first, last, origin, id_kind, id_address, weights)
                        block += 64
                    elif wide - block >= 32:
                        shifts, parts = sum_32_columns(target, block, first, last, origin, id_kind, id_address, weights)
                        block += 32
                    else:
                        shifts, parts = sum_16_columns(target, block, first, last, origin, id_kind, id_address, weights)
                        block += 16
                if wide < n:  # the last columns, up to fifteen
                    shifts, parts = np.float32(0.0), 0
                    zero_bytes(target + 4 * wide, 4 * (n - wide))
                    for i in range(first, last):
                        kind = id_kind[i - origin]
                        if kind >= PART:
                            parts |= kind
                            continue
                        at, size = id_address[i - origin], bits[id_class[i - origin]]
                        scale = weights[i] if weighted else np.float32(1.0)
                        bias = np.float32(0.0)
                        if kind & SHIFTED:
                            shifts += scale
                        if kind & INTEGER:
                            bias = read_f16(at + 2) * scale
                            scale = read_f16(at) * scale
                            at += HEADER
                        add_last_columns(target + 4 * wide, n - wide, at + (wide * size >> 3), size, scale, bias)
                if shift >= 0 and shifts != 0:
                    add_columns(target, n, offset_address + 4 * shift, 32, shifts, np.float32(0.0))
                if parts & PART:  # rows that store some of their columns
                    for i in range(first, last):
                        kind = id_kind[i - origin]
                        if not kind & PART:
                            continue
                        c = id_class[i - origin]
                        at = id_address[i - origin]
                        factor = weights[i] if weighted else np.float32(1.0)
                        scale, bias = factor, np.float32(0.0)
                        if kind & INTEGER:
                            bias = read_f16(at + 2) * factor
                            scale = read_f16(at) * factor
                            at += HEADER
                        for run in range(first_column[c], first_column[c + 1]):
                            low, length = run_column[run], run_length[run]
                            add_columns(target + 4 * low, length, at, bits[c], scale, bias)
                            if kind & SHIFTED and shift >= 0:
                                source = offset_address + 4 * (shift + low)
                                add_columns(target + 4 * low, length, source, 32, factor, np.float32(0.0))
                            at += (length * bits[c]) >> 3
                if averaged and last - first > 1:
                    share = np.float32(1.0) / np.float32(last - first)
                    row = out[line_of, column[feature] : column[feature] + n]
                    for d in range(n):
                        row[d] *= share
            begin = end


def class_kinds(classes: ServedClasses) -> np.ndarray:
    """One byte per class: size of a value, and whether rows take an offset or store some columns only."""
    sizes = {8: BITS_8 | INTEGER, 4: BITS_4 | INTEGER, 2: INTEGER, 16: BITS_16, 32: BITS_32}
    return np.array(
        [
            sizes[bits] | (SHIFTED if shifted else 0) | (0 if whole else PART)
            for bits, shifted, whole in zip(
                classes.bits.tolist(), classes.shifted.tolist(), classes.whole.tolist(), strict=True
            )
        ],
        np.uint8,
    )


def _arrays(router: ServedRouter, classes: ServedClasses) -> tuple[Any, ...]:
    """Arguments of the kernel that are the same in every call; kept on the router, with the classes they are of."""
    kept = router.__dict__.get("_arrays")
    if kept is not None and kept[0] is classes:
        found: tuple[Any, ...] = kept[1]
        return found
    packed, columns = router.packed, classes.columns
    found = (
        router.first_run.numpy(),
        router.run_end.numpy(),
        router.run_class.numpy(),
        router.run_base.numpy(),
        router.hint.numpy(),
        router.first_hint.numpy(),
        router.hint_shift.numpy(),
        packed.words.numpy().view(np.uint64),
        packed.words.numpy().view(np.int32),
        packed.start.numpy(),
        packed.stride.numpy(),
        packed.planes.numpy(),
        packed.rows.numpy(),
        router.class_of_code.numpy(),
        classes.address.numpy(),
        class_kinds(classes),
        classes.bits.numpy(),
        classes.stride.numpy(),
        columns.first_run.numpy(),
        columns.column.numpy(),
        columns.length.numpy(),
        classes.first_offset.numpy(),
        classes.offsets.data_ptr(),
    )
    router.__dict__["_arrays"] = (classes, found)
    return found


def pool_served(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    router: ServedRouter,
    classes: ServedClasses,
) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.dequantize.reference.pool_served`."""
    ids, bounds = indices.contiguous().numpy(), offsets.contiguous().numpy()
    out = torch.empty(layout.shape, dtype=torch.float32)
    total = bounds.shape[0] - 1
    threads = threads_for(total, _BAGS_PER_THREAD)
    bad = np.full(threads, -1, np.int64)
    _pool_served(
        threads,
        out.numpy(),
        out.data_ptr(),
        ids,
        bounds,
        np.empty(0, np.float32) if weights is None else weights.detach().contiguous().numpy(),
        np.array([total * thread // threads for thread in range(threads + 1)], np.int64),
        layout.table.numpy(),
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.width.numpy(),
        layout.mean.numpy(),
        *_arrays(router, classes),
        bad,
    )
    if (bad >= 0).any():
        at = int(bad[bad >= 0].min())
        bag = int(np.searchsorted(bounds, at, side="right")) - 1
        feature = int(np.searchsorted(layout.bag_start.numpy()[1:], bag, side="right"))
        raise IdOutOfRangeError(at, feature, int(ids[at]), int(router.packed.rows[layout.table[feature]]))
    return out
