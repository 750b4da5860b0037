"""Steps with two moments, and stochastic rounding: parts of the Triton kernel that updates rows."""
# ruff: noqa: ANN001, ANN201 - Triton has types of its own

from __future__ import annotations

import triton
import triton.language as tl

from lightning_embcomp.kernels.count.encoding import MIX_1, MIX_2, ROW_FACTOR
from lightning_embcomp.kernels.update.moments.rounding import CLASS_SHIFT, LARGEST_HALF
from lightning_embcomp.kernels.update.rule import FIRST_BY_ROW, KIND_NUMBERS

_BY_ROW: tl.constexpr = tl.constexpr(FIRST_BY_ROW)
_LAMB: tl.constexpr = tl.constexpr(KIND_NUMBERS["lamb"])
_PARTIAL_LAMB: tl.constexpr = tl.constexpr(KIND_NUMBERS["partial_rowwise_lamb"])
_SHIFT: tl.constexpr = tl.constexpr(CLASS_SHIFT)
_LARGEST: tl.constexpr = tl.constexpr(LARGEST_HALF)
_ROW_FACTOR: tl.constexpr = tl.constexpr(ROW_FACTOR)
_MIX_1: tl.constexpr = tl.constexpr(MIX_1)
_MIX_2: tl.constexpr = tl.constexpr(MIX_2)


@triton.jit
def direction(
    total,
    weight,
    state,
    other,
    slot,
    columns,
    s,
    head,
    kept,
    eps,
    keep_first,
    add_first,
    keep_second,
    add_second,
    first_scale,
    second_scale,
    decay,
    kind: tl.constexpr,
):
    """Move the moments of rows, and say where their weights go; ``total`` is 0 beyond the columns of a row."""
    place = (slot * columns)[:, None] + s
    mean = keep_first * tl.load(state[:, None] + place, kept, other=0.0) + add_first * total
    tl.store(state[:, None] + place, mean, kept)
    if kind >= _BY_ROW:
        square = tl.sum(total * total, 1) / columns.to(tl.float32)
        moment = keep_second * tl.load(other + slot, head, other=0.0) + add_second * square
        tl.store(other + slot, moment, head)
        root = (tl.sqrt_rn(moment * second_scale) + eps)[:, None]
    else:
        moments = keep_second * tl.load(other[:, None] + place, kept, other=0.0) + add_second * total * total
        tl.store(other[:, None] + place, moments, kept)
        root = tl.sqrt_rn(moments * second_scale) + eps
    turned = tl.where(kept, mean * first_scale / root + decay * weight, 0.0)
    if kind == _LAMB or kind == _PARTIAL_LAMB:
        here, there = tl.sum(weight * weight, 1), tl.sum(turned * turned, 1)
        both = (here > 0.0) & (there > 0.0)
        turned *= tl.where(both, tl.sqrt_rn(here) / tl.sqrt_rn(tl.where(both, there, 1.0)), 1.0)[:, None]
    return turned


@triton.jit
def round_to_half(values, seed, c, slot, columns, s):
    """Twin of :func:`lightning_embcomp.kernels.update.moments.rounding.round_to_half` with its draws, still float32.

    The seed is multiplied already.
    """
    position = ((c << _SHIFT) + slot * columns)[:, None] + s
    mixed = position.to(tl.uint64) * _ROW_FACTOR + seed.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    draw = ((mixed ^ (mixed >> 31)) >> 11).to(tl.float64) * (2.0**-53)
    size = tl.abs(values)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 113)
    fits = size < _LARGEST  # not NaN
    exponent = tl.where(fits, exponent, 113)
    scaled = tl.where(fits, size, 0.0) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = tl.floor(scaled)
    whole += tl.where(draw < (scaled - whole).to(tl.float64), 1.0, 0.0)
    whole *= ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    return tl.where(fits, tl.where(values < 0.0, -whole, whole), values)
