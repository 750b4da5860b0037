"""What crosses: K positions and K values per row, one row after the other, as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.topk import position_dtype


def cast_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values for sending. Finite values stay finite; infinity and NaN stay what they are.

    Args:
        values: float32 of any shape.
        dtype: float32, float16 or bfloat16.

    Returns:
        Tensor of that dtype, same shape.

    Example:
        >>> cast_values(torch.tensor([1e6, float("-inf"), float("nan")]), torch.float16)
        tensor([65504.,   -inf,    nan], dtype=torch.float16)
    """
    if dtype == torch.float32:
        return values
    largest = torch.finfo(dtype).max
    return torch.where(values.isinf(), values, values.clamp(-largest, largest)).to(dtype)


def pack_entries(positions: Tensor, values: Tensor) -> Tensor:
    """Lay out the entries of each row: its positions, then its values.

    Args:
        positions: uint8 or int16 ``(M, K)``.
        values: float32, float16 or bfloat16 ``(M, K)``.

    Returns:
        uint8 ``(M, K · (bytes of a position + bytes of a value))``.

    Example:
        >>> pack_entries(torch.tensor([[7]], dtype=torch.uint8), torch.tensor([[1.0]], dtype=torch.float16))
        tensor([[ 7,  0, 60]], dtype=torch.uint8)
    """
    return torch.cat([as_bytes(positions), as_bytes(values)], dim=1)


def unpack_entries(packed: Tensor, kept: int, row_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Read what :func:`pack_entries` wrote.

    Args:
        packed: uint8 of any shape with whole rows.
        kept: K.
        row_dim: Columns that positions point into.
        dtype: Of the values that were packed.

    Returns:
        Positions, uint8 or int16 ``(M, K)``, and float32 values ``(M, K)``.
    """
    at = position_dtype(row_dim)
    split = kept * at.itemsize
    rows = packed.reshape(-1, split + kept * dtype.itemsize)
    return from_bytes(rows[:, :split], at), from_bytes(rows[:, split:], dtype).float()


def as_bytes(entries: Tensor) -> Tensor:
    """View a ``(M, K)`` tensor as uint8 ``(M, K · bytes of an entry)``.

    Example:
        >>> as_bytes(torch.tensor([[1.0]]))
        tensor([[  0,   0, 128,  63]], dtype=torch.uint8)
    """
    return entries.contiguous().view(torch.uint8)


def from_bytes(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy uint8 ``(M, K · bytes of an entry)`` into a ``(M, K)`` tensor.

    Example:
        >>> from_bytes(torch.tensor([[0, 60]], dtype=torch.uint8), torch.float16)
        tensor([[1.]], dtype=torch.float16)
    """
    # A copy even of what is contiguous: PyTorch views bytes as a wider type from an aligned offset only.
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)
