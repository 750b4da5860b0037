"""Rounding on CUDA: one program per block of rows evaluates all candidates while the rows are in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.quantize.types import PASS, Rounding, RoundingGradients

_ROWS = 16
_PASS: tl.constexpr = tl.constexpr(PASS)
# Adding and taking away 1.5 · 2^23 rounds a small float32 to the nearest integer, ties to even.
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _candidate(w, width, step, offset):  # noqa: ANN001, ANN202 - Triton's own types
    """Value, level, scaled value and whether it is inside the range."""
    high = tl.exp2(width.to(tl.float32) - 1.0) - 1.0
    scaled = tl.div_rn(w - offset, step + tl.zeros_like(w))
    clipped = tl.minimum(tl.maximum(scaled, -high - 1.0), high)
    level = (clipped + _MAGIC) - _MAGIC
    return level * step + offset, level, scaled, scaled == clipped


@triton.jit
def _forward(  # noqa: ANN202
    rows,  # noqa: ANN001
    group,  # noqa: ANN001
    table,  # noqa: ANN001
    widths,  # noqa: ANN001
    shares,  # noqa: ANN001
    steps,  # noqa: ANN001
    offset,  # noqa: ANN001
    out,  # noqa: ANN001
    n_rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    candidates: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_columns)
    inside_batch = i < n_rows
    there = inside_batch[:, None] & (d < columns)[None, :]
    at = i[:, None] * columns + d[None, :]
    g = tl.load(group + i, inside_batch, other=-1)
    own = g >= 0
    t = tl.load(table + g, own, other=0)
    w = tl.load(rows + at, there, other=0.0)
    shift = tl.load(offset + t[:, None] * columns + d[None, :], own[:, None] & there, other=0.0)
    total = tl.zeros_like(w)
    for k in tl.static_range(candidates):
        width = tl.load(widths + k)
        share = tl.load(shares + g * candidates + k, own, other=0.0)[:, None]
        step = tl.load(steps + t * candidates + k, own, other=1.0)[:, None]
        rounded, _, _, _ = _candidate(w, width, tl.where(step > 0.0, step, 1.0), shift)
        value = tl.where(width == _PASS, w, tl.where(width == 0, 0.0, rounded))
        total += tl.where(share > 0.0, share * value, 0.0)
    tl.store(out + at, tl.where(own[:, None], total, w), there)


@triton.jit
def _backward(  # noqa: ANN202
    grad,  # noqa: ANN001
    rows,  # noqa: ANN001
    group,  # noqa: ANN001
    table,  # noqa: ANN001
    widths,  # noqa: ANN001
    shares,  # noqa: ANN001
    steps,  # noqa: ANN001
    offset,  # noqa: ANN001
    row_grad,  # noqa: ANN001
    share_sum,  # noqa: ANN001
    error_sum,  # noqa: ANN001
    step_sum,  # noqa: ANN001
    offset_sum,  # noqa: ANN001
    n_rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    all_candidates: tl.constexpr,
    candidates: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_columns)
    inside_batch = i < n_rows
    there = inside_batch[:, None] & (d < columns)[None, :]
    at = i[:, None] * columns + d[None, :]
    g = tl.load(group + i, inside_batch, other=-1)
    own = g >= 0
    t = tl.load(table + g, own, other=0)
    w = tl.load(rows + at, there, other=0.0)
    dy = tl.load(grad + at, there, other=0.0)
    shift_at = t[:, None] * columns + d[None, :]
    shift = tl.load(offset + shift_at, own[:, None] & there, other=0.0)
    as_is = tl.sum(dy * w, 1)
    inner = tl.zeros_like(w)
    by_offset = tl.zeros_like(w)
    for k in tl.static_range(candidates):
        width = tl.load(widths + k)
        share = tl.load(shares + g * candidates + k, own, other=0.0)[:, None]
        share = tl.where(share > 0.0, share, 0.0)
        step = tl.load(steps + t * candidates + k, own, other=1.0)[:, None]
        rounded, level, scaled, inside = _candidate(w, width, tl.where(step > 0.0, step, 1.0), shift)
        quantizes = (width > 0) & (width < _PASS)
        straight = (quantizes & inside) | (width == _PASS)
        inner += tl.where(straight, share * dy, 0.0)
        clipped = quantizes & (inside == 0)
        by_offset += tl.where(clipped, share * dy, 0.0)
        by_step = tl.where(quantizes, share * dy * tl.where(inside, level - scaled, level), 0.0)
        tl.atomic_add(step_sum + t * candidates + k, tl.sum(by_step, 1), mask=own)
        if all_candidates:
            value = tl.where(width == _PASS, w, tl.where(width == 0, 0.0, rounded))
            change = tl.sum(dy * value, 1)
            tl.atomic_add(share_sum + g * candidates + k, change, mask=own)
            tl.atomic_add(error_sum + g * candidates + k, (change - as_is) * (change - as_is), mask=own)
    tl.atomic_add(offset_sum + shift_at, by_offset, mask=own[:, None] & there)
    tl.store(row_grad + at, tl.where(own[:, None], inner, dy), there)


def round_rows(rows: Tensor, rounding: Rounding) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.quantize.reference.round_rows`."""
    rows = rows.detach().float().contiguous()
    out = torch.empty_like(rows)
    if rows.numel():
        _forward[_grid(rows)](rows, *_tensors(rounding), out, *rows.shape, rounding.widths.numel(), *_blocks(rows))
    return out


def round_rows_backward(
    grad: Tensor, rows: Tensor, rounding: Rounding, all_candidates: bool
) -> tuple[Tensor, RoundingGradients]:
    """Triton twin of :func:`lightning_embcomp.kernels.quantize.reference.round_rows_backward`."""
    rows, grad = rows.detach().float().contiguous(), grad.detach().float().contiguous()
    row_grad = torch.empty_like(rows)
    shares, steps, offset = rounding.shares, rounding.steps, rounding.offset
    sums = [torch.zeros_like(like, memory_format=torch.contiguous_format) for like in (shares, shares, steps, offset)]
    if rows.numel():
        _backward[_grid(rows)](
            grad,
            rows,
            *_tensors(rounding),
            row_grad,
            *sums,
            *rows.shape,
            all_candidates,
            rounding.widths.numel(),
            *_blocks(rows),
        )
    by_share, errors, by_step, by_offset = sums
    return row_grad, RoundingGradients(shares=by_share, errors=errors, steps=by_step, offset=by_offset)


def _tensors(rounding: Rounding) -> list[Tensor]:
    tensors = (
        rounding.group,
        rounding.table,
        rounding.widths,
        rounding.shares,
        rounding.steps,
        rounding.offset,
    )
    return [tensor.detach().contiguous() for tensor in tensors]


def _grid(rows: Tensor) -> tuple[int]:
    return (triton.cdiv(rows.shape[0], _ROWS),)


def _blocks(rows: Tensor) -> tuple[int, int]:
    return _ROWS, triton.next_power_of_2(rows.shape[1])
