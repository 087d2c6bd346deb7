"""Checkers of 00_start_here: a loss in bits per byte, the surprise of each token, and what fits into a device's
memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import attempt


def check_to_bits_per_byte(to_bits_per_byte: Callable[[float, int, int], float]) -> str:
    """Check `to_bits_per_byte(loss, tokens, nbytes)`: a mean loss in nats a token, as bits a byte."""

    def check() -> None:
        found = to_bits_per_byte(math.log(2), 10, 10)
        assert math.isclose(found, 1.0), f"ln 2 nats a token, one byte a token: expected 1 bit a byte, got {found}"
        found = to_bits_per_byte(math.log(256), 4, 4)
        assert math.isclose(found, 8.0), f"guessing evenly among 256 bytes: expected 8 bits a byte, got {found}"
        found = to_bits_per_byte(1.5, 300, 1000)
        expected = 1.5 * 300 / math.log(2) / 1000
        assert math.isclose(found, expected), f"300 tokens for 1000 bytes: expected {expected:.3f}, got {found:.3f}"

    return attempt("to_bits_per_byte", check)


def check_surprise(surprise: Callable[[Tensor, list[int]], Tensor]) -> str:
    """Check `surprise(logits, ids)`: logits [T, V] of T ids -> bits of each id but the first, [T - 1]."""

    def check() -> None:
        logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 3
        ids = [3, 1, 4, 1, 5, 9, 2]
        found = surprise(logits.clone(), list(ids))
        assert tuple(found.shape) == (6,), f"7 ids: expected 6 numbers, got shape {tuple(found.shape)}"
        nats = [-logits[t].softmax(-1)[ids[t + 1]].log().item() for t in range(6)]
        expected = torch.tensor(nats) / math.log(2)
        assert not torch.allclose(found, torch.tensor(nats), atol=1e-4), "these are nats; divide by ln 2 for bits"
        assert torch.allclose(found, expected, atol=1e-4), "row t of the logits is about id t + 1, not about id t"

    return attempt("surprise", check)


def check_longest_context(longest_context: Callable[[ModelConfig, int], int]) -> str:
    """Check `longest_context(config, memory)`: tokens of 2-byte KV cache that fit in `memory` bytes beside the 2-byte
    weights; 0 when the weights alone do not fit."""

    def check() -> None:
        config = ModelConfig.preset("minicpm4.1-8b")
        weights, a_token = 2 * config.num_parameters(), config.kv_bytes_per_token()
        found = longest_context(config, weights)
        assert found == 0, f"memory for the weights and not a byte more: expected 0, got {found}"
        found = longest_context(config, weights + 5 * a_token)
        assert found == 5, f"room for exactly 5 tokens: expected 5, got {found}"
        found = longest_context(config, weights + 6 * a_token - 1)
        assert found == 5, f"one byte short of 6 tokens: expected 5, got {found}"
        found = longest_context(config, weights // 2)
        assert found == 0, f"the weights alone do not fit: expected 0, got {found}"
        small = ModelConfig.preset("minicpm4-0.5b")
        found = longest_context(small, 2 * small.num_parameters() + small.kv_bytes_per_token())
        assert found == 1, f"another config, room for one token: expected 1, got {found}"

    return attempt("longest_context", check)
