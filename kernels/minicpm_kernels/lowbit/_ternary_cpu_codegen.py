"""Machine code for ternary products on a CPU: sixteen output rows by a few tokens, in three instruction sets.

The layout does most of the work (see `ternary_cpu`): one 64-byte chunk holds sixteen codes of each of sixteen rows,
one 32-bit lane a row. For each of the four bit pairs p of a chunk, `(chunk >> 2p) & 0x03030303` leaves in every lane
four unsigned bytes, the digits u = code + 1 of four neighbouring columns, which are multiplied by the same four int8
activations in all lanes: one 4-byte broadcast. Sums of a group are exact integers:

    dot = sum(code * q) = sum(u * q) - sum(q)

What differs is the instruction that takes four products:

- `avx512_vnni`  vpdpbusd: four u8 x s8 products added into an int32 lane, 64 a instruction. For a single token the
                 shift is left out: masks 0x03.., 0x0c.., 0x30.., 0xc0.. give digits times 1, 4, 16, 64 (2 * 64 still
                 is a u8), each summed on its own, and one shift a group takes the factor out again.
- `avx2`         vpmaddubsw: two u8 x s8 products into an int16. Thirty-two of them of at most 2 * 2 * 127 are 16256
                 a group: no saturation; one widening addition a group.
- `portable`     no instruction of any particular CPU: the same sums in int16 lanes by generic vector multiplications,
                 which LLVM lowers for whatever the machine has.

Then, a group at a time and in float32 without fused multiply-add: y = y + dot * (scale of x * scale of w). All three
therefore return the same bits.

The compiled loops live in this file, next to the code generator, because numba's cache looks at the age of the file
that defines a compiled function and at nothing else: in two files, an edited generator would go on running its old
code.

Left out: ARM's sdot and AVX-VNNI on 256 bits (one more entry of `INSTRUCTION_SETS` each); bfloat16 and AMX, whose
tiles have no two-bit operand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, float32, int64, prange, types, void
from numba.core import cgutils
from numba.extending import intrinsic

from minicpm_kernels.disk_cache import cached_njit

GROUP = 128  # columns with one scale
ROWS = 16  # rows in lanes
CHUNK = 64  # bytes: 16 columns of 16 rows

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
Value = Any  # an ir.Value; llvmlite has no type hints


def _vector(element: Value, lanes: int) -> Value:
    return ir.VectorType(element, lanes)


def _fill(vector_type: Value, value: float) -> Value:
    return ir.Constant(vector_type, [value] * vector_type.count)


def _splat(b: Value, scalar: Value, lanes: int) -> Value:
    undefined = ir.Constant(_vector(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, _fill(_vector(I32, lanes), 0))


def _pointer(b: Value, base: Value, offset: Value | int, kind: Value) -> Value:
    """The address `offset` bytes after `base`, both int64, as a pointer to `kind`."""
    offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(base, offset), kind.as_pointer())


def _load(b: Value, base: Value, offset: Value | int, kind: Value, align: int = 1) -> Value:
    load = b.load(_pointer(b, base, offset, kind))
    load.align = align  # the default is the natural alignment of the vector, which nobody promises
    return load


def _times(b: Value, value: Value, factor: int) -> Value:
    return b.mul(value, ir.Constant(I64, factor))


class _Vnni:
    """AVX-512 VNNI: one 512-bit vector for all sixteen rows."""

    needs = ("avx512f", "avx512vnni", "f16c")
    tiles = (1, 2, 4, 8, 16)  # tokens at once: one accumulator each, of 32 vector registers
    lanes = 16

    def __init__(self, tokens: int):
        self.planes = 4 if tokens == 1 else 1  # accumulators a token
        self.shift = tokens > 1

    def start(self, b: Value, offset: Value) -> list[Value]:
        zero = _fill(_vector(I32, 16), 0)
        return [_splat(b, offset, 16)] + [zero] * (self.planes - 1)

    def digits(self, b: Value, word: Value, pair: int) -> Value:
        if self.shift:
            return _shifted_digits(b, word, pair)
        mask = 0x03030303 << 2 * pair
        return b.and_(word, _fill(word.type, mask - (1 << 32) if mask >> 31 else mask))

    def dot(self, b: Value, total: Value, digits: Value, quad: Value) -> Value:
        # LLVM 22 retyped the operands from <16 x i32> to <64 x i8>
        operand = _vector(ir.IntType(8), 64) if llvmlite.binding.llvm_version_info[0] >= 22 else total.type
        signature = ir.FunctionType(total.type, [total.type, operand, operand])
        vpdpbusd = b.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", fnty=signature)
        quads = _splat(b, quad, 16)
        return b.call(vpdpbusd, [total, b.bitcast(digits, operand), b.bitcast(quads, operand)])

    def finish(self, b: Value, totals: list[Value], offset: Value) -> Value:
        dot = totals[0]  # the offset is in it
        for plane, total in enumerate(totals[1:], start=1):
            dot = b.add(dot, b.ashr(total, _fill(total.type, 2 * plane)))
        return dot


class _Avx2:
    """AVX2: two 256-bit vectors of eight rows."""

    needs = ("avx2", "f16c")
    tiles = (1, 2, 4)  # 2 accumulators a token, of 16 vector registers
    lanes = 8
    planes = 1

    def __init__(self, tokens: int):
        del tokens

    def start(self, b: Value, offset: Value) -> list[Value]:
        return [_fill(_vector(I16, 16), 0)]

    def digits(self, b: Value, word: Value, pair: int) -> Value:
        return _shifted_digits(b, word, pair)

    def dot(self, b: Value, total: Value, digits: Value, quad: Value) -> Value:
        octets = _vector(ir.IntType(8), 32)
        signature = ir.FunctionType(total.type, [octets, octets])
        vpmaddubsw = b.module.declare_intrinsic("llvm.x86.avx2.pmadd.ub.sw", fnty=signature)
        quads = _splat(b, quad, 8)
        return b.add(total, b.call(vpmaddubsw, [b.bitcast(digits, octets), b.bitcast(quads, octets)]))

    def finish(self, b: Value, totals: list[Value], offset: Value) -> Value:
        return b.add(_add_halves(b, totals[0], 8), _splat(b, offset, 8))


class _Portable:
    """Generic vectors of sixteen rows; LLVM cuts them to the machine's width."""

    needs = ()
    tiles = (1, 2, 4)
    lanes = 16
    planes = 1

    def __init__(self, tokens: int):
        del tokens

    def start(self, b: Value, offset: Value) -> list[Value]:
        return [_fill(_vector(I16, 32), 0)]

    def digits(self, b: Value, word: Value, pair: int) -> Value:
        return _shifted_digits(b, word, pair)

    def dot(self, b: Value, total: Value, digits: Value, quad: Value) -> Value:
        eight = _fill(total.type, 8)
        digits = b.bitcast(digits, total.type)  # two digits in an int16
        quads = b.bitcast(_splat(b, quad, 16), total.type)  # two activations in an int16
        even = b.mul(b.and_(digits, _fill(total.type, 0xFF)), b.ashr(b.shl(quads, eight), eight))
        odd = b.mul(b.lshr(digits, eight), b.ashr(quads, eight))
        return b.add(total, b.add(even, odd))

    def finish(self, b: Value, totals: list[Value], offset: Value) -> Value:
        return b.add(_add_halves(b, totals[0], 16), _splat(b, offset, 16))


