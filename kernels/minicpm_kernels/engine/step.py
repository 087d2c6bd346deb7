"""One step of the decoder in one compiled function: all layers for the tokens of a call, on threads that meet.

Problem. In a decode step of a small model half of the time is not arithmetic: a thousand calls from Python, each of
which checks shapes, allocates and wakes threads.

Idea. The loop over layers is compiled. A layer is a handful of phases, in each of which every thread does its share,
and between which all meet at a barrier:

    norm, operand, q k v | angles, cache | attention | (join) | o, residual | norm, gate and up, SwiGLU | down, residual

Shares are ranges of *columns*, never of tokens, wherever neighbouring tokens lie in one cache line. For one or two
tokens each thread normalizes and rounds everything for itself, which is cheaper than another barrier.

No bit of a token's result depends on the number of threads or on its company: each number is computed by one thread in
one order of operations (see `products` and `attention` for why that order is the same in every tile and part).

Whatever depends on a format or an instruction set is called by address, so this file is compiled once for all of them.
"""

from __future__ import annotations

import numpy as np
from numba import float32, from_dtype, int64, njit, types

from minicpm_kernels.engine.attention import BLOCKS, PART, POSITIONS, TAIL, clear_state, join, leave_state
from minicpm_kernels.engine.compiling import call_address
from minicpm_kernels.engine.memory import copy_items, copy_words, float_at, integer_at, put_float, put_integer
from minicpm_kernels.engine.operands import add_scaled, scaled, sum_of_squares, swiglu
from minicpm_kernels.engine.state import STATE, UNIT
from minicpm_kernels.engine.threads import barrier, listen

compiled = njit(error_model="numpy", nogil=True)


@compiled
def _share(count, me, threads):  # type: ignore[no-untyped-def]
    """The range of `count` things that is this thread's."""
    return count * me // threads, count * (me + 1) // threads


