"""Group the ids of a batch by row, for one of several threads; parts of Numba kernels."""

# ruff: noqa: ANN401 - Numba has types of its own

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lightning_embcomp.kernels.types import NO_CLASS

_SMALLEST = 16


@numba.njit(cache=True)
def feature_groups(table_of: Any, bag_start: Any, offsets: Any) -> Any:
    """Split features into runs that have no table, and so no row, in common.

    Args:
        table_of: Table of each feature.
        bag_start: First bag of each feature, and the number of bags.
        offsets: Bag boundaries.

    Returns:
        For the first feature of each run the feature after its last, and the most ids of a run.
    """
    features = table_of.shape[0]
    last_feature = np.zeros(table_of.max() + 1, np.int64)
    for feature in range(features):
        last_feature[table_of[feature]] = feature
    group_end = np.empty(features, np.int64)
    most_ids = np.int64(0)
    first_feature = 0
    while first_feature < features:
        end_feature = first_feature
        feature = first_feature
        while feature <= end_feature:
            end_feature = max(end_feature, last_feature[table_of[feature]])
            feature += 1
        group_end[first_feature] = feature
        most_ids = max(most_ids, np.int64(offsets[bag_start[feature]] - offsets[bag_start[first_feature]]))
        first_feature = feature
    return group_end, most_ids


@numba.njit(cache=True)
def buckets_for(ids: Any) -> Any:
    """Size of the hash table: a power of two, half empty even if every id is a row of its own."""
    buckets = np.int64(_SMALLEST)
    while buckets < 2 * ids:
        buckets *= 2
    return buckets


@numba.njit(cache=True)
def group_rows(
    first_feature: Any,
    end_feature: Any,
    thread: Any,
    threads: Any,
    stride: Any,
    id_class: Any,
    id_slot: Any,
    offsets: Any,
    weights: Any,
    bag_start: Any,
    row_start: Any,
    column: Any,
    mean: Any,
    bucket_row: Any,
    row_key: Any,
    row_first: Any,
    row_last: Any,
    next_same: Any,
    source: Any,
    scale: Any,
) -> Any:
    """List the rows of a run of features that fall to a thread, and chain the ids of each in the order of the batch.

    Args:
        first_feature: First feature of the run.
        end_feature: Feature after its last.
        thread: Number of the thread.
        threads: Threads.
        stride: Columns of the output.
        id_class: Class of every id.
        id_slot: Slot of every id.
        offsets: Bag boundaries.
        weights: Per-sample weights; empty for none.
        bag_start: First bag of each feature, and the number of bags.
        row_start: First output row of each feature.
        column: First output column of each feature.
        mean: Whether features are averaged.
        bucket_row: Room for the hash table, filled here.
        row_key: Gets class and slot of each row, in 32 bits each.
        row_first: Gets the first id of each row, counted from the first of the run.
        row_last: Gets the last id of each row.
        next_same: Gets the next id of the same row after each, -1 after the last.
        source: Gets where the gradient of each id begins.
        scale: Gets what it is multiplied by.

    Returns:
        How many rows there are.
    """
    weighted = weights.shape[0] > 0
    first_id = np.int64(offsets[bag_start[first_feature]])
    buckets = buckets_for(np.int64(offsets[bag_start[end_feature]]) - first_id)
    mask = np.uint64(buckets - 1)
    bucket_row[:buckets] = -1
    rows = 0
    feature = first_feature
    for bag in range(bag_start[first_feature], bag_start[end_feature]):
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
                    rows += 1
                    break
                if row_key[row] == key:
                    next_same[row_last[row]] = at
                    row_last[row] = at
                    break
                bucket = (bucket + np.uint64(1)) & mask
    return rows
