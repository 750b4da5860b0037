"""Rounding on CPU: one pass over the rows for all candidates, a row at a time while it is in the cache."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.quantize.types import PASS, Rounding, RoundingGradients

_IDS_PER_THREAD = 4096
_PASS = np.int64(PASS)


@threaded()
def _forward(
    rows: Any,
    group: Any,
    table_of: Any,
    widths: Any,
    shares: Any,
    steps: Any,
    offset: Any,
    out: Any,
    chunks: Any,
) -> None:
    for chunk in numba.prange(chunks.shape[0] - 1):
        columns = rows.shape[1]
        for i in range(chunks[chunk], chunks[chunk + 1]):
            g = group[i]
            if g < 0:
                out[i, :] = rows[i, :]
                continue
            t = table_of[g]
            for d in range(columns):
                out[i, d] = np.float32(0.0)
            for k in range(widths.shape[0]):
                share = shares[g, k]
                width = widths[k]
                if share <= 0.0 or width == 0:
                    continue
                if width == _PASS:
                    for d in range(columns):
                        out[i, d] += share * rows[i, d]
                    continue
                high = np.float32((1 << (width - 1)) - 1)
                low = -high - np.float32(1.0)
                step = steps[t, k]
                for d in range(columns):
                    scaled = (rows[i, d] - offset[t, d]) / step
                    level = np.rint(min(max(scaled, low), high))
                    out[i, d] += share * (level * step + offset[t, d])


@threaded(fastmath={"reassoc"})  # lets sums over columns use vector registers
def _backward(
    grad: Any,
    rows: Any,
    group: Any,
    table_of: Any,
    widths: Any,
    shares: Any,
    steps: Any,
    offset: Any,
    row_grad: Any,
    all_candidates: Any,
    share_sum: Any,
    error_sum: Any,
    step_sum: Any,
    offset_sum: Any,
    chunks: Any,
) -> None:
    for chunk in numba.prange(chunks.shape[0] - 1):
        columns = rows.shape[1]
        for i in range(chunks[chunk], chunks[chunk + 1]):
            g = group[i]
            if g < 0:
                row_grad[i, :] = grad[i, :]
                continue
            t = table_of[g]
            as_is = np.float32(0.0)
            for d in range(columns):
                row_grad[i, d] = np.float32(0.0)
                as_is += grad[i, d] * rows[i, d]
            for k in range(widths.shape[0]):
                share = shares[g, k]
                width = widths[k]
                if share <= 0.0 and not all_candidates:
                    continue
                rounded = np.float32(0.0)
                if width == _PASS:
                    rounded = as_is
                    for d in range(columns):
                        row_grad[i, d] += share * grad[i, d]
                elif width > 0:
                    high = np.float32((1 << (width - 1)) - 1)
                    low = -high - np.float32(1.0)
                    step = steps[t, k]
                    by_step = np.float32(0.0)
                    for d in range(columns):
                        dy = grad[i, d]
                        scaled = (rows[i, d] - offset[t, d]) / step
                        clipped = min(max(scaled, low), high)
                        level = np.rint(clipped)
                        inside = scaled == clipped
                        rounded += dy * (level * step + offset[t, d])
                        row_grad[i, d] += share * dy if inside else np.float32(0.0)
                        by_step += dy * (level - scaled if inside else level)
                        offset_sum[chunk, t, d] += np.float32(0.0) if inside else share * dy
                    step_sum[chunk, t, k] += share * by_step
                if all_candidates:
                    share_sum[chunk, g, k] += rounded
                    error_sum[chunk, g, k] += (rounded - as_is) * (rounded - as_is)


def round_rows(rows: Tensor, rounding: Rounding) -> Tensor:
    """Numba twin of :func:`lightning_embcomp.kernels.quantize.reference.round_rows`."""
    rows = rows.detach().float().contiguous()
    out = torch.empty_like(rows)
    chunks = _chunks(rows.shape[0])
    _forward(chunks.size - 1, rows.numpy(), *_arrays(rounding), out.numpy(), chunks)
    return out


def round_rows_backward(
    grad: Tensor, rows: Tensor, rounding: Rounding, all_candidates: bool
) -> tuple[Tensor, RoundingGradients]:
    """Numba twin of :func:`lightning_embcomp.kernels.quantize.reference.round_rows_backward`."""
    rows, grad = rows.detach().float().contiguous(), grad.detach().float().contiguous()
    row_grad = torch.empty_like(rows)
    chunks = _chunks(rows.shape[0])
    threads = chunks.size - 1
    shares, steps, offset = rounding.shares, rounding.steps, rounding.offset
    sums = [torch.zeros(threads, *like.shape) for like in (shares, shares, steps, offset)]
    _backward(
        threads,
        grad.numpy(),
        rows.numpy(),
        *_arrays(rounding),
        row_grad.numpy(),
        all_candidates,
        *(total.numpy() for total in sums),
        chunks,
    )
    by_share, errors, by_step, by_offset = (total.sum(0) for total in sums)
    return row_grad, RoundingGradients(shares=by_share, errors=errors, steps=by_step, offset=by_offset)


def _arrays(rounding: Rounding) -> list[np.ndarray]:
    tensors = (
        rounding.group,
        rounding.table,
        rounding.widths,
        rounding.shares,
        rounding.steps,
        rounding.offset,
    )
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _chunks(rows: int) -> np.ndarray:
    """Row ranges of the threads."""
    threads = threads_for(rows, _IDS_PER_THREAD)
    return np.linspace(0, rows, threads + 1).astype(np.int64)
