"""Stochastic rounding to float16 in plain PyTorch: the definition that the fast paths are tested against.

The draw of a weight is a hash of the step, the class, the slot and the column: no state, the same on every device, and
the same again after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.count.encoding import uniform

LARGEST_HALF = 65504.0
CLASS_SHIFT = 48
"""Bits of a position below the number of the class: slots have 32, columns fewer than 16."""


def draws(step: int, row_class: int, slots: Tensor, width: int) -> Tensor:
    """Draws for the weights of rows.

    Args:
        step: Number of the optimizer step.
        row_class: Class of the rows.
        slots: int64 ``(n,)``.
        width: Columns of the class.

    Returns:
        float64 ``(n, width)`` from 0 to below 1.
    """
    columns = torch.arange(width, device=slots.device)
    return uniform(step, (row_class << CLASS_SHIFT) + slots.unsqueeze(1) * width + columns)


def round_to_half(values: Tensor, draw: Tensor) -> Tensor:
    """Round to one of the two float16 around each value, the nearer one more often.

    Args:
        values: float32.
        draw: Numbers from 0 to below 1, of the same shape.

    Returns:
        float16 of the same shape; beyond the largest finite float16 rounded to nearest.

    Example:
        >>> round_to_half(torch.tensor([1.0, 1.00025, 1.00025]), torch.tensor([0.5, 0.2, 0.3]))
        tensor([1.0000, 1.0010, 1.0000], dtype=torch.float16)
    """
    size = values.abs()
    exponent = (torch.frexp(size).exponent - 1).clamp(min=-14)
    unit = torch.ldexp(torch.ones_like(size), exponent - 10)
    scaled = size / unit
    whole = scaled.floor()
    rounded = (whole + (draw < scaled - whole)) * unit
    return torch.where(size < LARGEST_HALF, rounded.copysign(values), values).half()
