"""The small functions of the decoder: norms, rotary positions, causal attention.

They stand below the model, so that a kernel, a draft head or an executor can use them without a decoder, and a fused
kernel has a reference with its own name and signature.

Why fuse: on a GPU an elementwise step costs what its bytes cost. A residual add and then an RMSNorm, as two steps, move
3 + 2 tensors of the size of the hidden state (read residual, read branch, write hidden; read hidden, write normed).
Fused, the hidden state is normalised while it is still in registers: 2 are read and 2 written, which is at best 5 / 4 =
1.25 times faster. MiniCPM scales each residual branch by scale_depth / sqrt(layers) (muP; MiniCPM, arXiv 2404.06395),
so the scale is part of the add.

Why stretch: RoPE turns every pair of a query and a key by an angle that grows with their distance. Fast pairs have gone
round many times within a training piece, so they have seen every angle. Slow ones have not: at a distance that training
never had, they reach angles for which the weights were never asked, and attention goes to arbitrary places.
`stretched_rope` slows down those pairs alone. Local order, which fast pairs carry, is untouched. LongRoPE's divisors
say the same thing with searched numbers, and the model has a place for them (`ModelConfig.rope_scaling`). Left out:
YaRN's temperature on the logits, and fine-tuning, which every published long-context model has had.

Tensor letters as in `minicpm_ref.model`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicpm_ref import row_blocks
from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.machine import multiplies_bfloat16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32, result in x's dtype.

    x [..., C], weight [C]. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x32.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """hidden = residual + scale * branch, and its RMSNorm: the end of one residual branch and the start of the next.

    residual, branch [..., C] of one dtype; weight [C]. Returns (hidden, normed), both [..., C] in the dtype of
    `residual`. The sum is taken in float32; `hidden` is rounded once, and normed from the unrounded sum.
    """
    hidden = residual.float() + scale * branch.float()
    return hidden.to(residual.dtype), rms_norm(hidden, weight.float(), eps).to(residual.dtype)


def rope_frequencies(config: ModelConfig, long: bool, device: torch.device | str = "cpu") -> Tensor:
    """Angle in radians that one token step adds to each rotated pair, [D/2] float32.

    Plain RoPE: theta^(-2j/D). LongRoPE divides entry j by a searched factor, taken from the short or the long list.
    Sources: Su et al., arXiv 2104.09864; Ding et al., arXiv 2402.13753.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        factors = config.rope_scaling.long_factor if long else config.rope_scaling.short_factor
        frequencies = frequencies / torch.tensor(factors, device=device, dtype=torch.float32)
    return frequencies


def is_long(config: ModelConfig, length: int) -> bool:
    """Whether a sequence of `length` tokens takes LongRoPE's long list of divisors."""
    return config.rope_scaling is not None and length > config.rope_scaling.original_max_position_embeddings


def rope_attention_factor(config: ModelConfig) -> float:
    """What LongRoPE multiplies both cos and sin by: sqrt(1 + ln(max / original) / ln(original)); 1 for plain RoPE."""
    if config.rope_scaling is None:
        return 1.0
    original = config.rope_scaling.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_angles(config: ModelConfig, positions: Tensor, long: Tensor) -> Tensor:
    """Rotation angles [..., T, D/2] in float32 of `positions` [..., T]; `long` (bool, broadcastable) picks LongRoPE's
    list."""
    positions = positions.unsqueeze(-1).float()
    short_angles = positions * rope_frequencies(config, False, positions.device)
    if config.rope_scaling is None:
        return short_angles
    return torch.where(long.unsqueeze(-1), positions * rope_frequencies(config, True, positions.device), short_angles)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., T, D] by the angles whose cos and sin are [..., T, D/2], in the half-split ("NeoX") layout.

    Entry j is paired with entry j + D/2. Computed in float32, returned in x's dtype.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def stretched_rope(config: ModelConfig, trained_tokens: int, factor: float, often: float = 8.0) -> LongRope:
    """Divisors that let a model trained on pieces of `trained_tokens` read texts `factor` times as long.

    The same list stands for short and long texts, so no switch happens in the middle of one. Raises ValueError for
    lengths below 1, `factor` below 1, or `often` not above 1.

    A pair that turns `often` times or more within the trained length is left as it is; one that turns less than once is
    divided by `factor`, so that `factor` times the length stays within its known angles; in between the speed is
    interpolated. Source: YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts").
    """
    if trained_tokens < 1 or factor < 1 or often <= 1:
        raise ValueError(
            f"trained_tokens {trained_tokens}, factor {factor}, often {often}: expected at least 1, 1, and above 1"
        )
    plain = rope_frequencies(replace(config, rope_scaling=None), long=False)  # [D/2], radians a token
    turns = trained_tokens * plain / (2 * math.pi)
    keep = ((turns - 1) / (often - 1)).clamp(0, 1)
    divisors = tuple((1 / (keep + (1 - keep) / factor)).tolist())
    return LongRope(divisors, divisors, config.max_position_embeddings)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of the last T of S tokens over all S, causal, with grouped key-value heads.

    q [B, H, T, D], k and v [B, G, S, D] with H a multiple of G and S >= T; query head h reads key-value
    head h // (H / G). Returns [B, H, T, D]. Scale 1/sqrt(D); `scaled_dot_product_attention` keeps the softmax in
    float32. Training in bfloat16 on a CPU that multiplies it in hardware takes `row_block_attention`, which is faster.
    """
    new_tokens, total, groups = q.shape[2], k.shape[2], k.shape[1]
    if new_tokens == 1:
        # one token sees everything, so the heads of a group can stand as the queries of one head: their keys are read
        # once and not once a head, which is all that decoding costs
        folded = rearrange(q, "b (g h) 1 d -> b g h d", g=groups)
        return rearrange(F.scaled_dot_product_attention(folded, k, v), "b g h d -> b (g h) 1 d")
    training = torch.is_grad_enabled() and q.dtype == torch.bfloat16 and new_tokens == total <= row_blocks.LONGEST
    if training and q.device.type == "cpu" and multiplies_bfloat16(q.device):
        return row_blocks.row_block_attention(q, k, v)
    mask = None
    if new_tokens < total:
        mask = torch.ones(new_tokens, total, dtype=torch.bool, device=q.device).tril(total - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
