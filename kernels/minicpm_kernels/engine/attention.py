"""Attention of a few query rows over a few blocks of the cache: the part of a step that grows with the context.

Problem. Keys and values are a second stream of memory, in 16 bits; each number must be loaded and widened once for all
query heads (and, when several tokens are verified, all tokens) that share it. A softmax over a long context must be cut
into parts for the threads, but *its bits may depend neither on the cut nor on the number of tokens*.

Idea. The cache lies in blocks of sixteen positions: keys [block][D][16 positions], so that a vector holds one number of
sixteen keys; values [block][D / 16][16 positions][16 numbers]. A *part* is always 128 positions (`PART`), whoever works
on it: scores, maximum, weights 2^(score - maximum), their sum, and the weighted sum of values. Parts are joined in
ascending order by `join`, one after another, in one thread. Both the walk through all parts of a prompt's token and the
parts that several threads computed for one decoded token are the same sequence of operations.

The blocks of a part are a list of addresses, so block-sparse attention lists what it chose, and a node of a draft tree
lists blocks in which its own branch has been laid behind the text.

Scores come with log2 e / sqrt(D) already in the queries. Positions beyond a row's count are never used, whatever stands
there. Sources: online softmax, Milakov and Gimelshein, arXiv 1805.02867; splitting the keys: FlashDecoding.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from minicpm_kernels.engine.instruction_sets import INSTRUCTION_SETS, Portable
from minicpm_kernels.engine.llvm import (
    F32,
    FLOATS,
    HALVES,
    I32,
    I64,
    INTS,
    LANES,
    exp2,
    fill,
    from_half,
    halves_of_lanes,
    larger,
    load,
    multiply_add,
    number,
    shift,
    splat,
    store,
    sum_of_lanes,
    to_half,
)  # fmt: skip
from minicpm_kernels.engine.memory import integer_at

Value = Any  # an ir.Value; llvmlite has no type hints
POSITIONS = LANES  # of a block
PART = 128  # positions
BLOCKS = PART // POSITIONS  # of a part
ELEMENT = {"float16": 2, "float32": 4}  # bytes of a number in the cache
TAIL = 16  # floats behind the D numbers of a state: maximum, sum of weights, padding


def _cached(b: Value, address: Value, element: str, isa: Portable) -> Value:
    """Sixteen numbers of the cache."""
    if element == "float32":
        return load(b, address, FLOATS)
    return from_half(b, load(b, address, HALVES, 2), isa.half)


def _switch(b: Value, rows: Value, most: int, emit: Any) -> None:
    """emit(first row, how many) for all rows, in tiles of at most `most`."""
    full = b.mul(b.udiv(rows, number(most)), number(most))
    with cgutils.for_range_slice(b, number(0), full, number(most), intp=I64) as (first, _):
        emit(first, most)
    done = b.append_basic_block("done")
    switch = b.switch(b.sub(rows, full), done)
    for n in range(1, most):
        block = b.append_basic_block(f"rows{n}")
        switch.add_case(ir.Constant(I64, n), block)
        b.position_at_end(block)
        emit(full, n)
        b.branch(done)
    b.position_at_end(done)


def _loop_of(b: Value, count: Value, unroll: int, body: Any, slots: list[Value]) -> None:
    """body(index, values) -> values for `count` steps, a multiple of `unroll`; values live in slots between steps."""
    with cgutils.for_range_slice(b, number(0), count, number(unroll), intp=I64) as (first, _):
        values = [b.load(slot) for slot in slots]
        for i in range(unroll):
            values = body(b.add(first, number(i)), values)
        for slot, value in zip(slots, values, strict=True):
            b.store(value, slot)


def _slots(b: Value, values: list[Value]) -> list[Value]:
    slots = [cgutils.alloca_once(b, value.type) for value in values]
    for slot, value in zip(slots, values, strict=True):
        b.store(value, slot)
    return slots


@intrinsic(prefer_literal=True)
def block_scores(typing_context, isa, element, keys, queries, rows, width, out, stride):  # type: ignore[no-untyped-def]
    """out[row][16] = queries [rows, width] times a block of keys [width][16]; `stride` bytes from row to row of out."""
    chosen, kind = INSTRUCTION_SETS[isa.literal_value], element.literal_value
    signature = void(isa, element, *[int64] * 6)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        keys, queries, rows, width, out, stride = args[2:]

        def emit(first: Value, count: int) -> None:
            at = [shift(b, queries, b.mul(b.add(first, number(i)), width), 4) for i in range(count)]
            slots = _slots(b, [fill(FLOATS, 0.0)] * count)

            def body(d: Value, sums: list[Value]) -> list[Value]:
                key = _cached(b, shift(b, keys, d, 16 * ELEMENT[kind]), kind, chosen)
                query = [splat(b, load(b, shift(b, a, d, 4), F32)) for a in at]
                return [multiply_add(b, key, q, s, chosen.fused) for q, s in zip(query, sums, strict=True)]

            _loop_of(b, width, 4, body, slots)
            for i, slot in enumerate(slots):
                store(b, b.load(slot), shift(b, out, b.mul(b.add(first, number(i)), stride)))

        _switch(b, rows, chosen.row_tile, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def soften(typing_context, scores, count, blocks, state):  # type: ignore[no-untyped-def]
    """Scores [16 * blocks] become weights 2^(score - maximum), 0 from `count` on; state gets maximum and sum."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        scores, count, blocks, state = args
        lane = ir.Constant(INTS, list(range(LANES)))
        last = b.trunc(count, I32)

        def visible(block: Value) -> Value:
            left = b.sub(last, b.trunc(b.mul(block, number(LANES)), I32))
            return b.icmp_signed("<", lane, splat(b, left))

        best = cgutils.alloca_once(b, FLOATS)
        b.store(fill(FLOATS, -math.inf), best)
        with cgutils.for_range(b, blocks, intp=I64) as loop:
            score = load(b, shift(b, scores, loop.index, 64), FLOATS)
            b.store(larger(b, b.select(visible(loop.index), score, fill(FLOATS, -math.inf)), b.load(best)), best)
        top = b.load(best)
        while top.type.count > 1:
            top = larger(b, *(halves_of_lanes(b, top, part, 2) for part in (0, 1)))
        top = b.extract_element(top, number(0, I32))
        wide, total = splat(b, top), cgutils.alloca_once(b, FLOATS)
        b.store(fill(FLOATS, 0.0), total)
        with cgutils.for_range(b, blocks, intp=I64) as loop:
            at = shift(b, scores, loop.index, 64)
            weight = exp2(b, b.fsub(load(b, at, FLOATS), wide))
            weight = b.select(visible(loop.index), weight, fill(FLOATS, 0.0))
            store(b, weight, at)
            b.store(b.fadd(b.load(total), weight), total)
        store(b, top, state)
        store(b, sum_of_lanes(b, b.load(total)), shift(b, state, 4))
        return context.get_dummy_value()

    return void(*[int64] * 4), codegen


