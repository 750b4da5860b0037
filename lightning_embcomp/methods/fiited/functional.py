r"""Maths of dimension pruning: who keeps which column chunks under a byte budget.

Utilities are bfloat16, hence at most 32 768 different non-negative values: a histogram of them is exact, and the
threshold that meets a budget is found on the histogram instead of on the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 15
"""Non-negative bfloat16 bit patterns."""
NOT_FINITE = 0x7F80
"""First bit pattern of infinity and NaN."""


def bin_values() -> Tensor:
    """The utility that each histogram bin stands for, float64 of shape ``(32768,)``.

    Example:
        >>> bin_values()[0x3F80].item()
        1.0
    """
    return torch.arange(BINS, dtype=torch.int16).view(torch.bfloat16).double()


def chunk_factors(chunks: int, falloff: float) -> Tensor:
    r"""Share of a row's utility that its c-th leading chunk gets: :math:`falloff^c`.

    Args:
        chunks: Number of chunks K.
        falloff: Ratio between neighbours, over 0 and at most 1.

    Returns:
        float64 tensor of shape ``(K,)``.

    Example:
        >>> chunk_factors(4, 0.5)
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    return torch.tensor(falloff, dtype=torch.float64) ** torch.arange(chunks, dtype=torch.float64)


def zipf_prior(start: int, stop: int, rows: int) -> Tensor:
    r"""Utility to assume for rows before anything was seen: :math:`1 / ((r + 1) H_R)`, Zipf's law over row numbers.

    Right for tables whose ids are numbered by falling frequency, harmless for others. Normalised to one lookup per
    sample, so that tables of different size compare.

    Args:
        start: First row.
        stop: Row after the last.
        rows: Rows R of the table.

    Returns:
        bfloat16 tensor of shape ``(stop - start,)``.
    """
    harmonic = math.log(rows) + 0.5772156649 + 1 / (2 * rows)
    ranks = torch.arange(start + 1, stop + 1, dtype=torch.float64)
    return (1.0 / (ranks * harmonic)).to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Groups of chunks that compete for bytes; all chunks of a cell have the same value and cost.

    Attributes:
        value: Utility per chunk after normalisation and hysteresis, float64 ``(n,)``.
        cost: Bytes per chunk, int64 ``(n,)``.
        count: Chunks in the cell, int64 ``(n,)``.
        live: Whether they are stored now, bool ``(n,)``.
        order: Tie break among equal values, int64 ``(n,)``; lower first.
    """

    value: Tensor
    cost: Tensor
    count: Tensor
    live: Tensor
    order: Tensor


def allocate(cells: Cells, budget: int) -> Tensor:
    r"""Keep the chunks of highest value whose bytes fit the budget.

    The order is by falling value, then live before dead, then ``order``: with equal utilities nothing moves. At most
    one cell is filled in part.

    Args:
        cells: Competing groups.
        budget: Bytes.

    Returns:
        Chunks kept per cell, int64 ``(n,)``.

    Example:
        >>> cells = Cells(value=torch.tensor([1.0, 3.0, 2.0]), cost=torch.tensor([4, 4, 4]),
        ...     count=torch.tensor([5, 2, 3]), live=torch.zeros(3, dtype=torch.bool), order=torch.arange(3))
        >>> allocate(cells, budget=4 * 4)
        tensor([0, 2, 2])
    """
    rank = torch.arange(cells.value.numel())
    for key in (cells.order, (~cells.live).long(), -cells.value):
        rank = rank[torch.argsort(key[rank], stable=True)]
    bytes_needed = (cells.cost * cells.count)[rank]
    before = bytes_needed.cumsum(0) - bytes_needed
    affordable = ((budget - before).clamp(min=0) // cells.cost[rank]).minimum(cells.count[rank])
    # After the first cell that does not fit, nothing of lower value may slip in.
    cut_short = affordable < cells.count[rank]
    affordable[(cut_short.long().cumsum(0) - cut_short.long()) > 0] = 0
    kept = torch.zeros_like(cells.count)
    kept[rank] = affordable
    return kept


def with_hysteresis(value: Tensor, live: Tensor, margin: float) -> Tensor:
    r"""Raise the value of live chunks by a margin, so that only a clear gain swaps them.

    Args:
        value: Utilities, any shape.
        live: Bool tensor of the same shape.
        margin: Relative gain that a dead chunk must show, at least 0.
    """
    return torch.where(live, value * (1.0 + margin), value)
