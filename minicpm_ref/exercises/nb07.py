"""Checkers of 07_what_sparsity_costs: chance, how far news travels through local attention, and the smallest budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from minicpm_ref.config import SparseConfig
from minicpm_ref.exercises import attempt


def check_chance_kept(chance_kept: Callable[[int, int, SparseConfig], float]) -> str:
    """Check `chance_kept(held, blocks, config)`: that a random list of the last token of `blocks` blocks has at least
    one of `held` blocks, none of them forced."""

    def check() -> None:
        for inclusive in (True, False):
            for held, blocks, topk in ((1, 12, 4), (2, 12, 4), (3, 14, 5), (1, 9, 3), (2, 8, 5), (4, 11, 2)):
                config = SparseConfig(8, 4, 1, 16, 32, topk, local_inclusive=inclusive)
                found, expected = chance_kept(held, blocks, config), _counted(held, blocks, config)
                assert math.isclose(found, expected, abs_tol=1e-9), (
                    f"{held} of {blocks} blocks, budget {config.visible_blocks}, local_inclusive={inclusive}: {found}, "
                    f"but a share of {expected:.4f} of all lists has one of them"
                )
        found = chance_kept(2, 512, SparseConfig())
        assert math.isclose(found, 1 - math.comb(476, 62) / math.comb(478, 62)), "the published settings, 512 blocks"

    return attempt("chance_kept", check)


def check_earliest_token(earliest_token: Callable[[int, int, SparseConfig], int]) -> str:
    """Check `earliest_token(i, layers, config)` of attention to the local band alone (`init_blocks` is 0)."""

    def check() -> None:
        for inclusive in (True, False):
            for block, window in ((4, 8), (1, 3), (8, 8)):
                config = SparseConfig(1, 1, 0, block, window, topk=1, local_inclusive=inclusive)
                reads = _reads(12 * block, config)
                reached = torch.eye(len(reads), dtype=torch.bool)
                for layers in range(1, 5):
                    reached = (reached.float() @ reads.float()) > 0
                    for i in (0, block - 1, 4 * block, 5 * block + block // 2, 12 * block - 1):
                        found, expected = earliest_token(i, layers, config), int(reached[i].int().argmax())
                        assert found == expected, (
                            f"token {i} after {layers} layers, blocks of {block}, window {window}, "
                            f"local_inclusive={inclusive}: {found}, but token {expected} reaches it"
                        )

    return attempt("earliest_token", check)


def check_smallest_budget(smallest_budget: Callable[[Tensor, Tensor, Tensor, float], int]) -> str:
    """Check `smallest_budget(mass, rank, forced, share)`: blocks needed until their mass [N] reaches `share`."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            parts = torch.randint(0, 9, (12,), generator=generator).float()
            parts[3] += 128 - parts.sum()  # 128ths add up without rounding
            mass, rank = parts / 128, torch.randperm(12, generator=generator).float()
            forced = torch.tensor([True] + 8 * [False] + 3 * [True])
            for share in (0.125, 0.5, 0.75, 0.9375, 1.0):
                found = smallest_budget(mass.clone(), rank.clone(), forced.clone(), share)
                held = {budget: _held(mass, rank, forced, budget) for budget in range(4, 13)}
                expected = min(budget for budget, part in held.items() if part >= share)
                assert found >= 4, f"share {share}: {found} blocks, but the 4 forced ones are always read"
                assert found == expected, (
                    f"mass {parts.int().tolist()} / 128, rank {rank.int().tolist()}, blocks 0, 9, 10, 11 forced, share "
                    f"{share}: {found} blocks; {expected} hold {held[expected]}, and fewer do not reach the share"
                )

    return attempt("smallest_budget", check)


def _counted(held: int, blocks: int, config: SparseConfig) -> float:
    """Every list that there is, one by one."""
    band = config.window_blocks + (1 if config.local_inclusive else 0)
    free = range(config.init_blocks, blocks - band)
    drawn = min(config.visible_blocks, blocks) - config.init_blocks - band
    lists = list(combinations(free, drawn))
    return sum(any(n < config.init_blocks + held for n in chosen) for chosen in lists) / len(lists)


def _reads(tokens: int, config: SparseConfig) -> Tensor:
    """Which keys every token reads in the local band, bool [T, T]."""
    token = torch.arange(tokens)
    block = token // config.block_size
    band = config.window_blocks + (1 if config.local_inclusive else 0)
    return (block > block[:, None] - band) & (token <= token[:, None])


def _held(mass: Tensor, rank: Tensor, forced: Tensor, budget: int) -> float:
    best = rank.masked_fill(forced, math.inf).topk(budget).indices
    return float(mass[best].sum())
