"""Stage 2 of InfLLM-V2, the dull version: ordinary causal softmax attention over the tokens of the chosen blocks.

`attend` does both stages and owns the choice of the implementation, so that the model, a tree verifier and an executor
say *what* to attend to, and this file says *how*.

Left out: speed. The lists become a dense mask, and every logit is computed before most are thrown away. Queries are
processed in chunks; for a backward pass, each layer keeps its mask, T * S numbers a group. `minicpm_kernels` has the
fast twins. Source: arXiv 2509.24663, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicpm_ref import backend
from minicpm_ref.config import SparseConfig
from minicpm_ref.sparse.blocks import check_query_key, query_chunks, query_positions, select_blocks, widen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SparseConfig,
    compressed: tuple[Tensor, Tensor] | None = None,
    selector: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Both stages, each by the fastest implementation that can run here: choose blocks, then attend to them.

    q [B, H, T, D] are the last T of the keys k and values v [B, G, S, D]; returns [B, H, T, D] in the dtype of q.
    `compressed` are the pooled keys of k when they are at hand; `selector` stands in for `select_blocks`, for
    comparison.
    """
    select, attention = select_blocks, sparse_attention
    chosen = backend.choose_for("sparse_attention", q, k, v)  # of both stages: stage 1 has nothing to differentiate
    if chosen != "torch":
        select, attention = (backend.kernel(name, chosen) for name in ("select_blocks", "sparse_attention"))
    blocks = (selector or select)(q, k, config, compressed=compressed)
    return attention(q, k, v, blocks, config, check_blocks=selector is not None)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    config: SparseConfig,
    query_start: int | Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    check_blocks: bool = True,
) -> Tensor:
    """Stage 2: causal softmax attention over the tokens of the listed blocks, scale 1/sqrt(D).

    q [B, H, T, D], k and v [B, G, S, D], blocks int32 [B, G, T, K] (order free, -1 = empty) -> [B, H, T, D] in the
    dtype of q, computed in float32 (float64 for float64 inputs). A row of padding, or one without blocks, gives 0.
    Blocks are read whole, so a token sees `window_size` keys plus what its own block already holds. Gradients reach
    q, k and v.

    query_start, lengths: see `query_positions`. `check_blocks=False` skips the look at the lists' values, which on a
    GPU waits for the device; it is for lists that `select_blocks` has just made. Raises ValueError for inconsistent
    shapes or a block outside the cache. Source: arXiv 2509.24663, section 3.1.

    >>> blocks = select_blocks(q, k, config)
    >>> out = sparse_attention(q, k, v, blocks, config)  # [B, H, T, D]
    """
    check_query_key(q, k)
    batch, groups, keys = k.shape[:3]
    count = math.ceil(keys / config.block_size)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if blocks.ndim != 4 or blocks.shape[:3] != (batch, groups, q.shape[2]):
        raise ValueError(f"blocks must be [B={batch}, G={groups}, T={q.shape[2]}, K], got {tuple(blocks.shape)}")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks must be int32 or int64, got {blocks.dtype}")
    if check_blocks and blocks.numel() and not -1 <= int(blocks.min()) <= int(blocks.max()) < count:
        raise ValueError(f"blocks must lie in -1..{count - 1}, got {int(blocks.min())}..{int(blocks.max())}")
    positions = query_positions(q, k, query_start, lengths)
    out = []
    for chunk in query_chunks(q.shape[2], q.shape[0] * q.shape[1] * keys):
        out.append(_attend(q[:, :, chunk], k, v, blocks[:, :, chunk], positions[:, chunk], config.block_size))
    return torch.cat(out, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    keys = k.shape[2]
    count = math.ceil(keys / block_size)
    listed = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=q.device)
    listed.scatter_(-1, torch.where(blocks < 0, count, blocks).long(), True)  # column `count` collects the -1
    token = torch.arange(keys, device=q.device)
    visible = listed[..., token // block_size] & (token <= positions[:, None, :, None])  # [B, G, t, S]
    grouped = rearrange(widen(q), "B (G h) t D -> (B G) h t D", G=k.shape[1])
    keys_of_group, values_of_group = (rearrange(widen(x), "B G S D -> (B G) 1 S D") for x in (k, v))
    out = F.scaled_dot_product_attention(
        grouped, keys_of_group, values_of_group, attn_mask=visible.flatten(0, 1)[:, None], enable_gqa=True
    )  # [B G, h, t, D]; a row that sees nothing gives 0
    return rearrange(out, "(B G) h t D -> B (G h) t D", B=q.shape[0]).to(q.dtype)
