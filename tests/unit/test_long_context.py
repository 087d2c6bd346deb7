"""Stretched rotary angles: fast pairs stay, slow ones are slowed, and the same weights run under another config."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.model import with_config
from minicpm_ref.ops import rope_frequencies, stretched_rope

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    max_position_embeddings=256,
)


def test_fast_pairs_stay_and_slow_ones_are_divided() -> None:
    rope = stretched_rope(CONFIG, 64, 4.0)
    turns = (64 * rope_frequencies(CONFIG, long=False) / (2 * math.pi)).tolist()
    assert rope.short_factor == rope.long_factor
    assert max(turns) > 8
    assert min(turns) < 1
    for turn, divisor in zip(turns, rope.short_factor, strict=True):
        assert divisor == pytest.approx(1.0 if turn >= 8 else 4.0) if not 1 < turn < 8 else 1 < divisor < 4
    assert all(a <= b for a, b in pairwise(rope.short_factor))


def test_slow_pairs_stay_within_the_trained_angles() -> None:
    stretched = replace(CONFIG, rope_scaling=stretched_rope(CONFIG, 64, 4.0))
    plain, slowed = (rope_frequencies(config, long=False) for config in (CONFIG, stretched))
    slow = 64 * plain < 2 * math.pi
    assert (256 * slowed <= 64 * plain + 1e-5)[slow].all()


def test_factor_one_changes_nothing() -> None:
    assert set(stretched_rope(CONFIG, 64, 1.0).short_factor) == {1.0}


@pytest.mark.parametrize("arguments", [(0, 4.0), (64, 0.5), (64, 4.0, 1.0)])
def test_senseless_numbers_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        stretched_rope(CONFIG, *arguments)


@torch.no_grad()
def test_the_weights_are_the_same_under_another_config() -> None:
    model = fresh_model(CONFIG, seed=1)
    ids = torch.arange(40)[None]
    everything = SparseConfig(8, 4, 1, 16, 16, topk=40, dense_len=-1)
    torch.testing.assert_close(with_config(model, sparse_config=everything)(ids), model(ids), rtol=1e-4, atol=1e-5)
    stretched = with_config(model, rope_scaling=stretched_rope(CONFIG, 8, 4.0))
    assert not torch.allclose(stretched(ids), model(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_config(model, intermediate_size=32)
