"""The corpus: what goes in, how it is split, and the yardstick."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import fresh_model

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus, Document, build_corpus, find_roots, small_sample
from minicpm_ref.evaluate import bits_per_byte


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of Python files: ordinary, duplicated, empty, not UTF-8, too large, installed below it."""
    root = tmp_path_factory.mktemp("sources")
    for i in range(120):
        lines = [f"def function_{i}_{j}(first, second):\n    return first + second * {i * j}\n" for j in range(8)]
        (root / f"module_{i}.py").write_text("\n".join(lines), "utf-8")
    (root / "chinese.py").write_text('greeting = "你好,世界 🙂"\n' * 5, "utf-8")
    (root / "copy.py").write_text((root / "module_3.py").read_text())
    (root / "empty.py").write_text("\n\n")
    (root / "latin.py").write_bytes(b"x = '\xe9'\n")
    (root / "table.py").write_text("x = 1\n" * 50_000)
    (root / "notes.txt").write_text("not Python")
    (root / "config-3.99-x86_64").mkdir()
    (root / "config-3.99-x86_64" / "generated.py").write_text("prefix = 'of this machine'\n")
    (root / "package.py").mkdir()
    (root / ".#edited.py").symlink_to("user@host.4711:1")  # an editor's lock
    (root / "loop.py").symlink_to(root / "loop.py")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("installed = True\n")
    return root


@pytest.fixture(scope="module")
def corpus(sources, tmp_path_factory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"), {"stdlib": sources}, vocab_size=500)


def test_files_are_filtered_deduplicated_and_listed(corpus: Corpus) -> None:
    paths = {file["path"] for file in corpus.manifest["files"]}
    assert len(paths) == 121
    assert len(paths & {"copy.py", "module_3.py"}) == 1
    assert not paths & {"empty.py", "latin.py", "table.py", "notes.txt", "site-packages/other.py"}
    assert not any(path.startswith("config-") for path in paths)
    assert corpus.manifest["licences"] == {"stdlib": "PSF-2.0"}
    sizes = corpus.manifest["bytes"]
    assert sum(sizes.values()) == sum(file["bytes"] for file in corpus.manifest["files"])
    assert all(len(file["sha256"]) == 64 for file in corpus.manifest["files"])


def test_no_held_out_file_is_trained_on(corpus: Corpus) -> None:
    text = corpus.tokenizer.decode(np.asarray(corpus.tokens))
    held_out = [file["path"] for file in corpus.manifest["files"] if file["split"] == "held_out"]
    assert held_out == [document.path for document in corpus.held_out]
    assert held_out
    for document in corpus.held_out:
        assert document.held_out
        assert document.text not in text
    assert text.count("def function_") == 8 * (120 - sum(path.startswith("module") for path in held_out))


def test_the_split_depends_on_the_path_alone() -> None:
    paths = [f"package/module_{i}.py" for i in range(5000)]
    split = [Document("stdlib", path, "one version").held_out for path in paths]
    assert split == [Document("stdlib", path, "another").held_out for path in paths]
    assert 60 <= sum(split) <= 140  # one in fifty


def test_chinese_survives(corpus: Corpus) -> None:
    document = next(file for file in corpus.manifest["files"] if file["path"] == "chinese.py")
    text = corpus.tokenizer.decode(np.asarray(corpus.tokens)) + "".join(d.text for d in corpus.held_out)
    assert document["bytes"] == len(('greeting = "你好,世界 🙂"\n' * 5).encode())
    assert text.count("你好,世界 🙂") == 5


def test_building_again_gives_the_same_corpus(corpus: Corpus, sources, tmp_path) -> None:
    again = build_corpus(tmp_path, {"stdlib": sources}, vocab_size=500)
    assert again.manifest_sha256 == corpus.manifest_sha256
    assert np.array_equal(again.tokens, corpus.tokens)


def test_batches_are_a_function_of_seed_and_step_and_can_be_shared(corpus: Corpus) -> None:
    inputs, targets = corpus.batch(step=7, rows=6, context=32, seed=1)
    assert inputs.shape == targets.shape == (6, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    shares = [corpus.batch(7, 6, 32, 1, part, 3)[0] for part in range(3)]
    assert torch.equal(torch.cat(shares), inputs)
    assert not torch.equal(corpus.batch(8, 6, 32, 1)[0], inputs)
    assert not torch.equal(corpus.batch(7, 6, 32, 2)[0], inputs)
    with pytest.raises(ValueError, match="6 rows"):
        corpus.batch(7, 6, 32, parts=4)


def test_bits_per_byte_counts_every_token_once(corpus: Corpus) -> None:
    config = ModelConfig(500, 32, 2, 4, 2, 48, max_position_embeddings=64)
    model = fresh_model(config, seed=3)
    texts = ["def f(x):\n    return x\n" * 9, "你好", "x", ""]
    nats = 0.0
    for text in texts:
        ids = corpus.tokenizer.encode(text)
        for start in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[start : start + 17]])
            nats += F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    for batch_tokens in (16, 64, 4096):
        measured = bits_per_byte(model, corpus.tokenizer, texts, context=16, batch_tokens=batch_tokens)
        assert math.isclose(measured, expected, rel_tol=1e-5)
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, corpus.tokenizer, [""])


def test_a_uniform_model_needs_the_entropy_of_its_vocabulary(corpus: Corpus) -> None:
    config = ModelConfig(500, 32, 2, 4, 2, 48, max_position_embeddings=64)
    model = fresh_model(config, seed=3)
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "def f(x):\n    return x\n"
    tokens = len(corpus.tokenizer.encode(text, add_bos=False))
    assert math.isclose(
        bits_per_byte(model, corpus.tokenizer, [text]), tokens * math.log2(500) / len(text), rel_tol=1e-6
    )


def test_the_small_sample_hears_every_group() -> None:
    documents = [Document(group, f"{i}.py", "x" * 3000) for group, n in (("a", 50), ("b", 3)) for i in range(n)]
    chosen = small_sample(documents, 15_000)
    assert sorted(d.group for d in chosen) == ["a", "a", "a", "b", "b", "b"]
    assert chosen == small_sample(documents[::-1], 15_000)


def test_damaged_and_missing_corpora_are_named(corpus: Corpus, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Corpus(tmp_path)
    for name in ("manifest.json", "tokenizer.json", "held_out.jsonl"):
        (tmp_path / name).write_bytes((corpus.folder / name).read_bytes())
    (tmp_path / "train.bin").write_bytes((corpus.folder / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train\.bin"):
        Corpus(tmp_path)
    with pytest.raises(ValueError, match="0 files to train on"):
        build_corpus(tmp_path / "x", {"stdlib": tmp_path})
    with pytest.raises(ValueError, match="'pandas'"):
        find_roots(["pandas"])


def test_the_manifest_is_json_that_names_the_corpus(corpus: Corpus) -> None:
    assert json.loads((corpus.folder / "manifest.json").read_text("utf-8")) == corpus.manifest
    assert corpus.manifest["train_tokens"] == len(corpus.tokens)
