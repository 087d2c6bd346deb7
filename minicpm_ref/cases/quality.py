"""Cases of the study of what sparse attention costs: settings for `window_only`, attention to sum up for `block_mass`.

The rows of `block_mass` give queries any place in the text, in any order: the first token, both sides of a block's
edge, the last token of a ragged block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minicpm_ref.cases.sparse import MEDIUM, PUBLISHED, SMALL
from minicpm_ref.config import SparseConfig


@dataclass(frozen=True)
class WindowOnlyCase:
    """One row: `window_only(config)`."""

    name: str
    config: SparseConfig

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[SparseConfig]:
        """(config,); neither a dtype nor a device matters."""
        return (self.config,)


@dataclass(frozen=True)
class BlockMassCase:
    """One row: `block_mass(q, k, positions, block_size)` with q [B, H, T, D], k [B, G, S, D], positions [B, T]."""

    name: str
    keys: int
    positions: tuple[tuple[int, ...], ...]
    block_size: int = 8
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    seed: int = 0

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """(q, k, positions, block_size)."""
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.tensor(self.positions, device=device)
        q = 2 * torch.randn(len(positions), self.query_heads, positions.shape[1], self.head_dim, generator=generator)
        k = torch.randn(len(positions), self.kv_heads, self.keys, self.head_dim, generator=generator)
        return q.to(device, dtype), k.to(device, dtype), positions, self.block_size


WINDOW_ONLY: tuple[WindowOnlyCase, ...] = (
    WindowOnlyCase("small", SMALL),
    WindowOnlyCase("medium", MEDIUM),
    WindowOnlyCase("published", PUBLISHED),
    WindowOnlyCase("window-counts-own-block", replace(SMALL, local_inclusive=False)),
    WindowOnlyCase("no-initial-block", replace(SMALL, init_blocks=0)),
    WindowOnlyCase("two-initial-blocks", replace(SMALL, init_blocks=2, topk=5)),
    WindowOnlyCase("a-window-already", replace(SMALL, topk=2)),
)

BLOCK_MASS: tuple[BlockMassCase, ...] = (
    BlockMassCase("one-token", 1, ((0,),)),
    BlockMassCase("around-a-block-edge", 37, ((0, 6, 7, 8, 9, 36),)),
    BlockMassCase("whole-blocks", 32, ((31, 15, 16),)),
    BlockMassCase("batch", 29, ((28, 3), (10, 20)), head_dim=32),
    BlockMassCase("group-1", 19, ((18, 5),), query_heads=2),
    BlockMassCase("group-16", 19, ((18, 5),), query_heads=16, kv_heads=1),
    BlockMassCase("block-of-one", 11, ((10, 4),), block_size=1),
)
