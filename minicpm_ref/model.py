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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicpm_ref.cache import KVCache
from minicpm_ref.config import ModelConfig
from minicpm_ref.lowbit.layers import copy_packed
from minicpm_ref.ops import apply_rope, causal_attention, is_long, rms_norm, rope_angles, rope_attention_factor
from minicpm_ref.sparse import CompressedKeys, attend


@dataclass(frozen=True)
class Segment:
    """Sequences that stand alike in a batch: tokens [start, stop) of the input rows `rows`, which follow `past` tokens
    of the rows `cache_rows` in the cache, in sequences of `final` tokens once their prompts are complete."""

    rows: slice
    start: int
    stop: int
    cache_rows: slice
    past: int
    final: int

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of this segment in a [B, H, T, D] tensor."""
        return self.rows, slice(None), slice(self.start, self.stop)

    @property
    def end(self) -> int:
        """Tokens in each of its sequences after this call."""
        return self.past + self.stop - self.start


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

    With a `sparse_config`, a sequence of n tokens is attended densely while n < `dense_len` and block-sparsely
    (`sparse.attend`) otherwise; -1 means always sparse. The switch looks at the length alone, so one prefill of n >=
    `dense_len` tokens is sparse for all of them. A prompt that is fed in pieces must say how long it will be
    (`final_length` of `MiniCPM.forward`), or its first pieces are dense.
    """

    merges: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}  # linears of one x, which `lowbit` may merge

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
            out = self._attend(q, k, v, q.shape[2])
        else:
            out = torch.empty_like(q)
            for segment in segments:
                at = segment.slices
                keys, values, pooled = k[at], v[at], None  # [R, G, T, D]
                if cache is not None:
                    keys, values = cache.append(self.layer, segment.cache_rows, keys, values)  # [R, G, S, D]
                    if self._is_sparse(segment.final):
                        pooled = cache.pooled(self.layer, segment.cache_rows, keys)
                out[at] = self._attend(q[at], keys, values, segment.final, pooled)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))

    def _is_sparse(self, final: int) -> bool:
        return self.sparse is not None and final >= self.sparse.dense_len

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, final: int, pooled: CompressedKeys | None = None) -> Tensor:
        """Dense or sparse attention in sequences of `final` tokens; `pooled` are the compressed keys of k, if kept."""
        if self.sparse is None or not self._is_sparse(final):
            return causal_attention(q, k, v)
        return attend(q, k, v, self.sparse, pooled, self.selector)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer, arXiv 2002.05202."""

    merges: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}  # linears of one x, which `lowbit` may merge

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
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        cu_seqlens: Sequence[int] | None = None,
        *,
        last: bool = False,
        final_length: int | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V] of `input_ids` [B, T] (int64).

        With `cache`, row b continues the `cache.lengths[b]` tokens already in it, and the cache takes the new ones.
        With `cu_seqlens` = [0, t1, t1 + t2, ...] the input is one row [1, T] of sequences laid end to end without
        padding: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]), sees only itself, and belongs to cache row i.

        `last` computes the logits of each sequence's last token alone: [B, 1, V], or [1, n, V] for n packed sequences.
        `final_length` is for a prompt fed in pieces: how many tokens each row will hold when it is complete (None: this
        call completes it). Dense or sparse, short or long angles then are those of the whole prompt, and the pieces
        give the logits of one pass.

        Raises ValueError for ids outside the vocabulary, a `cu_seqlens` that does not cover the row, a full cache or
        one of another dtype, and sequences longer than `max_position_embeddings`.

        >>> cache = KVCache(model.config, capacity=512)
        >>> for piece in prompt.split(128, dim=1):  # prompt int64 [1, T]
        ...     logits = model(piece, cache, last=True, final_length=prompt.shape[1])  # [1, 1, V]
        """
        segments = self._segments(input_ids, cache, cu_seqlens, final_length)
        for x in self._residual_stream(input_ids, segments, cache):
            final = x  # each state is freed when the next one is there
        if last:
            stops = [-1] if cu_seqlens is None else [int(stop) - 1 for stop in cu_seqlens[1:]]
            final = final[:, stops]
        return self.logits(self.model.norm(final))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final, normed hidden states [..., C]."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden / self.config.logit_divisor, head.weight)

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The residual stream [B, T, C] after the embedding and after each layer, then the normed final state: L + 2
        tensors, all kept. Arguments as in `forward`, which keeps one."""
        states = list(self._residual_stream(input_ids, self._segments(input_ids, cache, cu_seqlens, None), cache))
        return [*states, self.model.norm(states[-1])]

    def _residual_stream(
        self, input_ids: Tensor, segments: list[Segment] | None, cache: KVCache | None
    ) -> Iterator[Tensor]:
        """The residual stream [B, T, C] after the embedding, then after each layer; at the end the cache has counted
        the new tokens."""
        if cache is not None:
            for segment in segments or []:
                for row in range(segment.cache_rows.start, segment.cache_rows.stop):
                    cache.turn_keys(row, segment.final)
        x = self.model.embed_tokens(input_ids) * self.config.scale_emb
        rope = self._rope(input_ids, segments)
        yield x
        for layer in self.model.layers:
            x = layer(x, rope, segments, cache)
            yield x
        if cache is not None:
            cache.advance(_new_tokens(segments or [], cache.batch_size))

    def _segments(
        self, input_ids: Tensor, cache: KVCache | None, cu_seqlens: Sequence[int] | None, final_length: int | None
    ) -> list[Segment] | None:
        """How the batch falls into sequences (None: every row is a whole one), once all arguments are known to fit."""
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, T] with T at least 1")
        if input_ids.device.type == "cpu":  # elsewhere a look would stall the device, and the embedding itself asserts
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token id {low if low < 0 else high}: expected 0 <= id < {self.config.vocab_size}")
        rows, tokens = input_ids.shape
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
        if cache is not None and len(spans) > cache.batch_size:
            raise ValueError(f"{len(spans)} sequences for a KV cache of {cache.batch_size} rows")
        if cache is not None and (cache.keys.dtype, cache.keys.device) != (self.dtype, self.device):
            raise ValueError(
                f"the KV cache is {cache.keys.dtype} on {cache.keys.device}: expected {self.dtype} on {self.device} "
                "like the model; build it with dtype=model.dtype, device=model.device"
            )
        segments: list[Segment] = []
        for i, (row, start, stop) in enumerate(spans):
            past = 0 if cache is None else int(cache.lengths[i])
            end = past + stop - start
            final = end if final_length is None else final_length
            if not end <= final <= self.config.max_position_embeddings:
                wanted = f"expected {end} to max_position_embeddings = {self.config.max_position_embeddings}"
                given = f"sequence {i} has {end} tokens" if final_length is None else f"final_length = {final_length}"
                raise ValueError(f"{given}: {wanted} (`with_config` runs the weights under other limits)")
            alike = segments and cu_seqlens is None and (segments[-1].past, segments[-1].final) == (past, final)
            first = segments.pop().rows.start if alike else row  # neighbours that stand alike are one call of attention
            of_cache = slice(i + first - row, i + 1)
            segments.append(Segment(slice(first, row + 1), start, stop, of_cache, past, final))
        if cache is None and cu_seqlens is None and final_length is None:
            return None
        if cache is not None:
            cache.reserve(_new_tokens(segments, cache.batch_size))
        return segments

    def _rope(self, input_ids: Tensor, segments: list[Segment] | None) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, D/2] (or [1, 1, T, D/2] when all rows agree), each sequence by its own positions and
        length."""
        tokens = input_ids.shape[1]
        if segments is None:
            positions = torch.arange(tokens, device=input_ids.device)[None]  # [1, T]
            long = torch.full_like(positions, is_long(self.config, tokens), dtype=torch.bool)
        else:
            positions = torch.empty_like(input_ids)  # [B, T]
            long = torch.empty_like(input_ids, dtype=torch.bool)
            for s in segments:
                positions[s.rows, s.start : s.stop] = torch.arange(s.past, s.end, device=input_ids.device)
                long[s.rows, s.start : s.stop] = is_long(self.config, s.final)
        angles = rope_angles(self.config, positions, long)[:, None]  # [B, 1, T, D/2]
        factor = rope_attention_factor(self.config)
        return angles.cos() * factor, angles.sin() * factor


def _new_tokens(segments: list[Segment], rows: int) -> Tensor:
    counts = torch.zeros(rows, dtype=torch.int64)
    for segment in segments:
        counts[segment.cache_rows] += segment.stop - segment.start
    return counts


def with_config(model: MiniCPM, **changes: Any) -> MiniCPM:
    """The same weights, copied, under a config with some fields changed, such as `rope_scaling` or `sparse_config`.

    Packed ternary layers stay packed, and what asks for no gradient still asks for none. Raises RuntimeError when a
    change asks for weights of another shape.
    """
    changed = MiniCPM(replace(model.config, **changes)).to(model.device, model.dtype)
    copy_packed(model, changed)
    changed.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        changed.get_parameter(name).requires_grad_(parameter.requires_grad)
    return changed.train(model.training)
