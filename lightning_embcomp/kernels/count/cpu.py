"""Counting on CPU: a pass that finds the distinct rows in a hash table, then one that moves their counters."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.count.encoding import (
    LARGEST_INT,
    LAST_CODE,
    LOG_VALUES,
    MIX_1,
    MIX_2,
    ROW_FACTOR,
    STEP_FACTOR,
)
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.intrinsics import (
    load_f32,
    load_i32,
    load_u8,
    prefetch_address,
    store_f32,
    store_i32,
    store_u8,
)
from lightning_embcomp.kernels.types import BagLayout

_AHEAD = 8
_IDS_PER_THREAD = 8192
_STEP_FACTOR, _ROW_FACTOR = np.uint64(STEP_FACTOR), np.uint64(ROW_FACTOR)
_MIX_1, _MIX_2 = np.uint64(MIX_1), np.uint64(MIX_2)


@numba.njit(cache=True, inline="always")
def uniform(seed: Any, position: Any) -> Any:
    """Twin of :func:`lightning_embcomp.kernels.count.encoding.uniform`."""
    mixed = np.uint64(position) * _ROW_FACTOR + np.uint64(seed) * _STEP_FACTOR
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return np.float64((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True)
def advance(address: Any, row: Any, kind: Any, added: Any, seed: Any, position: Any, values: Any) -> Any:
    """Add to the counter of a row, none if ``added`` is 0, and return what it stands for afterwards."""
    if kind == 1:
        code = np.int64(load_u8(address, row))
        if added > 0.0 and code < LAST_CODE:
            goal = min(values[code] + added, values[LAST_CODE])
            while code < LAST_CODE and values[code + 1] <= goal:
                code += 1
            if code < LAST_CODE and uniform(seed, position) * (values[code + 1] - values[code]) < goal - values[code]:
                code += 1
            store_u8(address, row, np.uint8(code))
        return values[code]
    if kind == 2:
        count = np.float64(load_i32(address, row))
        if added > 0.0:
            count = min(count + added, np.float64(LARGEST_INT))
            store_i32(address, row, np.int32(count))
        return count
    total = np.float64(load_f32(address, row))
    if added > 0.0:
        rounded = np.float32(total + added)
        store_f32(address, row, rounded)
        total = np.float64(rounded)
    return total


@threaded()
def _count(
    address: Any,
    encoding: Any,
    first_row: Any,
    start: Any,
    increment: Any,
    occurrences: Any,
    seed: Any,
    values: Any,
    ids: Any,
    offsets: Any,
    bag_start: Any,
    table_of: Any,
    threads: Any,
) -> None:
    total = ids.shape[0]
    buckets = 16
    while buckets < 2 * total:
        buckets *= 2
    mask = np.uint64(buckets - 1)
    for thread in numba.prange(threads):
        bucket_row = np.full(buckets, -1, np.int32)
        row_key = np.empty(total, np.int64)
        row_table = np.empty(total, np.int32)
        row_times = np.empty(total, np.int32)
        rows = 0
        for feature in range(table_of.shape[0]):
            table = table_of[feature]
            if increment[table] == 0.0:
                continue
            for i in range(offsets[bag_start[feature]], offsets[bag_start[feature + 1]]):
                key = start[table] + ids[i]
                mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
                if threads > 1 and np.int64((mixed >> np.uint64(56)) % np.uint64(threads)) != thread:
                    continue
                bucket = (mixed >> np.uint64(20)) & mask
                while True:
                    row = bucket_row[bucket]
                    if row < 0:
                        bucket_row[bucket] = rows
                        row_key[rows] = key
                        row_table[rows] = table
                        row_times[rows] = 1
                        rows += 1
                        break
                    if row_key[row] == key:
                        row_times[row] += 1
                        break
                    bucket = (bucket + np.uint64(1)) & mask
        for row in range(rows):
            if row + _AHEAD < rows:
                near = row_table[row + _AHEAD]
                size = 1 if encoding[near] == 1 else 4
                prefetch_address(address[near] + (row_key[row + _AHEAD] - start[near]) * size)
            table = row_table[row]
            added = increment[table]
            if occurrences[table]:
                added *= row_times[row]
            number = row_key[row] - start[table]
            advance(address[table], number, encoding[table], added, seed, first_row[table] + number, values)


def count_rows(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.count.reference.count_rows`."""
    threads = threads_for(indices.numel(), _IDS_PER_THREAD)
    # First rows do not tell tables apart: two parts of one table may hold other columns of the same rows.
    rows = [0 if stored is None else stored.numel() for stored in counts.tables]
    _count(
        threads,
        counts.address.numpy(),
        counts.encoding.numpy(),
        counts.first_row.numpy(),
        np.cumsum([0, *rows]),
        counts.increment.numpy(),
        counts.occurrences.numpy(),
        int(counts.seed),
        LOG_VALUES,
        indices.contiguous().numpy(),
        offsets.contiguous().numpy(),
        layout.bag_start.numpy(),
        layout.table.numpy(),
        threads,
    )
