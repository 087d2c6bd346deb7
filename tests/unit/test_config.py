"""ModelConfig and SparseConfig: published files, published arithmetic, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from minicpm_ref.config import PRESETS, ModelConfig, SparseConfig
from minicpm_ref.model import MiniCPM


@pytest.mark.parametrize(
    ("preset", "total", "without_embeddings", "kv_bytes"),
    [
        ("minicpm4-8b", 8_185_253_888, 7_583_567_872, 32 * 1024),
        ("minicpm4.1-8b", 8_185_253_888, 7_583_567_872, 32 * 1024),
        ("minicpm4-0.5b", 433_873_920, 358_663_168, 12 * 1024),
    ],
)
def test_published_arithmetic(preset: str, total: int, without_embeddings: int, kv_bytes: int) -> None:
    config = ModelConfig.preset(preset)
    assert config.num_parameters() == total
    assert config.num_parameters(embeddings=False) == without_embeddings
    assert config.kv_bytes_per_token() == kv_bytes


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_the_model_on_the_meta_device(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        model = MiniCPM(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("preset", PRESETS)
def test_config_round_trips_through_json(preset: str) -> None:
    config = ModelConfig.preset(preset)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_flops_count_two_per_weight_and_four_per_attended_element() -> None:
    config = ModelConfig.preset("minicpm4-8b")
    weights = config.num_parameters(embeddings=False) - (2 * 32 + 1) * 4096 + 73448 * 4096
    assert config.flops_per_token(0) == 2 * weights
    assert config.flops_per_token(1000) - config.flops_per_token(0) == 4 * 32 * 4096 * 1000


def test_published_longcontext_fields_are_read() -> None:
    config = ModelConfig.preset("minicpm4.1-8b")
    assert config.rope_scaling is not None
    assert config.sparse_config is not None
    assert config.rope_scaling.original_max_position_embeddings == 65536
    assert len(config.rope_scaling.long_factor) == config.head_dim // 2 == 64
    assert config.sparse_config.visible_blocks == 96
    assert config.eos_token_id == (2, 73440)


def test_unknown_keys_are_ignored_and_missing_keys_named() -> None:
    published = ModelConfig.preset("minicpm4-8b").to_dict() | {"auto_map": {}}
    assert ModelConfig.from_dict(published) == ModelConfig.preset("minicpm4-8b")
    del published["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size"):
        ModelConfig.from_dict(published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 30, "head_dim": None}, "hidden_size = 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"head_dim": 64}, "head_dim / 2 = 32"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(ModelConfig.preset("minicpm4-8b").to_dict() | change)


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match="minicpm4-8b"):
        ModelConfig.preset("minicpm5")


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 24, "window_size": 48},
        {"window_size": 32},
        {"window_size": 100},
        {"topk": 0},
        {"kernel_size": 24},
        {"dense_len": -2},
        {"use_nope": True},
    ],
)
def test_a_sparse_config_that_makes_no_sense_is_refused(settings: dict) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        SparseConfig(**settings)


def test_the_small_preset_stretches_its_positions_like_the_published_file() -> None:
    config = ModelConfig.preset("minicpm4-0.5b")
    assert config.rope_scaling is not None
    assert len(config.rope_scaling.short_factor) == 32
    assert config.rope_scaling.short_factor == config.rope_scaling.long_factor
    assert config.rope_scaling.original_max_position_embeddings == config.max_position_embeddings == 32768
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.eos_token_id) == (1e-5, True, (2, 73440))


def test_a_sparse_step_reads_its_blocks_and_compressed_keys() -> None:
    """The 8B at 131072 tokens: 32 layers, 2 heads of 128 numbers, 96 blocks of 64, a mean for 16 keys and for 64."""
    config = ModelConfig.preset("minicpm4.1-8b")
    one_layer = 2 * 128 * 2  # bytes of a key of both heads in 16 bits
    read = 32 * one_layer * (2 * 96 * 64 + 131072 // 16 + 131072 // 64)
    whole = 32 * one_layer * 2 * 131072
    assert config.decode_bytes(131072) - config.decode_bytes(131072, sparse=True) == whole - read
    assert config.decode_bytes(131072, 1.725 / 8) / config.decode_bytes(131072, 1.725 / 8, sparse=True) > 2.4
    assert config.decode_bytes(100, sparse=True) == config.decode_bytes(100)  # every block is listed, none is scored
    assert config.decode_bytes(0, sparse=True) == config.decode_bytes(0)
    with pytest.raises(ValueError, match="expected a configuration with a sparse_config"):
        dataclasses.replace(config, sparse_config=None).decode_bytes(100, sparse=True)
