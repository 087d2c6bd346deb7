"""Sparse attention for a tree of draft tokens: one token a program, with the drafts as one more part of its list.

Source: the tree masks of CPM.cu (OpenBMB); tree attention: SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

import torch

from minicpm_kernels.checks import require_runnable, require_tensor
from minicpm_kernels.sparse import one_token
from minicpm_kernels.sparse.arguments import placement, require_attention
from minicpm_kernels.sparse.windows import Settings

MOST_DRAFTS = 64  # bits of a mask word

COMPILE_CONFIGS = ()  # the jitted functions are in `one_token`, and so are their configurations


def sparse_tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    tree_mask: torch.Tensor,
    config: Settings,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a tree of drafts; twin of `minicpm_ref.sparse.tree.sparse_tree_attention`.

    q [B, H, T, D], the last T <= 64 of `lengths` [B] tokens of k and v [B, G, S, D]; blocks [B, G, T, K]; tree_mask
    int64 [B, T], bit j of draft t set when it sees draft j; the rest as in `sparse_attention` -> [B, H, T, D]. Raises
    ValueError on anything else, RuntimeError when a gradient would be needed.
    """
    function = "sparse_tree_attention"
    require_attention(function, q, k, v, blocks, config)
    batch, _, tokens, _ = q.shape
    if tokens > MOST_DRAFTS:
        raise ValueError(f"{function}: q has {tokens} drafts, expected at most {MOST_DRAFTS}, the bits of a mask")
    require_tensor(function, "tree_mask", tree_mask, (batch, tokens), (torch.int64,), q.device)
    require_runnable(function, q, k, v)
    start = None if lengths is None else lengths - tokens
    first, stop = placement(function, q, k, start, lengths)
    blocks = blocks.to(torch.int32)
    return one_token.attend_tokens(q, k, v, blocks, first, stop, config.block_size, tree_mask=tree_mask)[0]
