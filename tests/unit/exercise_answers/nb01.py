"""Answers to the exercises of notebook 01, right and wrong."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb01
from minicpm_ref.ops import causal_attention


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    rows = []
    for t in range(q.shape[2]):
        start = max(0, t + 1 - window)
        rows.append(causal_attention(q[:, :, t : t + 1], k[:, :, start : t + 1], v[:, :, start : t + 1]))
    return torch.cat(rows, dim=2)


def folded(weights: dict[str, Tensor], factors: dict[str, float]) -> dict[str, Tensor]:
    return {n: t * next((f for end, f in factors.items() if n.endswith(end)), 1.0) for n, t in weights.items()}


def all_factors(config: ModelConfig) -> dict[str, float]:
    residual = config.residual_scale
    return {
        "embed_tokens.weight": config.scale_emb,
        "o_proj.weight": residual,
        "down_proj.weight": residual,
        "lm_head.weight": 1 / config.logit_divisor,
    }


def without(config: ModelConfig, name: str) -> dict[str, float]:
    return {key: factor for key, factor in all_factors(config).items() if key != name}


def from_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    return rearrange(weight, "(h j two) c -> (h two j) c", two=2, j=head_dim // 2)


RIGHT: list[Right] = [
    (nb01.check_window_attention, window_attention),
    (nb01.check_fold_multipliers, lambda weights, config: folded(weights, all_factors(config))),
    (nb01.check_from_interleaved, from_interleaved),
]

WRONG: dict[str, Wrong] = {
    "one too many": (nb01.check_window_attention, lambda q, k, v, w: window_attention(q, k, v, w + 1), "window 1"),
    "no window": (nb01.check_window_attention, lambda q, k, v, w: causal_attention(q, k, v), "window 1"),
    "no embedding": (
        nb01.check_fold_multipliers,
        lambda weights, c: folded(weights, without(c, "embed_tokens.weight")),
        "scale_emb",
    ),
    "one branch": (
        nb01.check_fold_multipliers,
        lambda weights, c: folded(weights, without(c, "down_proj.weight")),
        "both branches",
    ),
    "no head": (
        nb01.check_fold_multipliers,
        lambda weights, c: folded(weights, without(c, "lm_head.weight")),
        "the output matrix",
    ),
    "scaled norms": (
        nb01.check_fold_multipliers,
        lambda weights, c: folded(weights, all_factors(c) | {"norm.weight": 2.0}),
        "a norm needs no change",
    ),
    "unchanged": (nb01.check_from_interleaved, lambda weight, _: weight, "scores changed"),
    "inverse": (
        nb01.check_from_interleaved,
        lambda weight, d: rearrange(weight, "(h two j) c -> (h j two) c", two=2, j=d // 2),
        "scores changed",
    ),
    "across heads": (
        nb01.check_from_interleaved,
        lambda weight, _: rearrange(weight, "(hj two) c -> (two hj) c", two=2),
        "scores changed",
    ),
}
