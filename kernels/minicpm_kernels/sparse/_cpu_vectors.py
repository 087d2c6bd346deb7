"""Machine code for attention on a CPU: sixteen query heads in the lanes of a vector, times the numbers of a cache.

Both products of attention, and the scores of stage 1, have a few query heads on one side and rows of a cache on the
other. With the heads of one token in the sixteen lanes of a vector,

    logits[key]  = sum_d   query[d]     * K[key, d]       (lanes: heads)
    out[d]      += sum_key weights[key] * V[key, d]

are the same loop: a vector times one number of the cache, broadcast. Keys and values are read where they lie, in
order, once for all the heads that share them; nothing is transposed, gathered or added up across lanes, and maximum,
exponential and sum of the softmax are element-wise. `ROWS` rows of the result stay in registers: sixteen accumulators
of AVX-512, fewer where vectors are shorter and cost several registers.

Groups of fewer heads leave lanes empty, larger ones take several passes; so one machine code serves every shape.

Exponentials have base 2 (log2 e goes into the scale): 2^x = 2^n 2^r with n the nearest integer, |r| <= 1/2 and a
polynomial for 2^r, the exponent's bits being added as an integer. Results below 2^-125 are 0.

A cache in 16 bits is widened a block at a time, into scratch that stays in the first caches (`widen`): sixteen numbers
a few instructions, which the sixteen heads that use each of them outweigh. float16 is taken apart by integers, since
not every CPU has the conversion.

The loops around this are in `_cpu_attend` and `_cpu_select`. numba's cache looks at the file that defines a compiled
function and at no other, so after an edit here they would go on running old code; `SOURCES` is in their cache keys.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import float32, int64, njit, void
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16  # query heads in a vector
TILE = 32  # query tokens that walk the cache together; at most 63, the bits of a mask
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # how a cache is stored
# vector extension -> (features, rows of a product held in registers)
INSTRUCTION_SETS = {"avx512": (("avx512f",), 16), "avx2": (("avx2", "fma"), 4), "portable": ((), 4)}

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VECTOR_BYTES = 4 * LANES
Value = Any  # an ir.Value; llvmlite has no type hints


def _best_instructions() -> str:
    """The vector extension that numba may use on this CPU."""
    given = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES compiles for another CPU
    features = (get_host_cpu_features() if given is None else given).split(",")
    return next(name for name, (needs, _) in INSTRUCTION_SETS.items() if all(f"+{need}" in features for need in needs))


INSTRUCTION_SET = _best_instructions()
ROWS = INSTRUCTION_SETS[INSTRUCTION_SET][1]

# of all the files of this machine code; the entry functions hold it as a free variable, which numba's cache compares
SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("_cpu_*.py"))))

# for the parts of an entry function: compiled with it, and cached in it alone
part = njit(nogil=True, error_model="numpy")


def _number(value: int) -> Value:
    return ir.Constant(I64, value)


def _fill(value: float, kind: Value = FLOATS) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def _at(b: Value, base: Value, index: Value | int, size: int) -> Value:
    """base + index * size, in bytes."""
    return b.add(base, _number(index * size) if isinstance(index, int) else b.mul(index, _number(size)))


def _load(b: Value, address: Value, kind: Value = FLOATS) -> Value:
    load = b.load(b.inttoptr(address, kind.as_pointer()))
    load.align = 4
    return load


def _store(b: Value, value: Value, address: Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def _splat(b: Value, scalar: Value) -> Value:
    undefined = ir.Constant(FLOATS, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, _fill(0, INTS))


def _multiply_add(b: Value, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, in one instruction where there is one (a call of fma would be a library call where there is none)."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _larger(b: Value, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _exp2(b: Value, x: Value) -> Value:
    """2^x in every lane; 0 below 2^-125, infinity from 2^128 on."""
    magic = _fill(1.5 * 2**23)  # pushes the fraction out of the mantissa: rounds to nearest, integer in the low bits
    shifted = b.fadd(x, magic)
    rest = b.fsub(x, b.fsub(shifted, magic))
    terms = [math.log(2) ** i / math.factorial(i) for i in range(8)]  # 5e-9 of the result is left out at |r| = 1/2
    power = _fill(terms[-1])
    for term in reversed(terms[:-1]):
        power = _multiply_add(b, power, rest, _fill(term))
    exponent = b.shl(b.bitcast(shifted, INTS), _fill(23, INTS))
    scaled = b.bitcast(b.add(b.bitcast(power, INTS), exponent), FLOATS)
    scaled = b.select(b.fcmp_ordered("<", x, _fill(-125.0)), _fill(0.0), scaled)
    return b.select(b.fcmp_ordered(">=", x, _fill(128.0)), _fill(math.inf), scaled)


def _prefetch(b: Value, following: Value, first: Value, index: Value, length: Value) -> None:
    """Bring the next `ROWS` numbers of what is read next towards the core; `index` of `length` steps of a tile. Any
    address may be asked for."""
    done = b.add(b.mul(first, length), b.mul(index, _number(ROWS)))
    pointer = b.inttoptr(_at(b, following, done, 4), ir.IntType(8).as_pointer())
    flags = [ir.Constant(I32, flag) for flag in (0, 2, 1)]  # for reading, into the second cache, data
    signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    b.call(b.module.declare_intrinsic("llvm.prefetch.p0", fnty=signature), [pointer, *flags])


def _by_rows(b: Value, rows: Value, emit: Any) -> None:
    """emit(first row, how many) for every `ROWS` rows, then for single ones."""
    full = b.mul(b.udiv(rows, _number(ROWS)), _number(ROWS))
    with cgutils.for_range_slice(b, _number(0), full, _number(ROWS), intp=I64) as (first, _):
        emit(first, ROWS)
    with cgutils.for_range_slice(b, full, rows, _number(1), intp=I64) as (first, _):
        emit(first, 1)


@intrinsic
def dot_products(typing_context, query, keys, step, rows, width, out, following):  # type: ignore[no-untyped-def]
    """out[row] = sum_d query[d] * keys[row, d]; query [width, 16], keys `step` bytes apart, out [rows, 16].

    `following` is the address of what will be read next, as much as is read here.
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        query, keys, step, rows, width, out, following = args

        def emit(first: Value, count: int) -> None:
            row = [b.add(keys, b.mul(step, b.add(first, _number(i)))) for i in range(count)]
            sums = [cgutils.alloca_once(b, FLOATS) for _ in row]
            for total in sums:
                b.store(_fill(0.0), total)
            with cgutils.for_range(b, width, intp=I64) as loop:
                _prefetch(b, following, first, loop.index, width)
                left = _load(b, _at(b, query, loop.index, VECTOR_BYTES))
                for total, key in zip(sums, row, strict=True):
                    right = _splat(b, _load(b, _at(b, key, loop.index, 4), F32))
                    b.store(_multiply_add(b, left, right, b.load(total)), total)
            for i, total in enumerate(sums):
                _store(b, b.load(total), _at(b, out, b.add(first, _number(i)), VECTOR_BYTES))

        _by_rows(b, rows, emit)
        return context.get_dummy_value()

    return void(*[int64] * 7), codegen


