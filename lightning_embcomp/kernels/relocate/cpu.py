"""Relocation on CPU: sequential streams through old and new storage, bound by memory bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.intrinsics import copy_bytes, popcount, zero_bytes
from lightning_embcomp.kernels.types import ClassColumns, RouterTensors


@numba.njit(cache=True, boundscheck=False)
def _unpack(words: Any, words32: Any, first_word: Any, stride: Any, planes: Any, codes: Any, slots: Any) -> None:
    for i in range(codes.shape[0]):
        block = first_word + (i >> 6) * stride
        bit = np.uint64(i & 63)
        code = 0
        same = ~np.uint64(0)
        for plane in range(planes):
            word = words[block + plane]
            if (word >> bit) & np.uint64(1):
                code |= 1 << plane
                same &= word
            else:
                same &= ~word
        codes[i] = code
        if code == 0:
            slots[i] = -1
        else:
            rank = popcount(same & ((np.uint64(1) << bit) - np.uint64(1)))
            slots[i] = words32[2 * (block + planes) + code - 1] + np.int32(rank)


@numba.njit(cache=True, boundscheck=False)
def _pack(
    words: Any,
    words32: Any,
    first_word: Any,
    stride: Any,
    planes: Any,
    class_of_code: Any,
    codes: Any,
    next_slot: Any,
    slots: Any,
) -> None:
    for i in range(codes.shape[0]):
        block = first_word + (i >> 6) * stride
        if i & 63 == 0:
            for word in range(stride):
                words[block + word] = 0
            for code in range(1, class_of_code.shape[0]):
                if class_of_code[code] >= 0:
                    words32[2 * (block + planes) + code - 1] = next_slot[class_of_code[code]]
        code = codes[i]
        for plane in range(planes):
            words[block + plane] |= np.uint64((code >> plane) & 1) << np.uint64(i & 63)
        if code == 0:
            slots[i] = -1
        else:
            slots[i] = next_slot[class_of_code[code]]
            next_slot[class_of_code[code]] += 1


@numba.njit(cache=True, boundscheck=False)
def _move(
    old_codes: Any,
    old_slots: Any,
    new_codes: Any,
    new_slots: Any,
    class_of_code: Any,
    source: Any,
    target: Any,
    row_bytes: Any,
    pair_start: Any,
    pair_from: Any,
    pair_into: Any,
    pair_bytes: Any,
    pair_full: Any,
) -> None:
    codes = class_of_code.shape[0]
    for i in range(old_codes.shape[0]):
        after = new_codes[i]
        if after == 0:
            continue
        into = class_of_code[after]
        write = target[into] + np.int64(new_slots[i]) * row_bytes[into]
        before = old_codes[i]
        pair = np.int64(before) * codes + after
        if not pair_full[pair]:
            zero_bytes(write, row_bytes[into])
        if before == 0:
            continue
        out_of = class_of_code[before]
        read = source[out_of] + np.int64(old_slots[i]) * row_bytes[out_of]
        for run in range(pair_start[pair], pair_start[pair + 1]):
            copy_bytes(write + pair_into[run], read + pair_from[run], pair_bytes[run])


def unpack(router: RouterTensors, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Numba twin of :func:`lightning_embcomp.kernels.relocate.reference.unpack`."""
    codes, slots = np.empty(stop - start, np.uint8), np.empty(stop - start, np.int32)
    words = router.words.numpy()
    stride = int(router.stride[table])
    first = int(router.start[table]) + (start // 64) * stride
    _unpack(words.view(np.uint64), words.view(np.int32), first, stride, int(router.planes[table]), codes, slots)
    return torch.from_numpy(codes), torch.from_numpy(slots)


def pack(router: RouterTensors, table: int, start: int, codes: Tensor, next_slot: Tensor) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.relocate.reference.pack`."""
    slots = np.empty(codes.numel(), np.int32)
    words = router.words.numpy()
    stride = int(router.stride[table])
    _pack(
        words.view(np.uint64),
        words.view(np.int32),
        int(router.start[table]) + (start // 64) * stride,
        stride,
        int(router.planes[table]),
        router.class_of_code[table].numpy(),
        codes.contiguous().numpy(),
        next_slot.numpy(),
        slots,
    )
    return torch.from_numpy(slots)


def move_rows(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    class_of_code: Tensor,
    columns: ClassColumns,
    source: Sequence[Tensor | None],
    target: Sequence[Tensor | None],
    *,
    rowwise: bool,
) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.relocate.reference.move_rows`."""
    present = [t for t in (*source, *target) if t is not None]
    if not present:
        return
    itemsize = present[0].element_size()
    widths = np.ones_like(columns.width.numpy()) if rowwise else columns.width.numpy()
    _move(
        old[0].numpy(),
        old[1].numpy(),
        new[0].numpy(),
        new[1].numpy(),
        class_of_code.numpy(),
        _addresses(source),
        _addresses(target),
        widths * itemsize,
        *_copy_plan(class_of_code.tolist(), columns, itemsize, rowwise=rowwise),
    )


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)


def _copy_plan(
    class_of_code: list[int], columns: ClassColumns, itemsize: int, *, rowwise: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List the byte runs to copy for each pair (old code, new code), and whether they fill the whole new row."""
    starts, out_of, into, size, full = [0], [], [], [], []
    for before in class_of_code:
        for after in class_of_code:
            covered = 0
            if before >= 0 and after >= 0:
                shared = [(0, 0, 1)] if rowwise else _shared_runs(columns, before, after)
                for a, b, length in shared:
                    out_of.append(a * itemsize)
                    into.append(b * itemsize)
                    size.append(length * itemsize)
                    covered += length
            starts.append(len(size))
            full.append(after >= 0 and covered == (1 if rowwise else int(columns.width[after])))
    arrays = (np.array(values, np.int64) for values in (starts, out_of, into, size))
    first, second, third, fourth = arrays
    return first, second, third, fourth, np.array(full, np.bool_)


def _shared_runs(columns: ClassColumns, before: int, after: int) -> list[tuple[int, int, int]]:
    """Return (stored column before, stored column after, length) of the columns that both classes store."""
    runs = []
    stored_before = 0
    for i in range(int(columns.first_run[before]), int(columns.first_run[before + 1])):
        stored_after = 0
        for j in range(int(columns.first_run[after]), int(columns.first_run[after + 1])):
            low = max(int(columns.column[i]), int(columns.column[j]))
            high = min(
                int(columns.column[i] + columns.length[i]),
                int(columns.column[j] + columns.length[j]),
            )
            if low < high:
                runs.append(
                    (
                        stored_before + low - int(columns.column[i]),
                        stored_after + low - int(columns.column[j]),
                        high - low,
                    )
                )
            stored_after += int(columns.length[j])
        stored_before += int(columns.length[i])
    return runs
