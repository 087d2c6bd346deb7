"""Machine code for block-sparse attention on a CPU: sixteen query heads in the lanes of a vector, and the loops around.

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

The compiled loops live in this file, next to the code generator, because numba's cache looks at the age of the file
that defines a compiled function and at nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int32, int64, njit, prange, void
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numba.types import UniTuple

LANES = 16  # query heads in a vector
TILE = 32  # query tokens that walk the cache together; at most 63, the bits of a mask
CHUNK = 64  # compressed keys scored at a time
# vector extension -> (features, rows of a product held in registers)
INSTRUCTION_SETS = {"avx512": (("avx512f",), 16), "avx2": (("avx2", "fma"), 4), "portable": ((), 4)}

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VECTOR_BYTES = 4 * LANES
Value = Any  # an ir.Value; llvmlite has no type hints


def _best() -> str:
    """The vector extension that numba may use on this CPU."""
    given = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES compiles for another CPU
    features = (get_host_cpu_features() if given is None else given).split(",")
    return next(name for name, (needs, _) in INSTRUCTION_SETS.items() if all(f"+{need}" in features for need in needs))


INSTRUCTION_SET = _best()
ROWS = INSTRUCTION_SETS[INSTRUCTION_SET][1]


# ---- code generator --------------------------------------------------------------------------------------------------


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


def _ask_for(b: Value, following: Value, first: Value, index: Value, length: Value) -> None:
    """Bring the next `ROWS` numbers of what is read next towards the core; `index` of `length` steps of a tile. Any
    address may be asked for."""
    done = b.add(b.mul(first, length), b.mul(index, _number(ROWS)))
    pointer = b.inttoptr(_at(b, following, done, 4), ir.IntType(8).as_pointer())
    flags = [ir.Constant(I32, flag) for flag in (0, 2, 1)]  # for reading, into the second cache, data
    signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    b.call(b.module.declare_intrinsic("llvm.prefetch.p0", fnty=signature), [pointer, *flags])


def _in_tiles(b: Value, rows: Value, emit: Any) -> None:
    """emit(first row, how many) for every `ROWS` rows, then for single ones."""
    full = b.mul(b.udiv(rows, _number(ROWS)), _number(ROWS))
    with cgutils.for_range_slice(b, _number(0), full, _number(ROWS), intp=I64) as (first, _):
        emit(first, ROWS)
    with cgutils.for_range_slice(b, full, rows, _number(1), intp=I64) as (first, _):
        emit(first, 1)


@intrinsic
def _logits(typing_context, query, keys, step, rows, width, out, following):  # type: ignore[no-untyped-def]
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
                _ask_for(b, following, first, loop.index, width)
                left = _load(b, _at(b, query, loop.index, VECTOR_BYTES))
                for total, key in zip(sums, row, strict=True):
                    right = _splat(b, _load(b, _at(b, key, loop.index, 4), F32))
                    b.store(_multiply_add(b, left, right, b.load(total)), total)
            for i, total in enumerate(sums):
                _store(b, b.load(total), _at(b, out, b.add(first, _number(i)), VECTOR_BYTES))

        _in_tiles(b, rows, emit)
        return context.get_dummy_value()

    return void(*[int64] * 7), codegen


@intrinsic
def _soften(typing_context, logits, rows, scale, state):  # type: ignore[no-untyped-def]
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
def _accumulate(typing_context, weights, values, step, rows, width, state, out, following):  # type: ignore[no-untyped-def]
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
                _ask_for(b, following, first, loop.index, rows)
                left = _load(b, _at(b, weights, loop.index, VECTOR_BYTES))
                row = b.add(column, b.mul(loop.index, step))
                for i, total in enumerate(sums):
                    right = _splat(b, _load(b, _at(b, row, i, 4), F32))
                    b.store(_multiply_add(b, left, right, b.load(total)), total)
            for total, at in zip(sums, place, strict=True):  # last, so that a block's sum is small while it grows
                _store(b, _multiply_add(b, _load(b, at), shrink, b.load(total)), at)

        _in_tiles(b, width, emit)
        return context.get_dummy_value()

    return void(*[int64] * 8), codegen


@intrinsic
def _share(typing_context, logits, rows, scale, lse, out):  # type: ignore[no-untyped-def]
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


# ---- compiled loops --------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def _enter(q, batch, group, token, heads, queries, state):  # type: ignore[no-untyped-def]
    """One token's heads into lanes, empty lanes 0, and its softmax at the start; queries [passes, D, 16]."""
    for place in range(queries.shape[0]):
        for lane in range(LANES):
            head = place * LANES + lane
            for d in range(queries.shape[1]):
                queries[place, d, lane] = q[batch, group * heads + head, token, d] if head < heads else float32(0)
    state[:, 0] = -np.inf
    state[:, 1] = 0
    state[:, 2] = 0


