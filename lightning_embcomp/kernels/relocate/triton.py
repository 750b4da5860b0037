"""Relocation on CUDA: a lane per row reads packed routers, one per block of 64 rows writes them; rows move as bits.

``unpack`` reads the words of a block and writes 5 bytes per row. ``pack`` reads codes twice, writes the words of every
block once, and keeps 8 bytes per block and code in between. ``move_rows`` reads 10 bytes per row, and each stored value
of the old and of the new row once. All of it runs through the tables in order and is bound by memory bandwidth. Only
``pack`` waits for the device, once per call: how far slots have got is the host's to know.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.triton import (
    addresses,
    logical_column,
    read_code,
    stored_column,
    stored_runs,
    tile,
    widths_and_runs,
)
from lightning_embcomp.kernels.types import ClassColumns, RouterTensors

_ROWS, _BLOCKS = 512, 8
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _unpack(words, words32, start, stride, planes, table, first_block, codes, slots, n, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = i < n
    word = tl.load(start + table) + (first_block + (i >> 6)) * tl.load(stride + table)
    code, slot = read_code(words, words32, word, tl.zeros_like(i) + tl.load(planes + table), i & 63, live)
    tl.store(codes + i, code.to(tl.uint8), live)
    tl.store(slots + i, tl.where(code > 0, slot, -1).to(tl.int32), live)


@triton.jit
def _count_codes(codes, counts, n, blocks, most_codes, together: tl.constexpr):
    """How often each code occurs in each block of 64 rows, code by code."""
    b = tl.program_id(0).to(tl.int64) * together + tl.arange(0, together)
    i = b[:, None] * 64 + tl.arange(0, 64)[None, :]
    code = tl.load(codes + i, i < n, other=0).to(tl.int32)
    for wanted in range(1, most_codes):
        tl.store(counts + wanted * blocks + b, tl.sum((code == wanted).to(tl.int64), 1), b < blocks)


@triton.jit
def _base(ends, counts, next_slot, class_of_code, code, b, blocks, most_codes):
    """Slot of the first row with a code in blocks, 0 for codes that the table does not have; 32 bits of an int64."""
    wanted = tl.zeros_like(b) + code
    row_class = tl.load(class_of_code + wanted, wanted < most_codes, other=-1)
    stored = (b < blocks) & (row_class >= 0)
    at = wanted * blocks + b
    base = tl.load(ends + at, stored, other=0) - tl.load(counts + at, stored, other=0)
    base += tl.load(next_slot + row_class, row_class >= 0, other=0)
    return tl.where(stored, base, 0) & 0xFFFFFFFF


@triton.jit
def _write_blocks(
    words,
    start,
    stride,
    planes,
    class_of_code,
    table,
    first_block,
    codes,
    counts,
    ends,
    next_slot,
    n,
    blocks,
    most_codes,
    together: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * together + tl.arange(0, together)
    there = b < blocks
    bit = tl.arange(0, 64).to(tl.int64)[None, :]
    i = b[:, None] * 64 + bit
    code = tl.load(codes + i, i < n, other=0).to(tl.int64)
    mine = class_of_code + table * most_codes
    size, own_planes = tl.load(stride + table), tl.load(planes + table)
    block = words + tl.load(start + table) + (first_block + b) * size
    for plane in range(own_planes):
        tl.store(block + plane, tl.sum(((code >> plane) & 1) << bit, 1), there)
    for pair in range(size - own_planes):
        low = _base(ends, counts, next_slot, mine, 2 * pair + 1, b, blocks, most_codes)
        high = _base(ends, counts, next_slot, mine, 2 * pair + 2, b, blocks, most_codes)
        tl.store(block + own_planes + pair, low | (high << 32), there)


@triton.jit
def _move(
    old_code,
    old_slot,
    new_code,
    new_slot,
    class_of_code,
    source,
    target,
    class_width,
    first_run,
    run_column,
    run_length,
    n,
    runs,
    rowwise: tl.constexpr,
    kind: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    after = tl.load(new_code + i, i < n, other=0).to(tl.int64)
    before = tl.load(old_code + i, i < n, other=0).to(tl.int64)
    into = tl.load(class_of_code + after, after > 0, other=-1).to(tl.int64)
    out_of = tl.load(class_of_code + before, before > 0, other=-1).to(tl.int64)
    write = tl.load(target + into, into >= 0, other=0)
    read = tl.load(source + out_of, out_of >= 0, other=0)
    live, had = write != 0, (write != 0) & (read != 0)
    write, read = write.to(tl.pointer_type(kind)), read.to(tl.pointer_type(kind))
    to_slot = tl.load(new_slot + i, live, other=0).to(tl.int64)
    from_slot = tl.load(old_slot + i, had, other=0).to(tl.int64)
    if rowwise:
        tl.store(write + to_slot, tl.load(read + from_slot, had, other=0), live)
    else:
        width = tl.load(class_width + into, live, other=0)
        write += to_slot * width
        read += from_slot * tl.load(class_width + out_of, had, other=0)
        for begin in range(0, tl.max(width, 0), block_columns):
            s = begin + tl.arange(0, block_columns)[None, :]
            kept = live[:, None] & (s < width[:, None])
            d = logical_column(s, into[:, None], live[:, None], first_run, run_column, run_length, runs)
            at = stored_column(d, out_of[:, None], had[:, None], first_run, run_column, run_length, runs)
            shared = kept & had[:, None] & (at >= 0)
            tl.store(write[:, None] + s, tl.load(read[:, None] + at, shared, other=0), kept)


def unpack(router: RouterTensors, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Triton twin of :func:`lightning_embcomp.kernels.relocate.reference.unpack`."""
    n, device = stop - start, router.words.device
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    slots = torch.empty(n, dtype=torch.int32, device=device)
    if n:
        _unpack[(triton.cdiv(n, _ROWS),)](
            router.words,
            router.words.view(torch.int32),
            router.start,
            router.stride,
            router.planes,
            table,
            start // 64,
            codes,
            slots,
            n,
            _ROWS,
        )
    return codes, slots


