"""Sparse attention over a tree of drafts: against plain softmax over each draft's visible keys, and against the causal
reference where the tree is a chain."""

from __future__ import annotations

import pytest
import torch

from minicpm_ref.cases.sparse_tree import SPARSE_TREE_ATTENTION, SparseTreeCase
from minicpm_ref.sparse import sparse_attention, sparse_tree_attention

ROWS = {case.name: case for case in SPARSE_TREE_ATTENTION}


@pytest.mark.parametrize("case", SPARSE_TREE_ATTENTION, ids=lambda case: case.name)
def test_each_draft_sees_its_blocks_and_its_ancestors(case: SparseTreeCase) -> None:
    q, k, v, blocks, tree_mask, config, lengths = case.build(torch.float64)
    out = sparse_tree_attention(q, k, v, blocks, tree_mask, config, lengths)
    group = case.query_heads // case.kv_heads
    for b, length in enumerate(case.lengths or (case.keys,) * case.batch):
        first = length - case.tokens
        for t in range(case.tokens):
            word = tree_mask[b, t].item() & (2**64 - 1)
            drafts = [first + j for j in range(case.tokens) if word >> j & 1]
            for h in range(case.query_heads):
                g = h // group
                listed = set(blocks[b, g, t].tolist())
                keys = [i for i in range(first) if i // config.block_size in listed] + drafts
                weights = (k[b, g, keys] @ q[b, h, t] / case.head_dim**0.5).softmax(0)
                torch.testing.assert_close(out[b, h, t], weights @ v[b, g, keys], rtol=1e-11, atol=1e-12)


def test_a_chain_is_causal_attention() -> None:
    q, k, v, blocks, tree_mask, config, _ = ROWS["chain"].build(torch.float64)
    expected = sparse_attention(q, k, v, blocks, config)
    torch.testing.assert_close(sparse_tree_attention(q, k, v, blocks, tree_mask, config), expected)


def test_branches_do_not_see_each_other() -> None:
    q, k, v, blocks, tree_mask, config, _ = ROWS["tree"].build(torch.float64)
    star = torch.tensor([[1 << t for t in range(7)]])
    expected = sparse_tree_attention(q, k, v, blocks, star, config)
    k[:, :, -2:] += 1  # the last two drafts
    v[:, :, -2:] += 1
    changed = sparse_tree_attention(q, k, v, blocks, star, config)
    assert torch.equal(changed[:, :, :-2], expected[:, :, :-2])
    assert not torch.equal(changed[:, :, -2:], expected[:, :, -2:])
    with_tree = sparse_tree_attention(q, k, v, blocks, tree_mask, config)
    assert not torch.equal(with_tree, changed)  # the row's tree is not a star: its ancestors count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.ones(1, 4, 65, 16)}, "65 drafts: expected at most 64"),
        ({"tree_mask": torch.ones(1, 7)}, "tree_mask must be int64"),
        ({"tree_mask": torch.ones(1, 6, dtype=torch.int64)}, r"got torch.int64 \[1, 6\]"),
        ({"lengths": torch.tensor([6])}, r"values in T=7..S=150, got \[6\]"),
        ({"blocks": torch.zeros(1, 2, 6, 3, dtype=torch.int32)}, r"blocks must be \[B=1, G=2, T=7, K\]"),
    ],
)
def test_arguments_are_checked(change: dict[str, torch.Tensor], words: str) -> None:
    names = ("q", "k", "v", "blocks", "tree_mask", "config", "lengths")
    arguments = dict(zip(names, ROWS["tree"].build(), strict=True)) | change
    with pytest.raises(ValueError, match=words):
        sparse_tree_attention(**arguments)
