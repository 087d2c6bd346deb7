"""The MiniCPM4 decoder in plain PyTorch, with the published tensor names.

A pre-norm decoder like Llama's (RMSNorm, rotary positions, grouped-query attention, SwiGLU, no bias anywhere) plus the
three muP multipliers that make it MiniCPM:

1. the embedding is multiplied by `scale_emb`,
2. each residual branch by `scale_depth / sqrt(num_hidden_layers)`,
3. the last hidden state is divided by `hidden_size / dim_model_base` before the output matrix.

They keep activations and updates at the same size as the model grows, so that a learning rate found on a tiny model
holds for a large one (the "wind tunnel" of the MiniCPM reports).

Tensor letters: B batch, T tokens, H query heads, G key-value heads, D head dim, C hidden width, V vocabulary, S cached
tokens. Sources: MiniCPM4 technical report (arXiv 2506.07900); MiniCPM (arXiv 2404.06395) section 3 for the multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicpm_ref.cache import KVCache
from minicpm_ref.config import ModelConfig
from minicpm_ref.ops import apply_rope, causal_attention, rms_norm, rope_angles, rope_attention_factor
from minicpm_ref.sparse.attention import attend


@dataclass(frozen=True)
class Segment:
    """One sequence inside a batch: tokens [start, stop) of input row `row`, which follow `past` tokens of row
    `cache_row` in the cache."""

    row: int
    start: int
    stop: int
    cache_row: int
    past: int

    @property
    def slices(self) -> tuple[int, slice, slice]:
        """Index of this segment in a [B, H, T, D] tensor; gives [H, stop - start, D]."""
        return self.row, slice(None), slice(self.start, self.stop)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [C]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; `layer` is its index, which is also its place in the cache.

    With a `sparse_config`, a call whose sequence has n tokens so far is dense while n < `dense_len` and block-sparse
    (`sparse_attention`) otherwise; -1 means always sparse. The switch looks at the length alone: one prefill of n >=
    `dense_len` tokens is sparse for all of them, while the same tokens fed in pieces are dense up to `dense_len`.
    With -1, or when the first piece reaches `dense_len`, feeding in pieces selects the same blocks as one prefill.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        q_width = config.num_attention_heads * config.head_dim  # may differ from `width`: head_dim is its own number
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.qkv_proj: nn.Module | None = None  # q, k and v in one product, once `lowbit.layers` has merged them
        self.head_dim = config.head_dim
        self.sparse = config.sparse_config
        self.selector: Callable[..., Tensor] | None = None  # a rival of `select_blocks`, for comparison
        self.layer = layer

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Sequence[Segment] | None, cache: KVCache | None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]. `rope` is (cos, sin) [B, 1, T, D/2]; without `segments` every row is one whole
        sequence."""
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x)) if self.qkv_proj is None else self.qkv_proj(x)
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", d=self.head_dim) for part in qkv)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if segments is None:
            out = self._attend(q, k, v)
        else:
            out = torch.empty_like(q)
            for segment in segments:
                at = segment.slices
                keys, values = k[at], v[at]  # [G, T, D]
                if cache is not None:
                    keys, values = cache.append(self.layer, segment.cache_row, keys, values)  # [G, S, D]
                out[at] = self._attend(q[at][None], keys[None], values[None], cache, segment.cache_row)[0]
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None, row: int = 0) -> Tensor:
        """`causal_attention`, dense or sparse; with `cache` (B = 1), k and v are what it holds for `row`."""
        if self.sparse is None or k.shape[2] < self.sparse.dense_len:
            return causal_attention(q, k, v)
        pooled = None if cache is None or cache.compressed is None else cache.compressed.update(self.layer, row, k[0])
        return attend(q, k, v, self.sparse, pooled, self.selector)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj: nn.Module | None = None  # gate and up in one product, once `lowbit.layers` has merged them

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.gate_up_proj is None else self.gate_up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind a norm and added back with the muP depth multiplier."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.residual_scale = config.residual_scale

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Sequence[Segment] | None, cache: KVCache | None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, cache) * self.residual_scale
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_scale


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything below the output matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniCPM(nn.Module):
    """The MiniCPM4 language model; `state_dict` uses the published tensor names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the embedding, which is that of the hidden states."""
        return self.model.embed_tokens.weight.dtype

    def init_weights(self, seed: int = 0) -> MiniCPM:
        """Draw fresh weights under muP: std `initializer_range` for the embedding, divided by sqrt(C / dim_model_base)
        for every matrix inside a layer; norms are 1, and an output matrix of its own starts at 0, so that the first
        prediction is uniform. Sources: arXiv 2404.06395 table 7; arXiv 2203.03466 appendix D.2 (zero output)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            if name == "lm_head.weight":
                nn.init.zeros_(parameter)
                continue
            std = self.config.initializer_range
            if ".layers." in name:
                std /= math.sqrt(self.config.logit_divisor)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> Tensor:
        """Next-token logits [B, T, V] of `input_ids` [B, T] (int64).

        With `cache`, row b continues the `cache.lengths[b]` tokens already in it, and the cache takes the new ones.
        With `cu_seqlens` = [0, t1, t1 + t2, ...] the input is one row [1, T] of sequences laid end to end without
        padding: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]), sees only itself, and belongs to cache row i.

        Raises ValueError for ids outside the vocabulary, a `cu_seqlens` that does not cover the row, or a full cache.
        """
        return self.logits(self.hidden_states(input_ids, cache, cu_seqlens)[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final, normed hidden states [..., C]."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden / self.config.logit_divisor, head.weight)

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The residual stream [B, T, C] after the embedding and after each layer, then the normed final state: L + 2
        tensors."""
        segments = self._segments(input_ids, cache, cu_seqlens)
        x = self.model.embed_tokens(input_ids) * self.config.scale_emb
        rope = self._rope(input_ids, segments)
        if cache is not None:
            self._enter_long_context(cache, segments or [])
        states = [x]
        for layer in self.model.layers:
            states.append(layer(states[-1], rope, segments, cache))
        if cache is not None and segments is not None:
            cache.advance(_new_tokens(segments, cache.batch_size))
        return [*states, self.model.norm(states[-1])]

    def _segments(
        self, input_ids: Tensor, cache: KVCache | None, cu_seqlens: Sequence[int] | None
    ) -> list[Segment] | None:
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, T] with T at least 1")
        if input_ids.device.type == "cpu":  # elsewhere a look would stall the device, and the embedding itself asserts
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token id {low if low < 0 else high}: expected 0 <= id < {self.config.vocab_size}")
        rows, tokens = input_ids.shape
        if cache is None and cu_seqlens is None:
            return None
        if cu_seqlens is None:
            spans = [(row, 0, tokens) for row in range(rows)]
        else:
            bounds = [int(bound) for bound in cu_seqlens]
            spans = [(0, start, stop) for start, stop in pairwise(bounds)]
            if rows != 1 or (bounds[0], bounds[-1]) != (0, tokens) or any(stop <= start for _, start, stop in spans):
                raise ValueError(
                    f"cu_seqlens = {bounds} for input_ids {[rows, tokens]}: expected input_ids [1, T] and "
                    "0 = c0 < c1 < ... < cn = T"
                )
        if cache is None:
            return [Segment(row, start, stop, i, 0) for i, (row, start, stop) in enumerate(spans)]
        if len(spans) > cache.batch_size:
            raise ValueError(f"{len(spans)} sequences for a KV cache of {cache.batch_size} rows")
        segments = [Segment(row, start, stop, i, int(cache.lengths[i])) for i, (row, start, stop) in enumerate(spans)]
        cache.reserve(_new_tokens(segments, cache.batch_size))
        return segments

    def _rope(self, input_ids: Tensor, segments: list[Segment] | None) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, D/2] (or [1, 1, T, D/2] when all rows agree), each sequence by its own positions and
        length."""
        tokens = input_ids.shape[1]
        original = self.config.rope_scaling.original_max_position_embeddings if self.config.rope_scaling else tokens
        if segments is None:
            positions = torch.arange(tokens, device=input_ids.device)[None]  # [1, T]
            long = torch.full_like(positions, tokens > original, dtype=torch.bool)
        else:
            positions = torch.empty_like(input_ids)  # [B, T]
            long = torch.empty_like(input_ids, dtype=torch.bool)
            for s in segments:
                end = s.past + s.stop - s.start
                positions[s.row, s.start : s.stop] = torch.arange(s.past, end, device=input_ids.device)
                long[s.row, s.start : s.stop] = end > original
        angles = rope_angles(self.config, positions, long)[:, None]  # [B, 1, T, D/2]
        factor = rope_attention_factor(self.config)
        return angles.cos() * factor, angles.sin() * factor

    def _enter_long_context(self, cache: KVCache, segments: list[Segment]) -> None:
        """Turn the cached keys of every row that crosses LongRoPE's original length from the short to the long angles.

        Rotations add, so turning a cached key by (long - short) makes its distance to a new query the one the long list
        means. Only the first layer's keys become what a prefill at the new length would store: deeper states were
        computed at the short angles, and only a recomputation can change that. In the published files both lists are
        equal and nothing turns.
        """
        scaling = self.config.rope_scaling
        if scaling is None or scaling.short_factor == scaling.long_factor:
            return
        original = scaling.original_max_position_embeddings
        for s in segments:
            if 0 < s.past <= original < s.past + s.stop - s.start:
                positions = torch.arange(s.past, device=cache.keys.device)
                long = torch.ones_like(positions, dtype=torch.bool)
                turn = rope_angles(self.config, positions, long) - rope_angles(self.config, positions, ~long)
                keys = cache.keys[:, s.cache_row, :, : s.past]  # [L, G, S, D]
                keys.copy_(apply_rope(keys, turn.cos(), turn.sin()))
                if cache.compressed is not None:
                    cache.compressed.truncate(s.cache_row, 0)


def _new_tokens(segments: list[Segment], rows: int) -> Tensor:
    counts = torch.zeros(rows, dtype=torch.int64)
    for segment in segments:
        counts[segment.cache_row] += segment.stop - segment.start
    return counts


def with_config(model: MiniCPM, **changes: Any) -> MiniCPM:
    """The same weights, copied, under a config with some fields changed, such as `rope_scaling` or `sparse_config`.

    Raises RuntimeError when a change asks for weights of another shape.
    """
    changed = MiniCPM(replace(model.config, **changes)).to(model.device, model.dtype)
    changed.load_state_dict(model.state_dict())
    return changed.train(model.training)