@compiled
def _embed(s, me, threads):  # type: ignore[no-untyped-def]
    """x = embedding of the ids, times its scale."""
    first, last = _share(s.width_rows // 16, me, threads)
    first, last = 16 * first, min(16 * last, s.width)
    matrix = s.stream_at + integer_at(s.offsets_at + 8 * (4 * s.layers + 1))
    for t in range(s.tokens):
        x = s.x_at + 4 * s.stride * t
        call_address(s.read_at, (matrix, integer_at(s.ids_at + 8 * t), s.stride // s.head_group, first, last, x))
        for column in range(first, last):
            put_float(float_at(x + 4 * column) * s.embedding_scale, x + 4 * column)
    _capture(s, 0, first, last)


@compiled
def _capture(s, layer, first, last):  # type: ignore[no-untyped-def]
    """Keep columns first..last - 1 of the residual stream after `layer` layers, if it is asked for."""
    place = integer_at(s.captured_layers_at + 8 * layer)
    if place < 0:
        return
    for t in range(s.tokens):
        target = s.captured_at + 4 * s.stride * (place * s.tokens + t)
        copy_words(s.x_at + 4 * (s.stride * t + first), target + 4 * first, last - first)


@compiled
def _layer_operand(s, norm, buffer, first, last, me):  # type: ignore[no-untyped-def]
    """`_normed` for a product of the layers: all tokens."""
    one, all_tokens = float32(1.0), 0
    _normed(s, norm, one, buffer, s.write_at, s.tiles_at, s.tile_count, all_tokens, s.group, first, last, me)


@compiled
def _normed(s, norm, factor, buffer, write, tiles, tile_count, chosen, group, first, last, me):  # type: ignore[no-untyped-def]
    """Groups first..last - 1 of the operand `buffer`: RMSNorm number `norm` of x, times `factor`, token by token of the
    tiles; `chosen` lists the tokens, or is 0 for all in their order."""
    groups, scratch = s.stride // group, s.own_at + me * s.own_bytes
    operand, scales = s.operand_at + buffer * s.operand_bytes, s.scales_at + buffer * s.scales_bytes
    sums = s.sums_at + buffer * s.scales_bytes
    for tile in range(tile_count):
        start, n = integer_at(tiles + 16 * tile), integer_at(tiles + 16 * tile + 8)
        for t in range(start, start + n):
            source = s.x_at + 4 * s.stride * (integer_at(chosen + 8 * t) if chosen else t)
            mean = sum_of_squares(source, s.stride) / float32(s.width)  # what is behind C is zero
            rate = factor / np.sqrt(mean + s.eps)
            scaled(source, s.norms_at + 4 * s.stride * norm, rate, scratch, s.stride)
            call_address(write, (scratch, operand, scales, sums, start, n, t - start, groups, first, last))


@compiled
def _multiply(s, matrix, buffer, groups, y, y_rows, first, last):  # type: ignore[no-untyped-def]
    """y [T, y_rows], blocks first..last - 1, of a matrix of the layers and an operand."""
    operand, scales = s.operand_at + buffer * s.operand_bytes, s.scales_at + buffer * s.scales_bytes
    sums = s.sums_at + buffer * s.scales_bytes
    arguments = (
        matrix, operand, scales, sums, y, s.tiles_at, s.tile_count, groups, first, last, 4 * y_rows,
    )  # fmt: skip
    call_address(s.matmul_at, arguments)


@compiled
def _add_to_stream(s, first, last):  # type: ignore[no-untyped-def]
    """x = x + out * residual scale in blocks first..last - 1 of sixteen columns."""
    for t in range(s.tokens):
        x, out = s.x_at + 4 * s.stride * t, s.out_at + 4 * s.width_rows * t
        add_scaled(x + 64 * first, out + 64 * first, s.residual_scale, 16 * (last - first))


@compiled
def _place_heads(s, layer, me, threads):  # type: ignore[no-untyped-def]
    """Turn queries and keys by their angles; keys and values go into the cache."""
    group_heads, half, padded = s.heads // s.kv_heads, s.head_dim // 2, s.head_dim_padded
    scratch = s.own_at + me * s.own_bytes
    tile = POSITIONS * POSITIONS * s.element
    units = s.heads + 2 * s.kv_heads
    first, last = _share(units * s.tokens, me, threads)
    for unit in range(first, last):
        head, t = unit // s.tokens, unit % s.tokens
        source = s.qkv_at + 4 * (s.qkv_rows * t + s.head_dim * head)
        if head < s.heads + s.kv_heads:
            table = integer_at(s.long_at + 8 * t) * s.positions + integer_at(s.positions_at + 8 * t)
            cos = s.angles_at + 4 * s.head_dim * table
            sin = cos + 4 * half
            target, scale = scratch, float32(1.0)
            if head < s.heads:
                row = (head // group_heads * s.tokens + t) * group_heads + head % group_heads
                target, scale = s.queries_at + 4 * padded * row, s.query_scale
            for i in range(half):
                a, c = float_at(source + 4 * i), float_at(source + 4 * (i + half))
                turn_cos, turn_sin = float_at(cos + 4 * i), float_at(sin + 4 * i)
                put_float((a * turn_cos - c * turn_sin) * scale, target + 4 * i)
                put_float((c * turn_cos + a * turn_sin) * scale, target + 4 * (i + half))
        else:
            target = scratch
            copy_words(source, target, s.head_dim)
        for i in range(s.head_dim, padded):
            put_float(float32(0.0), target + 4 * i)
        if head >= s.heads:
            slot = integer_at(s.slots_at + 8 * t)
            kv_head = (head - s.heads) % s.kv_heads
            block = _block(s, layer, integer_at(s.rows_at + 8 * t), kv_head, slot // POSITIONS)
            place = slot % POSITIONS
            if head < s.heads + s.kv_heads:
                out, step = s.keys_at + block + s.element * place, POSITIONS * s.element
            else:
                out, step = s.values_at + block + POSITIONS * s.element * place, s.element
            call_address(s.place_at, (target, out, step, tile, padded))


@compiled
def _block(s, layer, row, kv_head, block):  # type: ignore[no-untyped-def]
    """Where a block of sixteen positions lies in the keys, and in the values."""
    index = ((layer * s.batch + row) * s.kv_heads + kv_head) * s.blocks + block
    return index * s.head_dim_padded * POSITIONS * s.element


@compiled
def _gather(s, layer, t, kv_head, past, me):  # type: ignore[no-untyped-def]
    """Lay the branch of node t of a tree behind the text, from the block on in which the text ends: what attention
    then reads is what it would read had the branch been the text. Returns the address of the blocks."""
    target = s.own_at + me * s.own_bytes + s.own_gather
    size = s.head_dim_padded * POSITIONS * s.element
    row, whole = integer_at(s.rows_at + 8 * t), past // POSITIONS * POSITIONS
    depth = integer_at(s.positions_at + 8 * t) - past
    node = t
    for place in range(past + depth - whole, -1, -1):
        slot = whole + place
        if slot >= past:  # an ancestor
            slot = integer_at(s.slots_at + 8 * node)
            node = integer_at(s.parents_at + 8 * node)
        source = _block(s, layer, row, kv_head, slot // POSITIONS)
        here = target + 2 * size * (place // POSITIONS)
        lane, column = slot % POSITIONS, place % POSITIONS
        step = POSITIONS * s.element
        copy_items(s.keys_at + source + s.element * lane, here + s.element * column, step, s.head_dim_padded, s.element)
        for tile in range(s.head_dim_padded // POSITIONS):
            at = tile * POSITIONS * step
            copy_words(s.values_at + source + at + step * lane, here + size + at + step * column, step // 4)
    return target


@compiled
def _attend(s, layer, unit, me):  # type: ignore[no-untyped-def]
    """One unit of attention: some tokens of one kv head, over some parts of their context."""
    fields = s.units_at + 8 * UNIT * unit
    first, count, kv_head = integer_at(fields), integer_at(fields + 8), integer_at(fields + 16)
    part_first, parts, past = integer_at(fields + 24), integer_at(fields + 32), integer_at(fields + 40)
    group_heads, padded = s.heads // s.kv_heads, s.head_dim_padded
    own, rows, state = s.own_at + me * s.own_bytes, count * group_heads, 4 * (padded + TAIL)
    counts, blocks, found = own + s.own_counts, own + s.own_blocks, own + s.own_part
    total = s.states_at + unit * group_heads * state if s.split else own + s.own_total
    queries = s.queries_at + 4 * padded * group_heads * (kv_head * s.tokens + first)
    row = integer_at(s.rows_at + 8 * first)
    size = padded * POSITIONS * s.element
    gathered = _gather(s, layer, first, kv_head, past, me) if past >= 0 else 0
    for i in range(rows):
        clear_state(total + i * state, padded)
    for part in range(part_first, part_first + parts):
        for i in range(BLOCKS):
            block = part * BLOCKS + i
            if past >= 0 and block >= past // POSITIONS:
                keys = gathered + 2 * size * (block - past // POSITIONS)
                values = keys + size
            else:
                keys = s.keys_at + _block(s, layer, row, kv_head, block)
                values = s.values_at + _block(s, layer, row, kv_head, block)
            put_integer(keys, blocks + 16 * i)
            put_integer(values, blocks + 16 * i + 8)
        for t in range(first, first + count):
            seen = integer_at(s.positions_at + 8 * t) + 1 - PART * part
            for i in range(group_heads):
                put_integer(max(0, min(seen, PART)), counts + 8 * ((t - first) * group_heads + i))
        call_address(s.attend_at, (blocks, queries, rows, counts, padded, own + s.own_scores, found))
        for i in range(rows):
            if integer_at(counts + 8 * i) > 0:
                join(total + i * state, found + i * state, padded)
    if not s.split:
        for i in range(rows):
            _leave(s, first + i // group_heads, kv_head * group_heads + i % group_heads, total + i * state)


@compiled
def _leave(s, t, head, state):  # type: ignore[no-untyped-def]
    """The attention of one head, as a part of the operand of `o`."""
    leave_state(state, s.attended_at + 4 * (s.attended_stride * t + s.head_dim * head), s.head_dim)


@compiled
def _join_parts(s, unit, me):  # type: ignore[no-untyped-def]
    """Join the parts of a token that were computed one by one; `unit` is the first of them. Later ones do nothing."""
    fields = s.units_at + 8 * UNIT * unit
    if integer_at(fields + 24) > 0:
        return
    group_heads, padded = s.heads // s.kv_heads, s.head_dim_padded
    state, total = 4 * (padded + TAIL), s.own_at + me * s.own_bytes + s.own_total
    t, kv_head = integer_at(fields), integer_at(fields + 16)
    parts = integer_at(s.positions_at + 8 * t) // PART + 1
    for i in range(group_heads):
        clear_state(total, padded)
        for part in range(parts):
            join(total, s.states_at + ((unit + part) * group_heads + i) * state, padded)
        _leave(s, t, kv_head * group_heads + i, total)


@compiled
def _attention(s, control, layer, me, threads):  # type: ignore[no-untyped-def]
    """Everything between q k v and the output product."""
    _place_heads(s, layer, me, threads)
    barrier(control, me, threads)
    for unit in range(me, s.unit_count, threads):
        _attend(s, layer, unit, me)
    if s.split:
        barrier(control, me, threads)
        for unit in range(me, s.unit_count, threads):
            _join_parts(s, unit, me)
    barrier(control, me, threads)


@compiled
def _feed_forward(s, control, offsets, layer, buffer, first, last, me, threads):  # type: ignore[no-untyped-def]
    """x = x + down(silu(gate) * up)."""
    _layer_operand(s, 2 * layer + 1, buffer, first, last, me)
    if buffer == threads:
        barrier(control, me, threads)
    groups, down_groups = s.stride // s.group, s.ffn // s.group
    down_first, down_last = _share(down_groups, me, threads)
    pair, pairs = down_first * s.group // 16, (down_last - down_first) * s.group // 16
    matrix = s.stream_at + integer_at(offsets + 16)
    _multiply(s, matrix, buffer, groups, s.gate_up_at, 2 * s.ffn, 2 * pair, 2 * (pair + pairs))
    scratch = s.own_at + me * s.own_bytes
    for tile in range(s.tile_count):
        start, n = integer_at(s.tiles_at + 16 * tile), integer_at(s.tiles_at + 16 * tile + 8)
        for t in range(start, start + n):
            gate_up = s.gate_up_at + 8 * s.ffn * t + 128 * pair
            swiglu(gate_up, scratch + 64 * pair, pairs)
            arguments = (
                scratch, s.hidden_at, s.hidden_scales_at, s.hidden_sums_at, start, n, t - start, down_groups,
                down_first, down_last,
            )  # fmt: skip
            call_address(s.write_at, arguments)
    barrier(control, me, threads)
    block, block_last = _share(s.width_rows // 16, me, threads)
    arguments = (
        s.stream_at + integer_at(offsets + 24), s.hidden_at, s.hidden_scales_at, s.hidden_sums_at, s.out_at, s.tiles_at,
        s.tile_count, down_groups, block, block_last, 4 * s.width_rows,
    )  # fmt: skip
    call_address(s.matmul_at, arguments)
    _add_to_stream(s, block, block_last)
    _capture(s, layer + 1, 16 * block, min(16 * block_last, s.width))
    barrier(control, me, threads)


@compiled
def _head(s, control, me, threads):  # type: ignore[no-untyped-def]
    """Logits of the wanted tokens."""
    private = s.wanted <= s.private
    groups = s.stride // s.head_group
    first, last = (0, groups) if private else _share(groups, me, threads)
    buffer = me if private else threads
    _normed(
        s, 2 * s.layers, s.head_scale, buffer, s.head_write_at, s.head_tiles_at, s.head_tile_count, s.wanted_at,
        s.head_group, first, last, me,
    )  # fmt: skip
    if not private:
        barrier(control, me, threads)
    first, last = _share(s.vocab_rows // 16, me, threads)
    operand, scales = s.operand_at + buffer * s.operand_bytes, s.scales_at + buffer * s.scales_bytes
    sums = s.sums_at + buffer * s.scales_bytes
    arguments = (
        s.stream_at + integer_at(s.offsets_at + 32 * s.layers), operand, scales, sums, s.logits_at, s.head_tiles_at,
        s.head_tile_count, groups, first, last, 4 * s.vocab_rows,
    )  # fmt: skip
    call_address(s.head_matmul_at, arguments)


@compiled
def _step(s, control, me, threads):  # type: ignore[no-untyped-def]
    """This thread's share of everything."""
    _embed(s, me, threads)
    barrier(control, me, threads)
    private = s.tokens <= s.private
    buffer = me if private else threads
    groups = s.stride // s.group
    first, last = (0, groups) if private else _share(groups, me, threads)
    attended_groups = s.attended_stride // s.group
    a_first, a_last = (0, attended_groups) if private else _share(attended_groups, me, threads)
    qkv, qkv_last = _share(s.qkv_rows // 16, me, threads)
    block, block_last = _share(s.width_rows // 16, me, threads)
    for layer in range(s.layers):
        offsets = s.offsets_at + 32 * layer
        _layer_operand(s, 2 * layer, buffer, first, last, me)
        if not private:
            barrier(control, me, threads)
        matrix = s.stream_at + integer_at(offsets)
        _multiply(s, matrix, buffer, groups, s.qkv_at, s.qkv_rows, qkv, qkv_last)
        barrier(control, me, threads)
        _attention(s, control, layer, me, threads)
        _attended_operand(s, buffer, a_first, a_last)
        if not private:
            barrier(control, me, threads)
        matrix = s.stream_at + integer_at(offsets + 8)
        _multiply(s, matrix, buffer, attended_groups, s.out_at, s.width_rows, block, block_last)
        _add_to_stream(s, block, block_last)
        barrier(control, me, threads)
        _feed_forward(s, control, offsets, layer, buffer, first, last, me, threads)
    if s.wanted:
        _head(s, control, me, threads)


@compiled
def _attended_operand(s, buffer, first, last):  # type: ignore[no-untyped-def]
    """Groups first..last - 1 of what attention found, as an operand."""
    operand, scales = s.operand_at + buffer * s.operand_bytes, s.scales_at + buffer * s.scales_bytes
    sums = s.sums_at + buffer * s.scales_bytes
    for tile in range(s.tile_count):
        start, n = integer_at(s.tiles_at + 16 * tile), integer_at(s.tiles_at + 16 * tile + 8)
        for t in range(start, start + n):
            source = s.attended_at + 4 * s.attended_stride * t
            groups = s.attended_stride // s.group
            call_address(s.write_at, (source, operand, scales, sums, start, n, t - start, groups, first, last))


def serve(states, control, threads, me):  # type: ignore[no-untyped-def]
    """To be compiled: thread 0 takes part in one step and returns; the others wait for steps (see `threads`)."""
    while True:
        if me > 0:
            heard = listen(control, me)
            if heard <= 0:
                return heard
        _step(states[0], control, me, threads)
        barrier(control, me, threads)
        if me == 0:
            return 1


SERVE = int64(types.Array(from_dtype(STATE), 1, "C"), types.Array(int64, 1, "C"), int64, int64)
