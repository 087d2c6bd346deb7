"""Stage 2 of block-sparse attention for long prompts: a shared window, then the union of a few tokens' lists.

The problem: with one token a program (`one_token`) each block is read from the second-level cache once per token
and kv head, and that traffic is the limit. The idea is to read a block once for several tokens:
1. The forced blocks, the first ones and the local window (34 of the 96 published), are the same for all tokens of a
   query block: `_window` is ordinary dense attention on tiles of 128 rows.
2. Of the chosen blocks neighbouring tokens share many. `_union` lets a tile of 4 tokens (16 heads: 64 rows) walk the
   union of their lists; one additive bias a row, 0 or -inf, says which token listed the block. Without any overlap
   this moves the same bytes as four tokens apart, with overlap fewer.
3. No merge kernel: `_union` starts its online softmax from the window's result, m = lse, total = 1, acc = out.

The lists of a tile become one bit a token and block (`_mark`, an atomic or: its result does not depend on the order),
and a prefix sum packs the blocks with any bit set into words, block | bits << 20 (`_pack`). The same bits, read along
a column, list the tokens of a block, which is what the backward pass needs.

Any lists are right, not only those that `select_blocks` makes: `_pack` checks for every token whether its whole forced
band is listed. If not, `_window` leaves the token out and `_union` walks all of its blocks. Blocks that begin before
the first token of a tile and end before it need no causal mask; the few others are walked in a second, masked, loop.

Pitfall: the word of step j + 1 is loaded in step j and carried. Loaded in the step that uses it, it pins keys and
values at two buffers whatever num_stages says (seen in the shared memory of the binary).

Source: arXiv 2509.24663, section 3.1, for what is computed; the tiling is this project's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minicpm_kernels.registry import NVIDIA, CompileConfig
from minicpm_kernels.sparse.arguments import key_tile, strides
from minicpm_kernels.sparse.one_token import softmax_step
from minicpm_kernels.sparse.windows import LOG2_E, Settings, local_reach

CHUNK = 1024  # bits a step of _pack


@triton.jit
def _mark(blocks_ptr, bits_ptr, tokens, slots, words, T: tl.constexpr, SLOTS: tl.constexpr):
    """bits[tile, block // PER] |= 1 << (block % PER * T + token), PER = 32 / T blocks a word."""
    tile = tl.program_id(0)
    plane = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    t = tl.arange(0, T)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    token = tile * T + t
    block = tl.load(
        blocks_ptr + (plane * tokens + token) * slots + slot, mask=(token < tokens) & (slot < slots), other=-1
    )
    PER: tl.constexpr = 32 // T
    at = (plane * tl.num_programs(0) + tile) * words + tl.maximum(block, 0) // PER
    bit = tl.full((T, SLOTS), 1, tl.int32) << (tl.maximum(block, 0) % PER * T + t)
    tl.atomic_or(bits_ptr + at, bit, mask=block >= 0, sem="relaxed")


@triton.jit
def _pack(
    bits_ptr, first_ptr, stop_ptr, list_ptr, count_ptr, past_ptr, whole_ptr,
    tokens, blocks, words, room, init_blocks, local_reach,
    T: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """list [tile, room]: block | bits << 20, ascending, `count` of them, of which the first `past` end before the
    tile's first token. With WINDOW, whole [token] is 1 where the forced band is listed, and that band is left out."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    batch = tl.program_id(2)
    plane = (batch * tl.num_programs(1) + group).to(tl.int64)
    row = plane * tl.num_programs(0) + tile
    t = tl.arange(0, T)
    c = tl.arange(0, C)
    token = tile * T + t
    first = tl.load(first_ptr + batch)
    real = (token < tokens) & (first + token < tl.load(stop_ptr + batch))
    own = tl.where(real, (first + token) // BLOCK, -1)[:, None]
    PER: tl.constexpr = 32 // T

    whole = tl.zeros((T,), tl.int32)
    if WINDOW:
        missing = tl.zeros((T,), tl.int32)
        for j in range(0, tl.cdiv(blocks, C)):
            block = j * C + c
            word = tl.load(bits_ptr + row * words + block // PER, mask=block < blocks, other=0)
            listed = (word[None, :] >> (block % PER * T)[None, :] + t[:, None]) & 1
            near = (block < init_blocks)[None, :] | (block[None, :] >= own - local_reach)
            missing += tl.sum((near & (block[None, :] <= own) & (listed == 0)).to(tl.int32), 1)
        whole = ((missing == 0) & real).to(tl.int32)
        tl.store(whole_ptr + plane * tokens + token, whole, mask=token < tokens)

    earliest = tl.min(tl.where(real, first + token, 2147483647), 0)
    count = 0
    past = 0
    for j in range(0, tl.cdiv(blocks, C)):
        block = j * C + c
        word = tl.load(bits_ptr + row * words + block // PER, mask=block < blocks, other=0)
        listed = (word[None, :] >> (block % PER * T)[None, :] + t[:, None]) & 1
        near = (block < init_blocks)[None, :] | (block[None, :] >= own - local_reach)
        done = near & (block[None, :] <= own) & (whole != 0)[:, None]
        members = tl.sum(tl.where(done | (real == 0)[:, None], 0, listed) << t[:, None], 0)
        some = (members != 0).to(tl.int32)
        slot = count + tl.cumsum(some, 0) - 1
        tl.store(list_ptr + row * room + slot, block | (members << 20), mask=members != 0)
        count += tl.sum(some, 0)
        past += tl.sum(tl.where((block + 1) * BLOCK <= earliest + 1, some, 0), 0)
    tl.store(count_ptr + row, count)
    tl.store(past_ptr + row, past)


@triton.jit
def _window(
    q_ptr, k_ptr, v_ptr, first_ptr, stop_ptr, whole_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, keys, init_blocks, local_reach, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T positions x HEADS rows, aligned so that a tile lies in one query block: dense attention over the first blocks
    and the local ones. Tokens without a whole band get out = 0, lse = -inf."""
    batch = tl.program_id(2)
    group = tl.program_id(1)
    first = tl.load(first_ptr + batch)
    stop = tl.load(stop_ptr + batch)
    start = (first // T + tl.num_programs(0) - 1 - tl.program_id(0)) * T  # long walks first
    r = tl.arange(0, T * HEADS)
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    position = start + r // HEADS
    token = position - first
    mine = (token >= 0) & (token < tokens) & (r % HEADS < GROUP)
    token = tl.maximum(tl.minimum(token, tokens - 1), 0)
    head = group * GROUP + tl.minimum(r % HEADS, GROUP - 1)
    q_at = batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    q = tl.load(q_ptr + q_at[:, None] + d[None, :])
    plane = (batch * tl.num_programs(1) + group).to(tl.int64)
    whole = tl.load(whole_ptr + plane * tokens + token, mask=mine, other=0) != 0
    own = start // BLOCK
    near = tl.maximum(own - local_reach, 0)
    early = tl.minimum(init_blocks, near)  # first blocks that are not local
    SUB: tl.constexpr = (BLOCK + N - 1) // N
    before = tl.where(start < stop, (early + own - near) * SUB, 0)
    k_base = k_ptr + batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head
    v_base = v_ptr + batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head
    m = tl.full((T * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((T * HEADS,), tl.float32)
    acc = tl.zeros((T * HEADS, D), tl.float32)
    for j in range(0, before):
        i = j // SUB
        inside = (j % SUB) * N + n
        key = tl.where(i < early, i, near + i - early) * BLOCK + inside
        at = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(k_base + at * k_token + d[None, :])
        v = tl.load(v_base + at * v_token + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if BLOCK < N:
            s = tl.where((inside < BLOCK)[None, :], s, float("-inf"))
        m, total, acc = softmax_step(s, v, m, total, acc)
    for j in range(0, tl.where(start < stop, SUB, 0)):  # own block
        inside = j * N + n
        key = own * BLOCK + inside
        at = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(k_base + at * k_token + d[None, :])
        v = tl.load(v_base + at * v_token + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        shown = (key[None, :] <= position[:, None]) & (inside < BLOCK)[None, :]
        m, total, acc = softmax_step(tl.where(shown, s, float("-inf")), v, m, total, acc)
    # a token of another kind of list is left to the union: out = 0, lse = -inf
    whole = whole & (total > 0)
    out = tl.where(whole[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    lse = tl.where(whole, m + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    at = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * tokens + token
    tl.store(lse_ptr + at, lse, mask=mine)
    tl.store(out_ptr + at[:, None] * D + d[None, :], out, mask=mine[:, None])


@triton.jit
def _union(
    q_ptr, k_ptr, v_ptr, first_ptr, stop_ptr, list_ptr, count_ptr, past_ptr, seed_ptr, seed_lse_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, keys, room, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T tokens x HEADS rows walk the union of their lists, from the window's result on."""
    batch = tl.program_id(2)
    group = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    r = tl.arange(0, T * HEADS)
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    token = tile * T + r // HEADS
    mine = (token < tokens) & (r % HEADS < GROUP)
    token = tl.minimum(token, tokens - 1)
    position = tl.load(first_ptr + batch) + token
    position = tl.where(position < tl.load(stop_ptr + batch), position, -1)
    head = group * GROUP + tl.minimum(r % HEADS, GROUP - 1)
    q_at = batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    q = tl.load(q_ptr + q_at[:, None] + d[None, :])
    row_at = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * tokens + token
    m = tl.load(seed_lse_ptr + row_at)
    total = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = tl.load(seed_ptr + row_at[:, None] * D + d[None, :])
    row = (batch * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + tile
    words = list_ptr + row * room
    k_base = k_ptr + batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head
    v_base = v_ptr + batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head
    SUB: tl.constexpr = (BLOCK + N - 1) // N
    past = tl.load(past_ptr + row) * SUB
    word_next = tl.load(words)
    for j in range(0, past):
        word = word_next
        word_next = tl.load(words + (j + 1) // SUB)
        inside = (j % SUB) * N + n
        key = (word & 0xFFFFF) * BLOCK + inside
        at = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(k_base + at * k_token + d[None, :])
        v = tl.load(v_base + at * v_token + d[None, :])
        bias = tl.where((((word >> 20) >> (r // HEADS)) & 1) != 0, 0.0, float("-inf"))
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[:, None]
        if BLOCK < N:
            s = tl.where((inside < BLOCK)[None, :], s, float("-inf"))
        m, total, acc = softmax_step(s, v, m, total, acc)
    for j in range(past, tl.load(count_ptr + row) * SUB):
        word = tl.load(words + j // SUB)
        inside = (j % SUB) * N + n
        key = (word & 0xFFFFF) * BLOCK + inside
        at = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(k_base + at * k_token + d[None, :])
        v = tl.load(v_base + at * v_token + d[None, :])
        member = (((word >> 20) >> (r // HEADS)) & 1) != 0
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        shown = member[:, None] & (key[None, :] <= position[:, None]) & (inside < BLOCK)[None, :]
        m, total, acc = softmax_step(tl.where(shown, s, float("-inf")), v, m, total, acc)
    some = total > 0
    lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    out = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(lse_ptr + row_at, lse, mask=mine)
    tl.store(out_ptr + row_at[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mine[:, None])


class UnionLists(NamedTuple):
    """Per tile of `tile` tokens: words [B, G, tiles, room], how many, and how many of them need no causal mask; whole
    [B, G, T] is 1 where the forced band was taken out."""

    words: torch.Tensor
    count: torch.Tensor
    past: torch.Tensor
    whole: torch.Tensor
    tile: int


def tile_heads(group: int) -> tuple[int, int]:
    """(tokens a union tile, rows a token): 64 rows for groups of 8 and 16, at least 16 for smaller ones."""
    heads = max(4, triton.next_power_of_2(group))
    return (4 if heads >= 16 else 8), heads


def member_bits(blocks: torch.Tensor, count: int, tile: int) -> torch.Tensor:
    """int32 [B, G, tiles, words]: `tile` bits a block, 32 / `tile` blocks a word, of lists [B, G, T, K] over `count`
    blocks."""
    batch, groups, tokens, slots = blocks.shape
    tiles, words = triton.cdiv(tokens, tile), triton.cdiv(count * tile, 32)
    bits = torch.zeros(batch, groups, tiles, words, dtype=torch.int32, device=blocks.device)
    padded = triton.next_power_of_2(slots)
    _mark[(tiles, groups, batch)](blocks, bits, tokens, slots, words, T=tile, SLOTS=padded)
    return bits


def union_lists(
    bits: torch.Tensor,
    first: torch.Tensor,
    stop: torch.Tensor,
    settings: Settings,
    tile: int,
    tokens: int,
    slots: int,
    count: int,
    window: bool,
) -> UnionLists:
    """Pack `member_bits`; with `window`, without the forced bands that are whole."""
    batch, groups, tiles, words = bits.shape
    room = min(tile * slots, count) + 1  # a kernel loads one word ahead
    device = bits.device
    lists = torch.empty(batch, groups, tiles, room, dtype=torch.int32, device=device)
    counts, past = torch.empty(2, batch, groups, tiles, dtype=torch.int32, device=device)
    whole = torch.empty(batch, groups, tokens if window else 0, dtype=torch.int32, device=device)
    _pack[(tiles, groups, batch)](
        bits, first, stop, lists, counts, past, whole, tokens, count, words, room, settings.init_blocks,
        local_reach(settings), T=tile, BLOCK=settings.block_size, C=min(CHUNK // tile, triton.next_power_of_2(count)),
        WINDOW=window,
    )  # fmt: skip
    return UnionLists(lists, counts, past, whole, tile)


def attend_union(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    first: torch.Tensor,
    stop: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, T, D] in the dtype of q, lse float32 [B, H, T] in base 2), window and union; no checks.

    Arguments as in `one_token.attend_tokens`; a block may be listed twice.
    """
    batch, heads, tokens, width = q.shape
    groups, keys, block = k.shape[1], k.shape[2], settings.block_size
    group, count = heads // groups, triton.cdiv(keys, block)
    tile, rows = tile_heads(group)
    bits = member_bits(blocks, count, tile)
    lists = union_lists(bits, first, stop, settings, tile, tokens, blocks.shape[3], count, window=True)
    seed = torch.empty(q.shape, dtype=torch.float32, device=q.device)  # one rounding, at the end
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seed_lse, lse = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=q.device)
    where = (*strides(q), *strides(k), *strides(v), tokens, keys)
    scale = LOG2_E / width**0.5
    shape = {"GROUP": group, "HEADS": rows, "D": width, "BLOCK": block, "N": key_tile(block, q.dtype)}
    window, warps, stages = window_tile(rows, block, q.dtype)
    _window[(triton.cdiv(tokens + window - 1, window), groups, batch)](
        q, k, v, first, stop, lists.whole, seed, seed_lse, *where, settings.init_blocks, local_reach(settings), scale,
        **shape, T=window, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _union[(triton.cdiv(tokens, tile), groups, batch)](
        q, k, v, first, stop, lists.words, lists.count, lists.past, seed, seed_lse, out, lse, *where,
        lists.words.shape[3], scale, **shape, T=tile,
        num_warps=4, num_stages=union_stages(q.dtype, torch.version.hip is not None),
    )  # fmt: skip
    return out, lse


def window_tile(heads: int, block_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(T, num_warps, num_stages) of `_window`: 128 rows, inside one query block; 32 for float32, which is unrolled."""
    rows = 32 if dtype == torch.float32 else 128
    return max(1, min(block_size, rows // heads)), 8, 2


def union_stages(dtype: torch.dtype, amd: bool) -> int:
    """num_stages of `_union`: buffers of 32 KB each, as far as shared memory has room (AMD: 64 KB in all)."""
    return 2 if amd or dtype == torch.float32 else 3


def _configs() -> tuple[CompileConfig, ...]:
    """bf16 as published (16 heads a group, D = 128, blocks of 64), and a small fp16 shape with a padded group."""
    configs = []
    heads_of = ("q", "k", "v")
    steps = tuple(f"{name}_{axis}" for name in heads_of for axis in ("batch", "head", "token"))
    for label, dtype, group, width, block in (("published", "bf16", 16, 128, 64), ("small", "fp16", 3, 16, 8)):
        tile, rows = tile_heads(group)
        counts = dict.fromkeys(("tokens", "blocks", "words", "room", "slots", "init_blocks", "local_reach"), "i32")
        mark = {"blocks_ptr": "*i32", "bits_ptr": "*i32", "tokens": "i32", "slots": "i32", "words": "i32"}
        configs.append(CompileConfig("sparse_attention", "_mark", label, mark, {"T": tile, "SLOTS": 128}))
        pointers = ("bits_ptr", "first_ptr", "stop_ptr", "list_ptr", "count_ptr", "past_ptr", "whole_ptr")
        pack = dict.fromkeys(pointers, "*i32") | {name: counts[name] for name in counts if name != "slots"}
        for window in (True, False):
            constexprs: dict[str, object] = {"T": tile, "BLOCK": block, "C": CHUNK // tile, "WINDOW": window}
            name = label if window else f"{label}-all"
            configs.append(CompileConfig("sparse_attention", "_pack", name, pack, constexprs))
        attend = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
        attend |= dict.fromkeys(("first_ptr", "stop_ptr"), "*i32")
        attend |= dict.fromkeys((*steps, "tokens", "keys"), "i32") | {"scale_log2": "fp32", "lse_ptr": "*fp32"}
        shape: dict[str, object] = {"GROUP": group, "HEADS": rows, "D": width, "BLOCK": block}
        shape["N"] = key_tile(block, torch.bfloat16)
        window_rows, warps, stages = window_tile(rows, block, torch.bfloat16)
        signature = attend | {"whole_ptr": "*i32", "out_ptr": "*fp32", "init_blocks": "i32", "local_reach": "i32"}
        constexprs = shape | {"T": window_rows}
        configs.append(CompileConfig("sparse_attention", "_window", label, signature, constexprs, steps, warps, stages))
        signature = attend | dict.fromkeys(("list_ptr", "count_ptr", "past_ptr"), "*i32") | {"room": "i32"}
        signature |= {"seed_ptr": "*fp32", "seed_lse_ptr": "*fp32", "out_ptr": f"*{dtype}"}
        for name, targets in ((label, NVIDIA), (f"{label}-amd", ("gfx942",))):
            stages = union_stages(torch.bfloat16, targets is not NVIDIA)
            constexprs = shape | {"T": tile}
            configs.append(
                CompileConfig(
                    "sparse_attention", "_union", name, signature, constexprs, steps, 4, stages, targets=targets
                )
            )
    return tuple(configs)


COMPILE_CONFIGS = _configs()
