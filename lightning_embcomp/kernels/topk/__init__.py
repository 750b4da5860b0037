"""Keep the K entries of largest magnitude in every row of a matrix, and put such entries back into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.topk import cpu, reference

__all__ = ["LARGEST_WIDTH", "place_entries", "position_dtype", "top_entries"]

LARGEST_WIDTH = 2**15
"""Columns that an int16 position can name."""


def position_dtype(width: int) -> torch.dtype:
    """Smallest dtype for positions in rows of ``width`` columns.

    Raises:
        ValueError: If ``width`` is below 1 or over 32768.

    Example:
        >>> position_dtype(256), position_dtype(257)
        (torch.uint8, torch.int16)
    """
    if not 1 <= width <= LARGEST_WIDTH:
        raise ValueError(f"rows must have 1 to {LARGEST_WIDTH} columns, not {width}")
    return torch.uint8 if width <= 256 else torch.int16


def top_entries(rows: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Positions and values of the ``kept`` entries of largest magnitude in every row.

    The order of magnitudes is that of their bits: NaN comes before infinity, and that before every number, so that an
    entry that is not finite is always kept. Of equal magnitudes the one further left is kept.

    Args:
        rows: float32 ``(M, N)``, N at most 32768.
        kept: K, from 1 to N.

    Returns:
        Positions ``(M, K)``, ascending in each row, uint8 for N up to 256 and int16 above, and float32 values
        ``(M, K)``.

    Raises:
        ValueError: If ``kept`` or the shape is out of range.

    Example:
        >>> top_entries(torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 5.0]]), 2)
        (tensor([[1, 2],
                [0, 2]], dtype=torch.uint8), tensor([[-3.,  2.],
                [ 0.,  5.]]))
    """
    if rows.dim() != 2 or not 1 <= kept <= rows.shape[1]:
        raise ValueError(f"cannot keep {kept} entries per row of a tensor of shape {tuple(rows.shape)}")
    dtype = position_dtype(rows.shape[1])
    kernel = choose(rows.device, cpu.top_entries, reference.top_entries)
    return kernel(rows, kept, dtype)


def place_entries(positions: Tensor, values: Tensor, width: int) -> Tensor:
    """Write entries into rows of zeros.

    Args:
        positions: uint8 or int16 ``(M, K)``, no position twice in a row.
        values: float32 ``(M, K)``.
        width: Columns N of the result.

    Returns:
        float32 ``(M, N)``.

    Raises:
        ValueError: If a position is not below ``width`` (checked on CPU only: elsewhere it would wait for the device).

    Example:
        >>> place_entries(torch.tensor([[0, 2]], dtype=torch.uint8), torch.tensor([[5.0, -1.0]]), 4)
        tensor([[ 5.,  0., -1.,  0.]])
    """
    kernel = choose(positions.device, cpu.place_entries, reference.place_entries)
    return kernel(positions, values, width)
