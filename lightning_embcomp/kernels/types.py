"""Plain data that kernels exchange: how ids are routed and where pooled rows go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RouterTensors:
    """The packed routers of all logical tables of an engine, as the kernels read them.

    A table's rows come in blocks of 64. A block is ``stride`` int64 words: ``planes`` bit planes (bit ``i`` of plane
    ``p`` is bit ``p`` of the code of row ``i``), then one int32 per code: the slot of the block's first row with that
    code. A row's slot is that base plus the number of earlier rows of the block with the same code.

    Attributes:
        words: Packed blocks of all tables, int64 tensor of shape ``(W,)``.
        start: First word of each table, int64 ``(T,)``.
        stride: Words per block of each table, int64 ``(T,)``.
        planes: Bit planes of each table, int64 ``(T,)``.
        rows: Logical rows of each table, int64 ``(T,)``.
        class_of_code: Row class of each code, int32 ``(T, codes)``; -1 for code 0, which has no storage.
    """

    words: Tensor
    start: Tensor
    stride: Tensor
    planes: Tensor
    rows: Tensor
    class_of_code: Tensor


@dataclass(frozen=True, kw_only=True)
class BagLayout:
    """Where the pooled row of each bag is written.

    Bags are numbered feature by feature. Bag ``b`` of feature ``f`` goes to row ``b - bag_start[f] + row_start[f]`` and
    to the columns from ``column[f]`` on.

    Attributes:
        table: Logical table of each feature, int64 ``(F,)``.
        bag_start: First bag of each feature, int64 ``(F + 1,)``.
        row_start: Output row of each feature's first bag, int64 ``(F,)``.
        column: First output column of each feature, int64 ``(F,)``.
        width: Columns that the feature fills, int64 ``(F,)``.
        mean: Whether the feature divides by the length of the bag, int64 0/1 ``(F,)``.
        shape: Rows and columns of the output.
    """

    table: Tensor
    bag_start: Tensor
    row_start: Tensor
    column: Tensor
    width: Tensor
    mean: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ClassColumns:
    """Which columns of a logical row each row class stores, as runs.

    Attributes:
        width: Stored columns per class, int64 ``(C,)``.
        first_run: Index of each class's first run, int64 ``(C + 1,)``.
        column: First logical column of each run, int64 ``(S,)``.
        length: Columns of each run, int64 ``(S,)``.
    """

    width: Tensor
    first_run: Tensor
    column: Tensor
    length: Tensor


@dataclass(frozen=True, kw_only=True)
class IdRoutes:
    """Row class and slot of every id of a batch, in the order of the batch.

    Attributes:
        row_class: uint8 ``(N,)``; :data:`NO_CLASS` for ids whose row has no storage.
        slot: int32 ``(N,)``; meaningless without a class.
    """

    row_class: Tensor
    slot: Tensor


NO_CLASS = 255
"""Marks an id whose row stores nothing."""


@dataclass(frozen=True, kw_only=True)
class RoutedBatch:
    """Ids of a batch, sorted into one bag list per row class; ids without storage are dropped.

    Class ``c`` owns ``slots[id_start[c]:id_start[c + 1]]`` and the bags ``bags[bag_start[c]:bag_start[c + 1]]``; only
    bags with at least one id in the class are listed. Its FBGEMM offsets are the ``n + 1`` entries of ``offsets`` from
    ``bag_start[c] + c`` on, counted from the class's first id.

    Attributes:
        slots: Row of the class table, int32 ``(L,)``.
        positions: Position of the id in the batch, int32 ``(L,)``.
        offsets: Bag offsets of all classes, int32 ``(M + C,)``.
        bags: Original bag, rising within a class, int32 ``(M,)``.
        id_start: First id of each class, ``C + 1`` numbers.
        bag_start: First bag of each class, ``C + 1`` numbers.
        chunk_bag: Bag ranges that a thread handles, int64 ``(P + 1,)``.
        chunk_class_bag: First entry of ``bags`` of each thread and class, int64 ``(P + 1, C)``.
    """

    slots: Tensor
    positions: Tensor
    offsets: Tensor
    bags: Tensor
    id_start: tuple[int, ...]
    bag_start: tuple[int, ...]
    chunk_bag: Tensor
    chunk_class_bag: Tensor
