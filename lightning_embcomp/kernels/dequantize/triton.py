"""Served lookups on CUDA: a lane per id finds its row, then a program turns the rows of a few bags into sums.

Per id 4 or 8 bytes in, sectors of the packed router or of the runs (in the cache), 5 bytes of route written and read,
and the stored bytes of its row at a random place; per bag the output row, written once. The random rows bound it;
narrow integers cost instructions too, so 2-bit rows gain less over 4-bit ones than their size says. Where every row
begins at a multiple of 4 bytes, values of 16 and 32 bits are read whole, elsewhere byte by byte.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.dequantize.types import ServedClasses, ServedRouter
from lightning_embcomp.kernels.route.watch import NEVER, Findings, report
from lightning_embcomp.kernels.triton import (
    count_at_most,
    place_of,
    places,
    read_code,
    steps_for,
    stored_column,
    tile,
    widths_and_runs,
)
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, IdRoutes

_IDS = 512
_NO_CLASS: tl.constexpr = tl.constexpr(NO_CLASS)
_NEVER: tl.constexpr = tl.constexpr(NEVER)
_HEADER: tl.constexpr = tl.constexpr(4)


@triton.jit
def _locate(
    ids,
    bounds,
    table_of,
    first_run,
    run_end,
    run_class,
    run_base,
    words,
    words32,
    start,
    stride,
    planes,
    rows,
    class_of_code,
    id_class,
    id_slot,
    first_bad,
    bad_value,
    n,
    features,
    codes,
    steps: tl.constexpr,
    run_steps: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = i < n
    table = tl.load(table_of + count_at_most(bounds + 1, features, i, steps), there, other=0)
    row = tl.load(ids + i, there, other=0).to(tl.int64)
    inside = there & (row >= 0) & (row < tl.load(rows + table, there, other=0))
    run = tl.load(first_run + table, inside, other=0)
    runs = tl.load(first_run + table + 1, inside, other=0) - run
    in_run = inside & (runs > 0)
    run += count_at_most(run_end + run, tl.where(in_run, runs, 0), row, run_steps)
    packed = inside & (runs == 0)
    first_word = tl.load(start + table, packed, other=0) + (row >> 6) * tl.load(stride + table, packed, other=0)
    code, slot = read_code(words, words32, first_word, tl.load(planes + table, packed, other=0), row & 63, packed)
    row_class = tl.load(class_of_code + table * codes + code, packed, other=_NO_CLASS)
    row_class = tl.where(in_run, tl.load(run_class + run, in_run, other=_NO_CLASS), row_class)
    slot = tl.where(in_run, tl.load(run_base + run, in_run, other=0) + row, slot)
    tl.store(id_class + i, row_class.to(tl.uint8), there)
    tl.store(id_slot + i, slot.to(tl.int32), there)
    wrong = tl.min(tl.where(there & (inside == 0), i, _NEVER), 0)
    if wrong < _NEVER:
        tl.atomic_min(first_bad, wrong)
        tl.store(bad_value + tl.program_id(0), tl.sum(tl.where(i == wrong, row, 0), 0))


@triton.jit
def _read(at, size: tl.constexpr, mask, aligned: tl.constexpr):
    """The 2 or 4 bytes at addresses, as an int32."""
    if aligned:
        if size == 4:
            return tl.load(at.to(tl.pointer_type(tl.int32)), mask, other=0)
        return tl.load(at.to(tl.pointer_type(tl.int16)), mask, other=0).to(tl.int32)
    pointer = at.to(tl.pointer_type(tl.uint8))
    word = tl.load(pointer, mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, size):
        word |= tl.load(pointer + byte, mask, other=0).to(tl.int32) << (8 * byte)
    return word


@triton.jit
def _half(word):
    """Float32 of the float16 in the low bits."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _values(row, bits, stored, live, kept, aligned: tl.constexpr):
    """Values of stored columns; rows of integers begin with scale and bias."""
    integer = live & (bits <= 8)
    scale = _half(_read(row, 2, integer, aligned))
    bias = _half(_read(row + 2, 2, integer, aligned))
    offset = stored * bits[:, None]
    at = row[:, None] + (offset >> 3) + tl.where(integer, _HEADER, 0)[:, None]
    packed = tl.load(at.to(tl.pointer_type(tl.uint8)), kept & integer[:, None], other=0).to(tl.int32)
    code = (packed >> (offset & 7).to(tl.int32)) & ((tl.zeros_like(packed) + 1 << bits[:, None].to(tl.int32)) - 1)
    half = _half(_read(at, 2, kept & (bits == 16)[:, None], aligned))
    whole = _read(at, 4, kept & (bits == 32)[:, None], aligned).to(tl.float32, bitcast=True)
    number = code.to(tl.float32) * scale[:, None] + bias[:, None]
    value = tl.where(integer[:, None], number, tl.where((bits == 16)[:, None], half, whole))
    return tl.where(kept, value, 0.0)


