"""Cases of sparse attention over a tree of drafts: one draft, a chain, stars, random trees, the full 64 bits (whose
last is the sign), drafts across a block's edge, and batches of different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicpm_ref.cases.sparse import SMALL, SelectBlocksCase
from minicpm_ref.sparse import select_blocks


@dataclass(frozen=True)
class SparseTreeCase(SelectBlocksCase):
    """One row: `sparse_tree_attention(q, k, v, blocks, tree_mask, config, lengths)`.

    `branching` is the chance that a draft's parent is drawn from all drafts before it instead of being the one before
    it: 0 gives a chain, 1 a random tree. One draft in eight starts a branch at the text.
    """

    branching: float = 1.0

    def tree_mask(self) -> Tensor:
        """int64 [B, T]: the ancestors of every draft, itself included."""
        generator = torch.Generator().manual_seed(self.seed)
        masks = torch.zeros(self.batch, self.tokens, dtype=torch.int64)
        for b in range(self.batch):
            for t in range(self.tokens):
                draw = torch.rand(3, generator=generator)
                parent = int(draw[1] * t) if draw[0] < self.branching else t - 1
                if t and not (self.branching and draw[2] < 1 / 8):
                    masks[b, t] = masks[b, parent]
                masks[b, t] |= torch.tensor(1) << t
        return masks

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """(q, k, v, blocks, tree_mask, config, lengths)."""
        q, k, v = self.inputs(dtype, device)
        _, lengths = self.placement(device)
        start = (torch.full((self.batch,), self.keys) if lengths is None else lengths.cpu()) - self.tokens
        blocks = select_blocks(*self.inputs()[:2], self.config, start, None if lengths is None else lengths.cpu())
        return q, k, v, blocks.to(device), self.tree_mask().to(device), self.config, lengths


SPARSE_TREE_ATTENTION: tuple[SparseTreeCase, ...] = (
    SparseTreeCase("one-draft", 1, 150),
    SparseTreeCase("chain", 6, 150, branching=0.0),
    SparseTreeCase("tree", 7, 150),
    SparseTreeCase("nothing-but-drafts", 5, 5),
    SparseTreeCase("across-a-block-edge", 9, 132, query_heads=2, kv_heads=1),
    SparseTreeCase("group-16", 4, 187, query_heads=16, kv_heads=1, head_dim=32),
    SparseTreeCase("all-64-bits", 64, 100, query_heads=1, kv_heads=1),
    SparseTreeCase("batch", 5, 160, batch=3, lengths=(160, 5, 83), config=SMALL),
)
