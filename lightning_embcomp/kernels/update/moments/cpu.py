"""Row updates on CPU with two moments, and with stochastic rounding.

As in :mod:`lightning_embcomp.kernels.update.cpu`, every thread owns the rows whose hash falls to it, and visits each
once. The sum of the gradients becomes the direction of the step in place, then the weights follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import WEIGHT_KIND, threaded, threads_for
from lightning_embcomp.kernels.count.cpu import count_rows, uniform
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.intrinsics import (
    bits_float,
    float_bits,
    load_f32,
    load_weight,
    prefetch_address,
    store_f32,
    store_weight,
)
from lightning_embcomp.kernels.types import BagLayout, ClassColumns, IdRoutes
from lightning_embcomp.kernels.update.moments.groups import buckets_for, feature_groups, group_rows
from lightning_embcomp.kernels.update.moments.rounding import CLASS_SHIFT, LARGEST_HALF
from lightning_embcomp.kernels.update.rule import FIRST_BY_ROW, FIRST_WITH_MOMENTS, KIND_NUMBERS, UpdateRule

_ROWWISE, _ADAGRAD = KIND_NUMBERS["rowwise_adagrad"], KIND_NUMBERS["adagrad"]
_LAMB, _PARTIAL_LAMB = KIND_NUMBERS["lamb"], KIND_NUMBERS["partial_rowwise_lamb"]
_AHEAD = 8
_LINE = 64
_IDS_PER_THREAD = 8192
_LARGEST = np.float32(LARGEST_HALF)


@numba.njit(cache=True)
def round_to_half(value: Any, draw: Any) -> Any:
    """Twin of :func:`lightning_embcomp.kernels.update.moments.rounding.round_to_half`, still float32."""
    size = np.float32(abs(value))
    if not size < _LARGEST:  # also NaN
        return value
    exponent = max(float_bits(size) >> np.uint32(23), np.uint32(113))
    scaled = size * bits_float(np.uint32((264 - exponent) << 23))
    whole = np.floor(scaled)
    if draw < scaled - whole:
        whole += np.float32(1.0)
    whole *= bits_float(np.uint32((exponent - 10) << 23))
    return -whole if value < 0.0 else whole


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def sum_gradients(
    row: Any,
    total: Any,
    gradient: Any,
    first_run: Any,
    last_run: Any,
    run_column: Any,
    run_length: Any,
    row_first: Any,
    next_same: Any,
    source: Any,
    scale: Any,
) -> None:
    """Sum the gradients of a row's ids over the columns that it stores."""
    at = row_first[row]
    fresh = True
    while at >= 0:
        stored = 0
        factor = scale[at]
        for run in range(first_run, last_run):
            base = source[at] + run_column[run]
            length = run_length[run]
            if fresh:
                for d in range(length):
                    store_f32(total, stored + d, load_f32(gradient, base + d) * factor)
            else:
                for d in range(length):
                    store_f32(total, stored + d, load_f32(total, stored + d) + load_f32(gradient, base + d) * factor)
            stored += length
        fresh = False
        at = next_same[at]


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def turn(
    weight_kind: Any,
    kind: Any,
    numbers: Any,
    total: Any,
    table: Any,
    state: Any,
    other: Any,
    slot: Any,
    width: Any,
) -> Any:
    """Move the state of a row, turn the sum of its gradients into the direction of its step, and return a factor."""
    eps, keep_first, add_first, keep_second, add_second, first_scale, second_scale, decay = (
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        numbers[4],
        numbers[5],
        numbers[6],
        numbers[7],
    )
    first = slot * width
    one = np.float32(1.0)
    square = np.float32(0.0)
    if kind == _ROWWISE or kind >= FIRST_BY_ROW:
        for d in range(width):
            square += load_f32(total, d) * load_f32(total, d)
        square /= np.float32(width)
    if kind == _ROWWISE:
        moment = load_f32(state, slot) + square
        store_f32(state, slot, moment)
        return one / (np.sqrt(moment) + eps)
    if kind == _ADAGRAD:
        for d in range(width):
            moment = load_f32(state, first + d) + load_f32(total, d) * load_f32(total, d)
            store_f32(state, first + d, moment)
            store_f32(total, d, load_f32(total, d) / (np.sqrt(moment) + eps))
        return one
    if kind < FIRST_WITH_MOMENTS:
        return one
    if kind >= FIRST_BY_ROW:
        moment = keep_second * load_f32(other, slot) + add_second * square
        store_f32(other, slot, moment)
        scale = first_scale / (np.sqrt(moment * second_scale) + eps)
        for d in range(width):
            mean = keep_first * load_f32(state, first + d) + add_first * load_f32(total, d)
            store_f32(state, first + d, mean)
            store_f32(total, d, mean * scale + decay * load_weight(weight_kind, table, first + d))
    else:
        for d in range(width):
            value = load_f32(total, d)
            mean = keep_first * load_f32(state, first + d) + add_first * value
            moment = keep_second * load_f32(other, first + d) + add_second * value * value
            store_f32(state, first + d, mean)
            store_f32(other, first + d, moment)
            value = mean * first_scale / (np.sqrt(moment * second_scale) + eps)
            store_f32(total, d, value + decay * load_weight(weight_kind, table, first + d))
    if kind != _LAMB and kind != _PARTIAL_LAMB:
        return one
    here = np.float32(0.0)
    there = np.float32(0.0)
    for d in range(width):
        weight = load_weight(weight_kind, table, first + d)
        here += weight * weight
        there += load_f32(total, d) * load_f32(total, d)
    if here > 0.0 and there > 0.0:
        return np.sqrt(here) / np.sqrt(there)
    return one


