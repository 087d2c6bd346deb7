"""A few words of LLVM, in which the other files of this room write their inner loops.

Problem. The inner loops of an engine are a dozen vector instructions whose order and registers decide the speed. numba
compiles Python loops and leaves the choice to a vectorizer that knows nothing of our layouts.

Idea. numba lets a function emit LLVM's intermediate code itself (`numba.extending.intrinsic`). Everything here works on
vectors of sixteen lanes, one a row of a block of weights; LLVM cuts them to what the machine has (two registers of
AVX2, one of AVX-512, four of SSE or NEON). Addresses are plain integers.

Two things must not depend on the machine by accident and are therefore written down: a multiply-add is fused exactly
where `fused` says so, and half precision is converted by instructions (`hardware`) or, on a CPU without them, by
integer arithmetic that gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

LANES = 16  # rows of a block of weights, positions of a block of keys

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F16 = ir.FloatType(), ir.HalfType()
Value = Any  # an ir.Value; llvmlite has no type hints


def vector(element: Value, lanes: int = LANES) -> Value:
    """The type <lanes x element>."""
    return ir.VectorType(element, lanes)


FLOATS, INTS, HALVES = vector(F32), vector(I32), vector(I16)


def number(value: int, kind: Value = I64) -> Value:
    """A constant integer."""
    return ir.Constant(kind, value)


def fill(kind: Value, value: float) -> Value:
    """A constant vector of equal lanes."""
    return ir.Constant(kind, [value] * kind.count)


def splat(b: Value, scalar: Value, lanes: int = LANES) -> Value:
    """A vector of equal lanes; from a fresh load it becomes a broadcast from memory."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, number(0, I32))
    return b.shuffle_vector(first, undefined, fill(vector(I32, lanes), 0))


def shift(b: Value, base: Value, index: Value | int, size: int = 1) -> Value:
    """The address `index` items of `size` bytes after `base`."""
    offset = number(index * size) if isinstance(index, int) else b.mul(index, number(size)) if size != 1 else index
    return b.add(base, offset)


def load(b: Value, address: Value, kind: Value, align: int = 4) -> Value:
    """What stands at an address. `align` is a promise; LLVM's own would be the whole vector, which nobody made."""
    found = b.load(b.inttoptr(address, kind.as_pointer()))
    found.align = align
    return found


def store(b: Value, value: Value, address: Value, align: int = 4) -> None:
    """Write a value to an address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def call(b: Value, name: str, result: Value, *arguments: Value) -> Value:
    """Call an LLVM intrinsic by its full name."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(b.module.declare_intrinsic(name, fnty=signature), arguments)


def multiply_add(b: Value, x: Value, y: Value, z: Value, fused: bool) -> Value:
    """x * y + z, rounded once (`fused`) or twice."""
    if fused:
        return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)
    return b.fadd(b.fmul(x, y), z)


def prefetch(b: Value, address: Value) -> None:
    """Ask for the cache line at an address; any address may be asked for."""
    pointer = b.inttoptr(address, I8.as_pointer())
    read, all_caches, data = number(0, I32), number(3, I32), number(1, I32)
    call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, read, all_caches, data)


def halves_of_lanes(b: Value, value: Value, part: int, parts: int) -> Value:
    """Lanes `part` of `parts` of a vector."""
    if parts == 1:
        return value
    count = value.type.count // parts
    places = ir.Constant(vector(I32, count), list(range(part * count, (part + 1) * count)))
    return b.shuffle_vector(value, value, places)


def sum_of_lanes(b: Value, value: Value) -> Value:
    """The sum of sixteen floats, halves onto halves: one order for all machines."""
    while value.type.count > 1:
        low, high = (halves_of_lanes(b, value, part, 2) for part in (0, 1))
        value = b.fadd(low, high)
    return b.extract_element(value, number(0, I32))


