"""Instructions of served lookups: add a few dequantised values to a sum, at any address, whatever its alignment.

Rows of a class may begin on odd bytes, and loops over bytes and nibbles do not turn into vector code by themselves;
these emit it.
"""

# ruff: noqa: ANN401 - Numba hands in its own builders and types

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

WIDE, NARROW = 16, 4
"""Values that one instruction handles."""
_CONTRACT = ("contract", "nsz")


@intrinsic
def read_u8(typing_context: Any, address: Any) -> Any:
    """Read a byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], ir.IntType(8)), align=1)

    return types.uint8(types.int64), generate


@intrinsic
def read_f16(typing_context: Any, address: Any) -> Any:
    """Read a float16 as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = builder.load(_pointer(builder, args[0], ir.HalfType()), align=1)
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def read_f32(typing_context: Any, address: Any) -> Any:
    """Read a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], ir.FloatType()), align=1)

    return types.float32(types.int64), generate


@intrinsic
def add_f32(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to a float32 in memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], ir.FloatType())
        builder.store(builder.fadd(builder.load(pointer, align=4), args[1]), pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


class _Lanes(types.Type):
    """Sixteen float32 sums, kept in registers."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), WIDE))


_LANES = _Lanes()


@intrinsic
def no_lanes(typing_context: Any) -> Any:
    """Sixteen zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.VectorType(ir.FloatType(), WIDE), None)

    return _LANES(), generate


@intrinsic
def put_lanes(typing_context: Any, target: Any, lanes: Any, constant: Any) -> Any:
    """Write ``lanes + constant`` to the sixteen float32 after an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = builder.fadd(args[1], _splat(builder, args[2], WIDE))
        builder.store(total, _pointer(builder, args[0], total.type), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, _LANES, types.float32), generate


def _summer(bits: int) -> Callable[..., Any]:
    """Make ``sum(lanes, source, scale) -> lanes + scale * source[:16]`` for stored values of that many bits."""

    @intrinsic
    def add(typing_context: Any, lanes: Any, source: Any, scale: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = _values(builder, args[1], bits, WIDE, args[0].type)
            product = builder.fmul(values, _splat(builder, args[2], WIDE), flags=_CONTRACT)
            return builder.fadd(product, args[0], flags=_CONTRACT)

        return _LANES(_LANES, types.int64, types.float32), generate

    return add


def _adder(bits: int) -> Callable[..., Any]:
    """Make ``add(target, source, scale, bias)``: ``target[:4] += scale * source[:4] + bias`` of float32 in memory.

    Bits are those of a stored value; the bias of floats is to be zero.
    """

    @intrinsic
    def add(typing_context: Any, target: Any, source: Any, scale: Any, bias: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            floats = ir.VectorType(ir.FloatType(), NARROW)
            values = _values(builder, args[1], bits, NARROW, floats)
            pointer = _pointer(builder, args[0], floats)
            total = builder.fadd(builder.load(pointer, align=4), _splat(builder, args[3], NARROW), flags=_CONTRACT)
            product = builder.fmul(values, _splat(builder, args[2], NARROW), flags=_CONTRACT)
            builder.store(builder.fadd(product, total, flags=_CONTRACT), pointer, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.float32), generate

    return add


def _values(builder: Any, address: Any, bits: int, lanes: int, floats: Any) -> Any:
    """Stored values as floats."""
    if bits == 32:
        return builder.load(_pointer(builder, address, floats), align=1)
    if bits == 16:
        half = builder.load(_pointer(builder, address, ir.VectorType(ir.HalfType(), lanes)), align=1)
        return builder.fpext(half, floats)
    wide = ir.VectorType(ir.IntType(32), lanes)
    if bits == 8:
        packed = builder.load(_pointer(builder, address, ir.VectorType(ir.IntType(8), lanes)), align=1)
        return builder.sitofp(builder.zext(packed, wide), floats)
    # Values are packed from the lowest bits of little-endian words; every lane shifts its own down.
    size = min(32, lanes * bits)
    words = lanes * bits // size
    vector = ir.VectorType(ir.IntType(size), words)
    packed = builder.load(_pointer(builder, address, vector), align=1)
    if size < 32:
        packed = builder.zext(packed, ir.VectorType(ir.IntType(32), words))
    per_word = size // bits
    choice = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [lane // per_word for lane in range(lanes)])
    spread = builder.shuffle_vector(packed, ir.Constant(packed.type, ir.Undefined), choice)
    shift = ir.Constant(wide, [bits * (lane % per_word) for lane in range(lanes)])
    mask = ir.Constant(wide, [2**bits - 1] * lanes)
    return builder.sitofp(builder.and_(builder.lshr(spread, shift), mask), floats)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = ir.VectorType(ir.FloatType(), lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    choice = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), choice)


add_2, add_4, add_8, add_16, add_32 = (_adder(bits) for bits in (2, 4, 8, 16, 32))
sum_2, sum_4, sum_8, sum_16, sum_32 = (_summer(bits) for bits in (2, 4, 8, 16, 32))