@intrinsic
def softmax_step(typing_context, logits, rows, scale, state):  # type: ignore[no-untyped-def]
    """One step of an online softmax: logits [rows, 16] become weights 2^(scale * logit - maximum), in place.

    state [3, 16]: maximum, sum of weights, and (written) what earlier results must be multiplied by.
    """

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        logits, rows, scale, state = args
        factor = _splat(b, scale)
        best, total = cgutils.alloca_once(b, FLOATS), cgutils.alloca_once(b, FLOATS)
        b.store(_fill(-math.inf), best)
        with cgutils.for_range(b, rows, intp=I64) as loop:
            b.store(_larger(b, _load(b, _at(b, logits, loop.index, VECTOR_BYTES)), b.load(best)), best)
        before = _load(b, state)
        maximum = _larger(b, b.fmul(b.load(best), factor), before)
        shrink = _exp2(b, b.fsub(before, maximum))
        b.store(_fill(0.0), total)
        negative = b.fneg(maximum)
        with cgutils.for_range(b, rows, intp=I64) as loop:
            at = _at(b, logits, loop.index, VECTOR_BYTES)
            weight = _exp2(b, _multiply_add(b, _load(b, at), factor, negative))
            _store(b, weight, at)
            b.store(b.fadd(b.load(total), weight), total)
        sums = _multiply_add(b, _load(b, _at(b, state, 1, VECTOR_BYTES)), shrink, b.load(total))
        for i, value in enumerate((maximum, sums, shrink)):
            _store(b, value, _at(b, state, i, VECTOR_BYTES))
        return context.get_dummy_value()

    return void(int64, int64, float32, int64), codegen


