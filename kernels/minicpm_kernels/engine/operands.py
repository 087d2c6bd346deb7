"""Activations on their way into a product: norm, SwiGLU, and rounding to int8.

A product of integers wants each token's activations in int8, a float32 scale for each group of columns (as long as the
weights' group), and the sum of the group's integers, which takes a format's offset off again; with minimums it is the
float scale * sum. The rounding is that of `minicpm_ref.lowbit.ternary.quantize_activations`, bit for bit: scale =
absmax / 127, half to even, a group with NaN or infinity gets zeros and a NaN scale, so that it poisons its own token
and no other.

What comes out are *operands* as `products` reads them: tile by tile, [4-byte unit][token of the tile].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import float32, int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from minicpm_kernels.engine.formats import FORMATS
from minicpm_kernels.engine.llvm import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    call,
    exp2,
    fill,
    load,
    number,
    shift,
    splat,
    store,
    sum_of_lanes,
    vector,
)  # fmt: skip

Value = Any  # an ir.Value; llvmlite has no type hints
SMALLEST_ABSMAX = 1e-30  # activations below this are zero; 127 divided by less would overflow float32
LOG2_E = 1.4426950408889634


@intrinsic(prefer_literal=True)
def _quantize_group(typing_context, group, product, x, q, step, scale, total):  # type: ignore[no-untyped-def]
    """One group of float32 at x -> int8 quads at q, q + step, ...; its scale; its sum (`product` 1: scale * sum)."""
    columns, with_product = group.literal_value, product.literal_value
    signature = void(group, product, *[int64] * 5)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        x, q, step, scale, total = args[2:]
        # largest absolute value as a bit pattern: NaN and infinity are larger than any number
        top = fill(INTS, 0)
        for i in range(columns // LANES):
            bits = b.and_(load(b, shift(b, x, 64 * i), INTS), fill(INTS, 0x7FFFFFFF))
            top = b.select(b.icmp_signed(">", bits, top), bits, top)
        bits = call(b, "llvm.vector.reduce.smax.v16i32", I32, top)
        absmax = b.bitcast(bits, F32)
        finite = b.icmp_signed("<", bits, number(0x7F800000, I32))
        smallest = ir.Constant(F32, SMALLEST_ABSMAX)
        usable = b.and_(finite, b.fcmp_ordered(">", absmax, smallest))
        inverse = b.select(usable, b.fdiv(ir.Constant(F32, 127.0), absmax), ir.Constant(F32, 0.0))
        inverse, usable_lanes = splat(b, inverse), splat(b, usable)
        sums = fill(INTS, 0)
        for i in range(columns // LANES):
            value = b.fmul(load(b, shift(b, x, 64 * i), FLOATS), inverse)
            value = b.select(usable_lanes, value, fill(FLOATS, 0.0))  # infinity * 0 is NaN, which is no integer
            rounded = b.fptosi(call(b, "llvm.rint.v16f32", FLOATS, value), INTS)
            sums = b.add(sums, rounded)
            quads = b.bitcast(b.trunc(rounded, vector(I8)), vector(I32, 4))
            for j in range(4):
                quad = b.extract_element(quads, number(j, I32))
                store(b, quad, shift(b, q, b.mul(step, number(4 * i + j))))
        nan = ir.Constant(F32, float("nan"))
        factor = b.select(finite, b.fdiv(absmax, ir.Constant(F32, 127.0)), nan)
        store(b, factor, scale)
        whole = call(b, "llvm.vector.reduce.add.v16i32", I32, sums)
        store(b, b.fmul(b.sitofp(whole, F32), factor) if with_product else whole, total)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _spread(typing_context, x, operand, step, count):  # type: ignore[no-untyped-def]
    """`count` floats at x to operand, operand + step, ..."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, operand, step, count = args
        with cgutils.for_range(b, count, intp=I64) as loop:
            store(b, load(b, shift(b, x, loop.index, 4), F32), shift(b, operand, b.mul(loop.index, step)))
        return context.get_dummy_value()

    return void(*[int64] * 4), codegen


