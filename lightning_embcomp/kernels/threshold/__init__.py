"""Add a gradient to what was not sent before, and select what is large enough to be sent now."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcomp.kernels.dispatch import choose
from lightning_embcomp.kernels.threshold import cpu, packed, reference
from lightning_embcomp.kernels.threshold.packed import Packed

__all__ = ["SMALLEST", "Packed", "kth_largest", "select_large", "select_packed"]

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
    _check(grad, residual, estimate, gain, threshold)
    kernel = choose(grad.device, cpu.select_large, reference.select_large)
    return kernel(grad.detach(), residual, estimate, factor, gain, threshold)


def select_packed(
    grad: Tensor,
    residual: Tensor | None = None,
    estimate: Tensor | None = None,
    *,
    factor: float = 1.0,
    gain: float = 1.0,
    threshold: float | Tensor,
    capacity: int,
    added: bool = False,
) -> Packed:
    """As :func:`select_large`, into tensors of given size: the host need not wait for a GPU to know how many there are.

    Args:
        grad: As in :func:`select_large`.
        residual: As in :func:`select_large`.
        estimate: As in :func:`select_large`.
        factor: As in :func:`select_large`.
        gain: As in :func:`select_large`.
        threshold: As in :func:`select_large`; or float32 ``(1,)`` on the device, which is taken as it is.
        capacity: Entries that there is room for; of more, those further left are kept.
        added: Whether the gradient is in the residual already: it is then only read.

    Returns:
        What was selected.

    Raises:
        ValueError: As in :func:`select_large`.

    Example:
        >>> found = select_packed(torch.tensor([1.0, -0.125, -2.0]), threshold=1.0, capacity=3)
        >>> found.indices, found.values, found.found, found.largest
        (tensor([0, 2, 0], dtype=torch.int32), tensor([ 1., -2.,  0.]), tensor([2]), tensor([2.]))
    """
    _check(grad, residual, estimate, gain, threshold)
    kernel = choose(grad.device, packed.select_packed, packed.select_packed)  # only GPUs profit from it
    return kernel(grad.detach(), residual, estimate, factor, gain, threshold, capacity, added)


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
    return choose(sizes.device, cpu.kth_largest, reference.kth_largest)(sizes.detach(), rank)


def _check(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, gain: float, threshold: float | Tensor
) -> None:
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
    if isinstance(threshold, Tensor):
        if threshold.dtype != torch.float32 or threshold.shape != (1,) or threshold.device != grad.device:
            raise ValueError(
                f"the threshold must be a number, or a float32 tensor of shape (1,) on {grad.device}, not"
                f" {threshold.dtype} of shape {tuple(threshold.shape)} on {threshold.device}"
            )
    elif not threshold >= SMALLEST:
        raise ValueError(f"the threshold must be at least {SMALLEST:g}, not {threshold}")
