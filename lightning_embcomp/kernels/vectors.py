"""Sums of rows in registers, spelled in vectors.

LLVM's own vectorisation makes loops for hundreds of elements, so that rows of 4 to 64 columns run in its scalar
remainder, and a sum kept in memory is stored and loaded again for every row. Here a pass over the ids of a bag sums
four blocks of columns at once in registers. No branch depends on the class of an id: classes of neighbouring ids
cannot be predicted, so blocks that a class does not store are read from a block of zeros.

Callers keep the tensors behind the addresses alive for the length of the call.
"""

# ruff: noqa: ANN401 - what Numba and llvmlite hand over has no types

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_embcomp.kernels.intrinsics import emit_prefetch
from lightning_embcomp.kernels.types import NO_CLASS, ClassColumns

BLOCKS = 4
"""Blocks of columns that are summed in one pass over the ids of a bag."""
_MOST_LANES = 32
_I64 = ir.IntType(64)


@dataclass(frozen=True, kw_only=True)
class BlockTable:
    """Where the blocks of every class lie, for classes 0 to 255.

    Attributes:
        lanes: Columns of a block: the largest power of two up to 32 that divides all runs and all widths.
        place: Address of the table and bytes of a row of every class, int64 ``(256, 2)``; the zeros and 0 for others.
        blocks: Byte in the row and a mask, int64 ``(256, blocks, 2)``; the mask is 0 where a block is not stored.
        zeros: Address of a block of zeros.
        kept: What must stay alive with the address.
    """

    lanes: int
    place: np.ndarray
    blocks: np.ndarray
    zeros: int
    kept: np.ndarray


