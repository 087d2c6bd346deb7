"""Reading and writing at addresses from compiled Python: the engine's buffers are one allocation and many integers.

Passing thirty numpy arrays to a compiled function costs Python more time than a small model's layer takes. So the step
gets one record of addresses (`state`) and reads through these.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, int64, void
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from minicpm_kernels.engine.llvm import F32, I8, I16, I32, I64, load, shift, store

PAGE = 4096


def allocate(count: int) -> NDArray[np.uint8]:
    """`count` bytes that begin at a page. numpy asks for huge pages; nothing is touched, so nothing is paid for yet."""
    memory = np.empty(count + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + count]


@intrinsic
def integer_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at an address."""
    return int64(int64), lambda context, b, signature, args: load(b, args[0], I64, 8)


@intrinsic
def small_integer_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The int32 at an address."""
    return int64(int64), lambda context, b, signature, args: b.sext(load(b, args[0], I32), I64)


@intrinsic
def byte_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The unsigned byte at an address."""
    return int64(int64), lambda context, b, signature, args: b.zext(load(b, args[0], I8, 1), I64)


@intrinsic
def float_at(typing_context, address):  # type: ignore[no-untyped-def]
    """The float32 at an address."""
    return float32(int64), lambda context, b, signature, args: load(b, args[0], F32)


@intrinsic
def put_integer(typing_context, value, address):  # type: ignore[no-untyped-def]
    """Write an int64."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        store(b, args[0], args[1], 8)
        return context.get_dummy_value()

    return void(int64, int64), codegen


@intrinsic
def put_small_integer(typing_context, value, address):  # type: ignore[no-untyped-def]
    """Write an int32."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        store(b, b.trunc(args[0], I32), args[1])
        return context.get_dummy_value()

    return void(int64, int64), codegen


@intrinsic
def put_float(typing_context, value, address):  # type: ignore[no-untyped-def]
    """Write a float32."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        store(b, args[0], args[1])
        return context.get_dummy_value()

    return void(float32, int64), codegen


@intrinsic
def copy_words(typing_context, source, target, count):  # type: ignore[no-untyped-def]
    """Copy `count` 4-byte words; the two do not overlap."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.VectorType(I32, 8)
        whole = b.udiv(args[2], ir.Constant(I64, 8))
        with cgutils.for_range(b, whole, intp=I64) as loop:
            store(b, load(b, shift(b, args[0], loop.index, 32), kind), shift(b, args[1], loop.index, 32))
        first = b.mul(whole, ir.Constant(I64, 8))
        with cgutils.for_range_slice(b, first, args[2], ir.Constant(I64, 1), intp=I64) as (index, _):
            store(b, load(b, shift(b, args[0], index, 4), I32), shift(b, args[1], index, 4))
        return context.get_dummy_value()

    return void(int64, int64, int64), codegen


@intrinsic
def copy_items(typing_context, source, target, step, count, size):  # type: ignore[no-untyped-def]
    """Copy `count` items of `size` 2 or 4 bytes, both `step` bytes apart."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        source, target, step, count, size = args
        wide = b.icmp_signed("==", size, ir.Constant(I64, 4))
        with cgutils.for_range(b, count, intp=I64) as loop:
            at = b.mul(loop.index, step)
            low = load(b, b.add(source, at), I16, 2)
            store(b, low, b.add(target, at), 2)
            with cgutils.if_likely(b, wide):
                high = load(b, b.add(b.add(source, at), ir.Constant(I64, 2)), I16, 2)
                store(b, high, b.add(b.add(target, at), ir.Constant(I64, 2)), 2)
        return context.get_dummy_value()

    return void(*[int64] * 5), codegen
