"""Row updates on CPU.

Every thread owns the rows whose hash falls to it, so no row is touched by two threads and the result does not depend on
timing. A thread groups the occurrences of its rows in a hash table of linked lists, in the order of the batch, then
visits each row once: sum the gradients, count the row, update the state, update the row. Rows that are counted but have
no storage are grouped like others, under a key of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from lightning_embcomp.kernels.compile import WEIGHT_KIND, threaded, threads_for
from lightning_embcomp.kernels.count.cpu import advance
from lightning_embcomp.kernels.count.encoding import LOG_VALUES
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.intrinsics import load_f32, load_weight, prefetch_address, store_f32, store_weight
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.moments import cpu as moments
from lightning_embcomp.kernels.update.moments.groups import buckets_for, feature_groups
from lightning_embcomp.kernels.update.rule import UpdateRule

_AHEAD = 12
_LINE = 64
_IDS_PER_THREAD = 8192
_NONE = np.empty(0, np.int64)
_NO_FLOAT64, _NO_FLOAT32 = np.empty(0), np.empty(0, np.float32)


@threaded(fastmath={"contract", "reassoc", "nsz"})
def _update(
    weight_kind: Any,
    item: Any,
    tables: Any,
    states: Any,
    kind: Any,
    rates: Any,
    eps: Any,
    gradient: Any,
    stride: Any,
    scratch: Any,
    scratch_columns: Any,
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
    logical: Any,
    table_of: Any,
    counter: Any,
    encoding: Any,
    first_row: Any,
    increment: Any,
    occurrences: Any,
    gain: Any,
    cap: Any,
    floor: Any,
    seed: Any,
    count_of_code: Any,
) -> None:
    counted = counter.shape[0] > 0
    weighted = weights.shape[0] > 0
    features = table_of.shape[0]
    group_end, most_ids = feature_groups(table_of, bag_start, offsets)
    most_buckets = buckets_for(most_ids)
    for thread in numba.prange(threads):
        bucket_row = np.empty(most_buckets, np.int32)
        row_key = np.empty(most_ids, np.int64)
        row_first = np.empty(most_ids, np.int32)
        row_last = np.empty(most_ids, np.int32)
        next_same = np.empty(most_ids, np.int32)
        source = np.empty(most_ids, np.int64)
        scale = np.empty(most_ids, np.float32)
        row_id = np.empty(most_ids if counted else 0, np.int64)
        row_table = np.empty(most_ids if counted else 0, np.int32)
        row_times = np.empty(most_ids if counted else 0, np.int32)
        total = scratch + 4 * thread * scratch_columns
        first_feature = 0
        while first_feature < features:
            end_feature = group_end[first_feature]
            feature = first_feature
            first_id = np.int64(offsets[bag_start[first_feature]])
            buckets = buckets_for(np.int64(offsets[bag_start[end_feature]]) - first_id)
            mask = np.uint64(buckets - 1)
            bucket_row[:buckets] = -1
            rows = 0
            for bag in range(bag_start[first_feature], bag_start[end_feature]):
                while bag >= bag_start[feature + 1]:
                    feature += 1
                start = (bag - bag_start[feature] + row_start[feature]) * stride + column[feature]
                factor = np.float32(1.0)
                if mean[feature]:
                    factor = np.float32(1.0) / np.float32(max(1, offsets[bag + 1] - offsets[bag]))
                for i in range(offsets[bag], offsets[bag + 1]):
                    key = (np.int64(id_class[i]) << 32) | np.int64(id_slot[i])
                    if id_class[i] == NO_CLASS:
                        if not counted or increment[table_of[feature]] == 0.0:
                            continue
                        key = -1 - (first_row[table_of[feature]] + np.int64(logical[i]))
                    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
                    if threads > 1 and np.int64((mixed >> np.uint64(56)) % np.uint64(threads)) != thread:
                        continue
                    at = i - first_id
                    source[at] = start
                    scale[at] = factor * weights[i] if weighted else factor
                    next_same[at] = -1
                    bucket = (mixed >> np.uint64(20)) & mask
                    while True:
                        row = bucket_row[bucket]
                        if row < 0:
                            bucket_row[bucket] = rows
                            row_key[rows] = key
                            row_first[rows] = at
                            row_last[rows] = at
                            if counted:
                                row_id[rows] = logical[i]
                                row_table[rows] = table_of[feature]
                                row_times[rows] = 1
                            rows += 1
                            break
                        if row_key[row] == key:
                            next_same[row_last[row]] = at
                            row_last[row] = at
                            if counted:
                                row_times[row] += 1
                            break
                        bucket = (bucket + np.uint64(1)) & mask
            for row in range(rows):
                if row + _AHEAD < rows:
                    near = row_key[row + _AHEAD]
                    if near >= 0:
                        # Gradients of neighbouring bags are far apart, so the processor does not see them coming.
                        first = source[row_first[row + _AHEAD]]
                        for line in range(0, 4 * class_width[near >> 32], _LINE):
                            prefetch_address(gradient + 4 * first + line)
                        near_class = near >> 32
                        size = item * class_width[near_class]
                        address = tables[near_class] + (near & 0xFFFFFFFF) * size
                        for line in range(0, size, _LINE):
                            prefetch_address(address + line)
                        if kind == 1:
                            prefetch_address(states[near_class] + 4 * (near & 0xFFFFFFFF))
                    if counted:
                        t = row_table[row + _AHEAD]
                        if encoding[t] != 0:
                            prefetch_address(counter[t] + row_id[row + _AHEAD] * (1 if encoding[t] == 1 else 4))
                multiplier = np.float32(-1.0)
                limit = np.float32(0.0)
                if counted:
                    t = row_table[row]
                    if encoding[t] != 0:
                        added = increment[t]
                        if occurrences[t]:
                            added *= row_times[row]
                        number = row_id[row]
                        count = advance(
                            counter[t], number, encoding[t], added, seed, first_row[t] + number, count_of_code
                        )
                        if gain[t] > 0.0:
                            multiplier = np.float32(gain[t] / np.sqrt(max(count, floor[t])))
                            limit = cap[t]
                    if row_key[row] < 0:
                        continue
                c = row_key[row] >> 32
                slot = row_key[row] & 0xFFFFFFFF
                width = class_width[c]
                at = row_first[row]
                fresh = True
                while at >= 0:
                    stored = 0
                    factor = scale[at]
                    for run in range(first_run[c], first_run[c + 1]):
                        base = source[at] + run_column[run]
                        length = run_length[run]
                        if fresh:
                            for d in range(length):
                                store_f32(total, stored + d, load_f32(gradient, base + d) * factor)
                        else:
                            for d in range(length):
                                summed = load_f32(total, stored + d) + load_f32(gradient, base + d) * factor
                                store_f32(total, stored + d, summed)
                        stored += length
                    fresh = False
                    at = next_same[at]
                first = slot * width
                learning_rate = rates[c]
                # Outside the loops over columns: a store might change them, as far as the compiler knows.
                table, state = tables[c], states[c]
                if kind == 2:
                    for d in range(width):
                        moment = load_f32(state, first + d) + load_f32(total, d) * load_f32(total, d)
                        store_f32(state, first + d, moment)
                        step = learning_rate * load_f32(total, d) / (np.sqrt(moment) + eps)
                        store_weight(weight_kind, table, first + d, load_weight(weight_kind, table, first + d) - step)
                    continue
                rate = learning_rate
                if kind == 1:
                    square = np.float32(0.0)
                    for d in range(width):
                        square += load_f32(total, d) * load_f32(total, d)
                    moment = load_f32(state, slot) + square / np.float32(width)
                    store_f32(state, slot, moment)
                    rate = learning_rate / (np.sqrt(moment) + eps)
                if multiplier >= 0.0:
                    rate = min(limit, learning_rate * multiplier)
                for d in range(width):
                    kept = load_weight(weight_kind, table, first + d) - rate * load_f32(total, d)
                    store_weight(weight_kind, table, first + d, kept)
            first_feature = end_feature


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
    logical: Tensor | None = None,
    counts: RowCounts | None = None,
    second: Sequence[Tensor | None] | None = None,
    step: int = 1,
) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.update.reference.update_rows`."""
    if rules[0].has_moments or rules[0].stochastic_rounding:
        given = (offsets, weights, layout, columns, logical, counts, second, step)
        return moments.update_rows(tables, states, rules, grad, routes, *given)
    threads = threads_for(routes.slot.numel(), _IDS_PER_THREAD)
    gradient = grad.detach().float().contiguous()
    width = columns.width.numpy()
    scratch = np.empty((threads, int(width.max()) + _LINE), np.float32)  # no cache line belongs to two threads
    _update(
        threads,
        WEIGHT_KIND[tables[0].dtype],
        tables[0].element_size(),
        np.array([table.data_ptr() for table in tables], np.int64),
        np.array([0 if state is None else state.data_ptr() for state in states], np.int64),
        rules[0].number,
        np.array([rule.learning_rate for rule in rules], np.float32),
        np.float32(rules[0].eps),
        gradient.data_ptr(),
        gradient.stride(0),
        scratch.ctypes.data,
        scratch.shape[1],
        routes.row_class.numpy(),
        routes.slot.numpy(),
        offsets.contiguous().numpy(),
        np.empty(0, np.float32) if weights is None else weights.detach().float().contiguous().numpy(),
        threads,
        layout.bag_start.numpy(),
        layout.row_start.numpy(),
        layout.column.numpy(),
        layout.mean.numpy(),
        width,
        columns.first_run.numpy(),
        columns.column.numpy(),
        columns.length.numpy(),
        _NONE if logical is None else logical.contiguous().numpy(),
        layout.table.numpy(),
        *_arrays(counts),
        LOG_VALUES,
    )


def _arrays(counts: RowCounts | None) -> tuple[Any, ...]:
    if counts is None:
        return _NONE, _NONE, _NONE, _NO_FLOAT64, _NONE, _NO_FLOAT32, _NO_FLOAT32, _NO_FLOAT64, 0
    fields = (counts.address, counts.encoding, counts.first_row, counts.increment, counts.occurrences)
    return (*(field.numpy() for field in (*fields, counts.gain, counts.cap, counts.floor)), int(counts.seed))
