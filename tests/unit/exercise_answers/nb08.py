"""Answers to the exercises of notebook 08, right and wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb08
from minicpm_ref.lowbit.packing import unpack


def checkpoint_bytes(config: ModelConfig, code_bits: float, group_size: int) -> float:
    packed = config.num_hidden_layers * sum(rows * columns for rows, columns in config.linear_shapes().values())
    return packed * (code_bits / 8 + 2 / group_size) + 2 * (config.num_parameters() - packed)


def everything_packed(config: ModelConfig, code_bits: float, group_size: int) -> float:
    return config.num_parameters() * (code_bits / 8 + 2 / group_size)


def unpack_trits(packed: Tensor, count: int, factor: int = 171, shift: int = 9) -> Tensor:
    rest, digits = packed.int(), []
    for _ in range(5):
        third = rest * factor >> shift
        digits.append(rest - 3 * third)
        rest = third
    return torch.stack(digits, 1).flatten()[:count].to(torch.int8) - 1


def divides(packed: Tensor, count: int) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81])
    return (packed[:, None] // powers % 3).flatten()[:count].to(torch.int8) - 1


def looks_up(packed: Tensor, count: int) -> Tensor:
    return unpack(packed, (1, count), "base3").flatten()


def last_digit_first(packed: Tensor, count: int) -> Tensor:
    whole = unpack_trits(packed, 5 * len(packed))
    return whole.view(-1, 5).flip(1).flatten()[:count]


def best_scales(w: Tensor, group_size: int) -> Tensor:
    magnitudes = w.abs().view(len(w), -1, group_size).sort(-1, descending=True).values
    sums, counts = magnitudes.cumsum(-1), torch.arange(1, group_size + 1)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    return (sums / counts).gather(-1, best).squeeze(-1)


RIGHT: list[Right] = [
    (nb08.check_checkpoint_bytes, checkpoint_bytes),
    (nb08.check_unpack_trits, unpack_trits),
    (nb08.check_best_scales, best_scales),
]

WRONG: dict[str, Wrong] = {
    "no scales": (nb08.check_checkpoint_bytes, lambda c, bits, _: checkpoint_bytes(c, bits, 10**12), "every group"),
    "groups of 128 always": (nb08.check_checkpoint_bytes, lambda c, bits, _: checkpoint_bytes(c, bits, 128), "64"),
    "embeddings, too": (nb08.check_checkpoint_bytes, everything_packed, "expected"),
    "division": (nb08.check_unpack_trits, divides, "divides"),
    "a table": (nb08.check_unpack_trits, looks_up, "table|divides"),
    "order of digits": (nb08.check_unpack_trits, last_digit_first, "number"),
    "a factor that is too coarse": (nb08.check_unpack_trits, lambda p, n: unpack_trits(p, n, 86, 8), "number|small k"),
    "digits, not codes": (nb08.check_unpack_trits, lambda p, n: unpack_trits(p, n) + 1, "number"),
    "the mean": (nb08.check_best_scales, lambda w, g: w.view(len(w), -1, g).abs().mean(-1), "mean is not"),
    "the largest": (nb08.check_best_scales, lambda w, g: w.view(len(w), -1, g).abs().amax(-1), "smallest possible"),
    "a constant of normal weights": (
        nb08.check_best_scales,
        lambda w, g: 1.534 * w.view(len(w), -1, g).abs().mean(-1),
        "smallest possible",
    ),
}
