"""Gradients of block-sparse attention: dq along the forward lists, dk and dv along the inverted ones.

The problem: a key collects gradient from every token that listed its block, and nobody knows beforehand which. Adding
with atomics gives another last bit on every run. The idea: two passes, each of which owns what it writes.
- `_dq` is the forward union (`union`) with all the blocks in the list: p is recomputed from the saved lse, and
  dq += p (dp - delta) k, with delta = rowsum(dout * out).
- `_dkdv` keeps a block of keys and values and gathers the tokens that listed it, a few at a time: the heads of a token
  are its rows, so any tokens can stand together in a tile, and overlap between neighbours does not matter.
The inverted lists come from the bits that the forward lists are made of: one column a block (`_count`, `_fill`), in
ascending order of tokens. The first block is listed by every token and others by few, so lists are cut into chunks of
`CHUNK` tokens, each chunk writes a partial sum, and `_reduce` adds the partial sums of a block in order. Nothing
depends on which program runs first: the same inputs give the same bits.

What it costs: 3.5 forward passes of arithmetic (2.5 with atomics), and the partial sums, 64 KB a chunk at D = 128.
Source: Dao, FlashAttention-2, arXiv 2307.08691, section 3.1 (recomputation, delta); the inverted lists are this
project's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minicpm_kernels.registry import NVIDIA, CompileConfig
from minicpm_kernels.sparse.arguments import key_tile, strides
from minicpm_kernels.sparse.union import member_bits, tile_heads, union_lists
from minicpm_kernels.sparse.windows import LOG2_E, Settings

CHUNK = 2048  # tokens a chunk of an inverted list


@triton.jit
def _delta(dout_ptr, out_ptr, delta_ptr, rows, D: tl.constexpr, R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    dout = tl.load(dout_ptr + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(dout * out, 1), mask=row < rows)


@triton.jit
def _dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, first_ptr, stop_ptr, list_ptr, count_ptr, dq_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, keys, room, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
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
    row_at = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * tokens + token
    at = row_at[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_at[:, None] + d[None, :])
    dout = tl.load(dout_ptr + at)
    delta = tl.load(delta_ptr + row_at)
    lse = tl.load(lse_ptr + row_at)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that saw nothing: p = 0
    dq = tl.zeros((T * HEADS, D), tl.float32)
    row = (batch * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + tile
    words = list_ptr + row * room
    k_base = k_ptr + batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head
    v_base = v_ptr + batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head
    SUB: tl.constexpr = (BLOCK + N - 1) // N
    word_next = tl.load(words)
    for j in range(0, tl.load(count_ptr + row) * SUB):
        word = word_next
        word_next = tl.load(words + (j + 1) // SUB)
        inside = (j % SUB) * N + n
        key = (word & 0xFFFFF) * BLOCK + inside
        at_key = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
        k = tl.load(k_base + at_key * k_token + d[None, :])
        v = tl.load(v_base + at_key * v_token + d[None, :])
        member = (((word >> 20) >> (r // HEADS)) & 1) != 0
        shown = member[:, None] & (key[None, :] <= position[:, None]) & (inside < BLOCK)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where(shown, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _count(bits_ptr, count_ptr, tiles, words, T: tl.constexpr, C: tl.constexpr):
    """count [block] = tokens that list it; grid (blocks, G, B)."""
    block = tl.program_id(0)
    plane = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tile = tl.arange(0, C)
    t = tl.arange(0, T)
    PER: tl.constexpr = 32 // T
    count = tl.zeros((C,), tl.int32)
    for j in range(0, tl.cdiv(tiles, C)):
        at = (plane * tiles + j * C + tile) * words + block // PER
        word = tl.load(bits_ptr + at, mask=j * C + tile < tiles, other=0)
        count += tl.sum((word[:, None] >> (block % PER * T + t)[None, :]) & 1, 1)
    tl.store(count_ptr + plane * tl.num_programs(0) + block, tl.sum(count, 0))


@triton.jit
def _fill(
    bits_ptr, start_ptr, list_ptr, owner_ptr, tiles, words, chunks, T: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """list [chunks, CHUNK]: the tokens that list a block, ascending, from chunk start[block] on; owner [chunks] names
    the block of a chunk."""
    block = tl.program_id(0)
    plane = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tile = tl.arange(0, C)
    t = tl.arange(0, T)
    PER: tl.constexpr = 32 // T
    start = tl.load(start_ptr + plane * tl.num_programs(0) + block)
    out = list_ptr + (plane * chunks + start) * CHUNK
    count = 0
    for j in range(0, tl.cdiv(tiles, C)):
        at = (plane * tiles + j * C + tile) * words + block // PER
        word = tl.load(bits_ptr + at, mask=j * C + tile < tiles, other=0)
        listed = tl.reshape((word[:, None] >> (block % PER * T + t)[None, :]) & 1, (C * T,))
        token = tl.reshape((j * C + tile)[:, None] * T + t[None, :], (C * T,))
        tl.store(out + count + tl.cumsum(listed, 0) - 1, token, mask=listed != 0)
        count += tl.sum(listed, 0)
    for j in range(0, tl.cdiv(count, CHUNK)):
        tl.store(owner_ptr + plane * chunks + start + j, block)


@triton.jit
def _dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, first_ptr, stop_ptr, list_ptr, owner_ptr, start_ptr, count_ptr,
    dk_ptr, dv_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, keys, chunks, blocks, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial dk and dv [B, G, chunks, SUB * N, D] of N keys from one chunk of tokens, T tokens a step; grid (chunks *
    SUB, G, B)."""
    SUB: tl.constexpr = (BLOCK + N - 1) // N
    chunk = tl.program_id(0) // SUB
    sub = tl.program_id(0) % SUB
    group = tl.program_id(1)
    batch = tl.program_id(2)
    plane = (batch * tl.num_programs(1) + group).to(tl.int64)
    block = tl.load(owner_ptr + plane * chunks + chunk)
    used = block >= 0
    block = tl.maximum(block, 0)
    before = (chunk - tl.load(start_ptr + plane * blocks + block)) * CHUNK
    listed = tl.minimum(tl.load(count_ptr + plane * blocks + block) - before, CHUNK)
    steps = tl.where(used, tl.cdiv(listed, T), 0)
    r = tl.arange(0, T * HEADS)
    d = tl.arange(0, D)
    inside = sub * N + tl.arange(0, N)
    key = block * BLOCK + inside
    at_key = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
    k = tl.load(k_ptr + batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head + at_key * k_token + d[None, :])
    v = tl.load(v_ptr + batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head + at_key * v_token + d[None, :])
    real = (key < keys) & (inside < BLOCK)
    first = tl.load(first_ptr + batch)
    stop = tl.load(stop_ptr + batch)
    head = group * GROUP + tl.minimum(r % HEADS, GROUP - 1)
    q_base = q_ptr + batch.to(tl.int64) * q_batch + head.to(tl.int64)[:, None] * q_head + d[None, :]
    row_base = (batch * tl.num_programs(1) * GROUP + head).to(tl.int64) * tokens
    dk = tl.zeros((N, D), tl.float32)
    dv = tl.zeros((N, D), tl.float32)
    listing = list_ptr + (plane * chunks + chunk) * CHUNK
    slot = r // HEADS
    token_next = tl.load(listing + slot, mask=slot < listed, other=-1)
    for j in range(0, steps):
        token = token_next
        after = (j + 1) * T + slot
        token_next = tl.load(listing + after, mask=after < listed, other=-1)
        position = first + token
        here = (token >= 0) & (r % HEADS < GROUP) & (position < stop)
        token = tl.maximum(token, 0)
        row = row_base + token
        q = tl.load(q_base + token.to(tl.int64)[:, None] * q_token)
        dout = tl.load(dout_ptr + row[:, None] * D + d[None, :])
        delta = tl.load(delta_ptr + row)
        lse = tl.load(lse_ptr + row)
        lse = tl.where(here & (lse != float("-inf")), lse, float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        shown = (key[:, None] <= position[None, :]) & real[:, None]
        p = tl.where(shown, tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at = ((plane * chunks + chunk) * SUB * N + inside)[:, None] * D + d[None, :]
    keep = used & (inside < SUB * N)[:, None]
    tl.store(dk_ptr + at, dk, mask=keep)
    tl.store(dv_ptr + at, dv, mask=keep)


@triton.jit
def _reduce(
    part_dk_ptr, part_dv_ptr, start_ptr, count_ptr, dk_ptr, dv_ptr, keys, chunks, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, G, S, D]: the partial sums of a block, added in order; grid (blocks * SUB, G, B)."""
    SUB: tl.constexpr = (BLOCK + N - 1) // N
    block = tl.program_id(0) // SUB
    inside = tl.program_id(0) % SUB * N + tl.arange(0, N)
    d = tl.arange(0, D)
    plane = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    blocks = tl.num_programs(0) // SUB
    start = tl.load(start_ptr + plane * blocks + block)
    dk = tl.zeros((N, D), tl.float32)
    dv = tl.zeros((N, D), tl.float32)
    for j in range(0, tl.cdiv(tl.load(count_ptr + plane * blocks + block), CHUNK)):
        at = ((plane * chunks + start + j) * SUB * N + inside)[:, None] * D + d[None, :]
        dk += tl.load(part_dk_ptr + at)
        dv += tl.load(part_dv_ptr + at)
    key = block * BLOCK + inside
    keep = ((key < keys) & (inside < BLOCK))[:, None]
    at = (plane * keys + key)[:, None] * D + d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=keep)


def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    first: torch.Tensor,
    stop: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of q; no checks.

    dout and out [B, H, T, D], contiguous, lse float32 [B, H, T] in base 2, the rest as in `union.attend_union`.
    """
    batch, heads, tokens, width = q.shape
    groups, keys, block = k.shape[1], k.shape[2], settings.block_size
    group, count = heads // groups, triton.cdiv(keys, block)
    device, slots = q.device, blocks.shape[3]
    tile, rows = tile_heads(group)
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(lse.numel(), 32),)](dout, out, delta, lse.numel(), D=width, R=32)
    bits = member_bits(blocks, count, tile)
    lists = union_lists(bits, first, stop, settings, tile, tokens, slots, count, window=False)
    inputs = (q, k, v, dout, lse, delta, first, stop)
    where = (*strides(q), *strides(k), *strides(v), tokens, keys)
    step, warps, stages = backward_tile(block, q.dtype, torch.version.hip is not None)
    shape = {"GROUP": group, "HEADS": rows, "D": width, "BLOCK": block, "N": step}
    scale = width**-0.5
    dq = torch.empty(q.shape, dtype=q.dtype, device=device)
    _dq[(triton.cdiv(tokens, tile), groups, batch)](
        *inputs, lists.words, lists.count, dq, *where, lists.words.shape[3], scale, scale * LOG2_E,
        **shape, T=tile, num_warps=warps, num_stages=stages,
    )  # fmt: skip

    tiles, words = bits.shape[2:]
    together = min(COLUMN, triton.next_power_of_2(tiles))
    listed = torch.empty(batch, groups, count, dtype=torch.int32, device=device)
    grid = (count, groups, batch)
    _count[grid](bits, listed, tiles, words, T=tile, C=together)
    used = (listed + CHUNK - 1) // CHUNK
    start = (used.cumsum(-1) - used).to(torch.int32)
    chunks = count + tokens * slots // CHUNK  # whatever the lists hold: no value has to be read off the device
    tokens_of = torch.empty(batch, groups, chunks, CHUNK, dtype=torch.int32, device=device)
    owner = torch.full((batch, groups, chunks), -1, dtype=torch.int32, device=device)
    _fill[grid](bits, start, tokens_of, owner, tiles, words, chunks, T=tile, C=together, CHUNK=CHUNK)
    padded = triton.cdiv(block, step) * step
    part_dk, part_dv = torch.empty(2, batch, groups, chunks, padded, width, dtype=torch.float32, device=device)
    per_block = padded // step
    _dkdv[(chunks * per_block, groups, batch)](
        *inputs, tokens_of, owner, start, listed, part_dk, part_dv, *where, chunks, count, scale * LOG2_E,
        **shape, T=tile, CHUNK=CHUNK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dk, dv = torch.empty(2, *k.shape, dtype=k.dtype, device=device)
    _reduce[(count * per_block, groups, batch)](
        part_dk, part_dv, start, listed, dk, dv, keys, chunks, scale, D=width, BLOCK=block, N=step, CHUNK=CHUNK
    )
    return dq, dk, dv


def backward_tile(block_size: int, dtype: torch.dtype, amd: bool) -> tuple[int, int, int]:
    """(N, num_warps, num_stages) of `_dq` and `_dkdv`. On AMD every warp holds whole operands: half the keys a step, or
    they spill."""
    step = key_tile(block_size, dtype)
    return (min(step, 32), 4, 1) if amd else (step, 8, 2)


COLUMN = 256  # tiles a step of _count and _fill


def _configs() -> tuple[CompileConfig, ...]:
    """bf16 as published (16 heads a group, D = 128, blocks of 64), and a small fp16 shape with a padded group."""
    configs = []
    steps = tuple(f"{name}_{axis}" for name in "qkv" for axis in ("batch", "head", "token"))
    for label, dtype, group, width, block in (("published", "bf16", 16, 128, 64), ("small", "fp16", 3, 16, 8)):
        tile, rows = tile_heads(group)
        pointer, chunk = f"*{dtype}", {"CHUNK": CHUNK}
        delta = {"dout_ptr": pointer, "out_ptr": pointer, "delta_ptr": "*fp32", "rows": "i32"}
        configs.append(CompileConfig("sparse_attention", "_delta", label, delta, {"D": width, "R": 32}))
        column: dict[str, object] = {"T": tile, "C": COLUMN}
        count = {"bits_ptr": "*i32", "count_ptr": "*i32", "tiles": "i32", "words": "i32"}
        configs.append(CompileConfig("sparse_attention", "_count", label, count, column))
        fill = dict.fromkeys(("bits_ptr", "start_ptr", "list_ptr", "owner_ptr"), "*i32")
        fill |= dict.fromkeys(("tiles", "words", "chunks"), "i32")
        configs.append(CompileConfig("sparse_attention", "_fill", label, fill, column | chunk))
        inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dout_ptr"), pointer)
        inputs |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "first_ptr": "*i32", "stop_ptr": "*i32"}
        inputs |= {"list_ptr": "*i32", "count_ptr": "*i32", "scale_log2": "fp32"}
        inputs |= dict.fromkeys((*steps, "tokens", "keys"), "i32")
        dq = inputs | {"dq_ptr": pointer, "room": "i32", "scale": "fp32"}
        dkdv = inputs | {"owner_ptr": "*i32", "start_ptr": "*i32", "dk_ptr": "*fp32", "dv_ptr": "*fp32"}
        dkdv |= {"chunks": "i32", "blocks": "i32"}
        reduce = {"part_dk_ptr": "*fp32", "part_dv_ptr": "*fp32", "start_ptr": "*i32", "count_ptr": "*i32"}
        reduce |= {"dk_ptr": pointer, "dv_ptr": pointer, "keys": "i32", "chunks": "i32", "scale": "fp32"}
        for name, targets in ((label, NVIDIA), (f"{label}-amd", ("gfx942",))):
            step, warps, stages = backward_tile(block, torch.bfloat16, targets is not NVIDIA)
            keys: dict[str, object] = {"D": width, "BLOCK": block, "N": step}
            shape = keys | {"GROUP": group, "HEADS": rows, "T": tile}
            for function, signature, constexprs, aligned, *launch in (
                ("_dq", dq, shape, steps, warps, stages),
                ("_dkdv", dkdv, shape | chunk, steps, warps, stages),
                ("_reduce", reduce, keys | chunk, (), 4, 2),
            ):
                configs.append(
                    CompileConfig(
                        "sparse_attention", function, name, signature, constexprs, aligned, *launch, targets=targets
                    )
                )
    return tuple(configs)


COMPILE_CONFIGS = _configs()
