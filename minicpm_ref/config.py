"""Configurations: what a published `config.json` says, and the arithmetic that follows from it.

A decoder is fixed by about a dozen integers. From them follow, exactly and before any weight is loaded, the number of
parameters, the floating-point operations a token costs, and the bytes its keys and values occupy. The memory-bound
limit of a device is then one division, so a speed can be predicted before it is measured.

Sources: the MiniCPM4 technical report (arXiv 2506.07900) and the `config.json` files published with MiniCPM4 and
MiniCPM4.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_ref.published import FAMILIES, model_settings, read_json


@dataclass(frozen=True)
class SparseConfig:
    """InfLLM-V2 block-sparse attention, under the published field names of `sparse_config`.

    All lengths are in tokens, except `init_blocks` and `topk`, which count blocks. The two fields at the end are ours:
    `exact_lse` normalises block scores over the fine compressed keys instead of the coarse ones, and `local_inclusive`
    adds the query's own block to the window (what the released training code does) rather than counting it as part of
    the window (what the paper says).

    Raises ValueError, with the reason, for settings that make no sense together.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    exact_lse: bool = False
    local_inclusive: bool = True

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride", "block_size", "window_size", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"sparse_config.{name} = {getattr(self, name)}: expected at least 1")
        if self.init_blocks < 0:
            raise ValueError(f"sparse_config.init_blocks = {self.init_blocks}: expected 0 or more")
        if self.dense_len < -1:
            raise ValueError(f"sparse_config.dense_len = {self.dense_len}: expected -1 (always sparse) or a length")
        if self.kernel_size % self.kernel_stride:
            raise ValueError(
                f"sparse_config.kernel_size = {self.kernel_size} is not a multiple of "
                f"kernel_stride = {self.kernel_stride}"
            )
        if self.block_size % self.kernel_stride:
            raise ValueError(
                f"sparse_config.block_size = {self.block_size} is not a multiple of kernel_stride = "
                f"{self.kernel_stride}"
            )
        if self.window_size % self.block_size:
            raise ValueError(
                f"sparse_config.window_size = {self.window_size} is not a multiple of block_size = {self.block_size} "
                "(a window holds whole blocks, at least one)"
            )
        always = self.init_blocks + (1 if self.local_inclusive else 0)
        if self.topk < always:
            raise ValueError(
                f"sparse_config.topk = {self.topk}: expected at least {always}; the first {self.init_blocks} blocks "
                "and the local window are always visible, and the budget of topk + window blocks must hold them"
            )
        if self.use_nope:
            raise ValueError(
                "sparse_config.use_nope = true: scoring keys before RoPE belongs to a later model family and is not "
                "implemented; MiniCPM4 and MiniCPM4.1 publish false"
            )

    @property
    def window_blocks(self) -> int:
        """The local window in blocks."""
        return self.window_size // self.block_size

    @property
    def visible_blocks(self) -> int:
        """Blocks a token may look at: `topk` plus the window (96 as published)."""
        return self.topk + self.window_blocks


