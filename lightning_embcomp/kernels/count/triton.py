"""Counting on CUDA: ids are sorted by row, and the lane of a row's first id moves the row's counter.

Per id a sort (:func:`lightning_embcomp.kernels.occurrences.triton.sort_rows`), which bounds it; per distinct row one
counter of 1 or 4 bytes read and written at a random place. No atomics: counters move once, by one lane.

The fields of :class:`~lightning_embcomp.kernels.count.rows.RowCounts` are small and set by the host in every step; they
stay in its memory, and only the counters themselves are on the GPU.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton has types of its own

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.count.encoding import (
    INTEGER,
    LARGEST_INT,
    LAST_CODE,
    LOG,
    LOG_VALUES,
    MIX_1,
    MIX_2,
    REAL,
    ROW_FACTOR,
    STEP_FACTOR,
)
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.occurrences.triton import sort_rows
from lightning_embcomp.kernels.transfer import on_device
from lightning_embcomp.kernels.triton import constant, count_at_most, steps_for
from lightning_embcomp.kernels.types import BagLayout

_HEADS = 256
_LOG: tl.constexpr = tl.constexpr(LOG)
_INTEGER: tl.constexpr = tl.constexpr(INTEGER)
_REAL: tl.constexpr = tl.constexpr(REAL)
_LAST_CODE: tl.constexpr = tl.constexpr(LAST_CODE)
_LARGEST_INT: tl.constexpr = tl.constexpr(float(LARGEST_INT))
_ROW_FACTOR: tl.constexpr = tl.constexpr(ROW_FACTOR)
_MIX_1: tl.constexpr = tl.constexpr(MIX_1)
_MIX_2: tl.constexpr = tl.constexpr(MIX_2)


@triton.jit
def _uniform(seed, position):
    """Twin of :func:`lightning_embcomp.kernels.count.encoding.uniform`; the seed is multiplied already."""
    mixed = position.to(tl.uint64) * _ROW_FACTOR + seed.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    return ((mixed ^ (mixed >> 31)) >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def decode(address, row, encoding, values, live):
    """Counts that counters stand for, float64."""
    is_log, is_integer, is_real = live & (encoding == _LOG), live & (encoding == _INTEGER), live & (encoding == _REAL)
    code = tl.load(address.to(tl.pointer_type(tl.uint8)) + row, is_log, other=0).to(tl.int64)
    whole = tl.load(address.to(tl.pointer_type(tl.int32)) + row, is_integer, other=0).to(tl.float64)
    real = tl.load(address.to(tl.pointer_type(tl.float32)) + row, is_real, other=0.0).to(tl.float64)
    return tl.where(is_log, tl.load(values + code), tl.where(is_integer, whole, real))


@triton.jit
def _count(
    keys,
    order,
    ids,
    bounds,
    table_of,
    address,
    encoding,
    first_row,
    rows,
    increment,
    occurrences,
    seed,
    values,
    n,
    features,
    steps: tl.constexpr,
    key_steps: tl.constexpr,
    block: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    key = tl.load(keys + p, p < n, other=-1)
    head = (key >= 0) & (key != tl.load(keys + p - 1, (p > 0) & (p < n), other=-1))
    i = tl.load(order + p, head, other=0)
    table = tl.load(table_of + count_at_most(bounds + 1, features, i, steps), head, other=0)
    row = tl.load(ids + i, head, other=0).to(tl.int64)
    head = head & (row >= 0) & (row < tl.load(rows + table, head, other=0))  # ids out of range are reported later
    added = tl.load(increment + table, head, other=0.0)
    if key_steps > 0:
        times = (count_at_most(keys, n, key, key_steps) - p).to(tl.float64)
        added *= tl.where(tl.load(occurrences + table, head, other=0) != 0, times, 1.0)
    at, kind = tl.load(address + table, head, other=0), tl.load(encoding + table, head, other=0)
    goal = decode(at, row, kind, values, head) + added

    integer = tl.minimum(goal, _LARGEST_INT).to(tl.int32)
    tl.store(at.to(tl.pointer_type(tl.int32)) + row, integer, head & (kind == _INTEGER))
    tl.store(at.to(tl.pointer_type(tl.float32)) + row, goal.to(tl.float32), head & (kind == _REAL))

    # Log counters move to one of the codes around the goal.
    goal = tl.minimum(goal, tl.load(values + _LAST_CODE))
    low = tl.minimum(count_at_most(values, _LAST_CODE + 1, goal, 9) - 1, _LAST_CODE)
    high = tl.minimum(low + 1, _LAST_CODE)
    below, above = tl.load(values + low), tl.load(values + high)
    draw = _uniform(tl.load(seed), tl.load(first_row + table, head, other=0) + row)
    code = tl.where(draw * (above - below) < goal - below, high, low).to(tl.uint8)
    tl.store(at.to(tl.pointer_type(tl.uint8)) + row, code, head & (kind == _LOG))


@triton.jit
def _gains(
    ids,
    bounds,
    table_of,
    address,
    encoding,
    rows,
    gain,
    floor,
    values,
    out,
    n,
    features,
    steps: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = i < n
    table = tl.load(table_of + count_at_most(bounds + 1, features, i, steps), there, other=0)
    row = tl.load(ids + i, there, other=0).to(tl.int64)
    live = there & (row >= 0) & (row < tl.load(rows + table, there, other=0))
    at, kind = tl.load(address + table, there, other=0), tl.load(encoding + table, there, other=0)
    count = tl.maximum(decode(at, row, kind, values, live), tl.load(floor + table, there, other=1.0))
    wanted = tl.load(gain + table, there, other=0.0)
    multiplier = (wanted / tl.sqrt(count)).to(tl.float32)
    tl.store(out + i, tl.where((kind != 0) & (wanted > 0.0), multiplier, 1.0), there)


def log_values(device: torch.device) -> Tensor:
    """The count that each log code stands for."""
    return constant(LOG_VALUES.tolist(), torch.float64, device)


def count_rows(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> None:
    """Triton twin of :func:`lightning_embcomp.kernels.count.reference.count_rows`."""
    device, ids, features = indices.device, indices.contiguous(), layout.table.numel()
    moving = (counts.increment.numpy() != 0.0) & (counts.encoding.numpy() != 0)
    if not ids.numel() or not moving.any():
        return
    rows = [0 if stored is None else stored.numel() for stored in counts.tables]
    start = np.where(moving, np.cumsum([0, *rows])[:-1], -1)
    keys, order = sort_rows(ids, offsets, layout, constant(start.tolist(), torch.int64, device), sum(rows))
    seed = (int(counts.seed.numpy()[0]) * STEP_FACTOR + 2**63) % 2**64 - 2**63
    by_occurrence = bool((counts.occurrences.numpy()[moving] != 0).any())
    _count[(triton.cdiv(ids.numel(), _HEADS),)](
        keys,
        order,
        ids,
        offsets.index_select(0, layout.bag_start),
        layout.table,
        on_device(counts.address, device),
        on_device(counts.encoding, device),
        on_device(counts.first_row, device),
        constant(rows, torch.int64, device),
        on_device(counts.increment, device),
        on_device(counts.occurrences, device),
        on_device(torch.tensor([seed]), device),
        log_values(device),
        ids.numel(),
        features,
        steps_for(features),
        steps_for(ids.numel()) if by_occurrence else 0,
        _HEADS,
    )


def row_gains(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.count.reference.row_gains`."""
    device, ids, features = indices.device, indices.contiguous(), layout.table.numel()
    gains = torch.empty(ids.numel(), device=device)
    if ids.numel():
        _gains[(triton.cdiv(ids.numel(), _HEADS),)](
            ids,
            offsets.index_select(0, layout.bag_start),
            layout.table,
            on_device(counts.address, device),
            on_device(counts.encoding, device),
            constant([0 if stored is None else stored.numel() for stored in counts.tables], torch.int64, device),
            on_device(counts.gain, device),
            on_device(counts.floor, device),
            log_values(device),
            gains,
            ids.numel(),
            features,
            steps_for(features),
            _HEADS,
        )
    return gains
