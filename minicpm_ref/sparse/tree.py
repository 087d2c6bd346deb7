"""Sparse attention for a tree of draft tokens, the dull version.

Problem. Speculative decoding proposes several continuations at once: a tree, of which one path will be kept. Verifying
it is one forward pass over all its tokens, in which a draft must see the text and its own ancestors, and nothing of the
other branches. Causal order is not enough: a cousin that stands earlier in the cache is not an ancestor.

Idea. The drafts are the last T <= 64 tokens of the cache, in any order in which parents come first. One 64-bit word a
draft says which drafts it sees, itself included. Keys before the drafts follow the draft's block list as always. Blocks
and positions go by slot in the cache, not by depth in the tree: the slot is where the key is.

Source: the tree masks of CPM.cu (OpenBMB), which packs them the same way; tree attention: SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from minicpm_ref.config import SparseConfig

MOST_DRAFTS = 64  # bits of a mask word


def sparse_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    tree_mask: Tensor,
    config: SparseConfig,
    lengths: Tensor | None = None,
) -> Tensor:
    """Softmax attention of T drafts over the listed blocks before them and over their ancestors, scale 1/sqrt(D).

    q [B, H, T, D] stands at slots length - T .. length - 1 of k and v [B, G, S, D], of which the first `lengths` [B]
    tokens are real (None: all S). blocks int32 [B, G, T, K] as in `sparse_attention`; what they hold of the drafts is
    ignored. tree_mask int64 [B, T]: draft t sees draft j when bit j is set. Returns [B, H, T, D] in the dtype of q,
    computed in float32 (float64 for float64 inputs); a draft that sees nothing gives 0.

    Raises ValueError for more than 64 drafts, for shapes that do not fit, and for a length below T.
    """
    (batch, _, tokens, width), (groups, keys) = q.shape, k.shape[1:3]
    if tokens > MOST_DRAFTS:
        raise ValueError(f"q has {tokens} drafts: expected at most {MOST_DRAFTS}, the bits of a mask")
    if tree_mask.shape != (batch, tokens) or tree_mask.dtype != torch.int64:
        raise ValueError(f"tree_mask must be int64 [{batch}, {tokens}], got {tree_mask.dtype} {list(tree_mask.shape)}")
    if blocks.ndim != 4 or blocks.shape[:3] != (batch, groups, tokens):
        raise ValueError(f"blocks must be [B={batch}, G={groups}, T={tokens}, K], got {list(blocks.shape)}")
    stop = torch.full((batch,), keys, device=q.device) if lengths is None else lengths.to(q.device)
    if stop.shape != (batch,) or bool(((stop < tokens) | (stop > keys)).any()):
        raise ValueError(f"lengths must be [B={batch}] with values in T={tokens}..S={keys}, got {stop.tolist()}")

    token = torch.arange(keys, device=q.device)
    draft = token - (stop - tokens)[:, None]  # [B, S]: which draft stands there, negative for the text
    seen = (tree_mask[:, :, None] >> draft.clamp(0, MOST_DRAFTS - 1)[:, None]) & 1  # [B, T, S]
    ancestor = (seen == 1) & ((draft >= 0) & (draft < tokens))[:, None]
    listed = (blocks[..., None] == token // config.block_size).any(-2)  # [B, G, T, S]
    visible = (listed & (draft < 0)[:, None, None]) | ancestor[:, None]
    hidden = ~visible[:, :, None]

    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q.to(wide), "B (G h) T D -> B G h T D", G=groups)
    logits = grouped @ k.to(wide)[:, :, None].transpose(-1, -2) / math.sqrt(width)  # [B, G, h, T, S]
    weights = logits.masked_fill(hidden, torch.finfo(wide).min).softmax(-1).masked_fill(hidden, 0.0)
    out = weights @ v.to(wide)[:, :, None]  # [B, G, h, T, D]
    return rearrange(out, "B G h T D -> B (G h) T D").to(q.dtype)
