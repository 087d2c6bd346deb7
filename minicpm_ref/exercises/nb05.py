"""Checkers of 05_choosing_blocks: the width of the local band, pooling for any settings, and the K-th largest score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from minicpm_ref.config import SparseConfig
from minicpm_ref.exercises import attempt
from minicpm_ref.sparse import pick_blocks, window_count

CALLS = 31  # bits of a non-negative float's pattern


def check_local_keys(local_keys: Callable[[int, SparseConfig], int]) -> str:
    """Check `local_keys(i, config)`: the keys that token i sees through the local band alone."""

    def check() -> None:
        for inclusive in (True, False):
            for block, window in ((64, 2048), (16, 32), (8, 8)):
                config = SparseConfig(8, 8, 0, block, window, topk=1, local_inclusive=inclusive)
                for i in (0, block - 1, block, window - 1, window, window + block - 1, 2 * window + 2 * block, 5000):
                    found, expected = local_keys(i, config), _keys_in_the_band(i, config)
                    assert found == expected, (
                        f"token {i}, blocks of {block}, window {window}, local_inclusive={inclusive}: {found} keys, "
                        f"but {expected} tokens of the band's blocks are not in the future"
                    )

    return attempt("local_keys", check)


def check_pooling(pooling: Callable[[SparseConfig], tuple[int, int, int]]) -> str:
    """Check `pooling(config)` -> (kernel, stride, padding) of the max pooling from windows to blocks."""

    def check() -> None:
        for size, stride, block in ((32, 16, 64), (16, 8, 32), (4, 4, 16), (16, 4, 16), (8, 4, 4), (24, 8, 64)):
            config = SparseConfig(size, stride, block_size=block, window_size=block)
            answer = pooling(config)
            assert len(answer) == 3, "three numbers: kernel, stride, padding"
            tokens = 20 * block
            scores = torch.rand(window_count(tokens, size, stride), generator=torch.Generator().manual_seed(0))
            expected = [
                max(score for j, score in enumerate(scores.tolist()) if _touches(j, n, config))
                for n in range(tokens // block)
            ]
            wide = F.pad(scores, (0, tokens // stride - len(scores)))  # windows that are not complete score 0
            try:
                found = F.max_pool1d(wide[None], *answer)[0, : len(expected)].tolist()
            except RuntimeError as error:
                raise AssertionError(f"windows of {size} every {stride}, blocks of {block}: {error}") from None
            shape = f"windows of {size} every {stride}, blocks of {block}: {answer} gives"
            assert len(found) == len(expected), f"{shape} {len(found)} blocks instead of {len(expected)}"
            wrong = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
            assert not wrong, f"{shape} block {wrong[0]} something else than the best of the windows that touch it"

    return attempt("pooling", check)


def check_kth_largest(kth_largest: Callable[[Callable[[int], int], int], int]) -> str:
    """Check `kth_largest(count, k)`, where count(threshold) says how many patterns are at least `threshold`."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(100, generator=generator).view(torch.int32).tolist()
        for patterns, ranks in (
            (drawn, (1, 2, 50, 100)),
            ([7], (1,)),
            ([5, 5, 5, 0, 0], (1, 3, 4, 5)),
            ([2**31 - 1, 2**30, 1], (1, 2, 3)),
        ):
            for k in ranks:
                _check_rank(kth_largest, patterns, k)

    return attempt("kth_largest", check)


def _check_rank(kth_largest: Callable[[Callable[[int], int], int], int], patterns: Sequence[int], k: int) -> None:
    calls = 0

    def count(threshold: int) -> int:
        nonlocal calls
        calls += 1
        assert calls <= CALLS, f"count was called more than {CALLS} times"
        return sum(pattern >= threshold for pattern in patterns)

    found, expected = kth_largest(count, k), sorted(patterns, reverse=True)[k - 1]
    shown = patterns if len(patterns) < 10 else f"{len(patterns)} scores"
    assert found == expected, f"k = {k} of {shown}: {found}, expected {expected}"


def _keys_in_the_band(i: int, config: SparseConfig) -> int:
    """What `pick_blocks` forces at position i when nothing is left for scores: the band, counted key by key."""
    count = i // config.block_size + 1
    band = config.window_blocks + (1 if config.local_inclusive else 0)
    blocks = pick_blocks(torch.zeros(1, 1, 1, count), torch.tensor([[i]]), config)[0, 0, 0].tolist()
    return sum(min(config.block_size, i + 1 - n * config.block_size) for n in blocks[-min(band, count) :] if n >= 0)


def _touches(window: int, block: int, config: SparseConfig) -> bool:
    first = window * config.kernel_stride
    last = first + config.kernel_size - 1
    return last >= block * config.block_size and first < (block + 1) * config.block_size
