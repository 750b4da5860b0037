"""Count how often the rows of a batch are looked up, in 1 or 4 bytes per row."""

from __future__ import annotations

from torch import Tensor

from lightning_embcomp.kernels.count import cpu, reference
from lightning_embcomp.kernels.count.encoding import (
    LOG_VALUES,
    decode,
    log_values,
    nearest_code,
    round_to_code,
    uniform,
)
from lightning_embcomp.kernels.count.rows import RowCounts
from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.types import BagLayout

__all__ = [
    "LOG_VALUES",
    "RowCounts",
    "count_rows",
    "decode",
    "log_values",
    "nearest_code",
    "round_to_code",
    "row_gains",
    "uniform",
]


def count_rows(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> None:
    """Add a batch to the counters, in place.

    Every distinct row moves once, by the table's increment, times its occurrences in the batch where the table counts
    those. Log counters move at random, such that the expectation is exact; the random bits are a hash of the seed and
    the row. Integers saturate.

    Args:
        counts: Counters; rates are not used.
        indices: Logical ids, ``(N,)``, in range.
        offsets: Bag boundaries, ``(bags + 1,)``.
        layout: Features of the bags.
    """
    kernel = choose(indices.device, cpu.count_rows, reference.count_rows)
    kernel(counts, indices, offsets, layout)


def row_gains(counts: RowCounts, indices: Tensor, offsets: Tensor, layout: BagLayout) -> Tensor:
    r"""Multipliers of the rates of the rows that a batch looks up, before the cap; nothing is counted.

    Args:
        counts: Counters, gains and floors.
        indices: Logical ids, ``(N,)``, in range.
        offsets: Bag boundaries, ``(bags + 1,)``.
        layout: Features of the bags.

    Returns:
        :math:`\mathrm{gain}_t / \sqrt{\max(c, \mathrm{floor}_t)}` per id, float32 ``(N,)``; 1 where the plain rate
        holds.
    """
    kernel = choose(indices.device, reference.row_gains, reference.row_gains)  # a mask per table is quick on the CPU
    return kernel(counts, indices, offsets, layout)