def larger(b: Value, x: Value, y: Value) -> Value:
    """The larger of two floats in every lane; y where x is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


# ---- half precision --------------------------------------------------------------------------------------------------


def from_half(b: Value, bits: Value, hardware: bool) -> Value:
    """float16, given as int16 lanes, to float32: exact."""
    floats, ints = vector(F32, bits.type.count), vector(I32, bits.type.count)
    if hardware:
        return b.fpext(b.bitcast(bits, vector(F16, bits.type.count)), floats)
    wide = b.zext(bits, ints)
    magnitude = b.shl(b.and_(wide, fill(ints, 0x7FFF)), fill(ints, 13))
    # the exponents' biases differ by 112; this multiplication makes subnormals right, too
    value = b.bitcast(b.fmul(b.bitcast(magnitude, floats), fill(floats, 2.0**112)), ints)
    special = b.or_(magnitude, fill(ints, 0x7F800000))  # infinity and NaN have an exponent of ones in both
    value = b.select(b.icmp_unsigned(">=", magnitude, fill(ints, 0x7C00 << 13)), special, value)
    sign = b.shl(b.and_(wide, fill(ints, 0x8000)), fill(ints, 16))
    return b.bitcast(b.or_(value, sign), floats)


def to_half(b: Value, value: Value, hardware: bool) -> Value:
    """float32 lanes to float16 as int16, to nearest even. What is too large becomes the largest finite number (an
    infinity in a cache would turn a weight of 0 into NaN); NaN stays NaN."""
    floats, ints = value.type, vector(I32, value.type.count)
    top = fill(floats, 65504.0)
    value = b.select(b.fcmp_ordered(">", value, top), top, value)
    value = b.select(b.fcmp_ordered("<", value, b.fneg(top)), b.fneg(top), value)
    if hardware:
        return b.bitcast(b.fptrunc(value, vector(F16, floats.count)), vector(I16, floats.count))
    bits = b.bitcast(value, ints)
    magnitude = b.and_(bits, fill(ints, 0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, fill(ints, 13)), fill(ints, 1))
    rounded = b.add(b.add(magnitude, fill(ints, 0xFFF)), odd)
    normal = b.sub(b.lshr(rounded, fill(ints, 13)), fill(ints, 112 << 10))
    # adding 0.5 pushes a small number's last bits out: what is left is its subnormal form
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, floats), fill(floats, 0.5)), ints), fill(ints, 0x3F000000))
    half = b.select(b.icmp_unsigned("<", magnitude, fill(ints, 113 << 23)), small, normal)
    half = b.select(b.icmp_unsigned(">", magnitude, fill(ints, 0x7F800000)), fill(ints, 0x7E00), half)
    sign = b.and_(b.lshr(bits, fill(ints, 16)), fill(ints, 0x8000))
    return b.trunc(b.or_(half, sign), vector(I16, floats.count))


def from_bfloat(b: Value, bits: Value) -> Value:
    """bfloat16, given as int16 lanes, to float32: the upper half of its bits."""
    ints = vector(I32, bits.type.count)
    return b.bitcast(b.shl(b.zext(bits, ints), fill(ints, 16)), vector(F32, bits.type.count))


# ---- exponential -----------------------------------------------------------------------------------------------------


def exp2(b: Value, x: Value) -> Value:
    """2^x in every lane within 2e-7 of itself; 0 below 2^-125, infinity from 2^128 on, NaN for NaN.

    2^x = 2^n 2^r with n the nearest integer and |r| <= 1/2; 2^r is a polynomial, and n is added to the exponent's bits.
    """
    floats, ints = x.type, vector(I32, x.type.count)
    magic = fill(floats, 1.5 * 2**23)  # pushes the fraction out of the mantissa: the integer is left in the low bits
    shifted = b.fadd(x, magic)
    rest = b.fsub(x, b.fsub(shifted, magic))
    terms = [math.log(2) ** i / math.factorial(i) for i in range(8)]  # 5e-9 of the result is left out at |r| = 1/2
    power = fill(floats, terms[-1])
    for term in reversed(terms[:-1]):
        power = b.fadd(b.fmul(power, rest), fill(floats, term))
    scaled = b.bitcast(b.add(b.bitcast(power, ints), b.shl(b.bitcast(shifted, ints), fill(ints, 23))), floats)
    scaled = b.select(b.fcmp_ordered("<", x, fill(floats, -125.0)), fill(floats, 0.0), scaled)
    scaled = b.select(b.fcmp_ordered(">=", x, fill(floats, 128.0)), fill(floats, math.inf), scaled)
    return b.select(b.fcmp_unordered("uno", x, x), x, scaled)