def operand_writer(form: str):  # type: ignore[no-untyped-def]
    """The function write(x, operand, scales, sums, start, n, token, groups, first, last) to be compiled.

    It puts the groups first..last - 1 of one token x [columns] into place `token` of the tile of n tokens that starts
    at token `start` of the buffers. All arguments are int64, the first four addresses.
    """
    kind = FORMATS[form]
    group, product, is_float = kind.group, int(kind.minimum), kind.is_float

    def write(x, operand, scales, sums, start, n, token, groups, first, last):  # type: ignore[no-untyped-def]
        if is_float:
            at = operand + 4 * (start * groups * group + first * group * n + token)
            _spread(x + 4 * first * group, at, 4 * n, (last - first) * group)
        else:
            for g in range(first, last):
                at = 4 * (start * groups + g * n + token)
                q = operand + start * groups * group + g * group * n + 4 * token
                _quantize_group(group, product, x + 4 * g * group, q, 4 * n, scales + at, sums + at)

    return write


WRITE = void(*[int64] * 10)


@intrinsic
def sum_of_squares(typing_context, x, count):  # type: ignore[no-untyped-def]
    """Sum of the squares of `count` floats at x, a multiple of sixteen, in one fixed order."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        total = cgutils.alloca_once(b, FLOATS)
        b.store(fill(FLOATS, 0.0), total)
        with cgutils.for_range(b, b.udiv(args[1], number(LANES)), intp=I64) as loop:
            value = load(b, shift(b, args[0], loop.index, 64), FLOATS)
            b.store(b.fadd(b.load(total), b.fmul(value, value)), total)
        return sum_of_lanes(b, b.load(total))

    return float32(int64, int64), codegen


@intrinsic
def scaled(typing_context, x, weight, factor, out, count):  # type: ignore[no-untyped-def]
    """out = x * factor * weight for `count` floats, a multiple of sixteen."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, weight, factor, out, count = args
        wide = splat(b, factor)
        with cgutils.for_range(b, b.udiv(count, number(LANES)), intp=I64) as loop:
            value = b.fmul(load(b, shift(b, x, loop.index, 64), FLOATS), wide)
            value = b.fmul(value, load(b, shift(b, weight, loop.index, 64), FLOATS))
            store(b, value, shift(b, out, loop.index, 64))
        return context.get_dummy_value()

    return void(int64, int64, float32, int64, int64), codegen


@intrinsic
def add_scaled(typing_context, x, y, factor, count):  # type: ignore[no-untyped-def]
    """x = x + y * factor for `count` floats, a multiple of sixteen."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        x, y, factor, count = args
        wide = splat(b, factor)
        with cgutils.for_range(b, b.udiv(count, number(LANES)), intp=I64) as loop:
            at = shift(b, x, loop.index, 64)
            product = b.fmul(load(b, shift(b, y, loop.index, 64), FLOATS), wide)
            store(b, b.fadd(load(b, at, FLOATS), product), at)
        return context.get_dummy_value()

    return void(int64, int64, float32, int64), codegen


@intrinsic
def swiglu(typing_context, gate_up, out, pairs):  # type: ignore[no-untyped-def]
    """silu(gate) * up of `pairs` pairs of sixteen gate rows and sixteen up rows that alternate."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        with cgutils.for_range(b, args[2], intp=I64) as loop:
            at = shift(b, args[0], loop.index, 128)
            gate, up = load(b, at, FLOATS), load(b, shift(b, at, 64), FLOATS)
            power = exp2(b, b.fmul(gate, fill(FLOATS, -LOG2_E)))
            silu = b.fdiv(gate, b.fadd(power, fill(FLOATS, 1.0)))
            store(b, b.fmul(silu, up), shift(b, args[1], loop.index, 64))
        return context.get_dummy_value()

    return void(int64, int64, int64), codegen
