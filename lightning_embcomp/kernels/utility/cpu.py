"""Utilities on CPU.

Accumulation is one pass over the ids, tables in parallel so that no two threads share a row; decay is one pass over the
values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lightning_embcomp.kernels.compile import threaded, threads_for
from lightning_embcomp.kernels.intrinsics import bits_float, float_bits, prefetch
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility.reference import SAMPLE_STRIDE

_AHEAD = 16
_IDS_PER_THREAD = 8192
_VALUES_PER_THREAD = 1 << 18
_KINDS = {"gradient": 0, "frequency": 1, "peak_gradient": 2}
_MASK = np.uint64(0xFFFFFFFF)


@numba.njit(cache=True, inline="always")
def _hash(seed: Any, position: Any) -> Any:
    mixed = (np.uint64(position) * np.uint64(0x9E3779B1) + seed * np.uint64(0x85EBCA6B)) & _MASK
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x2C1B3C6D)) & _MASK
    mixed = ((mixed ^ (mixed >> np.uint64(12))) * np.uint64(0x297A2D39)) & _MASK
    return np.uint32((mixed ^ (mixed >> np.uint64(15))) & np.uint64(0xFFFF))


@threaded()
def _accumulate(
    utility: Any,
    parts: Any,
    row_start: Any,
    ids: Any,
    offsets: Any,
    bag_start: Any,
    table_of: Any,
    norms: Any,
    weights: Any,
    kind: Any,
    seed: Any,
    number: Any,
) -> None:
    for table in numba.prange(row_start.shape[0]):
        first_row = row_start[table]
        for feature in range(table_of.shape[0]):
            if table_of[feature] != table:
                continue
            end = offsets[bag_start[feature + 1]]
            for bag in range(bag_start[feature], bag_start[feature + 1]):
                sample = (bag - bag_start[feature]) * SAMPLE_STRIDE
                for i in range(offsets[bag], offsets[bag + 1]):
                    if i + _AHEAD < end:
                        prefetch(utility, np.intp((first_row + ids[i + _AHEAD]) * parts))
                    base = (first_row + ids[i]) * parts
                    position = (number[table] + ids[i]) * parts + sample
                    scale = np.float32(1.0)
                    if weights.shape[0] > 0:
                        scale = abs(weights[i])
                    for part in range(parts):
                        old = bits_float(np.uint32(utility[base + part]) << np.uint32(16))
                        gain = norms[bag, part] * scale
                        if kind == 2:
                            rounded = float_bits(gain) + np.uint32(0x7FFF) + ((float_bits(gain) >> 16) & np.uint32(1))
                            if gain > old:
                                utility[base + part] = np.uint16(rounded >> np.uint32(16))
                            continue
                        if kind == 1:
                            gain = np.float32(1.0)
                        summed = float_bits(old + gain) + _hash(seed, position + part)
                        utility[base + part] = np.uint16(summed >> np.uint32(16))


def accumulate_utility(
    utility: Tensor,
    row_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    layout: BagLayout,
    norms: Tensor,
    weights: Tensor | None,
    kind: str,
    seed: int,
    number: Tensor,
) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.utility.reference.accumulate_utility`."""
    _accumulate(
        threads_for(indices.numel(), _IDS_PER_THREAD),
        utility.view(torch.int16).numpy().view(np.uint16).reshape(-1),
        utility.shape[1],
        row_start.numpy(),
        indices.contiguous().numpy(),
        offsets.contiguous().numpy(),
        layout.bag_start.numpy(),
        layout.table.numpy(),
        norms.numpy(),
        np.empty(0, np.float32) if weights is None else weights.detach().float().contiguous().numpy(),
        _KINDS[kind],
        np.uint64(seed & 0xFFFFFFFF),
        number.numpy(),
    )


@threaded()
def _decay(values: Any, factor: Any, seed: Any, first: Any) -> None:
    for i in numba.prange(values.shape[0]):
        scaled = bits_float(np.uint32(values[i]) << np.uint32(16)) * factor
        values[i] = np.uint16((float_bits(scaled) + _hash(seed, first + i)) >> np.uint32(16))


def decay_utility(values: Tensor, factor: float, seed: int, first: int = 0) -> None:
    """Numba twin of :func:`lightning_embcomp.kernels.utility.reference.decay_utility`."""
    _decay(
        threads_for(values.numel(), _VALUES_PER_THREAD),
        values.view(torch.int16).numpy().view(np.uint16).reshape(-1),
        np.float32(factor),
        np.uint64(seed & 0xFFFFFFFF),
        first,
    )
