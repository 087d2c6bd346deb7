"""Answers to the exercises of notebook 09, right and wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb09


def speedup(tokens: int, bandwidth: float, float_rate: float, int8_rate: float, bits: float = 2.125) -> float:
    return max(2 / bandwidth, tokens / float_rate) / max(bits / 8 / bandwidth, tokens / int8_rate)


def address(row: int, column: int, columns: int) -> tuple[int, int]:
    chunk = row // 16 * (columns // 16) + column // 16
    return 64 * chunk + 4 * (row % 16) + column % 4, 2 * (column % 16 // 4)


def one_row_after_another(row: int, column: int, columns: int) -> tuple[int, int]:
    return (row * columns + column) // 4, 2 * (column % 4)


def neighbours_in_a_byte(row: int, column: int, columns: int) -> tuple[int, int]:
    chunk = row // 16 * (columns // 16) + column // 16
    return 64 * chunk + 4 * (row % 16) + column % 16 // 4, 2 * (column % 4)


def one_block(row: int, column: int, columns: int) -> tuple[int, int]:
    return 64 * (column // 16) + 4 * (row % 16) + column % 4, 2 * (column % 16 // 4)


def digits_as_floats(halves: Tensor) -> Tensor:
    moved = halves >> 10
    pairs = [(halves if pair < 5 else moved) & 3 << 2 * (pair % 5) for pair in range(8)]
    return torch.stack(pairs, 1).view(torch.float16)


def without_the_shift(halves: Tensor) -> Tensor:
    return torch.stack([halves & (3 << 2 * pair if pair < 7 else -(1 << 14)) for pair in range(8)], 1).view(
        torch.float16
    )


def mask_before_shift(halves: Tensor) -> Tensor:
    high = [(halves & mask) >> 10 for mask in (3 << 10, 3 << 12, -(1 << 14))]  # the sign is shifted in again
    return torch.stack([halves & 3 << 2 * pair for pair in range(5)] + high, 1).view(torch.float16)


def converts(halves: Tensor) -> Tensor:
    digits = torch.stack([halves >> 2 * pair & 3 for pair in range(8)], 1)
    return (digits.float() * 4.0 ** (torch.arange(8) % 5) * 2.0**-24).half()


RIGHT: list[Right] = [
    (nb09.check_speedup, speedup),
    (nb09.check_address, address),
    (nb09.check_digits_as_floats, digits_as_floats),
]

WRONG: dict[str, Wrong] = {
    "no scales": (nb09.check_speedup, lambda *a: speedup(*a, bits=2), "scales are read"),
    "bytes only": (nb09.check_speedup, lambda *_: 16 / 2.125, "arithmetic decides"),
    "one limit for both": (nb09.check_speedup, lambda t, b, f, i: 16 / 2.125 if t < 5 else i / f, "4 tokens"),
    "upside down": (nb09.check_speedup, lambda *a: 1 / speedup(*a), "bytes decide"),
    "row-major": (nb09.check_address, one_row_after_another, "holds"),
    "neighbours in a byte": (nb09.check_address, neighbours_in_a_byte, "holds"),
    "one block only": (nb09.check_address, one_block, "row 16"),
    "beyond the exponent": (nb09.check_digits_as_floats, without_the_shift, "pair [567]"),
    "sign": (nb09.check_digits_as_floats, mask_before_shift, "pair 7"),
    "converts": (nb09.check_digits_as_floats, converts, "masks, shifts and views"),
}