@intrinsic
def add_values(typing_context, weights, values, step, rows, width, state, out, following):  # type: ignore[no-untyped-def]
    """out[d] = out[d] * state[2] + sum_row weights[row] * values[row, d]; out [width, 16], the rest as above."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        weights, values, step, rows, width, state, out, following = args
        shrink = _load(b, _at(b, state, 2, VECTOR_BYTES))

        def emit(first: Value, count: int) -> None:
            place = [_at(b, out, b.add(first, _number(i)), VECTOR_BYTES) for i in range(count)]
            sums = [cgutils.alloca_once(b, FLOATS) for _ in place]
            for total in sums:
                b.store(_fill(0.0), total)
            column = _at(b, values, first, 4)
            with cgutils.for_range(b, rows, intp=I64) as loop:
                _prefetch(b, following, first, loop.index, rows)
                left = _load(b, _at(b, weights, loop.index, VECTOR_BYTES))
                row = b.add(column, b.mul(loop.index, step))
                for i, total in enumerate(sums):
                    right = _splat(b, _load(b, _at(b, row, i, 4), F32))
                    b.store(_multiply_add(b, left, right, b.load(total)), total)
            for total, at in zip(sums, place, strict=True):  # last, so that a block's sum is small while it grows
                _store(b, _multiply_add(b, _load(b, at), shrink, b.load(total)), at)

        _by_rows(b, width, emit)
        return context.get_dummy_value()

    return void(*[int64] * 8), codegen


@intrinsic
def sum_heads(typing_context, logits, rows, scale, lse, out):  # type: ignore[no-untyped-def]
    """out[row] += sum over lanes of 2^(scale * logits[row] - lse); lse [16], out [rows]."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        logits, rows, scale, lse, out = args
        factor, negative = _splat(b, scale), b.fneg(_load(b, lse))
        with cgutils.for_range(b, rows, intp=I64) as loop:
            part = _exp2(b, _multiply_add(b, _load(b, _at(b, logits, loop.index, VECTOR_BYTES)), factor, negative))
            width = LANES
            while width > 1:  # halves onto halves
                width //= 2
                low, high = (
                    b.shuffle_vector(part, part, ir.Constant(ir.VectorType(I32, width), [*range(at, at + width)]))
                    for at in (0, width)
                )
                part = b.fadd(low, high)
            at = _at(b, out, loop.index, 4)
            _store(b, b.fadd(_load(b, at, F32), b.extract_element(part, ir.Constant(I32, 0))), at)
        return context.get_dummy_value()

    return void(int64, int64, float32, int64, int64), codegen


def _widened(b: Value, short: Value, half: bool) -> Value:
    """A vector of 16-bit patterns as float32: bfloat16 is the upper half of one, float16 has a shorter exponent."""
    ints, floats = ir.VectorType(I32, short.type.count), ir.VectorType(F32, short.type.count)
    bits = b.zext(short, ints)
    if not half:
        return b.bitcast(b.shl(bits, _fill(16, ints)), floats)
    magnitude = b.and_(bits, _fill(0x7FFF, ints))
    bias = _fill((127 - 15) << 23, ints)
    normal = b.add(b.shl(magnitude, _fill(13, ints)), bias)
    # exponents 31 (infinity, NaN) and 0 (multiples of 2^-24) mean the same in both formats, at other numbers
    normal = b.select(b.icmp_unsigned(">=", magnitude, _fill(0x7C00, ints)), b.add(normal, bias), normal)
    small = b.bitcast(b.fmul(b.uitofp(magnitude, floats), _fill(2.0**-24, floats)), ints)
    value = b.select(b.icmp_unsigned("<", magnitude, _fill(0x0400, ints)), small, normal)
    sign = b.shl(b.and_(bits, _fill(0x8000, ints)), _fill(16, ints))
    return b.bitcast(b.or_(value, sign), floats)


@intrinsic
def widen(typing_context, source, step, rows, width, storage, out):  # type: ignore[no-untyped-def]
    """out [rows, width] = source [rows, width], rows of FLOAT16 or BFLOAT16 numbers `step` bytes apart."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        source, step, rows, width, storage, out = args

        def emit(half: bool) -> None:
            full = b.and_(width, _number(-LANES))
            with cgutils.for_range(b, rows, intp=I64) as row:
                left = b.add(source, b.mul(row.index, step))
                right = _at(b, out, b.mul(row.index, width), 4)
                for start, stop, lanes in ((_number(0), full, LANES), (full, width, 1)):
                    with cgutils.for_range_slice(b, start, stop, _number(lanes), intp=I64) as (d, _):
                        address = b.inttoptr(_at(b, left, d, 2), ir.VectorType(I16, lanes).as_pointer())
                        short = b.load(address)
                        short.align = 2
                        _store(b, _widened(b, short, half), _at(b, right, d, 4))

        with b.if_else(b.icmp_signed("==", storage, _number(FLOAT16))) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)
        return context.get_dummy_value()

    return void(*[int64] * 6), codegen
