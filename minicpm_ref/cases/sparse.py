"""Cases of block-sparse attention: the shapes that have broken kernels before, small enough for an interpreter.

`compress_keys` and `pick_blocks`, the first and the last step of stage 1, have rows of their own.
Stage 1 (`select_blocks`, and `block_scores` with the same arguments) and stage 2 (`sparse_attention`) share their
rows; the lists that stage 2 is given are those the reference selects from the float32 inputs, the same for every
dtype. Two more rows of stage 2 are given random lists, of any length down to none at all and without forced blocks.

Rows without `big` have at most 200 keys, D = 16 or 32 and blocks of at most 16 tokens. Queries are scaled up, so that
a few blocks stand out and their order does not hang on rounding. With less than 32 bits it may: compare the scores of
what was chosen then, not the lists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minicpm_ref.config import SparseConfig
from minicpm_ref.sparse import query_positions, select_blocks

SMALL = SparseConfig(kernel_size=8, kernel_stride=4, init_blocks=1, block_size=16, window_size=32, topk=3, dense_len=-1)
MEDIUM = SparseConfig(kernel_size=32, kernel_stride=16, block_size=64, window_size=128, topk=4, dense_len=-1)
PUBLISHED = SparseConfig()


@dataclass(frozen=True)
class SelectBlocksCase:
    """One row: `select_blocks(q, k, config, query_start, lengths)` with q [B, H, T, D] and k [B, G, S, D]."""

    name: str
    tokens: int
    keys: int
    config: SparseConfig = SMALL
    batch: int = 1
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    query_start: int | tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    seed: int = 0
    big: bool = False

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v), drawn in float32 on the CPU and then rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        q = 3 * torch.randn(self.batch, self.query_heads, self.tokens, self.head_dim, generator=generator)
        k, v = torch.randn(2, self.batch, self.kv_heads, self.keys, self.head_dim, generator=generator)
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)

    def placement(self, device: torch.device | str = "cpu") -> tuple[int | Tensor | None, Tensor | None]:
        """(query_start, lengths): where the queries sit in the cache."""
        start = self.query_start
        return (
            torch.tensor(start, device=device) if isinstance(start, tuple) else start,
            None if self.lengths is None else torch.tensor(self.lengths, device=device),
        )

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """(q, k, config, query_start, lengths)."""
        q, k, _ = self.inputs(dtype, device)
        return q, k, self.config, *self.placement(device)


@dataclass(frozen=True)
class SparseAttentionCase(SelectBlocksCase):
    """One row: `sparse_attention(q, k, v, blocks, config, query_start, lengths)`, blocks int32 [B, G, T, K]."""

    random_lists: bool = False

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """(q, k, v, blocks, config, query_start, lengths)."""
        blocks = self._random_blocks() if self.random_lists else select_blocks(*super().build())
        return *self.inputs(dtype, device), blocks.to(device), self.config, *self.placement(device)

    def _random_blocks(self) -> Tensor:
        """Each past block with probability 1/2, ascending, -1 at the tail."""
        q, k, _ = self.inputs()
        positions = query_positions(q, k, *self.placement())
        count = -(-self.keys // self.config.block_size)
        block = torch.arange(count, dtype=torch.int32)
        drawn = torch.rand(
            self.batch, self.kv_heads, self.tokens, count, generator=torch.Generator().manual_seed(self.seed)
        )
        listed = (drawn < 0.5) & (block <= positions[:, None, :, None] // self.config.block_size)
        chosen = torch.where(listed, block, count).sort(-1).values
        return torch.where(chosen == count, -1, chosen).to(torch.int32)


@dataclass(frozen=True)
class CompressKeysCase:
    """One row: `compress_keys(k, kernel_size, stride)` with k [B, G, S, D]."""

    name: str
    keys: int
    kernel_size: int = 8
    stride: int = 4
    batch: int = 1
    kv_heads: int = 2
    head_dim: int = 16
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, int, int]:
        """(k, kernel_size, stride)."""
        generator = torch.Generator().manual_seed(self.seed)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.head_dim, generator=generator)
        return k.to(device, dtype), self.kernel_size, self.stride


@dataclass(frozen=True)
class PickBlocksCase:
    """One row: `pick_blocks(scores, positions, config)` with scores [B, G, T, N], positions [B, T].

    Scores take 8 values only, so ties abound, and blocks of the future have scores too.
    """

    name: str
    blocks: int
    positions: tuple[tuple[int, ...], ...]
    config: SparseConfig = SMALL
    kv_heads: int = 2
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, SparseConfig]:
        """(scores, positions, config); scores are exact in every dtype."""
        positions = torch.tensor(self.positions)
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.randint(8, (len(positions), self.kv_heads, positions.shape[1], self.blocks), generator=generator)
        return (scores / 8).to(device, dtype), positions.to(device), self.config


def _prefill(name: str, tokens: int, **settings: Any) -> SelectBlocksCase:
    return SelectBlocksCase(name, tokens, tokens, **settings)


SELECT_BLOCKS: tuple[SelectBlocksCase, ...] = (
    # length
    _prefill("one-token", 1),
    _prefill("below-a-compression-window", 7),
    _prefill("block-minus-1", 15),
    _prefill("block", 16),
    _prefill("block-plus-1", 17),
    _prefill("prime", 113),
    _prefill("whole-blocks", 128),
    _prefill("ragged-last-block", 150),
    _prefill("fewer-blocks-than-budget", 70, config=replace(SMALL, topk=8)),
    # query heads a group
    _prefill("group-1", 131, query_heads=2, kv_heads=2),
    _prefill("group-2", 131, query_heads=2, kv_heads=1),
    _prefill("group-4-head-dim-32", 131, query_heads=8, kv_heads=2, head_dim=32),
    _prefill("group-16", 131, query_heads=16, kv_heads=1),
    _prefill("group-3", 131, query_heads=6, kv_heads=2),
    # settings
    _prefill("exact-lse", 140, config=replace(SMALL, exact_lse=True)),
    _prefill("window-counts-own-block", 140, config=replace(SMALL, local_inclusive=False)),
    _prefill("window-only", 140, config=replace(SMALL, topk=2)),
    _prefill("no-initial-block", 140, config=replace(SMALL, init_blocks=0)),
    _prefill("two-initial-blocks", 200, config=replace(SMALL, init_blocks=2, topk=5)),
    _prefill("windows-side-by-side", 140, config=replace(SMALL, kernel_size=4)),
    _prefill("windows-overlap-fourfold", 150, config=replace(SMALL, kernel_size=16)),
    _prefill("block-is-one-stride", 70, config=replace(SMALL, block_size=4, window_size=8, topk=4)),
    # place in a longer cache
    SelectBlocksCase("chunk-at-an-offset", 23, 160, query_start=101),
    SelectBlocksCase("last-chunk", 33, 163),
    SelectBlocksCase("decode", 1, 150),
    SelectBlocksCase("decode-group-16", 1, 187, query_heads=16, kv_heads=1, head_dim=32),
    SelectBlocksCase("decode-first-token-of-a-block", 1, 145),
    # batches of different lengths
    SelectBlocksCase("padded-batch", 120, 120, batch=3, lengths=(120, 1, 77)),
    SelectBlocksCase("decode-batch-static-cache", 1, 160, batch=3, query_start=(159, 0, 82), lengths=(160, 1, 83)),
    SelectBlocksCase("draft-batch-static-cache", 5, 160, batch=2, query_start=(94, 140), lengths=(99, 144)),
    # large
    _prefill("medium", 1000, config=MEDIUM, query_heads=8, kv_heads=2, head_dim=64, big=True),
    _prefill("medium-batch", 515, config=MEDIUM, batch=2, head_dim=128, lengths=(515, 300), big=True),
    SelectBlocksCase("published-chunk", 16, 7011, config=PUBLISHED, query_heads=32, head_dim=128, big=True),
    SelectBlocksCase("published-decode", 1, 9001, config=PUBLISHED, query_heads=32, head_dim=128, big=True),
)

SPARSE_ATTENTION: tuple[SparseAttentionCase, ...] = (
    *(SparseAttentionCase(**{field.name: getattr(row, field.name) for field in fields(row)}) for row in SELECT_BLOCKS),
    SparseAttentionCase("random-lists", 150, 150, random_lists=True),
    SparseAttentionCase(
        "random-lists-decode-batch", 1, 160, batch=3, query_start=(159, 0, 82), lengths=(160, 1, 83), random_lists=True
    ),
)

COMPRESS_KEYS: tuple[CompressKeysCase, ...] = (
    CompressKeysCase("below-one-window", 7),
    CompressKeysCase("one-window", 8),
    CompressKeysCase("one-window-and-a-tail", 11),
    CompressKeysCase("two-windows", 12),
    CompressKeysCase("prime", 113, batch=2),
    CompressKeysCase("side-by-side", 30, kernel_size=4),
    CompressKeysCase("overlap-fourfold", 61, kernel_size=16),
    CompressKeysCase("published-fine", 127, kernel_size=32, stride=16, head_dim=32),
    CompressKeysCase("published-coarse", 200, kernel_size=128, stride=64, head_dim=32),
)

PICK_BLOCKS: tuple[PickBlocksCase, ...] = (
    PickBlocksCase("first-token", 1, ((0,),)),
    PickBlocksCase("around-a-block-edge", 12, ((95, 96, 97),)),
    PickBlocksCase("fewer-blocks-than-budget", 4, ((5, 16, 63),)),
    PickBlocksCase("budget-just-full", 12, ((79, 80),)),
    PickBlocksCase("cache-longer-than-the-text", 37, ((300, 301, 302),)),
    PickBlocksCase("batch-with-padding", 23, ((365, 366, 367), (100, -1, -1)), kv_heads=3),
    PickBlocksCase("window-counts-own-block", 23, ((200, 367),), replace(SMALL, local_inclusive=False)),
    PickBlocksCase("window-only", 23, ((200, 367),), replace(SMALL, topk=2)),
    PickBlocksCase("no-initial-block", 23, ((200, 367),), replace(SMALL, init_blocks=0)),
    PickBlocksCase("published", 150, ((9000, 9599),), PUBLISHED),
)
