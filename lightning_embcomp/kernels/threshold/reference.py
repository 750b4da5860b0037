"""Selection by a threshold in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def select_large(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, factor: float, gain: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`lightning_embcomp.kernels.threshold.select_large`."""
    whole = message(grad, residual, estimate, factor, gain)
    # Not `>=`: entries that are not numbers are to be found as well.
    (indices,) = torch.nonzero(~(whole.abs() < threshold), as_tuple=True)
    return indices.to(torch.int32), whole[indices]


def message(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, factor: float, gain: float, added: bool = False
) -> Tensor:
    """Message that the large entries are selected from; adds the gradient to the residual, unless it is there."""
    change = grad * factor
    if estimate is not None:
        change = change - estimate
    if residual is None:
        return change
    if not added:
        residual.add_(change)
    return residual if gain == 1.0 else gain * residual + (1.0 - gain) * change


def kth_largest(sizes: Tensor, rank: int) -> float:
    """Plain twin of :func:`lightning_embcomp.kernels.threshold.kth_largest`."""
    return float(torch.topk(sizes, rank, sorted=False).values.min())
