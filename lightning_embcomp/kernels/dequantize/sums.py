"""Sums of served rows: of the whole rows of a bag in registers, of single rows or their last columns in memory."""

# ruff: noqa: ANN401 - Numba compiles these for whatever it is given
# mypy: disable-error-code="call-arg, var-annotated, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_embcomp.kernels.dequantize.access import (
    add_2,
    add_4,
    add_8,
    add_16,
    add_32,
    add_f32,
    no_lanes,
    put_lanes,
    read_f16,
    read_f32,
    read_u8,
    sum_2,
    sum_4,
    sum_8,
    sum_16,
    sum_32,
)

MATHS = {"contract", "nsz"}
HEADER = 4
"""Bytes of scale and bias of an integer row."""
# What a kernel knows of a class, in one byte: the size of a value, and flags.
BITS, BITS_8, BITS_4, BITS_16, BITS_32 = 3, 1, 2, 1, 2  # integers of 2 bits are neither 8 nor 4
INTEGER, SHIFTED, PART, NOTHING = 4, 8, 16, 32


@numba.njit(cache=True, boundscheck=False, fastmath=MATHS)
def add_last_columns(target: Any, n: Any, at: Any, bits: Any, scale: Any, bias: Any) -> None:
    """Add ``scale * q + bias`` for the ``n`` values from address ``at`` on to the float32 sums at ``target``."""
    even = n & ~3
    if bits == 8:
        for d in range(0, even, 4):
            add_8(target + 4 * d, at + d, scale, bias)
        for d in range(even, n):
            add_f32(target + 4 * d, np.float32(read_u8(at + d)) * scale + bias)
    elif bits == 4:
        for d in range(0, even, 4):
            add_4(target + 4 * d, at + (d >> 1), scale, bias)
        for d in range(even, n):
            add_f32(target + 4 * d, np.float32(read_u8(at + (d >> 1)) >> (4 * (d & 1)) & 15) * scale + bias)
    elif bits == 2:
        for d in range(0, even, 4):
            add_2(target + 4 * d, at + (d >> 2), scale, bias)
        for d in range(even, n):
            add_f32(target + 4 * d, np.float32(read_u8(at + (d >> 2)) >> (2 * (d & 3)) & 3) * scale + bias)
    elif bits == 16:
        for d in range(0, even, 4):
            add_16(target + 4 * d, at + 2 * d, scale, bias)
        for d in range(even, n):
            add_f32(target + 4 * d, read_f16(at + 2 * d) * scale)
    else:
        for d in range(0, even, 4):
            add_32(target + 4 * d, at + 4 * d, scale, bias)
        for d in range(even, n):
            add_f32(target + 4 * d, read_f32(at + 4 * d) * scale)


@numba.njit(cache=True, boundscheck=False, fastmath=MATHS)
def add_columns(target: Any, n: Any, at: Any, bits: Any, scale: Any, bias: Any) -> None:
    """Like :func:`add_last_columns`, sixteen values at a time where there are as many."""
    wide = n & ~15
    for d in range(0, wide, 16):
        sums = sum_32(no_lanes(), target + 4 * d, np.float32(1.0))
        if bits == 8:
            sums = sum_8(sums, at + d, scale)
        elif bits == 4:
            sums = sum_4(sums, at + (d >> 1), scale)
        elif bits == 2:
            sums = sum_2(sums, at + (d >> 2), scale)
        elif bits == 16:
            sums = sum_16(sums, at + 2 * d, scale)
        else:
            sums = sum_32(sums, at + 4 * d, scale)
        put_lanes(target + 4 * d, sums, bias)
    if wide < n:
        add_last_columns(target + 4 * wide, n - wide, at + (wide * bits >> 3), bits, scale, bias)


def _block_summer(count: int) -> Callable[..., Any]:
    """Make the sum over the whole rows of a bag of ``16 * count`` neighbouring columns, kept in registers.

    The number is a constant of the compiled code, so that short rows do not pay for long ones.
    """

    @numba.njit(boundscheck=False, fastmath=MATHS, forceinline=True)
    def add(
        target: Any, block: Any, first: Any, last: Any, origin: Any, id_kind: Any, id_address: Any, weights: Any
    ) -> Any:
        a0, a1, a2, a3 = no_lanes(), no_lanes(), no_lanes(), no_lanes()
        weighted = weights.shape[0] > 0
        constant, shifts, parts = np.float32(0.0), np.float32(0.0), 0
        for i in range(first, last):
            kind = id_kind[i - origin]
            if kind >= PART:
                parts |= kind
                continue
            at = id_address[i - origin]
            scale = weights[i] if weighted else np.float32(1.0)
            if kind & INTEGER:
                constant += read_f16(at + 2) * scale
                if kind & SHIFTED:
                    shifts += scale
                scale = read_f16(at) * scale
                at += HEADER
                if kind & BITS == BITS_8:
                    at += block
                    a0 = sum_8(a0, at, scale)
                    if count > 1:
                        a1 = sum_8(a1, at + 16, scale)
                    if count > 2:
                        a2 = sum_8(a2, at + 32, scale)
                        a3 = sum_8(a3, at + 48, scale)
                elif kind & BITS == BITS_4:
                    at += block >> 1
                    a0 = sum_4(a0, at, scale)
                    if count > 1:
                        a1 = sum_4(a1, at + 8, scale)
                    if count > 2:
                        a2 = sum_4(a2, at + 16, scale)
                        a3 = sum_4(a3, at + 24, scale)
                else:
                    at += block >> 2
                    a0 = sum_2(a0, at, scale)
                    if count > 1:
                        a1 = sum_2(a1, at + 4, scale)
                    if count > 2:
                        a2 = sum_2(a2, at + 8, scale)
                        a3 = sum_2(a3, at + 12, scale)
            elif kind & BITS == BITS_16:
                at += 2 * block
                a0 = sum_16(a0, at, scale)
                if count > 1:
                    a1 = sum_16(a1, at + 32, scale)
                if count > 2:
                    a2 = sum_16(a2, at + 64, scale)
                    a3 = sum_16(a3, at + 96, scale)
            else:
                at += 4 * block
                a0 = sum_32(a0, at, scale)
                if count > 1:
                    a1 = sum_32(a1, at + 64, scale)
                if count > 2:
                    a2 = sum_32(a2, at + 128, scale)
                    a3 = sum_32(a3, at + 192, scale)
        put_lanes(target + 4 * block, a0, constant)
        if count > 1:
            put_lanes(target + 4 * block + 64, a1, constant)
        if count > 2:
            put_lanes(target + 4 * block + 128, a2, constant)
            put_lanes(target + 4 * block + 192, a3, constant)
        return shifts, parts

    return add


sum_16_columns, sum_32_columns, sum_64_columns = _block_summer(1), _block_summer(2), _block_summer(4)
