"""Published JSON, read strictly: what a file means, or a refusal that names the key. Right values are those of the
families' own configuration classes, and inputs are of kinds that public bug reports describe."""

from __future__ import annotations

import json
import math

import pytest
import torch

from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.published import parse_json, read_json, require

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 3.0, 4.5],
    "original_max_position_embeddings": 32,
}
LONG_ROPE = LongRope((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.5), 32)


def read(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(SIZES | MUP | changes)


def test_absent_keys_mean_what_the_published_minicpm_class_says() -> None:
    config = ModelConfig.from_dict(SIZES | {"model_type": "minicpm"})
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (1.0, 1.0, 1)
    assert config.tie_word_embeddings
    assert read(tie_word_embeddings=None).tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.rope_theta) == (1, (2,), 10000.0)


def test_a_llama_has_no_multipliers_whatever_a_conversion_left_in_its_file() -> None:
    config = read(model_type="llama", architectures=["LlamaForCausalLM"])
    assert config.is_llama
    assert (config.scale_emb, config.residual_scale, config.logit_divisor) == (1.0, 1.0, 1.0)
    assert not config.tie_word_embeddings
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_heads_may_be_wider_than_the_width_divided_among_them() -> None:
    config = ModelConfig.from_dict(  # MiniCPM5-1B's layout
        {
            "model_type": "llama",
            "vocab_size": 130560,
            "hidden_size": 1536,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 4608,
            "max_position_embeddings": 131072,
        }
    )
    assert config.num_parameters() == 1_080_632_832
    assert config.num_parameters(embeddings=False) == 679_552_512
    assert config.kv_bytes_per_token() == 2 * 24 * 2 * 128 * 2
    with torch.device("meta"):
        layer = MiniCPM(config).get_submodule("model.layers.0.self_attn")
    assert tuple(layer.get_parameter("q_proj.weight").shape) == (2048, 1536)
    assert tuple(layer.get_parameter("o_proj.weight").shape) == (1536, 2048)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope_theta": 5e4, "rope_scaling": LONG}, LONG_ROPE),
        ({"rope_parameters": LONG | {"rope_theta": 5e4}}, LONG_ROPE),
        ({"rope_scaling": LONG | {"rope_theta": 5e4}}, LONG_ROPE),
        ({"rope_theta": 5e4, "rope_scaling": {"type": "longrope", **LONG, "factor": 2.0}}, LONG_ROPE),
        ({"rope_theta": 5e4, "rope_scaling": LONG, "rope_parameters": LONG | {"rope_theta": 50000}}, LONG_ROPE),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, None),
        ({"rope_theta": 5e4, "rope_scaling": None}, None),
    ],
)
def test_every_spelling_of_rope_means_the_same(changes: dict, scaling: LongRope | None) -> None:
    config = read(**changes)
    assert (config.rope_theta, config.rope_scaling) == (5e4, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # families and parts that this package does not compute
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, "model_type = 'minicpm3'"),
        ({"model_type": "minicpm_sala"}, "model_type = 'minicpm_sala'"),
        ({"model_type": ["llama"]}, "model_type = "),
        ({"architectures": ["GraniteForCausalLM"]}, "architectures = .*Granite"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "minicpm"}, "contradict"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts = 8: a mixture of experts"),
        ({"kv_lora_rank": 256}, "kv_lora_rank = 256: multi-head latent attention"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"attention_bias": True}, "attention_bias = True: biases"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"embedding_multiplier": 3.0}, "Granite"),
        # positions
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e4}}, "rope_theta = 1.*contradict"),
        ({"rope_scaling": 5}, "rope_scaling = 5"),
        ({"rope_scaling": LONG | {"long_factor": [1, 2, 3, 0]}}, r"long_factor\[3\] = 0"),
        ({"rope_scaling": LONG | {"long_factor": [1, 2, 3, "a"]}}, r"long_factor\[3\] = 'a'"),
        ({"rope_scaling": LONG | {"original_max_position_embeddings": 1}}, "original_max_position_embeddings = 1"),
        ({"rope_scaling": LONG | {"factor": 8.0}}, "factor = 8.0: expected 2"),
        ({"rope_scaling": LONG | {"attention_factor": 1.0}}, "attention_factor = 1.0"),
        # types and ranges
        ({"hidden_size": "128"}, "hidden_size = '128': expected an integer"),
        ({"hidden_size": 32.0}, "hidden_size = 32.0: expected an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected at least 1"),
        ({"vocab_size": 10**30}, "vocab_size = 10"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x': expected a number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps = nan"),
        ({"scale_emb": math.inf}, "scale_emb = inf"),
        ({"scale_depth": 0}, "scale_depth = 0: expected more than 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ({"eos_token_id": [2, 64]}, "eos_token_id = 64: expected at least 0 and at most 63"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': expected true or false"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"sparse_config": 5}, "sparse_config = 5"),
        ({"sparse_config": {"topk": "64"}}, "sparse_config.topk = '64'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM': expected a list"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_harmless_keys_are_not_refused() -> None:
    plain = read()
    harmless = {
        "quantization_config": None,
        "num_experts": 0,
        "sliding_window": None,
        "attention_bias": False,
        "layer_types": ["full_attention"] * 2,
        "use_cache": True,
        "auto_map": {"AutoConfig": "x.Y"},
        "hidden_act": "silu",
    }
    assert read(**harmless) == plain
    assert read(sliding_window=16, use_sliding_window=False) == plain


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES | MUP), "utf-8-sig")
    assert ModelConfig.from_json(path) == read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "expected a JSON object"),
        (b"{", "Expecting"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_files_are_named(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_json(path)


def test_a_file_of_no_end_is_not_read(tmp_path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="bytes, expected at most"):
        read_json(tmp_path / "config.json")


def test_require_hands_back_what_it_was_asked_for() -> None:
    assert require("x", 3, int, low=3, high=3) == 3
    assert isinstance(require("x", 3, float), float)
    assert require("x", "s", str) == "s"
    assert parse_json('{"x": [1]}') == {"x": [1]}
    with pytest.raises(ValueError, match="x = 10000.*: expected a finite number"):
        require("x", 10**400, float)
