"""Machine instructions that Numba has no name for: population count, prefetch, typed access through addresses.

Addresses let one compiled kernel serve any number of class tables: a tuple of arrays would compile once per length.
Callers keep the tensors behind the addresses alive for the length of the call.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """Count the set bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line that holds ``array[index]`` of a one-dimensional array; never faults."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        view = cgutils.create_struct_proxy(array_type)(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(view.data, [args[1]]), ir.IntType(8).as_pointer())
        emit_prefetch(builder, pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def prefetch_address(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address; never faults."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def load_f32(typing_context: Any, address: Any, index: Any) -> Any:
    """Read the ``index``-th float32 after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def store_f32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Write the ``index``-th float32 after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.FloatType().as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


def _weight_pointer(builder: Any, kind: Any, address: Any) -> Any:
    element = ir.HalfType() if kind == types.uint16 else ir.FloatType()
    return builder.inttoptr(address, element.as_pointer())


@intrinsic
def load_weight(typing_context: Any, kind: Any, address: Any, index: Any) -> Any:
    """Read the ``index``-th weight after ``address`` as float32.

    Weights are float32, or float16 if ``kind`` is a uint16: kernels compile once for each.
    """
    if kind not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(builder.gep(_weight_pointer(builder, signature.args[0], args[1]), [args[2]]))
        return builder.fpext(loaded, ir.FloatType()) if signature.args[0] == types.uint16 else loaded

    return types.float32(kind, types.int64, types.int64), generate


@intrinsic
def store_weight(typing_context: Any, kind: Any, address: Any, index: Any, value: Any) -> Any:
    """Write a float32 as the ``index``-th weight after ``address``; float16 rounds to nearest, ties to even."""
    if kind not in (types.float32, types.uint16):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = builder.fptrunc(args[3], ir.HalfType()) if signature.args[0] == types.uint16 else args[3]
        builder.store(stored, builder.gep(_weight_pointer(builder, signature.args[0], args[1]), [args[2]]))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.float32), generate


@intrinsic
def load_i32(typing_context: Any, address: Any, index: Any) -> Any:
    """Read the ``index``-th int32 after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.int32(types.int64, types.int64), generate


@intrinsic
def store_i32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Write the ``index``-th int32 after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32), generate


@intrinsic
def load_u64(typing_context: Any, address: Any, index: Any) -> Any:
    """Read the ``index``-th uint64 after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.uint64(types.int64, types.int64), generate


@intrinsic
def load_u8(typing_context: Any, address: Any, index: Any) -> Any:
    """Read the ``index``-th byte after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.uint8(types.int64, types.int64), generate


@intrinsic
def store_u8(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Write the ``index``-th byte after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint8), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` bytes between addresses that do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(args[0], byte), builder.inttoptr(args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def zero_bytes(typing_context: Any, target: Any, count: Any) -> Any:
    """Set ``count`` bytes after an address to zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        cgutils.memset(builder, builder.inttoptr(args[0], byte), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def bits_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret a uint32 as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


def emit_prefetch(builder: Any, pointer: Any) -> None:
    """Emit ``llvm.prefetch`` for reading with high temporal locality."""
    i32 = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
    builder.call(function, [pointer, i32(0), i32(3), i32(1)])
