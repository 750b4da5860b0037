"""Selection into a place of given size, in plain PyTorch: the definition that the CUDA kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.threshold.reference import select_large


def select_packed(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    factor: float,
    gain: float,
    threshold: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain twin of :func:`lightning_embcomp.kernels.threshold.select_packed`."""
    found, message = select_large(grad, residual, estimate, factor, gain, threshold)
    indices = torch.zeros(capacity, dtype=torch.int32, device=grad.device)
    values = torch.zeros(capacity, device=grad.device)
    kept = min(capacity, found.numel())
    indices[:kept], values[:kept] = found[:kept], message[:kept]
    return indices, values, torch.tensor([found.numel()], device=grad.device)
