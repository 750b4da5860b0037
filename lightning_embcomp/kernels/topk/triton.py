"""Selection on CUDA: a program holds a few rows in registers and finds their K-th magnitudes by bisection of the bits.

Per entry 4 bytes are read, and 5 or 6 written per kept one; against that stand 31 rounds of a comparison and a sum over
the row's entries, about 62 integer operations per entry, which bound it. Nothing is atomic.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRIES = 2048


@triton.jit
def _select(bits, positions, values, n_rows, width, kept, block_rows: tl.constexpr, block_columns: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    d = tl.arange(0, block_columns)[None, :]
    there = (i < n_rows)[:, None] & (d < width)
    entry = tl.load(bits + i[:, None] * width + d, there, other=0)
    magnitude = tl.where(there, entry & 0x7FFFFFFF, -1)
    threshold = tl.zeros([block_rows], tl.int32)  # the largest that at least K entries reach
    for step in range(31):
        candidate = threshold | (tl.zeros_like(threshold) + 1 << (30 - step))
        reached = tl.sum((magnitude >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= kept, candidate, threshold)
    larger = magnitude > threshold[:, None]
    tie = magnitude == threshold[:, None]
    room = kept - tl.sum(larger.to(tl.int32), 1)
    chosen = larger | (tie & (tl.cumsum(tie.to(tl.int32), 1) <= room[:, None]))
    at = i[:, None] * kept + tl.cumsum(chosen.to(tl.int32), 1) - 1
    chosen = chosen & there
    tl.store(positions + at, (tl.zeros_like(entry) + d).to(positions.dtype.element_ty), chosen)
    tl.store(values + at, entry, chosen)


@triton.jit
def _place(positions, values, rows, entries, kept, width, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = tl.load(positions + at, at < entries, other=-1).to(tl.int32)
    tl.store(
        rows + at // kept * width + column,
        tl.load(values + at, at < entries),
        (column >= 0) & (column < width) & (at < entries),
    )


def top_entries(rows: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Triton twin of :func:`lightning_embcomp.kernels.topk.reference.top_entries`."""
    rows = rows.detach().contiguous()
    positions = torch.empty(rows.shape[0], kept, dtype=dtype, device=rows.device)
    values = torch.empty(rows.shape[0], kept, device=rows.device)
    if rows.shape[0]:
        columns = triton.next_power_of_2(rows.shape[1])
        together = max(1, _ENTRIES // columns)
        _select[(triton.cdiv(rows.shape[0], together),)](
            rows.view(torch.int32),
            positions,
            values.view(torch.int32),
            *rows.shape,
            kept,
            together,
            columns,
            num_warps=4 if columns <= 4096 else 16,
        )
    return positions, values


def place_entries(positions: Tensor, values: Tensor, width: int) -> Tensor:
    """Triton twin of :func:`lightning_embcomp.kernels.topk.reference.place_entries`."""
    rows = torch.zeros(positions.shape[0], width, dtype=values.dtype, device=values.device)
    if positions.numel():
        grid = (triton.cdiv(positions.numel(), _ENTRIES),)
        entries, kept = positions.numel(), positions.shape[1]
        _place[grid](positions.contiguous(), values.contiguous(), rows, entries, kept, width, _ENTRIES)
    return rows
