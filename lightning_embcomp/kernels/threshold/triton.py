"""Selection by a threshold on CUDA: a pass that adds and counts, a sum over the counts, a pass that packs.

The threshold is read from the device, so that it may have been computed there.

Per entry the first pass reads the gradient, residual and estimate and writes the residual, up to 16 bytes. The second
one reads what the message consists of again, in blocks that selected anything, and writes 8 bytes per selected entry.
Memory bandwidth bounds both. Positions rise and nothing is atomic. Both passes compute the message without fused
multiply-adds, so that they and the plain twin agree to the bit.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.threshold.packed import Packed
from lightning_embcomp.kernels.threshold.reference import kth_largest

__all__ = [
    "kth_largest",
    "select_large",
    "select_packed",
]  # a largest value as a Python float waits for the device anyway

_BLOCK = 2048


@triton.jit
def _message(
    grad,
    residual,
    estimate,
    factor,
    gain,
    rest,
    i,
    there,
    has_residual: tl.constexpr,
    has_estimate: tl.constexpr,
    adds: tl.constexpr,
):
    """Message at positions; ``adds`` says whether the gradient is still to be added to the residual."""
    message = tl.load(grad + i, there, other=0.0) * factor
    if has_estimate:
        message -= tl.load(estimate + i, there, other=0.0)
    if has_residual:
        kept = tl.load(residual + i, there, other=0.0)
        if adds:
            kept += message
            tl.store(residual + i, kept, there)
        if has_estimate:
            message = gain * kept + rest * message
        else:
            message = kept
    return message


@triton.jit
def _add_and_count(
    grad,
    residual,
    estimate,
    counts,
    peaks,
    factor,
    gain,
    rest,
    threshold,
    n,
    has_residual: tl.constexpr,
    has_estimate: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = i < n
    message = _message(grad, residual, estimate, factor, gain, rest, i, there, has_residual, has_estimate, adds)
    large = there & ((tl.abs(message) < tl.load(threshold)) == 0)  # what is not a number among them
    tl.store(counts + tl.program_id(0), tl.sum(large.to(tl.int64), 0))
    # Magnitudes have the order of their bits, in which infinity and then NaN are above all numbers.
    magnitude = message.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(peaks + tl.program_id(0), tl.max(tl.where(large, magnitude, 0), 0))


@triton.jit
def _pack(
    grad,
    residual,
    estimate,
    counts,
    ends,
    indices,
    values,
    factor,
    gain,
    rest,
    threshold,
    n,
    capacity,
    has_residual: tl.constexpr,
    has_estimate: tl.constexpr,
    block: tl.constexpr,
):
    selected = tl.load(counts + tl.program_id(0))
    first = tl.load(ends + tl.program_id(0)) - selected
    if (selected > 0) & (first < capacity):
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        there = i < n
        message = _message(grad, residual, estimate, factor, gain, rest, i, there, has_residual, has_estimate, False)
        large = there & ((tl.abs(message) < tl.load(threshold)) == 0)
        at = first + tl.cumsum(large.to(tl.int64), 0) - 1
        tl.store(indices + at, i.to(tl.int32), large & (at < capacity))
        tl.store(values + at, message, large & (at < capacity))


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
    """Triton twin of :func:`lightning_embcomp.kernels.threshold.packed.select_packed`."""
    limit = _on_device(threshold, grad.device)
    counts, ends, peaks = _add(grad, residual, estimate, factor, gain, limit, added)
    indices = torch.zeros(capacity, dtype=torch.int32, device=grad.device)
    values = torch.zeros(capacity, dtype=torch.float32, device=grad.device)
    _write(grad, residual, estimate, factor, gain, limit, counts, ends, indices, values)
    if not counts.numel():
        return Packed(indices, values, counts.new_zeros(1), values.new_zeros(1))
    return Packed(indices, values, ends[-1:], peaks.amax(0, keepdim=True).view(torch.float32))


def select_large(
    grad: Tensor, residual: Tensor | None, estimate: Tensor | None, factor: float, gain: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """Triton twin of :func:`lightning_embcomp.kernels.threshold.reference.select_large`.

    The size of the result is part of it, so the host waits for that number; :func:`select_packed` does not.
    """
    limit = _on_device(threshold, grad.device)
    counts, ends, _ = _add(grad, residual, estimate, factor, gain, limit, False)
    selected = ends[-1:].tolist()[0] if ends.numel() else 0
    indices = torch.empty(selected, dtype=torch.int32, device=grad.device)
    values = torch.empty(selected, dtype=torch.float32, device=grad.device)
    _write(grad, residual, estimate, factor, gain, limit, counts, ends, indices, values)
    return indices, values


def _on_device(threshold: float | Tensor, device: torch.device) -> Tensor:
    return (
        threshold if isinstance(threshold, Tensor) else torch.full((1,), threshold, dtype=torch.float32, device=device)
    )


def _add(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    factor: float,
    gain: float,
    threshold: Tensor,
    added: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """First pass: selected entries of each block, their running sum, and the bits of the largest one of each block."""
    counts = torch.empty(triton.cdiv(grad.numel(), _BLOCK), dtype=torch.int64, device=grad.device)
    peaks = torch.empty_like(counts, dtype=torch.int32)
    if counts.numel():
        _add_and_count[(counts.numel(),)](
            grad,
            grad if residual is None else residual,
            grad if estimate is None else estimate,
            counts,
            peaks,
            factor,
            gain,
            1.0 - gain,
            threshold,
            grad.numel(),
            residual is not None,
            estimate is not None,
            not added,
            _BLOCK,
            enable_fp_fusion=False,
        )
    return counts, counts.cumsum(0), peaks


def _write(
    grad: Tensor,
    residual: Tensor | None,
    estimate: Tensor | None,
    factor: float,
    gain: float,
    threshold: Tensor,
    counts: Tensor,
    ends: Tensor,
    indices: Tensor,
    values: Tensor,
) -> None:
    """Second pass, which fills the two last arguments."""
    if counts.numel() and indices.numel():
        _pack[(counts.numel(),)](
            grad,
            grad if residual is None else residual,
            grad if estimate is None else estimate,
            counts,
            ends,
            indices,
            values,
            factor,
            gain,
            1.0 - gain,
            threshold,
            grad.numel(),
            indices.numel(),
            residual is not None,
            estimate is not None,
            _BLOCK,
            enable_fp_fusion=False,
        )
