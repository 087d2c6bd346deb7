"""Answers to the exercises of notebook 07, right and wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.config import SparseConfig
from minicpm_ref.exercises import nb07


def forced_blocks(config: SparseConfig) -> int:
    return config.init_blocks + config.window_blocks + config.local_inclusive


def chance_kept(held: int, blocks: int, config: SparseConfig) -> float:
    free = blocks - forced_blocks(config)
    drawn = min(config.visible_blocks, blocks) - forced_blocks(config)
    return 1 - math.comb(free - held, drawn) / math.comb(free, drawn)


def with_replacement(held: int, blocks: int, config: SparseConfig) -> float:
    free = blocks - forced_blocks(config)
    drawn = min(config.visible_blocks, blocks) - forced_blocks(config)
    return 1 - (1 - drawn / free) ** held


def nothing_forced(held: int, blocks: int, config: SparseConfig) -> float:
    drawn = min(config.visible_blocks, blocks)
    return 1 - math.comb(blocks - held, drawn) / math.comb(blocks, drawn)


def earliest_token(i: int, layers: int, config: SparseConfig) -> int:
    reach = config.window_blocks - (0 if config.local_inclusive else 1)
    return max(0, i // config.block_size - layers * reach) * config.block_size


def smallest_budget(mass: Tensor, rank: Tensor, forced: Tensor, share: float) -> int:
    order = rank.masked_fill(forced, math.inf).argsort(descending=True)
    enough = mass[order].cumsum(0) >= share
    return max(int(forced.sum()), int(enough.int().argmax()) + 1)


def without_minimum(mass: Tensor, rank: Tensor, forced: Tensor, share: float) -> int:
    order = rank.masked_fill(forced, math.inf).argsort(descending=True)
    return int((mass[order].cumsum(0) >= share).int().argmax()) + 1


RIGHT: list[Right] = [
    (nb07.check_chance_kept, chance_kept),
    (nb07.check_earliest_token, earliest_token),
    (nb07.check_smallest_budget, smallest_budget),
]

WRONG: dict[str, Wrong] = {
    "with replacement": (nb07.check_chance_kept, with_replacement, "of all lists"),
    "nothing forced": (nb07.check_chance_kept, nothing_forced, "of all lists"),
    "the paper's band": (
        nb07.check_chance_kept,
        lambda held, blocks, c: 1 - math.comb(blocks - 3 - held, c.topk - 1) / math.comb(blocks - 3, c.topk - 1),
        "of all lists",
    ),
    "tokens": (
        nb07.check_earliest_token,
        lambda i, layers, c: max(0, i - layers * c.window_size),
        "reaches it",
    ),
    "one layer": (nb07.check_earliest_token, lambda i, _, c: earliest_token(i, 1, c), "after 2 layers"),
    "before the start": (
        nb07.check_earliest_token,
        lambda i, layers, c: (i // c.block_size - layers * c.window_blocks) * c.block_size,
        "token 0 after 1 layers",
    ),
    "code only": (
        nb07.check_earliest_token,
        lambda i, layers, c: max(0, i // c.block_size - layers * c.window_blocks) * c.block_size,
        "local_inclusive=False",
    ),
    "oracle": (
        nb07.check_smallest_budget,
        lambda mass, rank, forced, share: smallest_budget(mass, mass, forced, share),
        "fewer do not reach",
    ),
    "forced ones forgotten": (nb07.check_smallest_budget, without_minimum, "always read"),
    "one too few": (
        nb07.check_smallest_budget,
        lambda *a: max(4, smallest_budget(*a) - 1),
        "fewer do not reach",
    ),
    "ranked alone": (
        nb07.check_smallest_budget,
        lambda mass, rank, forced, share: smallest_budget(mass, rank, torch.zeros_like(forced), share),
        "always read|fewer do not reach",
    ),
}
