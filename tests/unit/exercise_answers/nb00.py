"""Answers to the exercises of notebook 00, right and wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb00


def to_bits_per_byte(loss: float, tokens: int, nbytes: int) -> float:
    return loss * tokens / math.log(2) / nbytes


def surprise(logits: Tensor, ids: list[int]) -> Tensor:
    log2p = logits[:-1].log_softmax(-1) / math.log(2)
    return -log2p[torch.arange(len(ids) - 1), ids[1:]]


def longest_context(config: ModelConfig, memory: int) -> int:
    return max(0, (memory - 2 * config.num_parameters()) // config.kv_bytes_per_token())


RIGHT: list[Right] = [
    (nb00.check_to_bits_per_byte, to_bits_per_byte),
    (nb00.check_surprise, surprise),
    (nb00.check_longest_context, longest_context),
]

WRONG: dict[str, Wrong] = {
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
}
