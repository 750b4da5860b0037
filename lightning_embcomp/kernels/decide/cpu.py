"""Decisions on CPU: one pass over the rows of a slab."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(cache=True, boundscheck=False)
def _count(codes: Any, bits: Any, counts: Any, prefix: Any) -> None:
    for row in range(codes.shape[0]):
        for part in range(counts.shape[0]):
            state = codes[row] if prefix else (codes[row] >> part) & 1
            counts[part, state, bits[row, part] & 0x7FFF] += 1


@numba.njit(cache=True, boundscheck=False)
def _decide(codes: Any, bits: Any, keep: Any, partial: Any, seen: Any, prefix: Any, decided: Any) -> Any:
    for row in range(codes.shape[0]):
        code = 0
        for part in range(keep.shape[0]):
            state = codes[row] if prefix else (codes[row] >> part) & 1
            bin_ = bits[row, part] & 0x7FFF
            kept = np.int64(keep[part, state, bin_])
            if part == partial[0] and state == partial[1] and bin_ == partial[2]:
                seen += 1
                if seen <= partial[3]:
                    kept += 1
            code |= kept if prefix else kept << part
        decided[row] = code
    return seen


def _bits(utility: Tensor) -> np.ndarray:
    return utility.contiguous().view(torch.int16).numpy().view(np.uint16)


def count_cells(codes: Tensor, utility: Tensor, counts: Tensor, *, prefix: bool) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.decide.reference.count_cells`."""
    _count(codes.contiguous().numpy(), _bits(utility), counts.numpy(), prefix)


def decide(
    codes: Tensor,
    utility: Tensor,
    keep: Tensor,
    partial: tuple[int, int, int, int],
    seen: int,
    *,
    prefix: bool,
) -> tuple[Tensor, int]:
    """Numba twin of :func:`lightning_embcomp.kernels.decide.reference.decide`."""
    decided = torch.empty_like(codes)
    seen = _decide(
        codes.contiguous().numpy(), _bits(utility), keep.numpy(), np.array(partial), seen, prefix, decided.numpy()
    )
    return decided, int(seen)
