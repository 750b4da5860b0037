"""What the kernels know of the counters of all tables in one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    r"""Counters of the rows of an engine's tables, what a lookup adds to them, and what they say about step sizes.

    A row of table ``t`` whose counter stands for :math:`c` after counting is updated with
    :math:`\min(\mathrm{cap}_t, \eta\, \mathrm{gain}_t / \sqrt{\max(c, \mathrm{floor}_t)})` in place of the rate
    :math:`\eta`.

    Attributes:
        tables: Counters of each table, uint8 (log codes), int32 or float32, ``(rows,)``; None for tables without.
        address: Where they are in memory, int64 ``(T,)``; 0 for tables without.
        encoding: Number of the encoding, int64 ``(T,)``, see :mod:`lightning_embcomp.kernels.count.encoding`.
        first_row: Number of each table's first row, int64 ``(T,)``; random bits are a hash of the row's number and the
            seed. Parts of one table that hold other columns of the same rows have the same number.
        increment: What a lookup adds, float64 ``(T,)``; 0 leaves the counters of the table as they are.
        occurrences: 1 to add it for each occurrence, 0 for each distinct row of the batch, int64 ``(T,)``.
        gain: float32 ``(T,)``; 0 keeps the plain rate.
        cap: Largest rate where there is a gain, float32 ``(T,)``.
        floor: Least count that a rate is computed from, float64 ``(T,)``.
        seed: Changes from step to step, int64 ``(1,)``.
    """

    tables: tuple[Tensor | None, ...]
    address: Tensor
    encoding: Tensor
    first_row: Tensor
    increment: Tensor
    occurrences: Tensor
    gain: Tensor
    cap: Tensor
    floor: Tensor
    seed: Tensor
