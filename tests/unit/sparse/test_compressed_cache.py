"""The incremental compressed keys equal pooling the whole key cache, to the last bit, whatever the history."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.sparse import CompressedKeyCache, compress_keys

CAPACITY = 150
SPARSE = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3)


def model_config(sparse: SparseConfig | None = SPARSE) -> ModelConfig:
    return ModelConfig(
        vocab_size=10,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        sparse_config=sparse,
    )


def random_keys(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, CAPACITY, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equals_whole(cache: CompressedKeyCache, layer: int, row: int, keys: torch.Tensor) -> None:
    fine, coarse = cache.update(layer, row, keys)
    assert torch.equal(fine[0], compress_keys(keys, 8, 4))
    assert torch.equal(coarse[0], compress_keys(keys, 32, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_by_token(dtype):
    keys = random_keys(dtype=dtype)
    cache = CompressedKeyCache(model_config(), capacity=CAPACITY, dtype=dtype)
    for length in range(1, CAPACITY + 1):
        assert_equals_whole(cache, 0, 0, keys[:, :length])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 60), st.integers(0, 5)), min_size=1, max_size=12))
def test_any_history_of_growing_and_taking_back(history):
    """Each step takes tokens back (and writes other keys there) or adds some."""
    cache = CompressedKeyCache(model_config(), batch_size=2, capacity=CAPACITY)
    keys, length = random_keys(), 0
    for step, seed in history:
        if step < 0:
            length = max(0, length + step)
            cache.truncate(1, length)
            keys = torch.cat((keys[:, :length], random_keys(seed)[:, length:]), dim=1)
        else:
            length = min(CAPACITY, length + step)
        assert_equals_whole(cache, 1, 1, keys[:, :length])


def test_layers_and_rows_are_independent():
    cache = CompressedKeyCache(model_config(), batch_size=2, capacity=CAPACITY)
    lengths = {(0, 0): 150, (0, 1): 3, (1, 0): 77, (1, 1): 32}
    for seed, ((layer, row), length) in enumerate(lengths.items()):
        cache.update(layer, row, random_keys(seed)[:, :length])
    for seed, ((layer, row), length) in enumerate(lengths.items()):
        assert_equals_whole(cache, layer, row, random_keys(seed)[:, :length])
    assert cache.pooled.tolist() == [[150, 3], [77, 32]]


def test_only_new_keys_are_read():
    keys = random_keys()
    cache = CompressedKeyCache(model_config(), capacity=CAPACITY)
    cache.update(0, 0, keys[:, :100])
    poisoned = keys.clone()
    # 100 tokens hold 24 fine windows (the next starts at 96) and 5 coarse ones (the next starts at 80)
    poisoned[:, :80] = float("nan")
    fine, coarse = cache.update(0, 0, poisoned)
    assert torch.equal(fine[0], compress_keys(keys, 8, 4))
    assert torch.equal(coarse[0], compress_keys(keys, 32, 16))


def test_without_truncate_stale_windows_would_stay():
    """Why `truncate` exists: keys rewritten in place and back at the old length look as if nothing had happened."""
    cache = CompressedKeyCache(model_config(), capacity=CAPACITY)
    cache.update(0, 0, random_keys(0)[:, :64])
    fine, _ = cache.update(0, 0, random_keys(1)[:, :64])
    assert not torch.equal(fine[0], compress_keys(random_keys(1)[:, :64], 8, 4))
    cache.truncate(0, 0)
    assert_equals_whole(cache, 0, 0, random_keys(1)[:, :64])


def test_a_row_that_shrank_or_overflows_is_refused():
    cache = CompressedKeyCache(model_config(), capacity=100)
    cache.update(0, 0, random_keys()[:, :64])
    with pytest.raises(ValueError, match=r"row 0 of layer 0 has 63 keys: expected 64 .* to 100"):
        cache.update(0, 0, random_keys()[:, :63])
    with pytest.raises(ValueError, match="has 101 keys"):
        cache.update(0, 0, random_keys()[:, :101])


def test_truncate_reaches_one_layer_or_all():
    cache = CompressedKeyCache(model_config(), batch_size=2, capacity=CAPACITY)
    for layer in range(2):
        for row in range(2):
            cache.update(layer, row, random_keys()[:, :64])
    cache.truncate(0, 50, layer=1)
    assert cache.pooled.tolist() == [[64, 64], [50, 64]]
    cache.truncate(0, 55)
    assert cache.pooled.tolist() == [[55, 64], [50, 64]]


def test_size():
    cache = CompressedKeyCache(model_config(), capacity=CAPACITY)
    assert cache.fine.shape == (2, 1, 2, 36, 8)
    assert cache.coarse.shape == (2, 1, 2, 8, 8)
    assert cache.nbytes == 4 * 2 * 2 * (36 + 8) * 8


def test_a_dense_model_has_none():
    with pytest.raises(ValueError, match="sparse_config is None"):
        CompressedKeyCache(model_config(sparse=None))
