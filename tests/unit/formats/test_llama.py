"""Llama-layout checkpoints against transformers' own Llama, written and read by either side."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.checkpoint import load, save
from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.formats import to_llama

PLAIN = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
    scale_emb=1.0,
    scale_depth=2**0.5,
    dim_model_base=32,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
)
FACTORS = (1.0, 1.5, 2.0, 4.0)
CONFIGS = {
    "plain": PLAIN,
    "tied": dataclasses.replace(PLAIN, tie_word_embeddings=True),
    "heads wider than the width": dataclasses.replace(PLAIN, head_dim=24),
    "one key-value head": dataclasses.replace(PLAIN, num_key_value_heads=1),
    "short LongRoPE": dataclasses.replace(PLAIN, rope_scaling=LongRope(FACTORS, tuple(2 * f for f in FACTORS), 32)),
    "long LongRoPE": dataclasses.replace(PLAIN, rope_scaling=LongRope(FACTORS, tuple(2 * f for f in FACTORS), 8)),
}
IDS = torch.arange(40)[None] % 48


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_transformers_wrote_gives_transformers_logits(name: str, tmp_path) -> None:
    llama = to_llama(fresh_model(CONFIGS[name], seed=1))
    llama.save_pretrained(tmp_path)
    ids = IDS[:, :20]
    loaded, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert loaded.config.is_llama
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        wanted = llama(ids).logits
        error = (loaded(ids) - wanted).abs().max()
        assert error <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["tied", "heads wider than the width"])
def test_a_folder_that_we_wrote_loads_in_transformers(name: str, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    model = fresh_model(CONFIGS[name], seed=1)
    save(model, tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(IDS)
        assert (llama(IDS).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_another_decoder_is_no_llama() -> None:
    with pytest.raises(ValueError, match=r"scale_emb = 12\.0"):
        to_llama(fresh_model(dataclasses.replace(PLAIN, scale_emb=12.0), seed=1))
