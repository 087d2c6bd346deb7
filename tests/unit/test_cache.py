"""The KV cache owns its lengths, and knows at which of LongRoPE's angles its keys stand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.cache import KVCache
from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.model import MiniCPM

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


ORIGINAL = 16  # LongRoPE's original length
# one layer: its keys depend on tokens and angles alone, so a rollback must be exact to rounding
LONG = replace(
    CONFIG,
    hidden_size=32,
    head_dim=16,
    intermediate_size=32,
    rope_scaling=LongRope((1.0,) * 8, tuple(1.5 + 0.7 * j for j in range(8)), ORIGINAL),
)
CLOSE = {"rtol": 0, "atol": 2e-5}  # rotations are float32 whatever the model; a key at the wrong angles errs by 1e-3
IDS = torch.randint(16, (1, 24), generator=torch.Generator().manual_seed(0))


def long_model() -> MiniCPM:
    return fresh_model(LONG, seed=1).double()


def cache_of(model: MiniCPM) -> KVCache:
    return KVCache(model.config, 1, 32, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("crossings", [1, 2])
def test_a_rejected_draft_across_the_long_edge_leaves_no_trace(crossings: int) -> None:
    model = long_model()
    cache = cache_of(model)
    model(IDS[:, :14], cache)
    keys = cache.keys[:, :, :, :14].clone()
    for _ in range(crossings):
        model(IDS[:, 10:15], cache)  # a draft that crosses the original length
        assert (cache.keys[:, :, :, 1:14] - keys[:, :, :, 1:]).abs().max() > 1e-2  # turned
        cache.truncate(torch.tensor([14]))
    torch.testing.assert_close(model(IDS[:, 14:15], cache), model(IDS[:, :15])[:, -1:], **CLOSE)
    # forwards again: turned once, not twice
    torch.testing.assert_close(model(IDS[:, 15:20], cache), model(IDS[:, :20])[:, -5:], **CLOSE)


@torch.no_grad()
def test_a_call_that_fails_after_the_turn_turns_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_model()
    cache = cache_of(model)
    model(IDS[:, :14], cache)
    with monkeypatch.context() as broken:
        broken.setattr(model.model.layers[0].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[:, 14:20], cache)
    assert cache.lengths.tolist() == [14]
    torch.testing.assert_close(model(IDS[:, 14:20], cache), model(IDS[:, :20])[:, -6:], **CLOSE)


@torch.no_grad()
def test_the_turn_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: keys that stay where they were written."""
    monkeypatch.setattr(KVCache, "turn_keys", lambda self, row, length: None)
    model = long_model()
    cache = cache_of(model)
    model(IDS[:, :14], cache)
    assert (model(IDS[:, 14:20], cache) - model(IDS[:, :20])[:, -6:]).abs().max() > 1e-4
