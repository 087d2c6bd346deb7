"""Stage 1 of block-sparse attention: score compressed keys, share between heads, pool to blocks, keep the best K.

The problem: every query token scores T/16 compressed keys with every head. At 128k tokens that matrix has 4 GB a
kv head in bfloat16, and a library top-k sorts it. The idea, in three kernels:
- `_compress`: means of overlapping windows of keys, summed in float32 one key after another, rounded once.
- `_score`: a tile of a few tokens x the heads of a group walks the coarse windows (their log-sum-exp puts the heads on
  one scale) and then the fine ones; p = exp2(s - lse) is summed over heads and pooled to blocks before it leaves the
  registers. A block's score is the best of the windows that touch it: those that start in it, and those that start in
  the block before and reach over the edge. A tile writes both maxima (`inside`, `over`) and the reader takes max(inside
  [n], over[n - 1]), so tiles need not overlap. What reaches memory is [chunk of tokens, T/64].
- `_top_k`: scores are not negative, so their bit patterns order like integers. 31 halvings find the K-th largest; one
  prefix sum breaks ties towards the lower block, another turns membership into slots. No sort, ascending lists.

Two shortcuts that change nothing: blocks that are kept anyway (the first ones and the window) are not scored; and the
windows of all other blocks end before the query, so the second walk needs no causal mask. The latter holds while the
window reaches back at least kernel_size - kernel_stride - 1 tokens from the start of the query's block; for settings
that do not, the wrapper compiles the mask in.

Left out: merging a running top-k inside `_score`, which would save the score buffer (1 ms of about 18 at 128k by
arithmetic) for a bitonic merge a step. Windows that reach over more than one block's edge are refused.
Source: arXiv 2509.24663, section 3.2 (which leaves the fused pooling and top-k to the future).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minicpm_kernels.checks import require_runnable
from minicpm_kernels.registry import CompileConfig
from minicpm_kernels.sparse.arguments import placement, require_heads, require_query_key, strides
from minicpm_kernels.sparse.windows import COARSE_FACTOR, LOG2_E, Settings, local_reach

SCORE_BYTES = 1 << 29  # of the score buffers; longer prompts are scored in chunks of tokens
MOST_BLOCKS = 16384  # one program holds a row of scores


@triton.jit
def _compress(
    k_ptr, out_ptr, k_batch, k_head, k_token, heads, windows,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)  # (batch, head)
    window = tl.program_id(0) * W + tl.arange(0, W)
    d = tl.arange(0, D)
    keep = (window < windows)[:, None]
    base = k_ptr + (row // heads).to(tl.int64) * k_batch + (row % heads).to(tl.int64) * k_head
    total = tl.zeros((W, D), tl.float32)
    for offset in range(SIZE):
        at = (window * STRIDE + offset).to(tl.int64)[:, None] * k_token + d[None, :]
        total += tl.load(base + at, mask=keep, other=0.0).to(tl.float32)
    at = (row.to(tl.int64) * windows + window)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, (total / SIZE).to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _score(
    q_ptr, fine_ptr, norm_ptr, first_ptr, stop_ptr, inside_ptr, over_ptr,
    q_batch, q_head, q_token, fine_batch, fine_head, norm_batch, norm_head,
    start, tokens, rows, fine_count, norm_count, blocks, local_reach, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, PER_BLOCK: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, NORM_SIZE: tl.constexpr, NORM_STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Rows of the tile are (token, head), token-major, HEADS of them a token of which GROUP are real. `start` is the
    first query of the chunk, `rows` its number of tokens."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tokens have the longest walk: first
    group = tl.program_id(1)
    batch = tl.program_id(2)
    r = tl.arange(0, T * HEADS)
    d = tl.arange(0, D)
    first = tl.load(first_ptr + batch)
    stop = tl.load(stop_ptr + batch)
    real = r % HEADS < GROUP
    token = start + tile * T + r // HEADS
    head = group * GROUP + tl.minimum(r % HEADS, GROUP - 1)
    q_at = (
        batch.to(tl.int64) * q_batch
        + head.to(tl.int64)[:, None] * q_head
        + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * q_token
        + d[None, :]
    )
    q = tl.load(q_ptr + q_at)
    position = tl.where((token < tokens) & (first + token < stop), first + token, -1)

    # walk 1: log-sum-exp over the windows that end at or before the query
    seen = tl.where(position + 1 >= NORM_SIZE, (position + 1 - NORM_SIZE) // NORM_STRIDE + 1, 0)
    seen = tl.minimum(seen, norm_count)
    norm = norm_ptr + batch.to(tl.int64) * norm_batch + group.to(tl.int64) * norm_head
    n = tl.arange(0, N)
    m = tl.full((T * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((T * HEADS,), tl.float32)
    for j in range(0, tl.cdiv(tl.max(seen, 0), N)):
        window = j * N + n
        keys = tl.load(norm + tl.minimum(window, norm_count - 1)[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        s = tl.where(window[None, :] < seen[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m = new
    # nothing to compare with, or a head that only fills the tile: every score 0
    lse = tl.where((total > 0) & real, m + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))

    # walk 2: the windows that start in a block before the forced band
    visible = tl.where(position + 1 >= SIZE, (position + 1 - SIZE) // STRIDE + 1, 0)
    scored = tl.maximum(tl.max(position, 0) // BLOCK - local_reach, 0)  # blocks
    fine = fine_ptr + batch.to(tl.int64) * fine_batch + group.to(tl.int64) * fine_head
    f = tl.arange(0, F)
    t = tl.arange(0, T)
    w = tl.arange(0, PER_BLOCK)
    out_row = (batch * tl.num_programs(1) + group).to(tl.int64) * rows + tile * T + t
    for j in range(0, tl.cdiv(scored * PER_BLOCK, F)):
        window = j * F + f
        keys = tl.load(fine + tl.minimum(window, fine_count - 1)[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        p = tl.exp2(s - lse[:, None])
        if CAUSAL:
            p = tl.where(window[None, :] < visible[:, None], p, 0.0)
        shared = tl.reshape(tl.sum(tl.reshape(p, (T, HEADS, F)), 1), (T, F // PER_BLOCK, PER_BLOCK))
        block = j * (F // PER_BLOCK) + tl.arange(0, F // PER_BLOCK)
        at = out_row[:, None] * blocks + block[None, :]
        keep = (block < scored)[None, :] & (tile * T + t < rows)[:, None]
        tl.store(inside_ptr + at, tl.max(shared, 2), mask=keep)
        if BEFORE > 0:
            reaching = tl.where((w >= PER_BLOCK - BEFORE)[None, None, :], shared, 0.0)
            tl.store(over_ptr + at, tl.max(reaching, 2), mask=keep)


@triton.jit
def _top_k(
    inside_ptr, over_ptr, first_ptr, stop_ptr, out_ptr, start, tokens, rows, blocks, slots, init_blocks, local_reach,
    BLOCK: tl.constexpr, BEFORE: tl.constexpr, NB: tl.constexpr, SLOTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T tokens a program; `slots` is the length of a list, padded to SLOTS."""
    group = tl.program_id(1)
    batch = tl.program_id(2)
    row = tl.program_id(0) * T + tl.arange(0, T)
    c = tl.arange(0, NB)
    token = start + row
    position = tl.load(first_ptr + batch) + token
    position = tl.where(position < tl.load(stop_ptr + batch), position, -1)
    own = tl.where(position >= 0, position // BLOCK, -1)[:, None]
    past = (c[None, :] <= own) & (row < rows)[:, None]
    forced = past & ((c < init_blocks)[None, :] | (c[None, :] >= own - local_reach))
    free = past & (forced == 0)
    plane = (batch * tl.num_programs(1) + group).to(tl.int64)
    at = (plane * rows + row)[:, None] * blocks + c[None, :]
    score = tl.load(inside_ptr + at, mask=free, other=0.0)
    if BEFORE > 0:
        score = tl.maximum(score, tl.load(over_ptr + at - 1, mask=free & (c >= 1)[None, :], other=0.0))
    score = tl.minimum(score, 3.4028234663852886e38)  # one that overflowed ties with the largest finite one
    key = tl.where(free, score.to(tl.int32, bitcast=True), -1)
    wanted = tl.minimum(tl.sum(free.to(tl.int32), 1), slots - tl.sum(forced.to(tl.int32), 1))
    threshold = tl.zeros((T,), tl.int32)
    for i in range(0, 31):
        trial = threshold | (1 << (30 - i))
        enough = tl.sum((key >= trial[:, None]).to(tl.int32), 1) >= wanted
        threshold = tl.where(enough, trial, threshold)
    above = key > threshold[:, None]
    equal = key == threshold[:, None]
    room = wanted - tl.sum(above.to(tl.int32), 1)
    tied = equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None])
    take = forced | (free & (above | tied))
    slot = tl.cumsum(take.to(tl.int32), 1) - 1
    out = out_ptr + (plane * tokens + token)[:, None] * slots
    tl.store(out + slot, tl.broadcast_to(c[None, :], (T, NB)), mask=take)
    s = tl.arange(0, SLOTS)[None, :]
    empty = (s >= tl.sum(take.to(tl.int32), 1)[:, None]) & (s < slots) & (row < rows)[:, None]
    tl.store(out + s, tl.full((T, SLOTS), -1, tl.int32), mask=empty)


