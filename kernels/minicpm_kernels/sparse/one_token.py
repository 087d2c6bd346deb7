"""Stage 2 of block-sparse attention, the simple way: one query token with its heads walks its own list of blocks.

The problem: every token has another list of blocks, so there is no dense tile of queries. The idea (published kernels
of this family do the same): the heads of a group share the list, so they are the rows of the tile. One program takes
one token and one kv head, loads a block of keys and values a step, and keeps an online softmax. With 16 heads the
16-row tensor-core tile is full; smaller groups leave rows empty.

What it costs: a block of 64 keys and values is 32 KB of traffic for 0.5 MFLOP, 16 FLOP a byte, so the second-level
cache and not the tensor core is the limit. For a long prompt `union` shares a block between tokens instead.
For decoding this is the right shape, with one addition: a single token has too few programs to fill a GPU, so
its list is cut into `SPLITS` parts, each gives a partial result and its log-sum-exp, and `_merge` weighs them.

A tree of draft tokens needs one more thing: drafts of different branches must not see each other. The last T keys
are the drafts themselves; they leave the lists, and one more part per token walks them under a 64-bit mask.

Everything is in base 2: scores carry log2(e), `lse` is log2 of the sum of powers of 2.
Sources: arXiv 2509.24663, section 3.1; arXiv 2502.11089 (NSA: the heads of a group as rows); Dao et al.,
Flash-Decoding (split and merge).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minicpm_kernels.registry import CompileConfig
from minicpm_kernels.sparse.arguments import key_tile, strides
from minicpm_kernels.sparse.windows import LOG2_E

PART = 16  # blocks a part of a split list


@triton.jit
def softmax_step(s, v, m, total, acc):
    """One step of the online softmax: scores s [rows, keys] in base 2, -inf where hidden, and values v [keys, D]."""
    new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet: not -inf - -inf
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def _attend_token(
    q_ptr, k_ptr, v_ptr, blocks_ptr, first_ptr, stop_ptr, tree_ptr, out_ptr, lse_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, keys, slots, part, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens * PARTS, G, B). Part p walks slots [p * part, (p + 1) * part) of the list; with TREE the last part
    walks the drafts. out [PARTS, B, H, T, D] and lse [PARTS, B, H, T]."""
    token = tl.program_id(0) // PARTS
    p = tl.program_id(0) % PARTS
    group = tl.program_id(1)
    batch = tl.program_id(2)
    r = tl.arange(0, HEADS)
    d = tl.arange(0, D)
    n = tl.arange(0, N)
    head = group * GROUP + tl.minimum(r, GROUP - 1)
    q_at = batch.to(tl.int64) * q_batch + head.to(tl.int64)[:, None] * q_head + token.to(tl.int64) * q_token
    q = tl.load(q_ptr + q_at + d[None, :])
    first = tl.load(first_ptr + batch)
    stop = tl.load(stop_ptr + batch)
    position = tl.where(first + token < stop, first + token, -1)
    limit = tl.minimum(position, first - 1) if TREE else position  # the last position that the list may show
    k_base = k_ptr + batch.to(tl.int64) * k_batch + group.to(tl.int64) * k_head
    v_base = v_ptr + batch.to(tl.int64) * v_batch + group.to(tl.int64) * v_head
    row = (batch * tl.num_programs(1) + group).to(tl.int64) * tokens + token
    blocks = blocks_ptr + row * slots
    m = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, D), tl.float32)

    SUB: tl.constexpr = (BLOCK + N - 1) // N  # steps a block
    begin = p * part
    slot = tl.arange(0, SLOTS)
    listed = tl.load(blocks + slot, mask=(slot < slots) & (slot < begin + part), other=-1)
    steps = tl.maximum(tl.max(tl.where(listed >= 0, slot + 1, 0), 0) - begin, 0) * SUB  # empty slots gather at the tail
    block_next = tl.load(blocks + tl.minimum(begin, slots - 1))
    for j in range(0, steps):
        block = block_next
        # loaded a step ahead: otherwise the address of the keys waits for it
        block_next = tl.load(blocks + tl.minimum(begin + (j + 1) // SUB, slots - 1))
        inside = (j % SUB) * N + n
        key = block * BLOCK + inside
        at = tl.maximum(tl.minimum(key, keys - 1), 0).to(tl.int64)[:, None]
        k = tl.load(k_base + at * k_token + d[None, :])
        v = tl.load(v_base + at * v_token + d[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        shown = (key <= limit) & (inside < BLOCK) & (block >= 0)
        m, total, acc = softmax_step(tl.where(shown[None, :], s, float("-inf")), v, m, total, acc)

    if TREE:
        mask = tl.load(tree_ptr + batch.to(tl.int64) * tokens + token)  # int64: bit j shows draft j
        drafts = tl.where((p == PARTS - 1) & (position >= 0), tokens, 0)
        for j in range(0, tl.cdiv(drafts, N)):
            draft = j * N + n
            key = first + draft
            at = tl.minimum(key, keys - 1).to(tl.int64)[:, None]
            k = tl.load(k_base + at * k_token + d[None, :])
            v = tl.load(v_base + at * v_token + d[None, :])
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            # a shift by 64 or more is undefined
            shown = (draft < drafts) & (key < stop) & (((mask >> tl.minimum(draft, 63).to(tl.int64)) & 1) != 0)
            m, total, acc = softmax_step(tl.where(shown[None, :], s, float("-inf")), v, m, total, acc)

    some = total > 0
    lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    out = acc / tl.where(some, total, 1.0)[:, None]
    heads = tl.num_programs(1) * GROUP
    out_row = ((p * tl.num_programs(2) + batch).to(tl.int64) * heads + head) * tokens + token
    tl.store(lse_ptr + out_row, lse, mask=r < GROUP)
    tl.store(out_ptr + out_row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(r < GROUP)[:, None])


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, rows, PARTS: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """out = sum_p 2^(lse_p - lse) out_p over the parts, for R rows a program."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, D)
    real = row < rows
    m = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, D), tl.float32)
    for p in range(PARTS):
        at = p * rows.to(tl.int64) + row
        lse = tl.load(part_lse_ptr + at, mask=real, other=float("-inf"))
        out = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
        new = tl.maximum(m, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, shrink = tl.exp2(lse - safe), tl.exp2(m - safe)
        acc = acc * shrink[:, None] + weight[:, None] * out
        total = total * shrink + weight
        m = new
    some = total > 0
    whole = tl.where(some, total, 1.0)
    tl.store(lse_ptr + row, tl.where(some, m + tl.log2(whole), float("-inf")), mask=real)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, (acc / whole[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None])


def attend_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    first: torch.Tensor,
    stop: torch.Tensor,
    block_size: int,
    part: int | None = PART,
    tree_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, T, D] in the dtype of q, lse float32 [B, H, T] in base 2), one token a program; no checks.

    q [B, H, T, D], k and v [B, G, S, D], blocks int32 [B, G, T, K], contiguous, each block once; first and stop as in
    `arguments.placement`. Lists are cut into parts of `part` blocks (None: not cut). tree_mask int64 [B, T]:
    query t sees the keys before `first` through its list, and of the queries' own keys those whose bit is set.
    """
    batch, heads, tokens, width = q.shape
    slots = blocks.shape[3]
    part = slots if part is None else min(part, slots)
    tree = tree_mask is not None
    parts = triton.cdiv(slots, part) + tree
    out = torch.empty(batch, heads, tokens, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
    group = heads // k.shape[1]
    _attend_token[(tokens * parts, k.shape[1], batch)](
        q, k, v, blocks, first, stop, tree_mask if tree else first, part_out, part_lse,
        *strides(q), *strides(k), *strides(v), tokens, k.shape[2], slots, part, LOG2_E / width**0.5,
        GROUP=group, HEADS=max(16, triton.next_power_of_2(group)), D=width, BLOCK=block_size,
        N=key_tile(block_size, q.dtype), SLOTS=triton.next_power_of_2(slots), PARTS=parts, TREE=tree,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        rows = lse.numel()
        _merge[(triton.cdiv(rows, 16),)](part_out, part_lse, out, lse, rows, PARTS=parts, D=width, R=16)
    return out, lse


WARPS, STAGES = 4, 2


def _configs() -> tuple[CompileConfig, ...]:
    """bf16 at D = 128 with 16 heads a group, whole, split and as a tree; a small fp16 shape with a padded group."""
    configs = []
    for label, dtype, group, width, block, parts, tree in (
        ("whole", "bf16", 16, 128, 64, 1, False),
        ("split", "bf16", 16, 128, 64, 6, False),
        ("tree", "bf16", 16, 128, 64, 7, True),
        ("small", "fp16", 3, 16, 8, 1, False),
    ):
        pointer = f"*{dtype}"
        out = pointer if parts == 1 else "*fp32"
        signature = {"q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer, "blocks_ptr": "*i32", "first_ptr": "*i32"}
        signature |= {"stop_ptr": "*i32", "tree_ptr": "*i64" if tree else "*i32", "out_ptr": out, "lse_ptr": "*fp32"}
        steps = tuple(f"{name}_{axis}" for name in "qkv" for axis in ("batch", "head", "token"))
        signature |= dict.fromkeys((*steps, "tokens", "keys", "slots", "part"), "i32") | {"scale_log2": "fp32"}
        constexprs: dict[str, object] = {"GROUP": group, "HEADS": 16, "D": width, "BLOCK": block}
        constexprs |= {"N": key_tile(block, torch.bfloat16), "SLOTS": 128, "PARTS": parts, "TREE": tree}
        kernel = "sparse_tree_attention" if tree else "sparse_attention"
        spills = 16 if tree else 0  # on AMD: scalar registers, kept in lanes of a vector register and not in memory
        configs.append(
            CompileConfig(kernel, "_attend_token", label, signature, constexprs, steps, WARPS, STAGES, spills)
        )
    merge = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "rows": "i32"}
    configs.append(CompileConfig("sparse_attention", "_merge", "split", merge, {"PARTS": 6, "D": 128, "R": 16}))
    return tuple(configs)


COMPILE_CONFIGS = _configs()
