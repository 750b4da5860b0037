"""Decisions on CUDA: a lane per row.

``count_cells`` reads a code and 2 bytes of utility per part of a row and adds one to a counter in the L2. Rows that
were never looked up share one cell, and the atomic adds to it, one after the other, bound it; whole numbers add up to
the same in any order. ``decide`` reads a byte of the table of decisions per part, in the L2 as well, and writes a byte.
It waits for the device only where a cell is kept in part, to know how many of its rows have come.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 512


@triton.jit
def _cell(code, utility, i, part, parts, states, bins, live, prefix: tl.constexpr):
    """Cells of rows: part, state and the bits of the utility."""
    state = code if prefix else (code >> part) & 1
    number = tl.load(utility + i * parts + part, live, other=0).to(tl.int64) & 0x7FFF
    return (part * states + state) * bins + number


@triton.jit
def _count(codes, utility, counts, n, parts, states, bins, prefix: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = i < n
    code = tl.load(codes + i, live, other=0).to(tl.int64)
    for part in range(parts):
        cell = _cell(code, utility, i, part, parts, states, bins, live, prefix)
        tl.atomic_add(counts + cell, tl.zeros_like(cell) + 1, mask=live)


@triton.jit
def _decide(
    codes,
    utility,
    keep,
    decided,
    chosen,
    wanted_part,
    wanted_cell,
    n,
    parts,
    states,
    bins,
    prefix: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = i < n
    code = tl.load(codes + i, live, other=0).to(tl.int64)
    found = tl.zeros_like(code)
    for part in range(parts):
        cell = _cell(code, utility, i, part, parts, states, bins, live, prefix)
        kept = tl.load(keep + cell, live, other=0).to(tl.int64)
        found |= kept << (0 if prefix else part)
        if part == wanted_part:
            tl.store(chosen + i, (cell == wanted_cell).to(tl.int64), live)
    tl.store(decided + i, found.to(tl.uint8), live)


def count_cells(codes: Tensor, utility: Tensor, counts: Tensor, *, prefix: bool) -> None:
    """Triton twin of :func:`lightning_embcomp.kernels.decide.reference.count_cells`."""
    n, (parts, states, bins) = codes.numel(), counts.shape
    if not n:
        return
    found = counts if counts.device == codes.device else torch.zeros_like(counts, device=codes.device)
    grid = (triton.cdiv(n, _ROWS),)
    bits = utility.contiguous().view(torch.int16)
    _count[grid](codes.contiguous(), bits, found, n, parts, states, bins, prefix, _ROWS)
    if found is not counts:
        counts += found.to(counts.device)


def decide(
    codes: Tensor,
    utility: Tensor,
    keep: Tensor,
    partial: tuple[int, int, int, int],
    seen: int,
    *,
    prefix: bool,
) -> tuple[Tensor, int]:
    """Triton twin of :func:`lightning_embcomp.kernels.decide.reference.decide`."""
    n, (parts, states, bins) = codes.numel(), keep.shape
    part, state, number, rows = partial
    decided = torch.empty(n, dtype=torch.uint8, device=codes.device)
    if not n:
        return decided, seen
    chosen = torch.empty(n if part >= 0 else 0, dtype=torch.int64, device=codes.device)
    _decide[(triton.cdiv(n, _ROWS),)](
        codes.contiguous(),
        utility.contiguous().view(torch.int16),
        keep.to(codes.device).contiguous(),
        decided,
        chosen,
        part,
        (part * states + state) * bins + number,
        n,
        parts,
        states,
        bins,
        prefix,
        _ROWS,
    )
    if part >= 0:
        rank = chosen.cumsum(0)
        more = chosen * (rank + seen <= rows)
        decided += (more << (0 if prefix else part)).to(torch.uint8)
        seen += int(rank[-1])
    return decided, seen
