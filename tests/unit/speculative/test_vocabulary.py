"""FR-Spec: which tokens are kept, what they cover, and a trimmed head."""

from __future__ import annotations

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.config import ModelConfig
from minicpm_ref.speculative import (
    Coverage,
    DraftHead,
    DraftHeadConfig,
    count_tokens,
    coverage,
    frequent_tokens,
    offsets,
    trim_head,
)

CONFIG = ModelConfig(40, 16, 2, 2, 1, 24, max_position_embeddings=64)


def head_of() -> DraftHead:
    model = fresh_model(CONFIG, seed=1)
    torch.manual_seed(0)
    return DraftHead(DraftHeadConfig.for_target(CONFIG, layers=(0, 1, 2)), model.model.embed_tokens.weight)


def test_the_frequent_ones_and_the_forced_ones() -> None:
    counts = count_tokens([[3, 3, 3, 1], [1, 7, 3]], 10)
    assert counts.tolist() == [0, 2, 0, 4, 0, 0, 0, 1, 0, 0]
    assert frequent_tokens(counts, 2).tolist() == [1, 3]
    assert frequent_tokens(counts, 3, always=[9]).tolist() == [1, 3, 9]
    assert frequent_tokens(counts, 5, always=[3, 3]).tolist() == [0, 1, 2, 3, 7]  # equal counts: the lower id
    for size in range(2, 11):  # asking for r gives r different ids, end ids present or not
        for always in ([], [2], [3], [3, 9]):
            kept = frequent_tokens(counts, size, always)
            assert len(kept) == len(set(kept.tolist())) == size
            assert set(always) <= set(kept.tolist())
            assert kept.tolist() == sorted(kept.tolist())


def test_coverage_is_a_share_of_the_text() -> None:
    counts = count_tokens([[3, 3, 3, 1, 1, 7]], 10)
    assert coverage(counts, torch.tensor([1, 3])) == Coverage(2, 10, pytest.approx(5 / 6))
    assert str(Coverage(1024, 4096, 0.9512)) == "1024 of 4096 tokens (25.0%) cover 95.1% of the text"


def test_offsets_not_ids() -> None:
    """Kept ids {0, 2, 5, 7}: d2t = (0, 1, 3, 4), target = i + d2t[i]."""
    kept = torch.tensor([0, 2, 5, 7])
    assert offsets(kept).tolist() == [0, 1, 3, 4]
    assert (torch.arange(4) + offsets(kept)).tolist() == kept.tolist()
    with pytest.raises(ValueError, match="ascend"):
        offsets(torch.tensor([2, 0]))


def test_a_trimmed_head_says_the_same_about_fewer_tokens() -> None:
    """D6: its law, spread over V, sums to one, is zero elsewhere, and keeps the ratios."""
    head = head_of()
    kept = torch.tensor([1, 4, 6, 30, 39])
    trimmed = trim_head(head, kept)
    assert trimmed.vocabulary.tolist() == kept.tolist()
    assert trimmed.to_target(torch.arange(5)).tolist() == kept.tolist()
    state = torch.randn(3, 16)
    full, small = head.logits(state), trimmed.logits(state)
    assert torch.allclose(small, full[:, kept])
    q = torch.zeros(3, 40).scatter(1, trimmed.vocabulary.expand(3, -1), small.softmax(-1))
    assert torch.allclose(q.sum(-1), torch.ones(3))
    assert q[:, [i for i in range(40) if i not in kept.tolist()]].abs().max() == 0
    again = trim_head(trimmed, torch.tensor([4, 39]))
    assert torch.allclose(again.logits(state), full[:, [4, 39]])
    assert trimmed.fc.weight.data_ptr() == head.fc.weight.data_ptr()  # nothing else is copied


def test_what_is_refused() -> None:
    counts = count_tokens([[1, 2]], 5)
    with pytest.raises(ValueError, match="size = 6"):
        frequent_tokens(counts, 6)
    with pytest.raises(ValueError, match="size = 1"):
        frequent_tokens(counts, 1, always=[0, 1])
    with pytest.raises(ValueError, match="always"):
        frequent_tokens(counts, 2, always=[7])
    with pytest.raises(ValueError, match="token id 9"):
        count_tokens([[9]], 5)
    with pytest.raises(ValueError, match="token 5 is not in the head's vocabulary"):
        trim_head(trim_head(head_of(), torch.tensor([1, 4])), torch.tensor([4, 5]))