def pack(router: RouterTensors, table: int, start: int, codes: Tensor, next_slot: Tensor) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.relocate.reference.pack`."""
    n, most_codes, device = codes.numel(), router.class_of_code.shape[1], router.words.device
    if not n:
        return torch.empty(0, dtype=torch.int32, device=device)
    blocks, codes = triton.cdiv(n, 64), codes.contiguous()
    counts = torch.zeros(most_codes, blocks, dtype=torch.int64, device=device)
    grid = (triton.cdiv(blocks, _BLOCKS),)
    _count_codes[grid](codes, counts, n, blocks, most_codes, _BLOCKS)
    ends = counts.cumsum(1)
    _write_blocks[grid](
        router.words,
        router.start,
        router.stride,
        router.planes,
        router.class_of_code,
        table,
        start // 64,
        codes,
        counts,
        ends,
        next_slot.to(device, copy=True),
        n,
        blocks,
        most_codes,
        _BLOCKS,
    )
    row_class, used = torch.stack([router.class_of_code[table].long(), ends[:, -1]]).tolist()
    for c, rows in zip(row_class, used, strict=True):
        if c >= 0:
            next_slot[c] += rows
    return unpack(router, table, start, start + n)[1]


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
    """Triton twin of :func:`lightning_embcomp.kernels.relocate.reference.move_rows`."""
    n, device = new[0].numel(), new[0].device
    present = [tensor for tensor in target if tensor is not None]
    if not n or not present:
        return
    widths, runs = widths_and_runs(columns)
    block_rows, block_columns = (_ROWS, 1) if rowwise else tile(widths)
    _move[(triton.cdiv(n, block_rows),)](
        *(tensor.contiguous() for tensor in (*old, *new)),
        class_of_code.contiguous(),
        addresses(source, device),
        addresses(target, device),
        *stored_runs(columns),
        n,
        runs,
        rowwise,
        _BITS[present[0].element_size()],
        block_rows,
        block_columns,
    )
