"""Add a gradient to what was not sent before, and select what is large enough to be sent now."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import backend_for
from lightning_embcomp.kernels.threshold import cpu, reference

__all__ = ["SMALLEST", "kth_largest", "select_large"]

SMALLEST = 2.0**-126
"""Smallest normal float32; smaller thresholds would let zeros and denormals through."""


def select_large(
    grad: Tensor,
    residual: Tensor | None = None,
    estimate: Tensor | None = None,
    *,
    factor: float = 1.0,
    gain: float = 1.0,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    r"""Add a gradient to the residual and return the entries of the message that reach a threshold, in one pass.

    With :math:`d = \text{factor}\,g - h` (h the estimate, 0 if None), the residual e becomes :math:`e + d`. The message
    is :math:`u = d` without a residual, :math:`u = e + d` with a residual and no estimate, and
    :math:`u = \text{gain}\,(e + d) + (1 - \text{gain})\,d` with both, which is :math:`\text{gain}\,e + d`.

    Nothing counts as sent yet: the caller takes what it sends out of the residual, and adds it to the estimate.

    Args:
        grad: float32 ``(n,)``, contiguous.
        residual: What earlier steps did not send, float32 ``(n,)``; changed in place.
        estimate: What the receivers hold, float32 ``(n,)``; not changed.
        factor: Multiplies the gradient, for example to take out a loss scale.
        gain: Share of the residual in the message where there is an estimate; 1 where there is none.
        threshold: Smallest absolute value that is selected, at least :data:`SMALLEST`.

    Returns:
        Positions, int32 ``(k,)``, rising, and the message there, float32 ``(k,)``. NaN and infinity are always
        selected.

    Raises:
        ValueError: If types or shapes do not fit, the gain has no meaning, or the threshold is too small.

    Example:
        >>> residual = torch.tensor([0.5, 0.0, -0.25])
        >>> select_large(torch.tensor([1.0, -0.125, -1.0]), residual, threshold=1.0)
        (tensor([0, 2], dtype=torch.int32), tensor([ 1.5000, -1.2500]))
        >>> residual
        tensor([ 1.5000, -0.1250, -1.2500])
    """
    for name, tensor in (("grad", grad), ("residual", residual), ("estimate", estimate)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.shape != (grad.numel(),) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous float32 tensor of shape ({grad.numel()},), not {tensor.dtype} of shape"
                f" {tuple(tensor.shape)}"
            )
    if gain != 1.0 and (residual is None or estimate is None):
        raise ValueError(f"gain={gain} has no effect without both a residual and an estimate")
    if not threshold >= SMALLEST:
        raise ValueError(f"the threshold must be at least {SMALLEST:g}, not {threshold}")
    selected: tuple[Tensor, Tensor]
    selected = _backend(grad).select_large(grad.detach(), residual, estimate, factor, gain, threshold)
    return selected


def kth_largest(sizes: Tensor, rank: int) -> float:
    """The ``rank``-th largest value.

    Args:
        sizes: float32 ``(n,)``, finite.
        rank: From 1 to n.

    Returns:
        The value.

    Raises:
        ValueError: If there is no such rank.

    Example:
        >>> kth_largest(torch.tensor([1.0, 4.0, 2.0, 3.0]), 2)
        3.0
    """
    if not 1 <= rank <= sizes.numel():
        raise ValueError(f"rank must be from 1 to {sizes.numel()}, not {rank}")
    value: float = _backend(sizes).kth_largest(sizes.detach(), rank)
    return value


def _backend(grad: Tensor) -> ModuleType:
    return cpu if backend_for(grad.device) == "cpu" else reference