def compress_keys(k: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """Mean of every complete window of keys; twin of `minicpm_ref.sparse.attention.compress_keys`.

    k [B, G, S, D], of float32, float16 or bfloat16, strided as it likes but for D -> [B, G, L, D], contiguous. Raises
    ValueError on anything else.
    """
    require_heads("compress_keys", "k", k)
    if kernel_size < 1 or stride < 1:
        raise ValueError(f"compress_keys: kernel_size and stride are {kernel_size} and {stride}, expected 1 or more")
    require_runnable("compress_keys", k.detach())
    batch, heads, keys, width = k.shape
    windows = max(0, (keys - kernel_size) // stride + 1)
    out = torch.empty(batch, heads, windows, width, dtype=k.dtype, device=k.device)
    if windows:
        grid = (triton.cdiv(windows, 32), batch * heads)
        _compress[grid](k, out, *strides(k), heads, windows, SIZE=kernel_size, STRIDE=stride, D=width, W=32)
    return out


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    config: Settings,
    query_start: int | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Stage 1: the blocks each query token may read; twin of `minicpm_ref.sparse.attention.select_blocks`.

    q [B, H, T, D], k [B, G, S, D] -> int32 [B, G, T, K], ascending, -1 at the tail. float32, float16 or bfloat16 on one
    GPU; D 16, 32, 64 or 128; any group H / G; blocks of 4 to 128 tokens, a power of two, at most 16384 of them; windows
    no longer than a block and a stride. Scores are float32, ties go to the lower block. No gradient.

    Raises ValueError on anything else (bfloat16 in the interpreter included), and for queries outside the cache.
    """
    function = "select_blocks"
    require_query_key(function, q, k, config)
    size, stride, block = config.kernel_size, config.kernel_stride, config.block_size
    if size - stride > block:
        raise ValueError(
            f"{function}: kernel_size is {size}, expected at most block_size + kernel_stride = {block + stride}"
        )
    batch, groups, keys, width = k.shape
    tokens, blocks = q.shape[2], triton.cdiv(keys, block)
    if blocks > MOST_BLOCKS:
        raise ValueError(f"{function}: {keys} keys are {blocks} blocks, expected at most {MOST_BLOCKS}")
    first, stop = placement(function, q, k, query_start, lengths)
    factor = 1 if config.exact_lse else COARSE_FACTOR
    fine_count, norm_count = (max(0, (keys - f * size) // (f * stride) + 1) for f in (1, factor))
    q, k = q.detach(), k.detach()
    if compressed is None:
        fine = compress_keys(k, size, stride)
        norm = fine if config.exact_lse else compress_keys(k, factor * size, factor * stride)
    else:
        fine, norm = compressed[0], compressed[0] if config.exact_lse else compressed[1]
        for name, x, count in (("fine", fine, fine_count), ("coarse", norm, norm_count)):
            if x.ndim != 4 or x.shape[:2] != k.shape[:2] or x.shape[2] < count or x.shape[3] != width:
                wanted = [batch, groups, f"{count} or more", width]
                raise ValueError(f"{function}: {name} compressed keys have shape {list(x.shape)}, expected {wanted}")
            if x.dtype != k.dtype or x.device != k.device or (count and x.stride()[2:] != (width, 1)):
                raise ValueError(
                    f"{function}: {name} compressed keys are {x.dtype} on {x.device}, strides {list(x.stride())}, "
                    f"expected {k.dtype} on {k.device} and windows one after another"
                )

    reach, slots = local_reach(config), min(config.visible_blocks, blocks)
    per_block, before = block // stride, size // stride - 1
    padded = triton.next_power_of_2(blocks)
    out = torch.empty(batch, groups, tokens, slots, dtype=torch.int32, device=q.device)
    tile, heads, fine_tile, norm_tile, warps, stages = _score_tile(q.shape[1] // groups, per_block, q.dtype)
    padded_slots = triton.next_power_of_2(slots)
    together = _top_k_tokens(padded, padded_slots)
    chunk = max(tile, min(tokens, SCORE_BYTES // (8 * batch * groups * blocks)))
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        inside, over = torch.empty(2, batch, groups, rows, blocks, dtype=torch.float32, device=q.device)
        _score[(triton.cdiv(rows, tile), groups, batch)](
            q, fine, norm, first, stop, inside, over, *strides(q), *strides(fine)[:2], *strides(norm)[:2],
            start, tokens, rows, fine_count, norm_count, blocks, reach, LOG2_E / width**0.5,
            GROUP=q.shape[1] // groups, HEADS=heads, D=width, T=tile, F=fine_tile, N=norm_tile, PER_BLOCK=per_block,
            BEFORE=before, BLOCK=block, SIZE=size, STRIDE=stride, NORM_SIZE=factor * size, NORM_STRIDE=factor * stride,
            CAUSAL=reach * block < size - stride - 1, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _top_k[(triton.cdiv(rows, together), groups, batch)](
            inside, over, first, stop, out, start, tokens, rows, blocks, slots, config.init_blocks, reach,
            BLOCK=block, BEFORE=before, NB=padded, SLOTS=padded_slots, T=together,
            num_warps=max(4, min(16, padded // 512)),
        )  # fmt: skip
    return out


def _score_tile(group: int, per_block: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """(T, HEADS, F, N, num_warps, num_stages): 128 rows, so that a key is read once for 8 tokens of 16 heads.

    float32 has no tensor core of full precision, and its products are unrolled: small tiles.
    """
    heads = triton.next_power_of_2(group)
    rows, windows, warps, stages = (32, 32, 4, 2) if dtype == torch.float32 else (128, 64, 8, 3)
    return max(1, rows // heads), heads, max(windows, per_block), windows, warps, stages


def _top_k_tokens(blocks: int, slots: int) -> int:
    """Tokens a program of the top-k: about 1024 scores, which stay in registers through the 31 halvings."""
    return max(1, 1024 // max(blocks, slots))


def _configs() -> tuple[CompileConfig, ...]:
    """bf16 as published (16 heads a group, D = 128, 2048 blocks), and a small fp16 shape."""
    configs = []
    for label, dtype, group, width, size, stride, block, blocks in (
        ("published", "bf16", 16, 128, 32, 16, 64, 2048),
        ("small", "fp16", 3, 16, 8, 4, 16, 16),
    ):
        pointer, slots = f"*{dtype}", min(128, blocks)
        tile, heads, fine_tile, norm_tile, warps, stages = _score_tile(group, block // stride, torch.bfloat16)
        compress = {"k_ptr": pointer, "out_ptr": pointer}
        steps = ("k_batch", "k_head", "k_token")
        compress |= dict.fromkeys((*steps, "heads", "windows"), "i32")
        constexprs: dict[str, object] = {"SIZE": size, "STRIDE": stride, "D": width, "W": 32}
        configs.append(CompileConfig("compress_keys", "_compress", label, compress, constexprs, steps))
        steps = ("q_batch", "q_head", "q_token", "fine_batch", "fine_head", "norm_batch", "norm_head")
        counts = ("start", "tokens", "rows", "fine_count", "norm_count", "blocks", "local_reach")
        score = dict.fromkeys(("q_ptr", "fine_ptr", "norm_ptr"), pointer)
        score |= {"first_ptr": "*i32", "stop_ptr": "*i32", "inside_ptr": "*fp32", "over_ptr": "*fp32"}
        score |= dict.fromkeys((*steps, *counts), "i32") | {"scale_log2": "fp32"}
        constexprs = {"GROUP": group, "HEADS": heads, "D": width, "T": tile, "F": fine_tile, "N": norm_tile}
        constexprs |= {"PER_BLOCK": block // stride, "BEFORE": size // stride - 1, "BLOCK": block, "CAUSAL": False}
        constexprs |= {"SIZE": size, "STRIDE": stride, "NORM_SIZE": 4 * size, "NORM_STRIDE": 4 * stride}
        configs.append(CompileConfig("select_blocks", "_score", label, score, constexprs, steps, warps, stages))
        top_k = {"inside_ptr": "*fp32", "over_ptr": "*fp32", "first_ptr": "*i32", "stop_ptr": "*i32", "out_ptr": "*i32"}
        top_k |= dict.fromkeys(("start", "tokens", "rows", "blocks", "slots", "init_blocks", "local_reach"), "i32")
        constexprs = {"BLOCK": block, "BEFORE": 1, "NB": blocks, "SLOTS": slots}
        constexprs["T"] = _top_k_tokens(blocks, slots)
        warps = max(4, min(16, blocks // 512))
        configs.append(CompileConfig("select_blocks", "_top_k", label, top_k, constexprs, num_warps=warps))
    return tuple(configs)


COMPILE_CONFIGS = _configs()
