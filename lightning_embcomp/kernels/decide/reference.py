"""Decisions in plain PyTorch: the definition that the fast paths are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def _states(codes: Tensor, part: int, *, prefix: bool) -> Tensor:
    return codes.long() if prefix else (codes.long() >> part) & 1


def count_cells(codes: Tensor, utility: Tensor, counts: Tensor, *, prefix: bool) -> None:
    """Plain twin of :func:`lightning_embcomp.kernels.decide.count_cells`."""
    bins = utility.contiguous().view(torch.int16).long()
    parts, states, size = counts.shape
    for part in range(parts):
        cell = _states(codes, part, prefix=prefix) * size + bins[:, part]
        found = torch.bincount(cell, minlength=states * size)
        counts[part] += found.to(counts.device).view(states, size)


def decide(
    codes: Tensor,
    utility: Tensor,
    keep: Tensor,
    partial: tuple[int, int, int, int],
    seen: int,
    *,
    prefix: bool,
) -> tuple[Tensor, int]:
    """Plain twin of :func:`lightning_embcomp.kernels.decide.decide`."""
    bins = utility.contiguous().view(torch.int16).long()
    decided, keep = torch.zeros_like(codes), keep.to(codes.device)
    wanted_part, wanted_state, wanted_bin, rows = partial
    for part in range(keep.shape[0]):
        state = _states(codes, part, prefix=prefix)
        kept = keep[part][state, bins[:, part]]
        if part == wanted_part:
            mine = (state == wanted_state) & (bins[:, part] == wanted_bin)
            kept = kept + (mine & (mine.long().cumsum(0) + seen <= rows)).to(torch.uint8)
            seen += int(mine.sum())
        decided |= kept if prefix else kept << part
    return decided, seen