def block_table(addresses: list[int], item: int, columns: ClassColumns, widths: np.ndarray) -> BlockTable:
    """Cut the rows of all classes into blocks.

    Args:
        addresses: Of the tables.
        item: Bytes of a weight.
        columns: Columns that each class stores.
        widths: Columns of each feature.
    """
    run_column, run_length = columns.column.tolist(), columns.length.tolist()
    lanes = gcd(_MOST_LANES, *run_column, *run_length, *widths.tolist())
    # Classes may be wider than every feature: those of tables that are not looked up.
    ends = [first + count for first, count in zip(run_column, run_length, strict=True)]
    passes = -(-max([1, *widths.tolist(), *ends]) // (lanes * BLOCKS))
    kept = np.zeros(_MOST_LANES, np.float32)
    place = np.zeros((NO_CLASS + 1, 2), np.int64)
    place[:, 0] = kept.ctypes.data
    blocks = np.zeros((NO_CLASS + 1, passes * BLOCKS, 2), np.int64)
    first_run = columns.first_run.tolist()
    for c, (address, width) in enumerate(zip(addresses, columns.width.tolist(), strict=True)):
        place[c] = address, width * item
        stored = 0
        for run in range(first_run[c], first_run[c + 1]):
            first, count = run_column[run] // lanes, run_length[run] // lanes
            blocks[c, first : first + count, 0] = item * (stored + lanes * np.arange(count))
            blocks[c, first : first + count, 1] = -1
            stored += run_length[run]
    return BlockTable(lanes=lanes, place=place, blocks=blocks, zeros=kept.ctypes.data, kept=kept)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _at(builder: Any, address: Any, index: Any, element: Any) -> Any:
    return builder.load(builder.gep(_pointer(builder, address, element), [index]))


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def _row(builder: Any, place: Any, id_class: Any, id_slot: Any, at: Any) -> tuple[Any, Any, Any]:
    """Class, address and bytes of the row of an id."""
    row_class = builder.zext(_at(builder, id_class, at, ir.IntType(8)), _I64)
    slot = builder.sext(_at(builder, id_slot, at, ir.IntType(32)), _I64)
    entry = builder.shl(row_class, _I64(1))
    size = _at(builder, place, builder.add(entry, _I64(1)), _I64)
    return row_class, builder.add(_at(builder, place, entry, _I64), builder.mul(slot, size)), size


@intrinsic
def sum_rows(
    typing_context: Any,
    kind: Any,
    lanes: Any,
    weighted: Any,
    into: Any,
    blocks: Any,
    scale: Any,
    place: Any,
    blocks_of_class: Any,
    stride: Any,
    zeros: Any,
    id_class: Any,
    id_slot: Any,
    weights: Any,
    first: Any,
    last: Any,
    end: Any,
    ahead: Any,
    lines: Any,
) -> Any:
    """Write the sum of the rows of some ids, up to four blocks of columns, times a scale.

    Args:
        typing_context: Numba's.
        kind: Of the weights, see :func:`lightning_embcomp.kernels.intrinsics.load_weight`.
        lanes: A tuple as long as a block has columns.
        weighted: A tuple of one entry if rows have weights, an empty one if not.
        into: Address of the sums, float32.
        blocks: How many blocks are written.
        scale: What sums are multiplied by, float32.
        place: Address of :attr:`BlockTable.place`.
        blocks_of_class: Address of the first block of class 0 in :attr:`BlockTable.blocks`.
        stride: Entries of ``blocks_of_class`` per class.
        zeros: Address of a block of zeros.
        id_class: Address of the classes, uint8.
        id_slot: Address of the slots, int32.
        weights: Address of the weights, float32.
        first: First id.
        last: Id after the last.
        end: Id after the last one that may be prefetched.
        ahead: Ids between a prefetch and its use.
        lines: Cache lines to prefetch per row; 0 for none.
    """
    count, has_weights = len(lanes), len(weighted) > 0

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (_, _, _, into, blocks, scale, place, of_class, stride, zeros, id_class, id_slot, weights) = args[:13]
        first, last, end, ahead, lines = args[13:]
        vector = ir.VectorType(ir.FloatType(), count)
        element = ir.HalfType() if kind == types.uint16 else ir.FloatType()
        item = 2 if kind == types.uint16 else 4
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * count)) for _ in range(BLOCKS)]
        final = builder.sub(end, _I64(1))
        with cgutils.for_range_slice(builder, first, last, _I64(1), _I64) as (at, _):
            near = builder.add(at, ahead)
            near = builder.select(builder.icmp_signed("<", near, final), near, final)
            _, near_row, near_size = _row(builder, place, id_class, id_slot, near)
            most = builder.sub(near_size, _I64(1))
            with cgutils.for_range(builder, lines, intp=_I64) as loop:
                byte = builder.shl(loop.index, _I64(6))
                byte = builder.select(builder.icmp_signed("<", byte, most), byte, most)
                emit_prefetch(builder, _pointer(builder, builder.add(near_row, byte), ir.IntType(8)))
            row_class, row, _ = _row(builder, place, id_class, id_slot, at)
            from_zeros = builder.sub(row, zeros)
            entry = builder.mul(row_class, stride)
            factor = _splat(builder, _at(builder, weights, at, ir.FloatType()), count) if has_weights else None
            for block, total in enumerate(sums):
                byte = _at(builder, of_class, builder.add(entry, _I64(2 * block)), _I64)
                mask = _at(builder, of_class, builder.add(entry, _I64(2 * block + 1)), _I64)
                source = builder.add(zeros, builder.and_(builder.add(from_zeros, byte), mask))
                pointer = _pointer(builder, source, ir.VectorType(element, count))
                loaded = builder.load(pointer, align=item)
                if kind == types.uint16:
                    loaded = builder.fpext(loaded, vector)
                if factor is not None:
                    # A weight of infinity times a block that is not there is 0.
                    product = builder.fmul(loaded, factor)
                    there = builder.icmp_signed("!=", mask, _I64(0))
                    loaded = builder.select(there, product, ir.Constant(vector, [0.0] * count))
                builder.store(builder.fadd(builder.load(total), loaded), total)
        for block, total in enumerate(sums):
            with builder.if_then(builder.icmp_signed("<", _I64(block), blocks)):
                target = builder.add(into, _I64(4 * count * block))
                scaled = builder.fmul(builder.load(total), _splat(builder, scale, count))
                builder.store(scaled, _pointer(builder, target, vector), align=4)
        return context.get_dummy_value()

    i = types.int64
    arguments = (kind, lanes, weighted, i, i, types.float32, *[i] * 12)
    return types.void(*arguments), generate
