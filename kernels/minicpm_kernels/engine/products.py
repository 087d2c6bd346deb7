"""The inner product of the engine: sixteen rows of packed weights times a few tokens, and a matrix of such blocks.

Problem. At one token the product is a stream of memory; at sixteen it is arithmetic. One loop must serve both, in eight
formats, and *a token's result may not depend on how many others were multiplied with it*: only then is verifying drafts
the same as decoding them.

Idea. For every row and token there is one chain of additions, group after group, whatever the tile:

    float formats    the group's 32 columns one after another from zero, then y = y + group
    integers         dot exact, then y = y + dot * (weight scale * activation scale) in float32 without fusing
                     (int4_1: y = y + minimum * (activation scale * sum of activations) as well)

Tiles of n tokens by one block of rows (float formats at one and two tokens: several blocks, since a single chain of
multiply-adds would wait for itself) share what is loaded and unpacked; their n * 16 chains fill the registers.

Activations come as *operands*: tile by tile, [4-byte unit][token of the tile], a unit being four int8 columns or one
float32 column; then scales and sums [group][token of the tile]. From eight tokens on the next block of rows is asked
for while this one is multiplied: a second tile runs from the cache, and the hardware's own prefetching stops.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from minicpm_kernels.engine.formats import FORMATS, ROWS, Format
from minicpm_kernels.engine.instruction_sets import INSTRUCTION_SETS, Portable, subtract_offset
from minicpm_kernels.engine.llvm import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    fill,
    from_half,
    load,
    multiply_add,
    number,
    prefetch,
    shift,
    splat,
    store,
    vector,
)  # fmt: skip
from minicpm_kernels.engine.memory import integer_at

Value = Any  # an ir.Value; llvmlite has no type hints
CHUNK = 64  # bytes: sixteen lanes
UNROLL = 32  # columns of integers in a loop's body
PREFETCH_FROM = 8  # tokens


def tile_size(isa: str, form: str) -> int:
    """The most tokens that are multiplied together."""
    return INSTRUCTION_SETS[isa].float_tile if FORMATS[form].is_float else INSTRUCTION_SETS[isa].int_tile


def blocks_at_once(form: Format, tokens: int) -> int:
    """How many blocks of rows share a tile of so few tokens that their chains alone would wait."""
    return {1: 4, 2: 2}.get(tokens, 1) if form.is_float else 1


@intrinsic(prefer_literal=True)
def _row_block(typing_context, isa, form, blocks, tokens, w, operand, scales, sums, y, groups, stride):  # type: ignore[no-untyped-def]
    """y [tokens, stride bytes] gets `blocks` blocks of sixteen rows; all but the first two are int64."""
    chosen, kind = INSTRUCTION_SETS[isa.literal_value], FORMATS[form.literal_value]
    signature = void(isa, form, *[int64] * 9)

    def codegen(context, b, sig, args):  # type: ignore[no-untyped-def]
        count = chosen.float_tile if kind.is_float else chosen.int_tile
        cases = {(blocks_at_once(kind, n), n) for n in range(1, count + 1)} | {(1, n) for n in range(1, count + 1)}
        done = b.append_basic_block("done")
        switch = b.switch(b.add(b.mul(args[2], number(64)), args[3]), done)
        for rows, n in sorted(cases):
            block = b.append_basic_block(f"blocks{rows}_tokens{n}")
            switch.add_case(ir.Constant(I64, rows * 64 + n), block)
            b.position_at_end(block)
            (_emit_floats if kind.is_float else _emit_integers)(b, chosen, kind, rows, n, *args[4:])
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


def _emit_floats(
    b: Value, isa: Portable, form: Format, rows: int, n: int, w: Value, operand: Value, scales: Value, sums: Value,
    y: Value, groups: Value, stride: Value,
) -> None:  # fmt: skip
    del scales, sums
    step = b.mul(groups, number(form.group_bytes))  # bytes from block to block
    chains = [(row, token) for row in range(rows) for token in range(n)]
    totals = {chain: cgutils.alloca_once(b, FLOATS) for chain in chains}
    for total in totals.values():
        b.store(fill(FLOATS, 0.0), total)
    per_lane = 2 if form.bits == 16 else 1
    with cgutils.for_range(b, groups, intp=I64) as loop:
        at = [shift(b, shift(b, w, loop.index, form.group_bytes), b.mul(step, number(row))) for row in range(rows)]
        x = shift(b, operand, loop.index, 4 * n * form.group)
        group = {chain: fill(FLOATS, 0.0) for chain in chains}
        for column in range(0, form.group, per_lane):
            words = [load(b, shift(b, a, column * ROWS * form.bits // 8), INTS) for a in at]
            for place in range(per_lane):
                units = [splat(b, load(b, shift(b, x, 4 * ((column + place) * n + t)), F32)) for t in range(n)]
                for row, token in chains:
                    if per_lane == 1:
                        weight = words[row]
                    elif place == 0:
                        weight = b.shl(words[row], fill(INTS, 16))
                    else:
                        weight = b.and_(words[row], fill(INTS, -65536))
                    chain = group[row, token]
                    group[row, token] = multiply_add(b, b.bitcast(weight, FLOATS), units[token], chain, isa.fused)
        if n >= min(PREFETCH_FROM, isa.float_tile):
            _prefetch_block(b, shift(b, at[0], step), form.group_bytes)
        for chain, total in totals.items():
            b.store(b.fadd(b.load(total), group[chain]), total)
    for (row, token), total in totals.items():
        store(b, b.load(total), shift(b, shift(b, y, b.mul(stride, number(token))), 4 * ROWS * row))


def _emit_integers(
    b: Value, isa: Portable, form: Format, rows: int, n: int, w: Value, operand: Value, scales: Value, sums: Value,
    y: Value, groups: Value, stride: Value,
) -> None:  # fmt: skip
    assert rows == 1
    lanes = LANES // isa.parts
    floats = vector(F32, lanes)
    pieces = [(part, token) for part in range(isa.parts) for token in range(n)]
    totals = {piece: cgutils.alloca_once(b, floats) for piece in pieces}
    for total in totals.values():
        b.store(fill(floats, 0.0), total)
    codes_bytes = form.group * ROWS * form.bits // 8
    with cgutils.for_range(b, groups, intp=I64) as loop:
        at = shift(b, w, loop.index, form.group_bytes)
        q = shift(b, operand, loop.index, form.group * n)
        if n >= min(PREFETCH_FROM, isa.int_tile):
            _prefetch_block(b, shift(b, at, b.mul(groups, number(form.group_bytes))), form.group_bytes)
        scale_at = shift(b, scales, loop.index, 4 * n)
        sum_at = shift(b, sums, loop.index, 4 * n)
        for part in range(isa.parts):
            dots = _group_dots(b, isa, form, n, at, q, part)
            half = load(b, shift(b, at, codes_bytes + 2 * lanes * part), vector(I16, lanes), 2)
            scale = from_half(b, half, isa.half)
            if form.minimum:
                half = load(b, shift(b, at, codes_bytes + 2 * ROWS + 2 * lanes * part), vector(I16, lanes), 2)
                minimum = from_half(b, half, isa.half)
            for token in range(n):
                dot = dots[token]
                if isa.offset(form):
                    dot = subtract_offset(b, dot, load(b, shift(b, sum_at, 4 * token), I32), isa.offset(form))
                x_scale = splat(b, load(b, shift(b, scale_at, 4 * token), F32), lanes)
                total = b.load(totals[part, token])
                total = b.fadd(total, b.fmul(b.sitofp(dot, floats), b.fmul(x_scale, scale)))
                if form.minimum:
                    x_sum = splat(b, load(b, shift(b, sum_at, 4 * token), F32), lanes)
                    total = b.fadd(total, b.fmul(minimum, x_sum))
                b.store(total, totals[part, token])
    for (part, token), total in totals.items():
        store(b, b.load(total), shift(b, shift(b, y, b.mul(stride, number(token))), 4 * lanes * part))


def _group_dots(b: Value, isa: Portable, form: Format, n: int, at: Value, q: Value, part: int) -> list[Value]:
    """The exact sums, int32 lanes, of one group of one part of the rows for each of n tokens."""
    lanes, per = LANES // isa.parts, 8 // form.bits
    words, chunk_columns = vector(I32, lanes), 4 * per
    at_once = isa.columns_at_once(form)
    mask = int.from_bytes(bytes([(1 << form.bits) - 1]) * 4, "little", signed=True)

    def body(first: Value | int, columns: int, sums: list[Value]) -> list[Value]:
        """Add `columns` columns from column `first` on."""
        # a lane of a chunk has 4 bytes for 4 * per columns; an operand has a byte for each column and token
        base = shift(b, at, b.mul(first, number(ROWS // per)) if not isinstance(first, int) else first * ROWS // per)
        x = shift(b, q, first, n)
        for chunk in range(columns // chunk_columns):
            word = load(b, shift(b, base, CHUNK * chunk + CHUNK // isa.parts * part), words)
            for place in range(per):
                digits = word
                if per > 1:
                    shifted = b.lshr(word, fill(words, form.bits * place)) if place else word
                    digits = b.and_(shifted, fill(words, mask))
                digits = isa.weights(b, digits, form)
                for token in range(n):
                    quad = load(b, shift(b, x, 4 * ((chunk * per + place) * n + token)), I32)
                    sums[token] = isa.dot(b, sums[token], digits, quad, form)
        return sums

    if form.group == UNROLL:
        sums = body(0, form.group, [isa.start(form)] * n)
        return [isa.finish(b, s, form) for s in sums]
    # longer groups: a loop over 32 columns, which either carries its accumulators along or finishes them each time
    carried = at_once == form.group
    kinds = isa.start(form).type if carried else words
    slots = [cgutils.alloca_once(b, kinds) for _ in range(n)]
    for slot in slots:
        b.store(isa.start(form) if carried else fill(words, 0), slot)
    with cgutils.for_range(b, number(form.group // UNROLL), intp=I64) as loop:
        first = b.mul(loop.index, number(UNROLL))
        sums = body(first, UNROLL, [b.load(s) if carried else isa.start(form) for s in slots])
        for slot, s in zip(slots, sums, strict=True):
            b.store(s if carried else b.add(b.load(slot), isa.finish(b, s, form)), slot)
    return [isa.finish(b, b.load(s), form) if carried else b.load(s) for s in slots]


def _prefetch_block(b: Value, at: Value, size: int) -> None:
    for line in range(0, size, 64):
        prefetch(b, shift(b, at, line))


def matrix_product(isa: str, form: str):  # type: ignore[no-untyped-def]
    """The function matmul(w, operand, scales, sums, y, tiles, count, groups, first, last, stride) to be compiled.

    All arguments are int64, the first six addresses. It multiplies the blocks of rows first..last - 1 of the stream w
    by `count` tiles, whose (first token, tokens) stand at `tiles`; y [tokens, stride bytes] float32.
    """
    kind = FORMATS[form]
    group, group_bytes, is_float = kind.group, kind.group_bytes, kind.is_float

    def matmul(w, operand, scales, sums, y, tiles, count, groups, first, last, stride):  # type: ignore[no-untyped-def]
        unit = 4 * group if is_float else group  # bytes of one token's group in an operand
        block = first
        while block < last:
            at = w + block * groups * group_bytes
            together = 1
            for i in range(count):
                start, n = integer_at(tiles + 16 * i), integer_at(tiles + 16 * i + 8)
                if is_float and count == 1:
                    together = 4 if n == 1 else 2 if n == 2 else 1
                    if block + together > last:
                        together = 1
                _row_block(
                    isa, form, together, n, at, operand + start * groups * unit, scales + start * groups * 4,
                    sums + start * groups * 4, y + start * stride + block * 64, groups, stride,
                )  # fmt: skip
            block += together

    return matmul


MATMUL = void(*[int64] * 11)
