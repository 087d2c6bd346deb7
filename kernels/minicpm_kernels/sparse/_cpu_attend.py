"""Stage 2 of block-sparse attention on a CPU: the loops around `_cpu_vectors`.

A tile of neighbouring tokens walks the union of its lists; each block is multiplied with the tokens that list it, in an
online softmax a token. When there are fewer tiles than threads, each tile's union is cut into shares, and the softmaxes
of the shares are merged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import float32, int16, int32, int64, prange, void
from numba.types import UniTuple

from minicpm_kernels.sparse._cpu_vectors import (
    FLOAT32,
    LANES,
    ROWS,
    SOURCES,
    add_values,
    dot_products,
    part,
    softmax_step,
    widen,
)


@part
def load_query(q, batch, group, token, heads, queries, state):  # type: ignore[no-untyped-def]
    """One token's heads into lanes, empty lanes 0, and its softmax at the start; queries [passes, D, 16]."""
    for place in range(queries.shape[0]):
        for lane in range(LANES):
            head = place * LANES + lane
            for d in range(queries.shape[1]):
                queries[place, d, lane] = q[batch, group * heads + head, token, d] if head < heads else float32(0)
    state[:, 0] = -np.inf
    state[:, 1] = 0
    state[:, 2] = 0


@part
def _next_listed(member, n):  # type: ignore[no-untyped-def]
    """The first listed block from n on, or their number."""
    while n < member.shape[0] and member[n] == 0:
        n += 1
    return n