# best first
INSTRUCTION_SETS: dict[str, type[_Vnni | _Avx2 | _Portable]] = {
    "avx512_vnni": _Vnni,
    "avx2": _Avx2,
    "portable": _Portable,
}


def _shifted_digits(b: Value, word: Value, pair: int) -> Value:
    shifted = b.lshr(word, _fill(word.type, 2 * pair)) if pair else word
    return b.and_(shifted, _fill(word.type, 0x03030303))


def _add_halves(b: Value, total: Value, lanes: int) -> Value:
    """The sum of the two int16 halves of every 32-bit lane."""
    words = b.bitcast(total, _vector(I32, lanes))
    sixteen = _fill(words.type, 16)
    return b.add(b.ashr(b.shl(words, sixteen), sixteen), b.ashr(words, sixteen))


def _widen_half(b: Value, halves: Value, lanes: int) -> Value:
    """Non-negative float16 bits to float32, exactly and without the instruction: move exponent and mantissa to their
    places, then multiply by the ratio of the exponents' biases, 2^(127 - 15)."""
    words = b.shl(b.zext(halves, _vector(I32, lanes)), _fill(_vector(I32, lanes), 13))
    return b.fmul(b.bitcast(words, _vector(F32, lanes)), _fill(_vector(F32, lanes), 2.0**112))


