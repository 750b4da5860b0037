"""Utilities on CUDA: ids are sorted by row, and the lane of a row's first id adds the gains of all and rounds once.

Per id a sort (:func:`lightning_embcomp.kernels.occurrences.triton.sort_rows`), which bounds it, 4 bytes of bag and 4
per part of norm; per distinct row 2 bytes per part read and written. No atomics: sums of a row run in the order of
the batch, in steps of 16. Decay moves 4 bytes per value and is bound by memory bandwidth.
"""
# ruff: noqa: ANN001, ANN202 - Triton has types of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_embcomp.kernels.occurrences.triton import bags_of_ids, sort_rows
from lightning_embcomp.kernels.triton import count_at_most, steps_for
from lightning_embcomp.kernels.types import BagLayout
from lightning_embcomp.kernels.utility.reference import SAMPLE_STRIDE

_HEADS, _TOGETHER = 32, 16
_VALUES = 1024
_KINDS = {"gradient": 0, "frequency": 1, "peak_gradient": 2}
_FREQUENCY: tl.constexpr = tl.constexpr(1)
_PEAK: tl.constexpr = tl.constexpr(2)
_STRIDE: tl.constexpr = tl.constexpr(SAMPLE_STRIDE)
_SEED_FACTOR = 0x85EBCA6B


@triton.jit
def _round(value, position, seed):
    """Bits of non-negative numbers rounded to bfloat16 at random, as an int16."""
    mixed = (position * 0x9E3779B1 + seed) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    random = (mixed ^ (mixed >> 15)) & 0xFFFF
    return ((value.to(tl.int32, bitcast=True) + random.to(tl.int32)) >> 16).to(tl.int16)


@triton.jit
def _wide(bits):
    """Float32 of the bits of a bfloat16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def _accumulate(
    utility,
    parts,
    keys,
    order,
    ids,
    bag_of_id,
    bag_start,
    table_of,
    number,
    norms,
    weights,
    seed,
    n,
    features,
    steps: tl.constexpr,
    kind: tl.constexpr,
    weighted: tl.constexpr,
    heads: tl.constexpr,
    together: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * heads + tl.arange(0, heads)
    key = tl.load(keys + p, p < n, other=-1).to(tl.int64)
    head = (key >= 0) & (key != tl.load(keys + p - 1, (p > 0) & (p < n), other=-1))
    first = tl.load(order + p, head, other=0)
    bag = tl.load(bag_of_id + first, head, other=0).to(tl.int64)
    feature = count_at_most(bag_start + 1, features, bag, steps)
    sample = bag - tl.load(bag_start + feature, head, other=0)
    row = tl.load(number + tl.load(table_of + feature, head, other=0), head, other=0) + tl.load(
        ids + first, head, other=0
    )
    for part in range(parts):
        total = _wide(tl.load(utility + key * parts + part, head, other=0))
        at = p[:, None] + tl.arange(0, together)[None, :]
        going = head
        while tl.max(going.to(tl.int32), 0) > 0:
            same = going[:, None] & (at < n)
            same = same & (tl.load(keys + at, same, other=-1) == key[:, None])
            if kind == _FREQUENCY:
                gain = same.to(tl.float32)
            else:
                i = tl.load(order + at, same, other=0)
                source = tl.load(bag_of_id + i, same, other=0).to(tl.int64) * parts + part
                gain = tl.load(norms + source, same, other=0.0)
                if weighted:
                    gain *= tl.abs(tl.load(weights + i, same, other=0.0).to(tl.float32))
            if kind == _PEAK:
                total = tl.maximum(total, tl.max(gain, 1))
            else:
                total += tl.sum(gain, 1)
            going = going & (tl.sum(same.to(tl.int32), 1) == together)
            at += together
        if kind == _PEAK:
            bits = total.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)  # to nearest, ties to even
        else:
            rounded = _round(total, row * parts + part + sample * _STRIDE, seed)
        tl.store(utility + key * parts + part, rounded, head)


@triton.jit(do_not_specialize=["seed", "first"])
def _decay(values, factor, seed, first, n, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    scaled = _wide(tl.load(values + i, i < n, other=0)) * factor
    tl.store(values + i, _round(scaled, first + i, seed), i < n)


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
    """Triton twin of :func:`lightning_embcomp.kernels.utility.reference.accumulate_utility`."""
    ids, parts, features = indices.contiguous(), utility.shape[1], layout.table.numel()
    if not ids.numel():
        return
    keys, order = sort_rows(ids, offsets, layout, row_start, utility.shape[0])
    _accumulate[(triton.cdiv(ids.numel(), _HEADS),)](
        utility.view(torch.int16),
        parts,
        keys,
        order,
        ids,
        bags_of_ids(offsets.contiguous(), ids.numel()),
        layout.bag_start,
        layout.table,
        number,
        norms.float().contiguous(),
        norms if weights is None else weights.detach().contiguous(),
        _mixed(seed),
        ids.numel(),
        features,
        steps_for(features),
        _KINDS[kind],
        weights is not None,
        _HEADS,
        _TOGETHER,
    )


def decay_utility(values: Tensor, factor: float, seed: int, first: int = 0) -> None:
    """Triton twin of :func:`lightning_embcomp.kernels.utility.reference.decay_utility`."""
    if values.numel():
        grid = (triton.cdiv(values.numel(), _VALUES),)
        _decay[grid](values.view(torch.int16), factor, _mixed(seed), first, values.numel(), _VALUES)


def _mixed(seed: int) -> int:
    return (seed & 0xFFFFFFFF) * _SEED_FACTOR & 0xFFFFFFFF