@part
def _attend_tile(  # type: ignore[no-untyped-def]
    q, k, v, storage, blocks, batch, group, first, tokens, position, share, shares, block, scale,
    member, queries, state, out, work, wide,
):  # fmt: skip
    """The softmax state and the unscaled result of `tokens` tokens from `first` on, the first of which stands at
    `position`, over one of `shares` shares of the blocks that they list.

    member int64 [N]; queries and out [tokens, passes, D, 16], state [tokens, passes, 3, 16], work [block, 16], wide
    [2, block, D].
    """
    heads, keys, width = q.shape[1] // k.shape[1], k.shape[2], q.shape[3]
    member[:] = 0
    listed = 0
    for t in range(tokens):
        load_query(q, batch, group, first + t, heads, queries[t], state[t])
        out[t] = 0
        for slot in range(blocks.shape[3]):
            n = blocks[batch, group, first + t, slot]
            if 0 <= n * block <= position + t:
                listed += member[n] == 0
                member[n] |= 1 << t
    rank = 0
    for n in range(member.shape[0]):  # of the union, keep this share
        if member[n] != 0:
            if not listed * share // shares <= rank < listed * (share + 1) // shares:
                member[n] = 0
            rank += 1
    keys_at = k.ctypes.data + batch * k.strides[0] + group * k.strides[1]
    values_at = v.ctypes.data + batch * v.strides[0] + group * v.strides[1]
    n = _next_listed(member, 0)
    while n < member.shape[0]:
        after = _next_listed(member, n + 1)
        key, key_step = keys_at + n * block * k.strides[2], k.strides[2]
        value, value_step = values_at + n * block * v.strides[2], v.strides[2]
        # what the two products ask for ahead of time: this block's values, then the next block's keys
        next_value, next_key = value, keys_at + after * block * k.strides[2]
        if storage[0] != FLOAT32:
            widen(key, key_step, min(block, keys - n * block), width, storage[0], wide[0].ctypes.data)
            key, key_step = wide[0].ctypes.data, 4 * width
        if storage[1] != FLOAT32:
            widen(value, value_step, min(block, keys - n * block), width, storage[1], wide[1].ctypes.data)
            value, value_step = wide[1].ctypes.data, 4 * width
            next_value = values_at + after * block * v.strides[2]  # this block's have just been read
        for t in range(tokens):
            if member[n] >> t & 1:
                seen = min(block, position + t - n * block + 1)
                rows = min(-(-seen // ROWS) * ROWS, block, keys - n * block)  # whole tiles, where there are keys
                for place in range(queries.shape[1]):
                    softmax, total = state[t, place].ctypes.data, out[t, place].ctypes.data
                    query, weights = queries[t, place].ctypes.data, work.ctypes.data
                    dot_products(query, key, key_step, rows, width, weights, next_value)
                    softmax_step(weights, seen, scale, softmax)
                    add_values(weights, value, value_step, seen, width, softmax, total, next_key)
        n = after


@part
def _store_result(result, batch, group, token, heads, state, out):  # type: ignore[no-untyped-def]
    """One token's result out of the lanes, divided by the sum of weights; 0 where nothing was visible.

    A sum that is NaN divides too: a broken input must come out as NaN, not as a plausible zero.
    """
    for head in range(heads):
        place, lane = head // LANES, head % LANES
        total = state[place, 1, lane]
        for d in range(out.shape[1]):
            result[batch, group * heads + head, token, d] = float32(0) if total == 0 else out[place, d, lane] / total


@part
def _merge(state, out, first, shares):  # type: ignore[no-untyped-def]
    """The shares first + 1, first + 2, ... of one tile into share `first`; state [., tokens, passes, 3, 16]."""
    for t in range(state.shape[1]):
        for place in range(state.shape[2]):
            for lane in range(LANES):
                maximum = float32(-np.inf)
                for share in range(first, first + shares):
                    maximum = max(maximum, state[share, t, place, 0, lane])
                total = float32(0)
                for share in range(first, first + shares):
                    before = state[share, t, place, 0, lane]
                    factor = np.exp2(before - maximum) if before > -np.inf else float32(0)
                    total += factor * state[share, t, place, 1, lane]
                    for d in range(out.shape[3]):
                        mine = factor * out[share, t, place, d, lane]
                        out[first, t, place, d, lane] = mine + (out[first, t, place, d, lane] if share > first else 0)
                state[first, t, place, 1, lane] = total


def _attend_from(sources: int) -> Callable[..., None]:
    def attend(  # type: ignore[no-untyped-def]
        q, k, v, blocks, starts, stops, result, member, queries, state, out, work, workers, shares, block, scale,
        storage, wide,
    ):  # fmt: skip
        """Stage 2 into result [B, H, T, D]; `scale` holds log2 e, `storage` says what k and v are, which come as int16
        [B, G, S, .]. Scratch: one entry a worker, or a share of a tile where `shares` > 1, in member [., N], queries
        and out [., tile, passes, D, 16], state [., tile, passes, 3, 16], work [., block, 16] and wide [., 2, block, D];
        `tile` tokens walk together."""
        sources  # noqa: B018  # a free variable: part of the key under which numba keeps the machine code
        batches, groups, tokens, tile = q.shape[0], k.shape[1], q.shape[2], queries.shape[1]
        tiles, heads = -(-tokens // tile), q.shape[1] // k.shape[1]
        tasks = batches * groups * tiles
        for thread in prange(workers):
            worker = int64(thread)  # prange counts unsigned, and the two kinds together would be floats
            for job in range(worker, tasks * shares, workers):
                task, share = job // shares, job % shares
                batch, group, first = task // (groups * tiles), task // tiles % groups, task % tiles * tile
                place = worker if shares == 1 else job
                count = min(tile, tokens - first)
                real = min(count, stops[batch] - starts[batch] - first)  # the others are padding
                for t in range(max(real, 0), count):
                    result[batch, group * heads : (group + 1) * heads, first + t] = 0
                _attend_tile(
                    q, k, v, storage, blocks, batch, group, first, real, starts[batch] + first, share, shares, block,
                    scale, member[place], queries[place], state[place], out[place], work[place], wide[place],
                )  # fmt: skip
                if shares == 1:
                    for t in range(real):
                        _store_result(result, batch, group, first + t, heads, state[place, t], out[place, t])
        if shares > 1:
            for i in prange(tasks):
                task = int64(i)
                batch, group, first = task // (groups * tiles), task // tiles % groups, task % tiles * tile
                _merge(state, out, task * shares, shares)
                for t in range(min(tile, tokens - first, stops[batch] - starts[batch] - first)):
                    _store_result(
                        result, batch, group, first + t, heads, state[task * shares, t], out[task * shares, t]
                    )

    return attend


attend = _attend_from(SOURCES)

_ANY, _WORDS, _LONG = float32[:, :, :, :], int16[:, :, :, :], float32[:, :, :, :, ::1]
ATTEND_SIGNATURE = void(
    _ANY, _WORDS, _WORDS, int32[:, :, :, :], int64[::1], int64[::1], _ANY, int64[:, ::1], _LONG, _LONG, _LONG,
    float32[:, :, ::1], int64, int64, int64, float32, UniTuple(int64, 2), float32[:, :, :, ::1],
)  # fmt: skip
