"""The checkers of notebooks 00 and 01 accept right answers, name each usual mistake, and wait for an untouched cell."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb00, nb01
from minicpm_ref.model import causal_attention


def untouched(*_: object) -> Any:
    raise NotImplementedError


def to_bits_per_byte(loss: float, tokens: int, nbytes: int) -> float:
    return loss * tokens / math.log(2) / nbytes


def surprise(logits: Tensor, ids: list[int]) -> Tensor:
    log2p = logits[:-1].log_softmax(-1) / math.log(2)
    return -log2p[torch.arange(len(ids) - 1), ids[1:]]


def longest_context(config: ModelConfig, memory: int) -> int:
    return max(0, (memory - 2 * config.num_parameters()) // config.kv_bytes_per_token())


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


RIGHT: list[tuple[Callable[..., str], Callable[..., Any]]] = [
    (nb00.check_to_bits_per_byte, to_bits_per_byte),
    (nb00.check_surprise, surprise),
    (nb00.check_longest_context, longest_context),
    (nb01.check_window_attention, window_attention),
    (nb01.check_fold_multipliers, lambda weights, config: folded(weights, all_factors(config))),
    (nb01.check_from_interleaved, from_interleaved),
]

WRONG: dict[str, tuple[Callable[..., str], Callable[..., Any], str]] = {
    "nats": (nb00.check_to_bits_per_byte, lambda loss, tokens, nbytes: loss * tokens / nbytes, "expected 1 bit"),
    "per token": (nb00.check_to_bits_per_byte, lambda loss, *_: loss / math.log(2), "300 tokens for 1000 bytes"),
    "surprise in nats": (nb00.check_surprise, lambda x, ids: surprise(x, ids) * math.log(2), "these are nats"),
    "own token": (
        nb00.check_surprise,
        lambda x, ids: -x[1:].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]] / math.log(2),
        "row t of the logits",
    ),
    "no shift": (nb00.check_surprise, lambda x, ids: surprise(torch.cat((x, x[:1])), [0, *ids]), "expected 6 numbers"),
    "negative": (
        nb00.check_longest_context,
        lambda c, memory: (memory - 2 * c.num_parameters()) // c.kv_bytes_per_token(),
        "the weights alone",
    ),
    "rounded up": (
        nb00.check_longest_context,
        lambda c, memory: max(0, math.ceil((memory - 2 * c.num_parameters()) / c.kv_bytes_per_token())),
        "one byte short",
    ),
    "8B only": (nb00.check_longest_context, lambda _, m: max(0, (m - 16_370_507_776) // 32_768), "another config"),
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


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda value: getattr(value, "__name__", ""))
def test_right_answers_pass(check: Callable[..., str], answer: Callable[..., Any]) -> None:
    assert check(answer).endswith(": solved")


@pytest.mark.parametrize("check", [check for check, _ in RIGHT], ids=lambda check: check.__name__)
def test_an_untouched_cell_is_no_error(check: Callable[..., str]) -> None:
    assert check(untouched).endswith(": not solved yet")


@pytest.mark.parametrize("mistake", WRONG)
def test_each_mistake_is_named(mistake: str) -> None:
    check, answer, hint = WRONG[mistake]
    with pytest.raises(AssertionError, match=hint):
        check(answer)
