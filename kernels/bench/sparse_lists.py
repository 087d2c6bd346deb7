"""What the sparse-attention benchmark feeds its kernels: queries, block lists of four kinds, and how they overlap.

The problem: the speed of sparse attention depends on the lists. Lists drawn over all blocks, of which the future ones
are then dropped, are half empty; independent lists share nothing between neighbours; lists of one repeated query share
everything. A single kind can be made to say anything. So:
- `public`: blocks drawn over the whole sequence, future ones dropped (what the public benchmarks draw);
- `random`: every entry is a block of the past, the own one included, independent from token to token;
- `selected`: what `select_blocks` picks for queries that follow q_t = a q_{t-1} + sqrt(1 - a^2) noise;
- `same`: the same for one query repeated, the most that tokens can share.
Every row of the results says how many blocks of a list are valid, and the overlap: blocks in the union of a tile's
lists for each block of a token's own, over what the shared window does not cover. 1 is full sharing, 4 none.
"""

from __future__ import annotations

import torch
import triton

from minicpm_kernels.sparse.arguments import placement
from minicpm_kernels.sparse.blocks import select_blocks
from minicpm_kernels.sparse.union import member_bits, tile_heads, union_lists
from minicpm_kernels.sparse.windows import Settings

KINDS = ("public", "random", "selected", "same")
CORRELATION = 0.98
CHUNK = 8192  # tokens drawn at once


def draw_inputs(
    kind: str, batch: int, tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [B, H, T, D], k, v [B, G, T, D]); neighbouring queries are correlated for the kinds that select."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(count: int, steps: int) -> torch.Tensor:
        return torch.randn(batch, count, steps, width, generator=generator, device=device, dtype=dtype)

    k, v = normal(groups, tokens), normal(groups, tokens)
    if kind == "same":
        return normal(heads, 1).expand(-1, -1, tokens, -1).contiguous(), k, v
    q = normal(heads, tokens)
    if kind == "selected":
        state = q[:, :, 0].float()
        for t in range(1, tokens):
            state = CORRELATION * state + (1 - CORRELATION**2) ** 0.5 * q[:, :, t]
            q[:, :, t] = state
    return q, k, v


def draw_lists(kind: str, q: torch.Tensor, k: torch.Tensor, config: Settings, seed: int) -> torch.Tensor:
    """int32 [B, G, T, K], ascending, -1 at the tail, K = config.visible_blocks at most."""
    if kind in ("selected", "same"):
        return select_blocks(q, k, config)
    (batch, _, tokens, _), groups = q.shape, k.shape[1]
    count = triton.cdiv(k.shape[2], config.block_size)
    slots = min(config.visible_blocks, count)
    generator = torch.Generator(q.device).manual_seed(seed)
    block = torch.arange(count, device=q.device)
    parts = []
    for start in range(0, tokens, CHUNK):
        own = (torch.arange(start, min(start + CHUNK, tokens), device=q.device) // config.block_size)[:, None]
        rank = torch.rand(batch, groups, len(own), count, generator=generator, device=q.device)
        if kind == "random":
            rank = rank.masked_fill(block > own, -1.0).masked_fill(block == own, 2.0)
        best = rank.topk(slots).indices
        ascending = torch.where(best <= own, best, count).sort(-1).values
        parts.append(torch.where(ascending == count, -1, ascending).to(torch.int32))
    return torch.cat(parts, 2)


def valid_blocks(blocks: torch.Tensor) -> float:
    """Mean number of listed blocks a token."""
    return (blocks >= 0).sum(-1).double().mean().item()


def overlap(q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor, config: Settings) -> float:
    """Size of a tile's union over the mean size of its tokens' lists, both without what the shared window covers."""
    first, stop = placement("overlap", q, k, None, None)
    tile = tile_heads(q.shape[1] // k.shape[1])[0]
    count = triton.cdiv(k.shape[2], config.block_size)
    bits = member_bits(blocks, count, tile)
    lists = union_lists(bits, first, stop, config, tile, q.shape[2], blocks.shape[3], count, window=True)
    listed = torch.arange(lists.words.shape[3], device=q.device) < lists.count[..., None]
    members = torch.where(listed, lists.words >> 20, 0)
    single = sum(int(((members >> t) & 1).sum()) for t in range(tile)) / tile
    return int(lists.count.sum()) / max(single, 1.0)
