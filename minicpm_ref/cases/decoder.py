"""Cases of the decoder's own parts: rotary embedding and dense causal attention with grouped heads.

Rotary embedding goes wrong in the pairing of the halves, in the sign of one sine, and far from position 0, where the
angles are large; `far` and `two-numbers` look there. The frequencies have two lists under LongRoPE, so every row
with factors stands twice, once for each list.

Attention goes wrong where the queries are not all of the keys: a mask aligned to the wrong corner is right for T = S
and wrong for every cached step. So besides prefill rows (T = S) there are single tokens and chunks at the end of a
longer cache. The groups 1, 2, 4 and 16 tell `h // group` from `h % G`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicpm_ref.config import LongRope, ModelConfig


@dataclass(frozen=True)
class RopeFrequenciesCase:
    """One row: `rope_frequencies(config, long, device)` of a config with this head dim."""

    name: str
    head_dim: int
    theta: float = 10000.0
    long_rope: bool = False
    long: bool = False

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[ModelConfig, bool, torch.device | str]:
        """(config, long, device); `dtype` has no effect, frequencies are float32."""
        pairs = self.head_dim // 2
        factors = None
        if self.long_rope:
            short = tuple(1 + j / pairs for j in range(pairs))
            factors = LongRope(short, tuple(factor**3 for factor in short), original_max_position_embeddings=64)
        config = ModelConfig(
            vocab_size=16,
            hidden_size=4 * self.head_dim,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=256,
            rope_theta=self.theta,
            rope_scaling=factors,
        )
        return config, self.long, device


@dataclass(frozen=True)
class ApplyRopeCase:
    """One row: `apply_rope(x, cos, sin)` with x [*lead, T, D] and the angles of positions start ... start + T - 1.

    With `per_row`, cos and sin are [B, 1, T, D/2] with other positions in every row of the batch; else [T, D/2].
    """

    name: str
    lead: tuple[int, ...]
    tokens: int
    head_dim: int = 32
    start: int = 0
    per_row: bool = False
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, cos, sin): x rounded to `dtype`, cos and sin float32 as the model computes them."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(*self.lead, self.tokens, self.head_dim, generator=generator)
        positions = torch.arange(self.start, self.start + self.tokens).float()  # [T]
        if self.per_row:
            positions = positions + 7 * torch.arange(self.lead[0]).view(-1, 1, 1)  # [B, 1, T]
        frequencies = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)  # [D/2]
        angles = positions[..., None] * frequencies  # [T, D/2] or [B, 1, T, D/2]
        return x.to(device, dtype), angles.cos().to(device), angles.sin().to(device)


@dataclass(frozen=True)
class CausalAttentionCase:
    """One row: `causal_attention(q, k, v)` with q [B, H, T, D], k and v [B, G, S, D]; `keys` None means S = T."""

    name: str
    tokens: int
    keys: int | None = None
    batch: int = 1
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    scale: float = 1.0
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v), drawn in float32 on the CPU and then rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = self.tokens if self.keys is None else self.keys
        q = self.scale * torch.randn(self.batch, self.query_heads, self.tokens, self.head_dim, generator=generator)
        k, v = torch.randn(2, self.batch, self.kv_heads, keys, self.head_dim, generator=generator)
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


ROPE_FREQUENCIES: tuple[RopeFrequenciesCase, ...] = (
    RopeFrequenciesCase("one-pair", 2),
    RopeFrequenciesCase("three-pairs", 6),
    RopeFrequenciesCase("head-dim-64", 64),
    RopeFrequenciesCase("head-dim-128", 128),
    RopeFrequenciesCase("other-theta", 32, theta=500.0),
    RopeFrequenciesCase("long-without-factors", 32, long=True),
    RopeFrequenciesCase("short-list", 32, long_rope=True),
    RopeFrequenciesCase("long-list", 32, long_rope=True, long=True),
    RopeFrequenciesCase("long-list-128", 128, long_rope=True, long=True),
)

APPLY_ROPE: tuple[ApplyRopeCase, ...] = (
    ApplyRopeCase("length-1", (1, 4), 1),
    ApplyRopeCase("two-numbers", (), 5, head_dim=2),
    ApplyRopeCase("block-1", (1, 4), 63),
    ApplyRopeCase("block", (1, 4), 64),
    ApplyRopeCase("block+1", (1, 4), 65),
    ApplyRopeCase("prime", (1, 2), 101, head_dim=64),
    ApplyRopeCase("one-head-of-many", (1, 16), 7, head_dim=128),
    ApplyRopeCase("batch", (3, 2), 17),
    ApplyRopeCase("batch-of-other-positions", (3, 4), 17, per_row=True),
    ApplyRopeCase("decode", (2, 4), 1, start=4095),
    ApplyRopeCase("far", (1, 2), 9, head_dim=128, start=65_527),
)

CAUSAL_ATTENTION: tuple[CausalAttentionCase, ...] = (
    # length
    CausalAttentionCase("length-1", 1),
    CausalAttentionCase("length-2", 2),
    CausalAttentionCase("block-1", 63),
    CausalAttentionCase("block", 64),
    CausalAttentionCase("block+1", 65),
    CausalAttentionCase("prime", 101),
    CausalAttentionCase("ragged-last-block", 150),
    # query heads a group
    CausalAttentionCase("group-1", 33, query_heads=3, kv_heads=3),
    CausalAttentionCase("group-2", 33, query_heads=6, kv_heads=3),
    CausalAttentionCase("group-4", 33, query_heads=8, kv_heads=2, head_dim=64),
    CausalAttentionCase("group-16", 33, query_heads=32, kv_heads=2),
    CausalAttentionCase("one-kv-head", 33, query_heads=4, kv_heads=1),
    # at the end of a longer cache
    CausalAttentionCase("decode", 1, 101),
    CausalAttentionCase("decode-group-16", 1, 65, query_heads=32, kv_heads=2, head_dim=128),
    CausalAttentionCase("decode-second-token", 1, 2),
    CausalAttentionCase("chunk", 7, 64),
    CausalAttentionCase("chunk-ragged", 17, 101, query_heads=8, kv_heads=2),
    CausalAttentionCase("chunk-of-all-but-one", 16, 17),
    CausalAttentionCase("chunk-batch", 5, 23, batch=3),
    # batch, and scores so far apart that the softmax picks one key: it overflows unless the maximum is subtracted
    CausalAttentionCase("batch", 19, batch=3),
    CausalAttentionCase("one-hot", 13, query_heads=2, kv_heads=1, scale=1e4),
)
