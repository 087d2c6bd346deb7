"""The KV cache owns its lengths."""

from __future__ import annotations

import torch

from minicpm_ref.cache import KVCache
from minicpm_ref.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=8,
    max_position_embeddings=64,
)


def test_truncate_does_not_keep_the_callers_tensor() -> None:
    cache = KVCache(CONFIG, batch_size=1, capacity=16)
    cache.advance(torch.tensor([9]))
    keep = torch.tensor([6])
    cache.truncate(keep)
    cache.advance(torch.tensor([3]))
    assert keep.tolist() == [6]
    cache.truncate(keep)
    assert cache.lengths.tolist() == [6]
