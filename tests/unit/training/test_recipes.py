"""The recipes of the variants, at a size that trains in seconds: what they start from, learn, and store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minicpm_ref.checkpoint import load
from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.data import Corpus
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.lowbit.layers import QuantizationAwareLinear, TernaryLinear
from minicpm_ref.training import Recipe, Trainer
from minicpm_ref.training.recipes import get_recipe
from minicpm_ref.training.recipes.sparse import SparseRecipe
from minicpm_ref.training.recipes.ternary import DistillationRecipe
from minicpm_ref.training.recipes.ternary_qat import TernaryRecipe

CONFIG = ModelConfig(480, 64, 2, 4, 1, 128, max_position_embeddings=256)
SETTINGS = {"tokens": 12 * 256, "context": 32, "batch_tokens": 256, "warmup_tokens": 256, "precision": "float32"}


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory) -> Path:
    """A finished dense run."""
    folder = tmp_path_factory.mktemp("parent")
    Trainer(Recipe("tiny", CONFIG, **SETTINGS | {"tokens": 40 * 256}), corpus, folder).run()
    return folder / "model"


@pytest.fixture(scope="module")
def qat(corpus: Corpus, parent: Path, tmp_path_factory) -> Path:
    """A finished QAT run from `parent`."""
    folder = tmp_path_factory.mktemp("qat")
    Trainer(TernaryRecipe("tiny", CONFIG, parent=str(parent), group_size=32, **SETTINGS), corpus, folder).run()
    return folder


def test_qat_starts_from_its_parent_and_stores_packed_weights(corpus: Corpus, parent: Path, qat: Path) -> None:
    recipe = TernaryRecipe("tiny", CONFIG, parent=str(parent), group_size=32, **SETTINGS)
    start = recipe.build_model()
    before = load(parent, dtype=torch.float32)[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())
    linears = [module for name, module in start.named_modules() if name.endswith("_proj")]
    assert [type(module) for module in linears] == [QuantizationAwareLinear] * 2 * 7
    packed, tokenizer = load(qat / "model", dtype=torch.float32)
    assert isinstance(packed.get_submodule("model.layers.1.mlp.down_proj"), TernaryLinear)
    trained = recipe.build_model()
    trained.load_state_dict(Trainer(recipe, corpus, qat).whole_model().state_dict())
    texts = [document.text for document in corpus.held_out]
    fake = bits_per_byte(trained, tokenizer, texts, 32)  # the same numbers, but for activations and float16 embeddings
    assert bits_per_byte(packed, tokenizer, texts, 32) == pytest.approx(fake, rel=0.02)
    assert fake < 0.9 * bits_per_byte(start, tokenizer, texts, 32)


def test_another_grid_stays_unpacked(corpus: Corpus, parent: Path, tmp_path) -> None:
    recipe = TernaryRecipe("five", CONFIG, parent=str(parent), group_size=32, grid="five", **SETTINGS)
    Trainer(replace(recipe, tokens=256), corpus, tmp_path).run()
    assert isinstance(load(tmp_path / "model")[0].get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear)


def test_distillation_starts_where_qat_ended_and_mixes_two_losses(corpus: Corpus, parent: Path, qat: Path) -> None:
    places = {"parent": str(parent), "start": str(qat), "teacher": str(parent)}
    recipe = DistillationRecipe("tiny", CONFIG, group_size=32, teacher_share=0.25, **places, **SETTINGS)
    model = recipe.build_model()
    ended = Trainer(
        TernaryRecipe("tiny", CONFIG, parent=str(parent), group_size=32, **SETTINGS), corpus, qat
    ).whole_model()
    assert all(torch.equal(tensor, ended.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = recipe.batch(corpus, 0, 0, 1)
    inputs, targets = batch
    hard = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    teacher = load(parent, dtype=torch.float32)[0](inputs).log_softmax(-1)
    entropy = -(teacher.exp() * teacher).sum(-1).mean()
    student = model(inputs).log_softmax(-1).flatten(0, 1)
    soft = F.kl_div(student, teacher.flatten(0, 1), log_target=True, reduction="batchmean")
    assert torch.allclose(recipe.loss(model, *batch), 0.75 * hard + 0.25 * (soft + entropy), atol=1e-5)
    assert not any(parameter.grad is not None for parameter in recipe.teacher_model.parameters())


def test_distillation_without_the_run_before_it_is_refused(parent: Path, tmp_path) -> None:
    recipe = DistillationRecipe("tiny", CONFIG, parent=str(parent), group_size=32, start=str(tmp_path), **SETTINGS)
    with pytest.raises(FileNotFoundError, match="expected the folder of a training run"):
        recipe.build_model()


def test_a_corpus_in_another_vocabulary_is_refused(corpus: Corpus, parent: Path, tmp_path) -> None:
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    tokenizer = (tmp_path / "corpus" / "tokenizer.json").read_text()
    (tmp_path / "corpus" / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(ValueError, match="--reuse-tokenizer"):
        Trainer(Recipe("tiny", CONFIG, parent=str(parent), **SETTINGS), Corpus(tmp_path / "corpus"), tmp_path / "run")


# ---- sparse


def test_the_sparse_recipe_lengthens_and_shares_its_rows() -> None:
    recipe = get_recipe("sparse")
    assert isinstance(recipe, SparseRecipe)
    first = int(recipe.short_share * recipe.steps)
    lengths = [recipe.length(step) for step in range(recipe.steps)]
    assert set(lengths[:first]) == {256}
    assert [lengths[first:].count(length) for length in recipe.lengths] == pytest.approx(
        [(recipe.steps - first) / len(recipe.lengths)] * len(recipe.lengths), abs=1
    )
    config = recipe.config.sparse_config
    assert config is not None
    assert config.visible_blocks * config.block_size <= 0.2 * max(recipe.lengths)
    assert config.dense_len > min(recipe.lengths)


def test_the_sparse_loss_weighs_answers_and_goes_through_sparse_attention(corpus: Corpus, parent: Path) -> None:
    sparse = SparseConfig(4, 2, 1, 8, 8, 2, dense_len=32)
    recipe = SparseRecipe(
        "tiny", replace(CONFIG, sparse_config=sparse), parent=str(parent), lengths=(16, 32, 64), **SETTINGS
    )
    batch = (inputs, targets, _) = recipe_batch(corpus)
    answers = torch.zeros_like(targets, dtype=torch.float32)
    answers[0, 3] = 1.0
    model = recipe.build_model()
    losses = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    expected = losses.mean() + recipe.answer_weight * losses[0, 3]
    assert torch.allclose(recipe.loss(model, inputs, targets, answers), expected)
    assert torch.allclose(recipe.loss(model, *batch), losses.mean())  # no answers in plain rows
    assert model.model.layers[0].self_attn.sparse == sparse
    dense = load(parent, dtype=torch.float32)[0](inputs)
    assert not torch.allclose(model(inputs), dense, atol=1e-4)
    assert torch.allclose(model(inputs[:, :24]), load(parent, dtype=torch.float32)[0](inputs[:, :24]), atol=1e-5)


def recipe_batch(corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets = corpus.batch(0, 2, 64)
    return inputs, targets, torch.zeros_like(targets, dtype=torch.float32)


def test_an_answer_counts_the_same_in_whichever_process_it_falls(parent: Path) -> None:
    """The mean of the parts' losses is that of the whole step, though the parts hold different numbers of answers."""
    recipe = replace(get_recipe("sparse"), batch_tokens=4 * 256, lengths=(256,), context=256, planted_share=0.5)
    tokens = np.random.default_rng(0).integers(3, 4096, 20_000).astype("<u2")
    corpus = SimpleNamespace(tokens=tokens)
    whole = recipe.batch(corpus, 0, 0, 1)
    parts = [recipe.batch(corpus, 0, part, 2) for part in range(2)]
    counts = [int((part[2] > 0).sum()) for part in parts]
    assert counts[0] != counts[1]
    losses = torch.rand(whole[0].shape, generator=torch.Generator().manual_seed(0))
    added = [(losses[rows] * part[2]).sum() for rows, part in zip((slice(0, 2), slice(2, 4)), parts, strict=True)]
    assert torch.allclose(sum(added) / 2, (losses * whole[2]).sum())
    assert torch.allclose((losses * whole[2]).sum(), losses[whole[2] > 0].mean())