@triton.jit
def _pool_served(
    out,
    out_stride,
    id_class,
    id_slot,
    offsets,
    weights,
    table_of,
    bag_start,
    row_start,
    column,
    width,
    mean,
    address,
    class_bits,
    row_bytes,
    shifted,
    first_run,
    run_column,
    run_length,
    first_offset,
    shifts,
    bags,
    features,
    runs,
    steps: tl.constexpr,
    weighted: tl.constexpr,
    aligned: tl.constexpr,
    block_bags: tl.constexpr,
    block_columns: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64) * block_bags + tl.arange(0, block_bags)
    there = bag < bags
    feature, target = place_of(bag, there, bag_start, row_start, column, out_stride, features, steps)
    first = tl.load(offsets + bag, there, other=0).to(tl.int64)
    length = tl.load(offsets + bag + 1, there, other=0) - first
    columns = tl.load(width + feature, there, other=0)
    averaged = tl.load(mean + feature, there, other=0) != 0
    scale = tl.where(averaged & (length > 0), 1.0 / tl.maximum(length, 1).to(tl.float32), 1.0)
    shift = tl.load(first_offset + tl.load(table_of + feature, there, other=0), there, other=-1)
    for start in range(0, tl.max(columns, 0), block_columns):
        d = start + tl.arange(0, block_columns)[None, :]
        moved = there[:, None] & (shift >= 0)[:, None] & (d < columns[:, None])
        by_table = tl.load(shifts + shift[:, None] + d, moved, other=0.0)
        total = tl.zeros([block_bags, block_columns], tl.float32)
        for k in range(tl.max(length, 0)):
            c = tl.load(id_class + first + k, k < length, other=_NO_CLASS).to(tl.int64)
            live = c != _NO_CLASS
            slot = tl.load(id_slot + first + k, live, other=0).to(tl.int64)
            row = tl.load(address + c, live, other=0) + slot * tl.load(row_bytes + c, live, other=0)
            stored = stored_column(d, c[:, None], live[:, None], first_run, run_column, run_length, runs)
            kept = live[:, None] & (stored >= 0)
            value = _values(row, tl.load(class_bits + c, live, other=8), stored, live, kept, aligned)
            takes_shift = tl.load(shifted + c, live, other=0) != 0
            value += tl.where(kept & takes_shift[:, None], by_table, 0.0)
            if weighted:
                value *= tl.load(weights + first + k, live, other=0.0).to(tl.float32)[:, None]
            total += value
        tl.store(out + target[:, None] + d, total * scale[:, None], there[:, None] & (d < columns[:, None]))


def pool_served(
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    router: ServedRouter,
    classes: ServedClasses,
) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.dequantize.reference.pool_served`.

    A GPU reports bad ids in a later call.
    """
    out = torch.empty(layout.shape, dtype=torch.float32, device=indices.device)
    bags, features = offsets.numel() - 1, layout.table.numel()
    if bags <= 0:
        return out
    routes = _find_rows(indices.contiguous(), offsets, layout, router)
    columns = classes.columns
    widths, runs = widths_and_runs(columns)
    aligned = all(rows.data_ptr() % 4 == 0 and rows.stride(0) % 4 == 0 for rows in classes.rows)
    block_bags, block_columns = tile(widths)
    _pool_served[(triton.cdiv(bags, block_bags),)](
        out,
        layout.shape[1],
        routes.row_class,
        routes.slot,
        offsets.contiguous(),
        offsets if weights is None else weights.detach().contiguous(),
        layout.table,
        *places(layout),
        classes.address,
        classes.bits,
        classes.stride,
        classes.shifted,
        columns.first_run,
        columns.column,
        columns.length,
        classes.first_offset,
        classes.offsets,
        bags,
        features,
        runs,
        steps_for(features),
        weights is not None,
        aligned,
        block_bags,
        block_columns,
    )
    return out


def _find_rows(ids: Tensor, offsets: Tensor, layout: BagLayout, router: ServedRouter) -> IdRoutes:
    """Class and slot of every id."""
    packed, device = router.packed, ids.device
    routes = IdRoutes(
        row_class=torch.empty(ids.numel(), dtype=torch.uint8, device=device),
        slot=torch.empty(ids.numel(), dtype=torch.int32, device=device),
    )
    if not ids.numel():
        return routes
    programs, features = triton.cdiv(ids.numel(), _IDS), layout.table.numel()
    findings = Findings.prepare(programs, _IDS, offsets, layout, packed)
    _locate[(programs,)](
        ids,
        findings.bounds,
        layout.table,
        router.first_run,
        router.run_end,
        router.run_class,
        router.run_base,
        packed.words,
        packed.words.view(torch.int32),
        packed.start,
        packed.stride,
        packed.planes,
        packed.rows,
        router.class_of_code,
        routes.row_class,
        routes.slot,
        findings.first,
        findings.values,
        ids.numel(),
        features,
        router.class_of_code.shape[1],
        steps_for(features),
        steps_for(router.run_end.numel()),
        _IDS,
    )
    report(findings)
    return routes