@intrinsic(prefer_literal=True)
def _row_block(typing_context, version, tokens, codes, scales, q, q_scales, offsets, y, groups, stride):  # type: ignore[no-untyped-def]
    """Sixteen rows by `tokens` tokens; addresses and counts are int64, `version` is a literal string.

    codes and scales are those of the row block; q holds the tile's activations [columns / 4, tokens, 4], q_scales
    and offsets [groups, tokens], y [tokens, stride] from the block's first row on.
    """
    name = version.literal_value
    signature = void(version, *[int64] * 9)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        tiles = INSTRUCTION_SETS[name].tiles
        done = b.append_basic_block("done")
        switch = b.switch(args[1], done)
        for tile in tiles:
            block = b.append_basic_block(f"tokens{tile}")
            switch.add_case(ir.Constant(I64, tile), block)
            b.position_at_end(block)
            _emit_tile(b, INSTRUCTION_SETS[name](tile), tile, *args[2:])
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


def _emit_tile(
    b: Value,
    isa: Any,
    tokens: int,
    codes: Value,
    scales: Value,
    q: Value,
    q_scales: Value,
    offsets: Value,
    y: Value,
    groups: Value,
    stride: Value,
) -> None:
    lanes, parts = isa.lanes, ROWS // isa.lanes
    words, floats = _vector(I32, lanes), _vector(F32, lanes)
    pieces = [(token, part) for token in range(tokens) for part in range(parts)]
    y_sums = {piece: cgutils.alloca_once_value(b, _fill(floats, 0.0)) for piece in pieces}
    for y_sum in y_sums.values():
        b.store(_fill(floats, 0.0), y_sum)
    with cgutils.for_range(b, groups, intp=I64) as loop:
        group = loop.index
        group_codes = b.add(codes, _times(b, group, GROUP // 16 * CHUNK))
        group_q = b.add(q, _times(b, group, GROUP * tokens))
        at = _times(b, group, 4 * tokens)
        offset = [_load(b, offsets, b.add(at, ir.Constant(I64, 4 * token)), I32, 4) for token in range(tokens)]
        totals = {}
        for piece in pieces:
            totals[piece] = [cgutils.alloca_once(b, start.type) for start in isa.start(b, offset[piece[0]])]
            for slot, start in zip(totals[piece], isa.start(b, offset[piece[0]]), strict=True):
                b.store(start, slot)
        with cgutils.for_range(b, ir.Constant(I64, GROUP // 16), intp=I64) as chunks:
            chunk_codes = b.add(group_codes, _times(b, chunks.index, CHUNK))
            chunk_q = b.add(group_q, _times(b, chunks.index, 16 * tokens))
            word = [_load(b, chunk_codes, CHUNK // parts * part, words) for part in range(parts)]
            for pair in range(4):
                digits = [isa.digits(b, w, pair) for w in word]
                for token, part in pieces:
                    quad = _load(b, chunk_q, 4 * (pair * tokens + token), I32, 4)
                    slot = totals[token, part][pair % isa.planes]
                    b.store(isa.dot(b, b.load(slot), digits[part], quad), slot)
        for part in range(parts):
            scale_at = b.add(_times(b, group, 2 * ROWS), ir.Constant(I64, 2 * lanes * part))
            halves = _load(b, scales, scale_at, _vector(I16, lanes), 2)
            scale = _widen_half(b, halves, lanes)
            for token in range(tokens):
                dot = isa.finish(b, [b.load(slot) for slot in totals[token, part]], offset[token])
                q_scale = _load(b, q_scales, b.add(at, ir.Constant(I64, 4 * token)), F32, 4)
                factor = b.fmul(_splat(b, q_scale, lanes), scale)
                y_sum = y_sums[token, part]
                b.store(b.fadd(b.load(y_sum), b.fmul(b.sitofp(dot, floats), factor)), y_sum)
    for (token, part), y_sum in y_sums.items():
        row = b.add(_times(b, stride, 4 * token), ir.Constant(I64, 4 * lanes * part))
        store = b.store(b.load(y_sum), _pointer(b, y, row, floats))
        store.align = 4


@cached_njit()
def _quantize_token(x, q, q_scales, offsets, first, tokens, token):  # type: ignore[no-untyped-def]
    """One token x [columns] into place `token` of a tile of `tokens` that starts at token `first` of the buffers.

    q int32 (four int8 each), q_scales float32 and offsets int32 are flat. The arithmetic is that of
    `minicpm_ref.lowbit.ternary.quantize_activations`, step for step.
    """
    groups = x.shape[0] // GROUP
    bits = x.view(np.uint32)
    rounded = np.empty(GROUP, np.int8)
    quads = rounded.view(np.int32)
    for group in range(groups):
        largest = np.uint32(0)  # of the absolute values' bit patterns: NaN and infinity are larger than any number
        for i in range(GROUP):
            largest = max(largest, np.uint32(bits[group * GROUP + i] & np.uint32(0x7FFFFFFF)))
        top = np.uint32(largest)  # numba views a variable only if it is assigned once
        absmax = top.view(np.float32)
        finite = top < np.uint32(0x7F800000)
        total = np.int32(0)
        if finite and absmax > np.float32(1e-30):
            inverse = np.float32(127) / absmax
            for i in range(GROUP):
                value = np.int32(np.rint(x[group * GROUP + i] * inverse))
                rounded[i] = np.int8(value)
                total += value
        else:
            rounded[:] = 0
        base = (first * groups + group * tokens) * (GROUP // 4) + token
        for i in range(GROUP // 4):
            q[base + i * tokens] = quads[i]
        at = first * groups + group * tokens + token
        q_scales[at] = absmax / np.float32(127) if finite else np.float32(np.nan)
        offsets[at] = -total


@intrinsic
def _floats(typing_context, address):  # type: ignore[no-untyped-def]
    """An int64 address as a pointer to float32, for `carray`."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(float32)(int64), codegen


@functools.cache
def compiled(version: str, parallel: bool) -> Callable[..., None]:
    """multiply(x, codes, scales, y, tokens, groups, blocks, full, largest, last) for one instruction set.

    The first four are addresses: x float32 [tokens, 128 * groups], codes uint8 [blocks, 8 * groups, 16, 4], scales
    float16 [blocks, groups, 16], y float32 [padded, 16 * blocks]. (Unpacking seven arrays costs Python more time than
    a small product takes.) Tokens go through in `full` tiles of `largest` and one of `last`, 0 for none; padded =
    full * largest + last >= tokens, and rows of y from `tokens` on are scratch.
    """

    def multiply(x, codes, scales, y, tokens, groups, blocks, full, largest, last):  # type: ignore[no-untyped-def]
        padded = full * largest + last
        activations = carray(_floats(x), (tokens, groups * GROUP))
        q = np.empty(padded * groups * (GROUP // 4), np.int32)
        q_scales = np.empty(padded * groups, np.float32)
        offsets = np.empty(padded * groups, np.int32)
        for token in prange(padded):
            tile = token // largest
            size = largest if tile < full else last
            first = tile * largest
            if token < tokens:
                _quantize_token(activations[token], q, q_scales, offsets, first, size, token - first)
            else:
                for group in range(groups):
                    at = first * groups + group * size + token - first
                    q_scales[at] = np.float32(0)
                    offsets[at] = np.int32(0)
        for block in prange(blocks):
            for tile in range(full + (last > 0)):
                first = tile * largest
                _row_block(
                    version,
                    largest if tile < full else last,
                    codes + block * groups * (GROUP // 16 * CHUNK),
                    scales + block * groups * (2 * ROWS),
                    q.ctypes.data + first * groups * GROUP,
                    q_scales.ctypes.data + first * groups * 4,
                    offsets.ctypes.data + first * groups * 4,
                    y + (first * blocks + block) * (ROWS * 4),
                    groups,
                    blocks * ROWS,
                )

    # numba names its cache files after the function; the flags that it was compiled with are not in their key
    multiply.__qualname__ = f"multiply_{version}_{'parallel' if parallel else 'serial'}"
    return cached_njit(void(*[int64] * 10), parallel=parallel)(multiply)
