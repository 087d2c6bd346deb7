"""A model of the wind tunnel: one width, one parametrization, and everything else held still.

muP (maximal update parametrization) says how initial weights, learning rates and multipliers must change with the
width so that every layer moves by the same amount at every width. Measured against a base width, with m = width / base:

| | muP | standard |
|---|---|---|
| initial std of a matrix inside a layer | s / sqrt(m) | s / sqrt(m) |
| its learning rate under AdamW | lr / m | lr |
| last hidden state before the output matrix | divided by m | as it is |
| embedding, norms, output matrix: learning rate | lr | lr |

At m = 1 the two are the same model and the same run, bit for bit. The standard form keeps the sensible initial size
(1 / sqrt(fan-in)): what goes wrong with it is not how it starts but how it moves.

Sources: Yang et al., arXiv 2203.03466 table 8; MiniCPM, arXiv 2404.06395 section 3 and table 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.training import Recipe

PARAMETRIZATIONS = ("mup", "standard")


@dataclass(frozen=True)
class Candidate:
    """Settings of one run. Lengths are in tokens, `ffn_ratio` is SwiGLU width / width, `evaluation_bytes` is how much
    held-out text measures the result. `base_width` has no default on purpose: without a base, muP is the standard form.
    """

    width: int
    base_width: int
    tokens: int
    lr: float
    parametrization: str = "mup"
    layers: int = 2
    head_dim: int = 16
    ffn_ratio: int = 2
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    initializer_range: float = 0.1
    optimizer: str = "adamw"
    matrix_lr: float = 0.02
    weight_decay: float = 0.0
    warmup_tokens: int = 8192
    decay: float = 0.3
    context: int = 128
    batch_tokens: int = 1024
    seed: int = 0
    evaluation_bytes: int = 40_000

    def __post_init__(self) -> None:
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization {self.parametrization!r}: expected one of {', '.join(PARAMETRIZATIONS)}")
        if self.width % self.head_dim:
            raise ValueError(f"width = {self.width} is not a multiple of head_dim = {self.head_dim}")
        if self.base_width < 1:
            raise ValueError(f"base_width = {self.base_width}: expected the width at which both forms are the same")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Candidate:
        """The candidate that `asdict` turned into `settings`; keys of others are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in known})

    def settings(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    def config(self, vocab_size: int = 4096) -> ModelConfig:
        """The model: heads of one size, four query heads (or all there are) to a key-value head, an output matrix of
        its own. The standard form is the model whose base is its own width."""
        heads = self.width // self.head_dim
        return ModelConfig(
            vocab_size,
            self.width,
            self.layers,
            heads,
            max(1, heads // 4),
            self.ffn_ratio * self.width,
            max_position_embeddings=self.context,
            scale_emb=self.scale_emb,
            scale_depth=self.scale_depth,
            initializer_range=self.initializer_range,
            dim_model_base=self.base_width if self.parametrization == "mup" else self.width,
        )

    def recipe(self, vocab_size: int = 4096) -> TunnelRecipe:
        """How it is trained, in float32 so that every machine runs the same arithmetic."""
        return TunnelRecipe(
            name=f"{self.parametrization}-{self.width}",
            config=self.config(vocab_size),
            tokens=self.tokens,
            context=self.context,
            batch_tokens=self.batch_tokens,
            optimizer=self.optimizer,
            lr=self.lr,
            matrix_lr=self.matrix_lr,
            weight_decay=self.weight_decay,
            warmup_tokens=self.warmup_tokens,
            decay=self.decay,
            seed=self.seed,
            precision="float32",
            base_width=self.base_width,
        )


@dataclass(frozen=True)
class TunnelRecipe(Recipe):
    """A recipe whose initial weights are those of muP at `base_width`, whichever form the model then trains in."""

    base_width: int = 256

    def build_model(self) -> MiniCPM:
        """Fresh weights: std initializer_range / sqrt(width / base_width) in every matrix inside a layer."""
        model = MiniCPM(self.config).init_weights(self.seed)
        missing = self.base_width / self.config.dim_model_base  # 1 under muP, where the config knows the base
        if missing != 1:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 2 and ".layers." in name:
                        parameter.mul_(math.sqrt(missing))
        return model


def multiplied_parameters(config: ModelConfig) -> int:
    """N of the scaling law: weights that a token is multiplied by, which are the layers' matrices and the output
    matrix (tied or not). The embedding is looked up, not multiplied, and the norms are a rounding error."""
    layers = config.num_hidden_layers * sum(rows * columns for rows, columns in config.linear_shapes().values())
    return layers + config.vocab_size * config.hidden_size


def training_flops(config: ModelConfig, tokens: float) -> float:
    """C = 6 N D: forward and backward products of `tokens` tokens, without attention's own (named convention)."""
    return 6.0 * multiplied_parameters(config) * tokens