@intrinsic(prefer_literal=True)
def _weigh(typing_context, isa, element, values, weights, rows, count, width, out, stride):  # type: ignore[no-untyped-def]
    """out[row][width] += weights[row][:count] times a block of values [width / 16][16][16]; weights PART apart."""
    chosen, kind = INSTRUCTION_SETS[isa.literal_value], element.literal_value
    signature = void(isa, element, *[int64] * 7)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        values, weights, rows, count, width, out, stride = args[2:]
        quads = b.and_(count, number(-4))

        def emit(first: Value, n: int) -> None:
            rows_at = [b.add(first, number(i)) for i in range(n)]
            with cgutils.for_range(b, b.udiv(width, number(LANES)), intp=I64) as tile:
                column = shift(b, values, tile.index, LANES * POSITIONS * ELEMENT[kind])
                places = [shift(b, shift(b, out, b.mul(row, stride)), tile.index, 64) for row in rows_at]
                slots = _slots(b, [load(b, place, FLOATS) for place in places])

                def body(position: Value, sums: list[Value]) -> list[Value]:
                    value = _cached(b, shift(b, column, position, LANES * ELEMENT[kind]), kind, chosen)
                    found = []
                    for row, total in zip(rows_at, sums, strict=True):
                        weight = load(b, shift(b, shift(b, weights, row, 4 * PART), position, 4), F32)
                        found.append(multiply_add(b, value, splat(b, weight), total, chosen.fused))
                    return found

                _loop_of(b, quads, 4, body, slots)
                with cgutils.for_range_slice(b, quads, count, number(1), intp=I64) as (position, _):
                    for slot, value in zip(slots, body(position, [b.load(s) for s in slots]), strict=True):
                        b.store(value, slot)
                for place, slot in zip(places, slots, strict=True):
                    store(b, b.load(slot), place)

        _switch(b, rows, chosen.row_tile, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def join(typing_context, total, part, width):  # type: ignore[no-untyped-def]
    """Join the state of a part, [width] numbers, maximum, sum, to that of all parts before it."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        total, part, width = args
        ends = [shift(b, at, width, 4) for at in (total, part)]
        tops = [splat(b, load(b, end, F32)) for end in ends]
        top = larger(b, tops[1], tops[0])
        old, new = (exp2(b, b.fsub(t, top)) for t in tops)
        sums = [splat(b, load(b, shift(b, end, 4), F32)) for end in ends]
        both = b.fadd(b.fmul(sums[0], old), b.fmul(sums[1], new))
        with cgutils.for_range(b, b.udiv(width, number(LANES)), intp=I64) as loop:
            at = shift(b, total, loop.index, 64)
            added = b.fmul(load(b, shift(b, part, loop.index, 64), FLOATS), new)
            store(b, b.fadd(b.fmul(load(b, at, FLOATS), old), added), at)
        store(b, b.extract_element(top, number(0, I32)), ends[0])
        store(b, b.extract_element(both, number(0, I32)), shift(b, ends[0], 4))
        return context.get_dummy_value()

    return void(*[int64] * 3), codegen


@intrinsic
def clear_state(typing_context, state, width):  # type: ignore[no-untyped-def]
    """A state of no parts: numbers 0, maximum -infinity, sum 0."""

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        state, width = args
        with cgutils.for_range(b, b.udiv(width, number(LANES)), intp=I64) as loop:
            store(b, fill(FLOATS, 0.0), shift(b, state, loop.index, 64))
        store(b, ir.Constant(F32, -math.inf), shift(b, state, width, 4))
        store(b, ir.Constant(F32, 0.0), shift(b, shift(b, state, width, 4), 4))
        return context.get_dummy_value()

    return void(int64, int64), codegen


@intrinsic
def leave_state(typing_context, state, out, width):  # type: ignore[no-untyped-def]
    """The result of a state, its `width` numbers (any) divided by its sum; `out` has room for just these."""

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        state, out, width = args
        padded = b.mul(b.udiv(b.add(width, number(LANES - 1)), number(LANES)), number(LANES))
        total = load(b, shift(b, shift(b, state, padded, 4), 4), F32)
        with cgutils.for_range(b, width, intp=I64) as loop:
            value = load(b, shift(b, state, loop.index, 4), F32)
            store(b, b.fdiv(value, total), shift(b, out, loop.index, 4))
        return context.get_dummy_value()

    return void(*[int64] * 3), codegen


@intrinsic(prefer_literal=True)
def put_cached(typing_context, isa, element, values, out, step, pitch, count):  # type: ignore[no-untyped-def]
    """`count` floats into the cache: those of one sixteen `step` bytes apart, sixteens `pitch` bytes apart."""
    chosen, kind = INSTRUCTION_SETS[isa.literal_value], element.literal_value
    signature = void(isa, element, *[int64] * 5)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        values, out, step, pitch, count = args[2:]
        with cgutils.for_range(b, b.udiv(count, number(LANES)), intp=I64) as loop:
            found = load(b, shift(b, values, loop.index, 64), FLOATS)
            if kind == "float16":
                found = to_half(b, found, chosen.half)
            at = shift(b, out, b.mul(loop.index, pitch))
            for i in range(LANES):
                item = b.extract_element(found, number(i, I32))
                store(b, item, shift(b, at, b.mul(step, number(i))), 2 if kind == "float16" else 4)
        return context.get_dummy_value()

    return signature, codegen


def part_function(isa: str, element: str):  # type: ignore[no-untyped-def]
    """attend(blocks, queries, rows, counts, width, scores, out), all int64, to be compiled: one part.

    `blocks`: addresses of up to BLOCKS blocks, of keys and of values in turn; queries [rows, width]; counts [rows]: how
    many positions of the part each row sees; scores [rows, PART] scratch; out [rows, width + TAIL] gets the states.
    """

    def attend(blocks, queries, rows, counts, width, scores, out):  # type: ignore[no-untyped-def]
        most = 0
        for row in range(rows):
            most = max(most, integer_at(counts + 8 * row))
        used = (most + 15) // 16
        for block in range(used):
            keys = integer_at(blocks + 16 * block)
            block_scores(isa, element, keys, queries, rows, width, scores + 64 * block, 4 * PART)
        for row in range(rows):
            state = out + 4 * row * (width + TAIL)
            clear_state(state, width)
            soften(scores + 4 * PART * row, integer_at(counts + 8 * row), used, state + 4 * width)
        for block in range(used):
            seen = min(16, most - 16 * block)
            values = integer_at(blocks + 16 * block + 8)
            _weigh(isa, element, values, scores + 64 * block, rows, seen, width, out, 4 * (width + TAIL))

    return attend


ATTEND = void(*[int64] * 7)


def place_function(isa: str, element: str):  # type: ignore[no-untyped-def]
    """place(values, out, step, pitch, count), all int64, to be compiled: see `put_cached`."""

    def place(values, out, step, pitch, count):  # type: ignore[no-untyped-def]
        put_cached(isa, element, values, out, step, pitch, count)

    return place


PLACE = void(*[int64] * 5)
