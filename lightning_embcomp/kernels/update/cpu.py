"""Row updates on CPU.

Every thread owns the rows whose hash falls to it, so no row is touched by two threads and the result does not depend on
timing. A thread groups the occurrences of its rows in a hash table of linked lists, in the order of the batch, then
visits each row once: sum the gradients, update the state, update the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.intrinsics import load_f32, prefetch_address, store_f32
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.rule import UpdateRule

_KINDS = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2}
_AHEAD = 6
_LINE = 64
_IDS_PER_THREAD = 8192


@threaded(fastmath={"contract", "reassoc", "nsz"})
def _update(
    tables: Any,
    states: Any,
    kind: Any,
    rates: Any,
    eps: Any,
    grad: Any,
    id_class: Any,
    id_slot: Any,
    offsets: Any,
    weights: Any,
    threads: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    mean: Any,
    class_width: Any,
    first_run: Any,
    run_column: Any,
    run_length: Any,
) -> None:
    ids = id_class.shape[0]
    stride = grad.shape[1]
    flat = grad.reshape(-1)
    weighted = weights.shape[0] > 0
    buckets = 16
    while buckets < 2 * ids:  # half empty even if every row falls to one thread
        buckets *= 2
    mask = np.uint64(buckets - 1)
    for thread in numba.prange(threads):
        bucket_row = np.full(buckets, -1, np.int32)
        row_key = np.empty(ids, np.int64)
        row_first = np.empty(ids, np.int32)
        row_last = np.empty(ids, np.int32)
        next_same = np.empty(ids, np.int32)
        source = np.empty(ids, np.int64)
        scale = np.empty(ids, np.float32)
        rows = 0
        feature = 0
        for bag in range(offsets.shape[0] - 1):
            while bag >= bag_start[feature + 1]:
                feature += 1
            start = (bag - bag_start[feature] + row_start[feature]) * stride + column[feature]
            factor = np.float32(1.0)
            if mean[feature]:
                factor = np.float32(1.0) / np.float32(max(1, offsets[bag + 1] - offsets[bag]))
            for i in range(offsets[bag], offsets[bag + 1]):
                if id_class[i] == NO_CLASS:
                    continue
                key = (np.int64(id_class[i]) << 32) | np.int64(id_slot[i])
                mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
                if threads > 1 and np.int64((mixed >> np.uint64(56)) % np.uint64(threads)) != thread:
                    continue
                source[i] = start
                scale[i] = factor * weights[i] if weighted else factor
                next_same[i] = -1
                bucket = (mixed >> np.uint64(20)) & mask
                while True:
                    row = bucket_row[bucket]
                    if row < 0:
                        bucket_row[bucket] = rows
                        row_key[rows] = key
                        row_first[rows] = i
                        row_last[rows] = i
                        rows += 1
                        break
                    if row_key[row] == key:
                        next_same[row_last[row]] = i
                        row_last[row] = i
                        break
                    bucket = (bucket + np.uint64(1)) & mask
        total = np.empty(class_width.max(), np.float32)
        for row in range(rows):
            if row + _AHEAD < rows:
                near = row_key[row + _AHEAD]
                near_class = near >> 32
                size = 4 * class_width[near_class]
                address = tables[near_class] + (near & 0xFFFFFFFF) * size
                for line in range(0, size, _LINE):
                    prefetch_address(address + line)
                if kind == 1:
                    prefetch_address(states[near_class] + 4 * (near & 0xFFFFFFFF))
            c = row_key[row] >> 32
            slot = row_key[row] & 0xFFFFFFFF
            width = class_width[c]
            i = row_first[row]
            fresh = True
            while i >= 0:
                stored = 0
                factor = scale[i]
                for run in range(first_run[c], first_run[c + 1]):
                    base = source[i] + run_column[run]
                    length = run_length[run]
                    if fresh:
                        for d in range(length):
                            total[stored + d] = flat[base + d] * factor
                    else:
                        for d in range(length):
                            total[stored + d] += flat[base + d] * factor
                    stored += length
                fresh = False
                i = next_same[i]
            first = slot * width
            learning_rate = rates[c]
            if kind == 2:
                for d in range(width):
                    moment = load_f32(states[c], first + d) + total[d] * total[d]
                    store_f32(states[c], first + d, moment)
                    step = learning_rate * total[d] / (np.sqrt(moment) + eps)
                    store_f32(tables[c], first + d, load_f32(tables[c], first + d) - step)
                continue
            rate = learning_rate
            if kind == 1:
                square = np.float32(0.0)
                for d in range(width):
                    square += total[d] * total[d]
                moment = load_f32(states[c], slot) + square / np.float32(width)
                store_f32(states[c], slot, moment)
                rate = learning_rate / (np.sqrt(moment) + eps)
            for d in range(width):
                store_f32(tables[c], first + d, load_f32(tables[c], first + d) - rate * total[d])


def update_rows(
    tables: Sequence[Tensor],
    states: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    grad: Tensor,
    routes: IdRoutes,
    offsets: Tensor,
    weights: Tensor | None,
    layout: BagLayout,
    columns: ClassColumns,
) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.update.reference.update_rows`."""
    threads = threads_for(routes.slot.numel(), _IDS_PER_THREAD)
    _update(
        threads,
        np.array([table.data_ptr() for table in tables], np.int64),
        np.array([0 if state is None else state.data_ptr() for state in states], np.int64),
        _KINDS[rules[0].kind],
        np.array([rule.learning_rate for rule in rules], np.float32),
        np.float32(rules[0].eps),
        grad.detach().float().contiguous().numpy(),
        routes.row_class.numpy(),
        routes.slot.numpy(),
        offsets.contiguous().numpy(),
        np.empty(0, np.float32) if weights is None else weights.detach().float().contiguous().numpy(),
        threads,
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.mean.numpy(),
        columns.width.numpy(),
        columns.first_run.numpy(),
        columns.column.numpy(),
        columns.length.numpy(),
    )
