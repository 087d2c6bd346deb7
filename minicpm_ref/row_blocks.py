"""Causal attention in row blocks with a backward pass of its own, for training in bfloat16 on a CPU.

Problem. In a training step at 512 tokens, the library's attention on a CPU takes two fifths of the time, most of it in
its backward pass, where it multiplies small tiles one by one.

Idea. The query heads of a group share keys, so they are stacked: a block of rows, all its heads together, is one
product with the keys that it may see. Nothing above the diagonal block is computed, and the probabilities are kept for
the backward pass, which is then five products a block. Where the processor multiplies bfloat16 in hardware this makes a
training step about twice as fast together with Newton-Schulz in bfloat16 (`training.optimizers`); in float32 it wins
nothing over the library and is not used.

Left out: a tiled softmax. Probabilities take rows x keys / 2 numbers a head, as much as the logits of a 512-token
sequence cost anyway; long sequences take the library's attention. Source of the tiles: FlashAttention, arXiv
2205.14135.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # rows a block: their scores stay in the second-level cache
LONGEST = 2048  # tokens; beyond, the kept probabilities would outgrow the rest of the model


class _RowBlocks(torch.autograd.Function):
    """q [N, R, T, D] (R query heads of each of N groups), k and v [N, T, D] -> [N, R, T, D]; q comes scaled."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, heads, tokens, width = q.shape
        out = torch.empty_like(q)
        future = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        kept = []
        for start in range(0, tokens, ROWS):
            stop = min(start + ROWS, tokens)
            rows = stop - start
            stacked = q[:, :, start:stop].reshape(groups, heads * rows, width)
            logits = torch.bmm(stacked, k[:, :stop].mT).view(groups, heads, rows, stop)
            logits[..., start:] += future[:rows, :rows]  # only the diagonal block holds keys of the future
            probabilities = logits.softmax(-1).view(groups, heads * rows, stop)
            out[:, :, start:stop] = torch.bmm(probabilities, v[:, :stop]).view(groups, heads, rows, width)
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        groups, heads, tokens, width = q.shape
        dq = torch.empty_like(q)
        # a key collects from every later block: sums of many terms, so in float32
        dk, dv = (
            torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) for x in (k, v)
        )
        for start, probabilities in zip(range(0, tokens, ROWS), kept, strict=True):
            stop = min(start + ROWS, tokens)
            shape = (groups, heads * (stop - start), width)
            dout_block, q_block = (x[:, :, start:stop].reshape(shape) for x in (dout, q))
            # softmax: dlogits = p * (dp - sum over keys of p * dp), one row at a time
            dprobabilities = torch.bmm(dout_block, v[:, :stop].mT)
            dlogits = torch._softmax_backward_data(dprobabilities, probabilities, -1, probabilities.dtype)
            dq[:, :, start:stop] = torch.bmm(dlogits, k[:, :stop]).view(groups, heads, stop - start, width)
            dk[:, :stop] += torch.bmm(dlogits.mT, q_block)
            dv[:, :stop] += torch.bmm(probabilities.mT, dout_block)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def row_block_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of T tokens over themselves, scale 1/sqrt(D), with gradients for q, k and v.

    q [B, H, T, D], k and v [B, G, T, D] of one dtype, H a multiple of G; query head h reads key-value head h // (H /
    G). Returns [B, H, T, D]. Raises ValueError for other shapes.
    """
    (batch, heads, tokens, width), groups = q.shape, k.shape[1]
    if k.shape != (batch, groups, tokens, width) or v.shape != k.shape or heads % groups:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected k and v of one shape, with q's batch, "
            "tokens and width, and a divisor of its heads"
        )
    grouped = (q * width**-0.5).reshape(batch * groups, heads // groups, tokens, width)
    out: Tensor = _RowBlocks.apply(
        grouped, k.reshape(batch * groups, tokens, width), v.reshape(batch * groups, tokens, width)
    )
    return out.view(batch, heads, tokens, width)