@dataclass(frozen=True)
class LongRope:
    """LongRoPE's per-frequency divisors, one list for short sequences and one for long ones; each holds head_dim / 2
    numbers."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A MiniCPM4 decoder under the field names of the published `config.json`; with all multipliers 1, a Llama decoder.

    Raises ValueError naming the field for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: LongRope | None = None
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 256
    tie_word_embeddings: bool = False
    initializer_range: float = 0.1
    bos_token_id: int = 1
    eos_token_id: tuple[int, ...] = (2,)
    sparse_config: SparseConfig | None = None
    head_dim: int = 0  # width of one attention head, D; 0 stands for hidden_size / num_attention_heads

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
            "dim_model_base",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = "
                    f"{self.num_attention_heads}; give head_dim where the two are not tied"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary embedding rotates pairs, expected an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        if self.rope_scaling is not None:
            for name in ("short_factor", "long_factor"):
                found = len(getattr(self.rope_scaling, name))
                if found != self.head_dim // 2:
                    raise ValueError(
                        f"rope_scaling.{name} holds {found} numbers: expected head_dim / 2 = {self.head_dim // 2}"
                    )

    # ---- sizes -------------------------------------------------------------------------------------------------------

    @property
    def is_llama(self) -> bool:
        """Whether this is exactly a Llama decoder: all three multipliers are 1 and attention is dense."""
        ones = (1.0, math.sqrt(self.num_hidden_layers), self.hidden_size)
        return (self.scale_emb, self.scale_depth, self.dim_model_base) == ones and self.sparse_config is None

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head, H / G."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def residual_scale(self) -> float:
        """muP depth multiplier of both residual branches, scale_depth / sqrt(L)."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        """muP width divisor of the final hidden state, C / dim_model_base."""
        return self.hidden_size / self.dim_model_base

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The seven matrices of one decoder layer as (out, in), under their published names."""
        c, f = self.hidden_size, self.intermediate_size
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (heads, c),
            "self_attn.k_proj": (kv, c),
            "self_attn.v_proj": (kv, c),
            "self_attn.o_proj": (c, heads),
            "mlp.gate_proj": (f, c),
            "mlp.up_proj": (f, c),
            "mlp.down_proj": (c, f),
        }

    def num_parameters(self, embeddings: bool = True) -> int:
        """Exact parameter count; `embeddings=False` leaves out the embedding and output matrices."""
        matrices = sum(rows * columns for rows, columns in self.linear_shapes().values())
        body = self.num_hidden_layers * (matrices + 2 * self.hidden_size) + self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return body + (tables if embeddings else 0)

    def flops_per_token(self, context_length: int) -> int:
        """Forward floating-point operations of one token that attends to `context_length` tokens (multiply and add
        count as two).

        Matrix products only: 2 a weight of every layer and of the output matrix, and 4 * H * D * context for attention.
        """
        weights = self.num_hidden_layers * sum(rows * columns for rows, columns in self.linear_shapes().values())
        attention = 2 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context_length
        return 2 * (weights + self.vocab_size * self.hidden_size + attention)

    def kv_bytes_per_token(self, bytes_per_element: float = 2) -> int:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return int(2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_element)

    def decode_bytes(
        self, context_length: int, bytes_per_weight: float = 2, bytes_per_element: float = 2, sparse: bool = False
    ) -> float:
        """Bytes that one decode step at batch 1 must read: the layers, the output matrix, and the KV cache.

        `bytes_per_weight` is that of the layers, which is what quantization shrinks; the output matrix stays at 2.
        With `sparse` only the blocks that `sparse_config` lists are read of the cache, and the compressed keys that
        the choice needs: one of every `kernel_stride` keys, and without `exact_lse` a quarter as many coarse ones.
        Divided by a device's bandwidth in bytes/s, the result is the shortest time a token can take. Raises ValueError
        for `sparse` without a `sparse_config`.
        """
        layers = self.num_parameters(embeddings=False) * bytes_per_weight
        cache: float = context_length * self.kv_bytes_per_token(bytes_per_element)
        if sparse:
            setting = self.sparse_config
            if setting is None:
                raise ValueError("sparse = True: expected a configuration with a sparse_config")
            listed = min(context_length, setting.visible_blocks * setting.block_size)
            compressed = context_length * (1 if setting.exact_lse else 1.25) / setting.kernel_stride
            # keys, and only they have compressed ones, are half of the cache
            cache = min(cache, (listed + compressed / 2) * self.kv_bytes_per_token(bytes_per_element))
        return layers + self.vocab_size * self.hidden_size * 2 + cache

    # ---- config.json -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a published `config.json` of a MiniCPM or a Llama decoder (see `published`).

        Raises ValueError naming the key when one is missing, is not what it should be, or describes a model that this
        package does not implement.

        >>> ModelConfig.from_dict(json.loads(Path("config.json").read_text()))
        """
        settings = model_settings(published)
        if settings["rope_scaling"] is not None:
            settings["rope_scaling"] = LongRope(**settings["rope_scaling"])
        if "sparse_config" in settings:
            settings["sparse_config"] = SparseConfig(**settings["sparse_config"])
        return cls(**settings)

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read the `config.json` at `path`. Raises FileNotFoundError or ValueError naming the file."""
        published = read_json(path)
        try:
            return cls.from_dict(published)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that `from_dict` reads back to an equal object."""
        family = "llama" if self.is_llama else "minicpm"
        out: dict[str, Any] = {"architectures": [FAMILIES[family]], "model_type": family, "hidden_act": "silu"}
        out |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.is_llama:  # the family says that they are 1
            for name in ("scale_emb", "scale_depth", "dim_model_base"):
                del out[name]
        out["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is None:
            del out["rope_scaling"]
        else:
            out["rope_scaling"] = {"rope_type": "longrope"} | {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self.rope_scaling).items()
            }
        if self.sparse_config is None:
            del out["sparse_config"]
        else:
            out["sparse_config"] = dataclasses.asdict(self.sparse_config)
        return out

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of `PRESETS` by name, e.g. "minicpm4.1-8b". Raises ValueError listing the names."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls.from_json(Path(__file__).parent / PRESETS[name])


PRESETS = {
    "minicpm4-0.5b": "presets/minicpm4-0.5b.json",
    "minicpm4-8b": "presets/minicpm4-8b.json",
    "minicpm4.1-8b": "presets/minicpm4.1-8b.json",
    "embedded": "weights/base/config.json",
}
"""Named configurations, as files of this package; "embedded" is the model whose weights are inside it."""


def next_border(config: ModelConfig, length: int) -> int | None:
    """The longest that a sequence of `length` tokens can become without another kind of attention or of angles (None:
    it never changes). A verification of drafts that would go past it must be cut there.

    >>> next_border(config, 500)  # config.sparse_config.dense_len == 512
    511
    """
    borders = []
    if config.sparse_config is not None:
        borders.append(config.sparse_config.dense_len - 1)
    if config.rope_scaling is not None:
        borders.append(config.rope_scaling.original_max_position_embeddings)
    return min((border for border in borders if border > length), default=None)
