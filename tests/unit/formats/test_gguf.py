"""GGUF files that the `gguf` package wrote: weights bit for bit, vocabularies id for id, refusals by name."""

from __future__ import annotations

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch
from einops import rearrange
from fresh import fresh_model
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from minicpm_ref.checkpoint import load
from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.formats.gguf import LAYER_NAMES, NAMES, Header, _pairs, _trits
from minicpm_ref.formats.gguf_vocabulary import merges_of_scores, read_vocabulary
from minicpm_ref.lowbit import TernaryLinear, dequantize
from minicpm_ref.model import MiniCPM

Type = gguf.GGMLQuantizationType
LLAMA = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=64,
    scale_emb=1.0,
    scale_depth=2**0.5,
    dim_model_base=256,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    initializer_range=0.02,
)
FACTORS = (1.0, 1.5) * 16
MINICPM = dataclasses.replace(
    LLAMA,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=64,
    tie_word_embeddings=False,
    rope_scaling=LongRope(FACTORS, tuple(2 * f for f in FACTORS), 32),
)
WIDE = dataclasses.replace(LLAMA, head_dim=96)


def write(path, model: MiniCPM, kind: Type = Type.F32, extra: dict | None = None, vocabulary: bool = False) -> dict:
    """Write `model` as llama.cpp's converter does; returns the float32 weights that the file stands for."""
    c = model.config
    family = "llama" if c.is_llama else "minicpm"
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if family == "minicpm":
        writer.add_embedding_scale(c.scale_emb)
        writer.add_residual_scale(c.residual_scale)
        writer.add_logit_scale(c.logit_divisor)
    if c.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(c.rope_scaling.original_max_position_embeddings)
        for name in ("short", "long"):
            factors = np.array(getattr(c.rope_scaling, f"{name}_factor"), np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    stored = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, number, part = stem.split(".", 3)
            there = f"blk.{number}.{next(k for k, v in LAYER_NAMES.items() if v == part)}.weight"
        else:
            there = f"{next(k for k, v in NAMES.items() if v == stem)}.weight"
        rows = tensor
        if stem.endswith(("q_proj", "k_proj")):
            rows = rearrange(tensor, "(h half pair) c -> (h pair half) c", half=2, pair=c.head_dim // 2)
        data = rows.contiguous().numpy()
        as_kind = kind if data.ndim == 2 else Type.F32
        packed = gguf.quantize(data, as_kind)
        writer.add_tensor(there, packed, raw_dtype=as_kind)
        back = torch.from_numpy(np.array(gguf.dequantize(packed, as_kind))).view(rows.shape)
        if stem.endswith(("q_proj", "k_proj")):
            back = rearrange(back, "(h pair half) c -> (h half pair) c", half=2, pair=c.head_dim // 2)
        stored[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("config", [LLAMA, MINICPM, WIDE], ids=["llama", "minicpm", "wide heads"])
def test_float_weights_and_config_read_back_to_the_bit(tmp_path, config: ModelConfig) -> None:
    model = fresh_model(config, seed=2)
    write(tmp_path / "model.gguf", model)
    loaded, tokenizer = load(tmp_path / "model.gguf")
    assert tokenizer is None
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_what_the_gguf_package_says(tmp_path, kind: str) -> None:
    stored = write(tmp_path / "model.gguf", fresh_model(LLAMA, seed=2), Type[kind])
    loaded = load(tmp_path / "model.gguf")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL"])
def test_types_that_can_only_be_read_are_read(tmp_path, kind: str) -> None:
    """The package cannot write these: any bytes are some weights, so random ones will do."""
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    data = np.random.default_rng(0).integers(0, 120, (8, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Header(tmp_path / "one.gguf").tensor("blk.0.ffn_down.weight")
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(data, Type[kind])))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_become_packed_layers_without_floats(tmp_path, monkeypatch, kind: str) -> None:
    stored = write(tmp_path / "model.gguf", fresh_model(LLAMA, seed=2), Type[kind])
    tensor = Header.tensor
    asked = []
    monkeypatch.setattr(Header, "tensor", lambda self, name: asked.append(name) or tensor(self, name))
    loaded, _ = load(tmp_path / "model.gguf")
    assert not any("attn_q" in name or "ffn_up" in name for name in asked)
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, TernaryLinear)}
    assert len(layers) == 7 * LLAMA.num_hidden_layers
    for name, layer in layers.items():
        matrix = layer.matrix()
        assert torch.equal(dequantize(matrix.codes, matrix.scales, 128).float(), stored[f"{name}.weight"]), name
    assert torch.equal(loaded.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


def test_every_ternary_byte_is_read_like_the_gguf_package_reads_it() -> None:
    generator = np.random.default_rng(0)
    for kind, size, read in ((Type.TQ1_0, 52, _trits), (Type.TQ2_0, 64, _pairs)):
        codes = np.arange(256, dtype=np.uint8) if kind == Type.TQ1_0 else generator.integers(0, 256, 256, np.uint8)
        blocks = np.stack([np.roll(codes, i)[:size] for i in range(256)])
        ones = np.broadcast_to(np.array([1.0], np.float16).view(np.uint8), (256, 2))
        wanted = gguf.dequantize(np.concatenate([blocks, ones], axis=1), kind)
        assert np.array_equal(read(blocks).astype(np.float32) - 1, wanted.reshape(256, 256))


# ---- refusals


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.sliding_window": 16}, "sliding_window = 16"),
        ({"tokenizer.ggml.model": 5}, "tokenizer.ggml.model = 5: expected a string"),
        ({"tokenizer.ggml.bos_token_id": 64}, "bos_token_id = 64"),
    ],
)
def test_what_is_not_understood_is_refused_by_key(tmp_path, extra: dict, message: str) -> None:
    write(tmp_path / "model.gguf", fresh_model(LLAMA, seed=2), extra=extra)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        load(tmp_path / "model.gguf")


def test_damaged_files_are_refused_by_name(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write(path, fresh_model(LLAMA, seed=2))
    whole = path.read_bytes()
    for content, message in [
        (whole[:20], "not a GGUF file, or a damaged one"),
        (whole[:3000], "damaged|too late"),
        (whole[:-100], "bytes too late"),
        (b"GGML" + whole[4:], "does not begin with 'GGUF'"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "version 50331648"),
        (whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "damaged"),
        (whole.replace(b"llama", b"gemma"), "general.architecture = 'gemma'"),
        (whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"), "'blk.1.ffn_xx.weight' belongs to no part"),
        (whole.replace(b"blk.1.ffn_up", b"blk.7.ffn_up"), "missing|belongs|unexpected|has no"),
        (b"", "empty|not a GGUF"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.gguf: .*({message})"):
            load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: no such file"):
        load(tmp_path / "nowhere.gguf")


# ---- vocabularies


def gpt2_fields(rule: str) -> dict:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt", "he", "12", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 4), 4],
        "tokenizer.ggml.merges": ["Ġ t", "h e", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def test_byte_level_vocabularies_follow_the_named_rule() -> None:
    spelled = {rule: read_vocabulary(gpt2_fields(rule)) for rule in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
    for rule, t in spelled.items():
        assert t is not None
        assert t.decode(t.encode("the 12\n<|im_end|>é")) == "the 12\n<|im_end|>é"
        assert ("12" in [t.token(i) for i in t.encode("12")]) == (rule in ("gpt-2", "llama-bpe"))
        assert (t.bos_id, t.eos_ids, t.add_bos) == (1, (2,), False)
        assert t.decode(t.encode("<tool>")) == "<tool>"
        assert len(t.encode("<tool>")) == 1
        assert t.settings["chat_template"] == "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre = 'deepseek-llm'"):
        read_vocabulary(gpt2_fields("deepseek-llm"))
    with pytest.raises(ValueError, match=r"merges holds 'Ġt': expected two tokens"):
        read_vocabulary(gpt2_fields("gpt-2") | {"tokenizer.ggml.merges": ["Ġt"]})
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model = 'bert'"):
        read_vocabulary({"tokenizer.ggml.model": "bert"})
    assert read_vocabulary({}) is None


def test_scores_become_merges_of_the_best_piece_first() -> None:
    tokens, scores = ["a", "b", "c", "ab", "bc", "abc"], [0.0, 0.0, 0.0, -2.0, -1.0, -3.0]
    merges = merges_of_scores(tokens, scores, [1] * 6)
    assert merges == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    assert Backend(models.BPE({t: i for i, t in enumerate(tokens)}, merges)).encode("abc").tokens == ["abc"]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_with_scores_are_read_with_or_without_a_blank_before_the_text(prefix: bool) -> None:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "d", "o", "g", "do", "▁do", "▁dog"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    t = read_vocabulary(fields)
    assert t is not None
    spelled = [t.token(i) for i in t.encode("dog 你")]
    assert spelled == ["<s>", *(["▁dog"] if prefix else ["do", "g"]), "▁", "<0xE4>", "<0xBD>", "<0xA0>"]
    assert t.decode(t.encode("dog 你")) == "dog 你"