@threaded(fastmath={"contract", "reassoc", "nsz"})
def _update(
    weight_kind: Any,
    item: Any,
    tables: Any,
    states: Any,
    others: Any,
    kind: Any,
    rounding: Any,
    step: Any,
    rates: Any,
    numbers: Any,
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
    table_of: Any,
) -> None:
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
        total = scratch + 4 * thread * scratch_columns
        first_feature = np.int64(0)
        while first_feature < features:
            end_feature = group_end[first_feature]
            rows = group_rows(
                first_feature,
                end_feature,
                thread,
                threads,
                stride,
                id_class,
                id_slot,
                offsets,
                weights,
                bag_start,
                row_start,
                column,
                mean,
                bucket_row,
                row_key,
                row_first,
                row_last,
                next_same,
                source,
                scale,
            )
            for row in range(rows):
                if row + _AHEAD < rows:
                    near = row_key[row + _AHEAD]
                    near_class, near_slot = near >> 32, near & 0xFFFFFFFF
                    near_width = class_width[near_class]
                    for line in range(0, 4 * near_width, _LINE):
                        prefetch_address(gradient + 4 * source[row_first[row + _AHEAD]] + line)
                        if kind >= _ADAGRAD:
                            prefetch_address(states[near_class] + 4 * near_slot * near_width + line)
                        if kind >= FIRST_WITH_MOMENTS and kind < FIRST_BY_ROW:
                            prefetch_address(others[near_class] + 4 * near_slot * near_width + line)
                    for line in range(0, item * near_width, _LINE):
                        prefetch_address(tables[near_class] + item * near_slot * near_width + line)
                c = row_key[row] >> 32
                slot = row_key[row] & 0xFFFFFFFF
                width = class_width[c]
                sum_gradients(
                    row,
                    total,
                    gradient,
                    first_run[c],
                    first_run[c + 1],
                    run_column,
                    run_length,
                    row_first,
                    next_same,
                    source,
                    scale,
                )
                table = tables[c]
                factor = turn(weight_kind, kind, numbers, total, table, states[c], others[c], slot, width)
                rate = rates[c] * factor
                first = slot * width
                if rounding:
                    position = (c << CLASS_SHIFT) + first
                    for d in range(width):
                        kept = load_weight(weight_kind, table, first + d) - rate * load_f32(total, d)
                        kept = round_to_half(kept, uniform(step, position + d))
                        store_weight(weight_kind, table, first + d, kept)
                else:
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
    """Numba twin of :func:`lightning_embcomp.kernels.update.reference.update_rows`; counters have no say in rates."""
    if counts is not None:
        assert logical is not None
        count_rows(counts, logical, offsets, layout)
    rule = rules[0]
    threads = threads_for(routes.slot.numel(), _IDS_PER_THREAD)
    gradient = grad.detach().float().contiguous()
    width = columns.width.numpy()
    scratch = np.empty((threads, int(width.max()) + _LINE), np.float32)  # no cache line belongs to two threads
    _update(
        threads,
        WEIGHT_KIND[tables[0].dtype],
        tables[0].element_size(),
        _addresses(tables),
        _addresses(states),
        _addresses([None] * len(tables) if second is None else second),
        rule.number,
        rule.stochastic_rounding and tables[0].dtype == torch.float16,
        step,
        np.array([rule.learning_rate for rule in rules], np.float32),
        np.array(rule.numbers(step), np.float32),
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
        layout.table.numpy(),
    )


def _addresses(tensors: Sequence[Tensor | None]) -> Any:  # noqa: ANN401 - a NumPy array
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.int64)
