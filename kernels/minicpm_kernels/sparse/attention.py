"""Stage 2 of block-sparse attention, the function that a model calls: it checks, and picks the kernel for the shape.

- a few tokens (decoding): one token a program, its list cut into parts (`one_token`);
- a prompt: a shared window and the union of neighbouring lists (`union`);
- training: the latter, and its gradient (`backward`). Lists have no gradient.

Source: arXiv 2509.24663, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minicpm_kernels.sparse import backward, one_token, union
from minicpm_kernels.sparse.arguments import placement, require_attention
from minicpm_kernels.sparse.windows import Settings

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
        out, lse = union.attend_union(q, k, v, blocks, first, stop, config)
        ctx.save_for_backward(q, k, v, out, lse, blocks, first, stop)
        ctx.config = config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = backward.attend_backward(dout.contiguous(), *ctx.saved_tensors, ctx.config)
        return *gradients, None, None, None, None


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    config: Settings,
    query_start: int | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    check_blocks: bool = True,
) -> torch.Tensor:
    """Causal softmax attention over the listed blocks; twin of `minicpm_ref.sparse.attention.sparse_attention`.

    q [B, H, T, D], k and v [B, G, S, D] in float32, float16 or bfloat16 on one GPU, with a contiguous head dimension of
    16, 32, 64 or 128; any group H / G; blocks int32 or int64 [B, G, T, K], each block once, -1 = empty; blocks of 4 to
    128 tokens, a power of two -> [B, H, T, D], contiguous, in the dtype of q. Any lists are right; those of
    `select_blocks` are fast. Gradients reach q, k and v; the same inputs give the same bits.

    Raises ValueError on anything else (bfloat16 in the interpreter included), and for queries or blocks outside the
    cache; while a CUDA graph is captured those values cannot be read and are not checked. `check_blocks=False` does not
    read the lists' values off the device: without tensors for `query_start` and `lengths` no call then waits for it.
    """
    function = "sparse_attention"
    require_attention(function, q, k, v, blocks, config, check_blocks)
    first, stop = placement(function, q, k, query_start, lengths)
    blocks = blocks.to(torch.int32)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, blocks, first, stop, config)
    if q.shape[2] <= FEW_TOKENS:
        return one_token.attend_tokens(q, k, v, blocks, first, stop, config.block_size)[0]
    return union.attend_union(q, k, v, blocks, first, stop, config)[0]
