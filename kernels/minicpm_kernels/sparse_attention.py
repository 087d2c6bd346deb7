"""Stage 2 of block-sparse attention, the function that a model calls: it checks, and picks the kernel for the shape.

- a tree of draft tokens (verifying speculation): the same, with the drafts as one more part (`sparse_token`);
- a few tokens (decoding): one token a program, its list cut into parts (`sparse_token`);
- a prompt: a shared window and the union of neighbouring lists (`sparse_union`);
- training: the latter, and its gradient (`sparse_backward`). Lists have no gradient.

Source: arXiv 2509.24663, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minicpm_kernels import sparse_backward, sparse_token, sparse_union
from minicpm_kernels.checks import require_runnable, require_tensor
from minicpm_kernels.sparse_arguments import Settings, placement, require_blocks, require_heads, require_query_key

MOST_DRAFTS = 64  # bits of a mask word
FEW_TOKENS = 8  # up to here a split list fills the GPU better than a shared one

COMPILE_CONFIGS = ()  # the jitted functions are in the modules above, and so are their configurations


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the lists, the result and its log-sum-exp: nothing that grows with T times S."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: torch.Tensor,
        first: torch.Tensor,
        stop: torch.Tensor,
        config: Settings,
    ) -> torch.Tensor:
        out, lse = sparse_union.attend_union(q, k, v, blocks, first, stop, config)
        ctx.save_for_backward(q, k, v, out, lse, blocks, first, stop)
        ctx.config = config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = sparse_backward.attend_backward(dout.contiguous(), *ctx.saved_tensors, ctx.config)
        return *gradients, None, None, None, None


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    config: Settings,
    query_start: int | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention over the listed blocks; twin of `minicpm_ref.sparse_attention.sparse_attention`.

    q [B, H, T, D], k and v [B, G, S, D] in float32, float16 or bfloat16 on one GPU, with a contiguous head dimension of
    16, 32, 64 or 128; any group H / G; blocks int32 or int64 [B, G, T, K], each block once, -1 = empty; blocks of 4 to
    128 tokens, a power of two -> [B, H, T, D], contiguous, in the dtype of q. Any lists are right; those of
    `select_blocks` are fast. Gradients reach q, k and v; the same inputs give the same bits.

    Raises ValueError on anything else (bfloat16 in the interpreter included), and for queries or blocks outside the
    cache; while a CUDA graph is captured those values cannot be read and are not checked.
    """
    function = "sparse_attention"
    _validate(function, q, k, v, blocks, config)
    first, stop = placement(function, q, k, query_start, lengths)
    blocks = blocks.to(torch.int32)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, blocks, first, stop, config)
    if q.shape[2] <= FEW_TOKENS:
        return sparse_token.attend_tokens(q, k, v, blocks, first, stop, config.block_size)[0]
    return sparse_union.attend_union(q, k, v, blocks, first, stop, config)[0]


def sparse_tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    tree_mask: torch.Tensor,
    config: Settings,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a tree of drafts; twin of `minicpm_ref.sparse_tree.sparse_tree_attention`.

    q [B, H, T, D], the last T <= 64 of `lengths` [B] tokens of k and v [B, G, S, D]; blocks [B, G, T, K]; tree_mask
    int64 [B, T], bit j of draft t set when it sees draft j; the rest as in `sparse_attention` -> [B, H, T, D]. Raises
    ValueError on anything else, RuntimeError when a gradient would be needed.
    """
    function = "sparse_tree_attention"
    _validate(function, q, k, v, blocks, config)
    batch, _, tokens, _ = q.shape
    if tokens > MOST_DRAFTS:
        raise ValueError(f"{function}: q has {tokens} drafts, expected at most {MOST_DRAFTS}, the bits of a mask")
    require_tensor(function, "tree_mask", tree_mask, (batch, tokens), (torch.int64,), q.device)
    require_runnable(function, q, k, v)
    start = None if lengths is None else lengths - tokens
    first, stop = placement(function, q, k, start, lengths)
    blocks = blocks.to(torch.int32)
    return sparse_token.attend_tokens(q, k, v, blocks, first, stop, config.block_size, tree_mask=tree_mask)[0]


def _validate(
    function: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, config: Settings
) -> None:
    require_query_key(function, q, k, config)
    require_heads(function, "v", v, q)
    if v.shape != k.shape:
        raise ValueError(f"{function}: v has shape {list(v.shape)}, expected {list(k.shape)} like k")
    require_blocks(function, blocks, q, k, config.block_size)
