"""Sixteen entries at a time: add the gradient, and tell in one bit each whether the message reaches the threshold.

Written as vector instructions because the compiler does not find the last step by itself: a comparison of vectors that
becomes bits of one word. Processors without vectors of sixteen take it in two or four pieces.
"""

# ruff: noqa: ANN401 - Numba hands in its own builders and types

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


@intrinsic
def add_and_mark(
    typing_context: Any,
    grad: Any,
    residual: Any,
    estimate: Any,
    index: Any,
    factor: Any,
    gain: Any,
    rest: Any,
    threshold: Any,
) -> Any:
    """Bits of the entries from ``index`` on that are to be selected, those that are not numbers among them.

    ``residual`` and ``estimate`` are arrays or None; arithmetic and order of operations are those of the reference.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(position: int) -> Any:
            array = cgutils.create_struct_proxy(signature.args[position])(context, builder, args[position])
            return builder.bitcast(builder.gep(array.data, [args[3]]), _FLOATS.as_pointer())

        def spread(scalar: Any) -> Any:
            first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
            return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))

        change = builder.fmul(builder.load(pointer(0), align=4), spread(args[4]))
        if signature.args[2] != types.none:
            change = builder.fsub(change, builder.load(pointer(2), align=4))
        message = change
        if signature.args[1] != types.none:
            place = pointer(1)
            message = builder.fadd(builder.load(place, align=4), change)
            builder.store(message, place, align=4)
            if signature.args[2] != types.none:
                message = builder.fadd(builder.fmul(spread(args[5]), message), builder.fmul(spread(args[6]), change))
        magnitude = builder.and_(builder.bitcast(message, _INTS), ir.Constant(_INTS, [0x7FFFFFFF] * LANES))
        reached = builder.fcmp_unordered(">=", builder.bitcast(magnitude, _FLOATS), spread(args[7]))
        return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), ir.IntType(64))

    scalar = types.float32
    return types.uint64(grad, residual, estimate, types.intp, scalar, scalar, scalar, scalar), generate


@intrinsic
def lowest(typing_context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a uint64 that has one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.intp(types.uint64), generate
