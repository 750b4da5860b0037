"""Rounding after training with FBGEMM's rows: TorchRec's post-training quantisation of tables."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401 - registers the operators
import torch
from torch import Tensor


def rounded(table: Tensor, bits: int) -> tuple[Tensor, int]:
    """What a table of rows with a float16 scale and bias serves.

    Args:
        table: ``(rows, columns)``, float32 or float16.
        bits: 8, 4 or 2.

    Returns:
        The values, float32 of the same shape, and the bytes of the rounded rows.
    """
    rows = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(table, bits)
    values = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, bits)
    return values[:, : table.shape[1]], rows.numel()


def rounded_all(tables: list[Tensor], bits: int) -> tuple[list[Tensor], int]:
    """The same of several tables, and their bytes together."""
    found = [rounded(table, bits) for table in tables]
    return [values for values, _ in found], sum(size for _, size in found)