@njit(cache=True, nogil=True, error_model="numpy")
def _next(member, n):  # type: ignore[no-untyped-def]
    """The first listed block from n on, or their number."""
    while n < member.shape[0] and member[n] == 0:
        n += 1
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def _attend_tile(  # type: ignore[no-untyped-def]
    q, k, v, blocks, batch, group, first, tokens, position, part, parts, block, scale, member, queries, state, out, work
):
    """The softmax state and the unscaled result of `tokens` tokens from `first` on, the first of which stands at
    `position`, over one of `parts` shares of the blocks that they list.

    member int64 [N]; queries and out [tokens, passes, D, 16], state [tokens, passes, 3, 16], work [block, 16].
    """
    heads, keys, width = q.shape[1] // k.shape[1], k.shape[2], k.shape[3]
    member[:] = 0
    listed = 0
    for t in range(tokens):
        _enter(q, batch, group, first + t, heads, queries[t], state[t])
        out[t] = 0
        for slot in range(blocks.shape[3]):
            n = blocks[batch, group, first + t, slot]
            if 0 <= n * block <= position + t:
                listed += member[n] == 0
                member[n] |= 1 << t
    rank = 0
    for n in range(member.shape[0]):  # of the union, keep this share
        if member[n] != 0:
            if not listed * part // parts <= rank < listed * (part + 1) // parts:
                member[n] = 0
            rank += 1
    keys_at = k.ctypes.data + batch * k.strides[0] + group * k.strides[1]
    values_at = v.ctypes.data + batch * v.strides[0] + group * v.strides[1]
    n = _next(member, 0)
    while n < member.shape[0]:
        after = _next(member, n + 1)
        key, value = keys_at + n * block * k.strides[2], values_at + n * block * v.strides[2]
        next_key = keys_at + after * block * k.strides[2]
        for t in range(tokens):
            if member[n] >> t & 1:
                seen = min(block, position + t - n * block + 1)
                rows = min(-(-seen // ROWS) * ROWS, block, keys - n * block)  # whole tiles, where there are keys
                for place in range(queries.shape[1]):
                    softmax, total = state[t, place].ctypes.data, out[t, place].ctypes.data
                    _logits(queries[t, place].ctypes.data, key, k.strides[2], rows, width, work.ctypes.data, value)
                    _soften(work.ctypes.data, seen, scale, softmax)
                    _accumulate(work.ctypes.data, value, v.strides[2], seen, width, softmax, total, next_key)
        n = after


@njit(cache=True, nogil=True, error_model="numpy")
def _leave(result, batch, group, token, heads, state, out):  # type: ignore[no-untyped-def]
    """One token's result out of the lanes, divided by the sum of weights; 0 where nothing was visible.

    A sum that is NaN divides too: a broken input must come out as NaN, not as a plausible zero.
    """
    for head in range(heads):
        place, lane = head // LANES, head % LANES
        total = state[place, 1, lane]
        for d in range(out.shape[1]):
            result[batch, group * heads + head, token, d] = float32(0) if total == 0 else out[place, d, lane] / total


@njit(cache=True, nogil=True, error_model="numpy")
def _merge(state, out, first, parts):  # type: ignore[no-untyped-def]
    """The shares first + 1, first + 2, ... of one tile into share `first`; state [shares, tokens, passes, 3, 16]."""
    for t in range(state.shape[1]):
        for place in range(state.shape[2]):
            for lane in range(LANES):
                maximum = float32(-np.inf)
                for share in range(first, first + parts):
                    maximum = max(maximum, state[share, t, place, 0, lane])
                total = float32(0)
                for share in range(first, first + parts):
                    before = state[share, t, place, 0, lane]
                    factor = np.exp2(before - maximum) if before > -np.inf else float32(0)
                    total += factor * state[share, t, place, 1, lane]
                    for d in range(out.shape[3]):
                        mine = factor * out[share, t, place, d, lane]
                        out[first, t, place, d, lane] = mine + (out[first, t, place, d, lane] if share > first else 0)
                state[first, t, place, 1, lane] = total


def attend(  # type: ignore[no-untyped-def]
    q, k, v, blocks, starts, stops, result, member, queries, state, out, work, workers, parts, block, scale
):
    """Stage 2 into result [B, H, T, D]; `scale` holds log2 e. Scratch: one entry a worker, or a share of a tile where
    `parts` > 1, in member [., N], queries and out [., tile, passes, D, 16], state [., tile, passes, 3, 16] and
    work [., block, 16]; `tile` tokens walk together."""
    batches, groups, tokens, tile = q.shape[0], k.shape[1], q.shape[2], queries.shape[1]
    tiles, heads = -(-tokens // tile), q.shape[1] // k.shape[1]
    tasks = batches * groups * tiles
    for thread in prange(workers):
        worker = int64(thread)  # prange counts unsigned, and the two kinds together would be floats
        for job in range(worker, tasks * parts, workers):
            task, part = job // parts, job % parts
            batch, group, first = task // (groups * tiles), task // tiles % groups, task % tiles * tile
            place = worker if parts == 1 else job
            count = min(tile, tokens - first)
            real = min(count, stops[batch] - starts[batch] - first)  # the others are padding
            for t in range(max(real, 0), count):
                result[batch, group * heads : (group + 1) * heads, first + t] = 0
            _attend_tile(
                q, k, v, blocks, batch, group, first, real, starts[batch] + first, part, parts, block, scale,
                member[place], queries[place], state[place], out[place], work[place],
            )  # fmt: skip
            if parts == 1:
                for t in range(real):
                    _leave(result, batch, group, first + t, heads, state[place, t], out[place, t])
    if parts > 1:
        for i in prange(tasks):
            task = int64(i)
            batch, group, first = task // (groups * tiles), task // tiles % groups, task % tiles * tile
            _merge(state, out, task * parts, parts)
            for t in range(min(tile, tokens - first, stops[batch] - starts[batch] - first)):
                _leave(result, batch, group, first + t, heads, state[task * parts, t], out[task * parts, t])


@njit(cache=True, nogil=True, error_model="numpy")
def _pool(k, batch, group, window, size, stride, out):  # type: ignore[no-untyped-def]
    """The mean of one window of keys: one key after another, so that the bits are those of the reference."""
    total = np.zeros(k.shape[3], np.float32)
    for token in range(window * stride, window * stride + size):
        for d in range(k.shape[3]):
            total[d] += k[batch, group, token, d]
    for d in range(k.shape[3]):
        out[batch, group, window, d] = total[d] / float32(size)


def pool(k, out, size, stride, workers):  # type: ignore[no-untyped-def]
    """Means of all whole windows of k [B, G, S, D] into out [B, G, L, D]."""
    groups, count = out.shape[1], out.shape[2]
    tasks = out.shape[0] * groups * count
    for thread in prange(workers):
        worker = int64(thread)  # prange counts unsigned, and the two kinds together would be floats
        for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            batch, group = task // (groups * count), task // count % groups
            _pool(k, batch, group, task % count, size, stride, out)


@njit(cache=True, nogil=True, error_model="numpy")
def _seen(position, size, stride, count):  # type: ignore[no-untyped-def]
    """How many of `count` windows have ended at `position`."""
    return min(count, (position + 1 - size) // stride + 1) if position + 1 >= size else 0


@njit(cache=True, nogil=True, error_model="numpy")
def _free(position, block, initial, reach, slots):  # type: ignore[no-untyped-def]
    """(end of the blocks before the window, how many of those after the first are free, how many of them are
    wanted) for a token at `position`."""
    own = position // block
    before = max(0, own - reach)
    free = max(0, before - initial)
    return before, free, min(free, slots - (own + 1 - free))


@njit(cache=True, nogil=True, error_model="numpy")
def _score_tile(  # type: ignore[no-untyped-def]
    q, fine, norm, batch, group, first, tokens, position, settings, scale, queries, state, work, scores
):
    """Shared scores [tokens, windows] of the compressed keys that start before each token's window."""
    block, initial, reach, slots, size, stride, factor = settings
    heads, width = q.shape[1] // fine.shape[1], q.shape[3]
    passes = queries.shape[1]
    fine_at = fine.ctypes.data + batch * fine.strides[0] + group * fine.strides[1]
    norm_at = norm.ctypes.data + batch * norm.strides[0] + group * norm.strides[1]
    for t in range(tokens):
        _enter(q, batch, group, first + t, heads, queries[t], state[t])
    last = position + tokens - 1
    for start in range(0, _seen(last, factor * size, factor * stride, norm.shape[2]), CHUNK):
        for t in range(tokens):
            free, wanted = _free(position + t, block, initial, reach, slots)[1:]
            seen = min(CHUNK, _seen(position + t, factor * size, factor * stride, norm.shape[2]) - start)
            if wanted < free and wanted > 0 and seen > 0:
                rows = min(-(-seen // ROWS) * ROWS, norm.shape[2] - start)
                for place in range(passes):
                    at, step, query = norm_at + start * norm.strides[2], norm.strides[2], queries[t, place].ctypes.data
                    _logits(query, at, step, rows, width, work.ctypes.data, at + CHUNK * step)
                    _soften(work.ctypes.data, seen, scale, state[t, place].ctypes.data)
    for t in range(tokens):
        for place in range(passes):
            for lane in range(LANES):
                total = state[t, place, 1, lane]
                known = total > 0 and place * LANES + lane < heads
                # an empty lane, or nothing to compare with: every score 0
                state[t, place, 0, lane] = state[t, place, 0, lane] + np.log2(total) if known else np.inf
    per_block = block // stride
    scores[:tokens] = 0
    for start in range(0, _free(last, block, initial, reach, slots)[0] * per_block, CHUNK):
        for t in range(tokens):
            before, free, wanted = _free(position + t, block, initial, reach, slots)
            seen = min(CHUNK, before * per_block - start, _seen(position + t, size, stride, fine.shape[2]) - start)
            if wanted < free and wanted > 0 and seen > 0:
                rows = min(-(-seen // ROWS) * ROWS, fine.shape[2] - start)
                for place in range(passes):
                    at, step, query = fine_at + start * fine.strides[2], fine.strides[2], queries[t, place].ctypes.data
                    _logits(query, at, step, rows, width, work.ctypes.data, at + CHUNK * step)
                    lse, sums = state[t, place].ctypes.data, scores[t, start:].ctypes.data
                    _share(work.ctypes.data, seen, scale, lse, sums)


@njit(cache=True, nogil=True, error_model="numpy")
def _list(position, settings, scores, pooled, out):  # type: ignore[no-untyped-def]
    """The ascending list of one token into out [slots], from its scores of windows."""
    block, initial, reach, slots, size, stride, factor = settings
    per_block, over = block // stride, size // stride - 1
    own = position // block
    before, free, wanted = _free(position, block, initial, reach, slots)
    keys = pooled.view(np.int32)  # scores are not negative: their bits are in the same order
    threshold, room = np.int32(0), free
    if 0 < wanted < free:
        for n in range(initial, before):
            best = float32(0)
            for window in range(max(0, n * per_block - over), (n + 1) * per_block):
                best = max(best, scores[window])
            pooled[n] = min(best, float32(3.4028234663852886e38))  # overflow ties with the largest finite one
        for bit in range(30, -1, -1):  # the largest value that `wanted` blocks reach
            trial = np.int32(threshold | (1 << bit))
            reached = 0
            for n in range(initial, before):
                reached += keys[n] >= trial
            if reached >= wanted:
                threshold = trial
        room = wanted
        for n in range(initial, before):
            room -= keys[n] > threshold
    elif wanted <= 0:
        room = 0
    slot = 0
    for n in range(own + 1):
        take = n < initial or n >= before
        if not take and wanted > 0:
            take = wanted == free or keys[n] > threshold
            if not take and keys[n] == threshold and room > 0:  # ties go to the lower block
                take = True
                room -= 1
        if take:
            out[slot] = n
            slot += 1
    out[slot:] = -1


def select(  # type: ignore[no-untyped-def]
    q, fine, norm, starts, stops, lists, queries, state, work, scores, pooled, settings, workers, scale
):
    """Stage 1 into lists [B, G, T, K]. settings: block, initial blocks, reach of the window, K, size and stride of
    the fine windows, and how much longer those of `norm` are. Scratch, an entry a worker: as in `attend`, with
    work [., CHUNK, 16], scores [., tile, windows] and pooled [., N]."""
    groups, tokens, tile = fine.shape[1], q.shape[2], queries.shape[1]
    tiles = -(-tokens // tile)
    for thread in prange(workers):
        worker = int64(thread)  # prange counts unsigned, and the two kinds together would be floats
        for task in range(worker, q.shape[0] * groups * tiles, workers):
            batch, group, first = task // (groups * tiles), task // tiles % groups, task % tiles * tile
            position = starts[batch] + first
            count = min(tile, tokens - first)
            real = max(0, min(count, stops[batch] - position))  # the others are padding
            for t in range(real, count):
                lists[batch, group, first + t] = -1
            free, wanted = _free(position + real - 1, settings[0], settings[1], settings[2], settings[3])[1:]
            if real > 0 and 0 < wanted < free:  # free grows along the tile
                _score_tile(
                    q, fine, norm, batch, group, first, real, position, settings, scale,
                    queries[worker], state[worker], work[worker], scores[worker],
                )  # fmt: skip
            for t in range(real):
                row = lists[batch, group, first + t]
                _list(position + t, settings, scores[worker, t], pooled[worker], row)


_ANY, _PLACES, _LONG = float32[:, :, :, :], int64[::1], float32[:, :, :, :, ::1]
_SIGNATURES = {
    attend: void(
        _ANY, _ANY, _ANY, int32[:, :, :, :], _PLACES, _PLACES, _ANY, int64[:, ::1], _LONG, _LONG, _LONG,
        float32[:, :, ::1], int64, int64, int64, float32,
    ),
    pool: void(_ANY, float32[:, :, :, ::1], int64, int64, int64),
    select: void(
        _ANY, _ANY, _ANY, _PLACES, _PLACES, int32[:, :, :, ::1], _LONG, _LONG, float32[:, :, ::1],
        float32[:, :, ::1], float32[:, ::1], UniTuple(int64, 7), int64, float32,
    ),
}  # fmt: skip


@functools.cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`attend`, `pool` or `select` as machine code; strides are arguments like any other, so there is one of each."""
    options = {"cache": True, "nogil": True, "parallel": True, "error_model": "numpy"}
    return njit(_SIGNATURES[function], **options)(function)
