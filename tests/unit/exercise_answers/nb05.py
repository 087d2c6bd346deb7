"""Answers to the exercises of notebook 05, right and wrong."""

from __future__ import annotations

from collections.abc import Callable

from exercise_answers import Right, Wrong
from minicpm_ref.config import SparseConfig
from minicpm_ref.exercises import nb05


def local_keys(i: int, config: SparseConfig) -> int:
    first = i // config.block_size - config.window_blocks + (0 if config.local_inclusive else 1)
    return i + 1 - max(0, first) * config.block_size


def pooling(config: SparseConfig) -> tuple[int, int, int]:
    start, before = config.block_size // config.kernel_stride, config.kernel_size // config.kernel_stride - 1
    return start + before, start, before


def kth_largest(count: Callable[[int], int], k: int) -> int:
    threshold = 0
    for bit in reversed(range(31)):
        if count(threshold | 1 << bit) >= k:
            threshold |= 1 << bit
    return threshold


def strictly(count: Callable[[int], int], k: int) -> int:
    return kth_largest(count, k + 1)


def by_tens(count: Callable[[int], int], k: int) -> int:
    low, high = 0, 2**31
    while high - low > 1:
        middle = low + max(1, (high - low) // 10)
        low, high = (middle, high) if count(middle) >= k else (low, middle)
    return low


RIGHT: list[Right] = [
    (nb05.check_local_keys, local_keys),
    (nb05.check_pooling, pooling),
    (nb05.check_kth_largest, kth_largest),
]

WRONG: dict[str, Wrong] = {
    "window_size": (nb05.check_local_keys, lambda i, c: min(i + 1, c.window_size), "not in the future"),
    "code only": (
        nb05.check_local_keys,
        lambda i, c: i + 1 - max(0, i // c.block_size - c.window_blocks) * c.block_size,
        "local_inclusive=False",
    ),
    "whole own block": (
        nb05.check_local_keys,
        lambda i, c: local_keys(i // c.block_size * c.block_size + c.block_size - 1, c),
        "token 0",
    ),
    "before the start": (
        nb05.check_local_keys,
        lambda i, c: c.window_size + i % c.block_size + c.local_inclusive,
        "token 0",
    ),
    "as published": (
        nb05.check_pooling,
        lambda c: (c.block_size // c.kernel_stride + 1, 4, 1),
        "gives",
    ),
    "paper's offset": (
        nb05.check_pooling,
        lambda c: (pooling(c)[0], pooling(c)[1], 0),
        "gives",
    ),
    "own windows alone": (
        nb05.check_pooling,
        lambda c: (pooling(c)[1], pooling(c)[1], 0),
        "gives",
    ),
    "strictly larger": (nb05.check_kth_largest, strictly, "expected"),
    "too many calls": (nb05.check_kth_largest, by_tens, "more than 31"),
}
