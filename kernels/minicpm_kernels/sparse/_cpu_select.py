"""Stage 1 of block-sparse attention on a CPU: the loops around `_cpu_vectors`.

A tile of neighbouring tokens walks the compressed keys twice: the coarse ones for the log-sum-exp of each head, the
fine ones for the scores that the heads share. Then each token takes its best blocks; the threshold is found bit by bit,
without a sort.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import float32, int16, int32, int64, prange, void
from numba.types import UniTuple

from minicpm_kernels.sparse._cpu_attend import load_query
from minicpm_kernels.sparse._cpu_vectors import (
    FLOAT32,
    LANES,
    ROWS,
    SOURCES,
    dot_products,
    part,
    softmax_step,
    sum_heads,
    widen,
)

CHUNK = 64  # compressed keys scored at a time


@part
def _pool(k, batch, group, window, size, stride, out):  # type: ignore[no-untyped-def]
    """The mean of one window of keys: one key after another, so that the bits are those of the reference."""
    total = np.zeros(k.shape[3], np.float32)
    for token in range(window * stride, window * stride + size):
        for d in range(k.shape[3]):
            total[d] += k[batch, group, token, d]
    for d in range(k.shape[3]):
        out[batch, group, window, d] = total[d] / float32(size)


@part
def _ended(position, size, stride, count):  # type: ignore[no-untyped-def]
    """How many of `count` windows have ended at `position`."""
    return min(count, (position + 1 - size) // stride + 1) if position + 1 >= size else 0


@part
def _free_blocks(position, block, initial, reach, slots):  # type: ignore[no-untyped-def]
    """(end of the blocks before the window, how many of those after the first are free, how many of them are
    wanted) for a token at `position`."""
    own = position // block
    before = max(0, own - reach)
    free = max(0, before - initial)
    return before, free, min(free, slots - (own + 1 - free))


@part
def _score_tile(  # type: ignore[no-untyped-def]
    q, fine, norm, storage, batch, group, first, tokens, position, settings, scale, queries, state, work, scores, wide
):
    """Shared scores [tokens, windows] of the compressed keys that start before each token's window."""
    block, initial, reach, slots, size, stride, factor = settings
    heads, width = q.shape[1] // fine.shape[1], q.shape[3]
    passes = queries.shape[1]
    fine_at = fine.ctypes.data + batch * fine.strides[0] + group * fine.strides[1]
    norm_at = norm.ctypes.data + batch * norm.strides[0] + group * norm.strides[1]
    for t in range(tokens):
        load_query(q, batch, group, first + t, heads, queries[t], state[t])
    last = position + tokens - 1
    for start in range(0, _ended(last, factor * size, factor * stride, norm.shape[2]), CHUNK):
        at, step = norm_at + start * norm.strides[2], norm.strides[2]
        following = at + CHUNK * step
        if storage[1] != FLOAT32:
            widen(at, step, min(CHUNK, norm.shape[2] - start), width, storage[1], wide.ctypes.data)
            at, step = wide.ctypes.data, 4 * width
        for t in range(tokens):
            free, wanted = _free_blocks(position + t, block, initial, reach, slots)[1:]
            seen = min(CHUNK, _ended(position + t, factor * size, factor * stride, norm.shape[2]) - start)
            if wanted < free and wanted > 0 and seen > 0:
                rows = min(-(-seen // ROWS) * ROWS, norm.shape[2] - start)
                for place in range(passes):
                    query = queries[t, place].ctypes.data
                    dot_products(query, at, step, rows, width, work.ctypes.data, following)
                    softmax_step(work.ctypes.data, seen, scale, state[t, place].ctypes.data)
    for t in range(tokens):
        for place in range(passes):
            for lane in range(LANES):
                total = state[t, place, 1, lane]
                known = total > 0 and place * LANES + lane < heads
                # an empty lane, or nothing to compare with: every score 0
                state[t, place, 0, lane] = state[t, place, 0, lane] + np.log2(total) if known else np.inf
    per_block = block // stride
    scores[:tokens] = 0
    for start in range(0, _free_blocks(last, block, initial, reach, slots)[0] * per_block, CHUNK):
        at, step = fine_at + start * fine.strides[2], fine.strides[2]
        following = at + CHUNK * step
        if storage[0] != FLOAT32:
            widen(at, step, min(CHUNK, fine.shape[2] - start), width, storage[0], wide.ctypes.data)
            at, step = wide.ctypes.data, 4 * width
        for t in range(tokens):
            before, free, wanted = _free_blocks(position + t, block, initial, reach, slots)
            seen = min(CHUNK, before * per_block - start, _ended(position + t, size, stride, fine.shape[2]) - start)
            if wanted < free and wanted > 0 and seen > 0:
                rows = min(-(-seen // ROWS) * ROWS, fine.shape[2] - start)
                for place in range(passes):
                    query = queries[t, place].ctypes.data
                    dot_products(query, at, step, rows, width, work.ctypes.data, following)
                    lse, sums = state[t, place].ctypes.data, scores[t, start:].ctypes.data
                    sum_heads(work.ctypes.data, seen, scale, lse, sums)


@part
def _pick(position, settings, scores, pooled, out):  # type: ignore[no-untyped-def]
    """The ascending list of one token into out [slots], from its scores of windows."""
    block, initial, reach, slots, size, stride, factor = settings
    per_block, over = block // stride, size // stride - 1
    own = position // block
    before, free, wanted = _free_blocks(position, block, initial, reach, slots)
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


def _pool_from(sources: int) -> Callable[..., None]:
    def pool(k, out, size, stride, workers):  # type: ignore[no-untyped-def]
        """Means of all whole windows of k [B, G, S, D] into out [B, G, L, D]."""
        sources  # noqa: B018  # a free variable: part of the key under which numba keeps the machine code
        groups, count = out.shape[1], out.shape[2]
        tasks = out.shape[0] * groups * count
        for thread in prange(workers):
            worker = int64(thread)  # prange counts unsigned, and the two kinds together would be floats
            for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
                batch, group = task // (groups * count), task // count % groups
                _pool(k, batch, group, task % count, size, stride, out)

    return pool


pool = _pool_from(SOURCES)


def _select_from(sources: int) -> Callable[..., None]:
    def select(  # type: ignore[no-untyped-def]
        q,
        fine,
        norm,
        starts,
        stops,
        lists,
        queries,
        state,
        work,
        scores,
        pooled,
        settings,
        workers,
        scale,
        storage,
        wide,
    ):
        """Stage 1 into lists [B, G, T, K]. settings: block, initial blocks, reach of the window, K, size and stride of
        the fine windows, and how much longer those of `norm` are. `storage` says what fine and norm are, which come as
        int16 [B, G, L, .]. Scratch, an entry a worker: as in `attend`, with work [., CHUNK, 16], scores [., tile,
        windows], pooled [., N] and wide [., CHUNK, D]."""
        sources  # noqa: B018  # a free variable: part of the key under which numba keeps the machine code
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
                free, wanted = _free_blocks(position + real - 1, settings[0], settings[1], settings[2], settings[3])[1:]
                if real > 0 and 0 < wanted < free:  # free grows along the tile
                    _score_tile(
                        q, fine, norm, storage, batch, group, first, real, position, settings, scale,
                        queries[worker], state[worker], work[worker], scores[worker], wide[worker],
                    )  # fmt: skip
                for t in range(real):
                    row = lists[batch, group, first + t]
                    _pick(position + t, settings, scores[worker, t], pooled[worker], row)

    return select


select = _select_from(SOURCES)

_ANY, _WORDS, _LONG = float32[:, :, :, :], int16[:, :, :, :], float32[:, :, :, :, ::1]
POOL_SIGNATURE = void(_ANY, float32[:, :, :, ::1], int64, int64, int64)
SELECT_SIGNATURE = void(
    _ANY, _WORDS, _WORDS, int64[::1], int64[::1], int32[:, :, :, ::1], _LONG, _LONG, float32[:, :, ::1],
    float32[:, :, ::1], float32[:, ::1], UniTuple(int64, 7), int64, float32, UniTuple(int64, 2), float32[:, :, ::1],
)  # fmt: skip
