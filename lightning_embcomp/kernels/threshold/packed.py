"""Selection into a place of given size, in plain PyTorch: the definition that the CUDA kernel is tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_embcomp.kernels.threshold.reference import message


class Packed(NamedTuple):
    """What was selected, on the device.

    Attributes:
        indices: Positions, int32 ``(capacity,)``, rising; zeros at the end.
        values: The message there, float32 ``(capacity,)``; zeros at the end.
        found: Entries that reach the threshold, int64 ``(1,)``; they may be more than there is room for.
        largest: Largest magnitude among all of them, float32 ``(1,)``; 0 for none, and not finite if any of them is.
    """

    indices: Tensor
    values: Tensor
    found: Tensor
    largest: Tensor


def select_packed(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    factor: float,
    gain: float,
    threshold: float | Tensor,
    capacity: int,
    added: bool,
) -> Packed:
    """Plain twin of :func:`lightning_embcomp.kernels.threshold.select_packed`, which waits for the device."""
    whole = message(grad, residual, estimate, factor, gain, added)
    (found,) = torch.nonzero(~(whole.abs() < threshold), as_tuple=True)
    selected = whole[found]
    indices = torch.zeros(capacity, dtype=torch.int32, device=grad.device)
    values = torch.zeros(capacity, dtype=torch.float32, device=grad.device)
    kept = min(capacity, found.numel())
    indices[:kept], values[:kept] = found[:kept].to(torch.int32), selected[:kept]
    largest = selected.abs().amax(0, keepdim=True) if found.numel() else values.new_zeros(1)
    return Packed(indices, values, torch.tensor([found.numel()], device=grad.device), largest)
