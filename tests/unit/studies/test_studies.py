"""The studies measure what they say: modes see what they should, budgets recall what they keep, records are resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fresh import fresh_model
from torch import Tensor

from minicpm_ref.checkpoint import EMBEDDED, sha256_file
from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.data import Corpus, build_corpus
from minicpm_ref.lowbit.layers import to_ternary
from minicpm_ref.lowbit.ternary import GRIDS
from minicpm_ref.machine import machine
from minicpm_ref.plotting import load_results, source_note
from minicpm_ref.sparse import select_blocks
from minicpm_ref.studies import reproduce, ternary_ablation
from minicpm_ref.studies.record import Record
from minicpm_ref.studies.sparse_quality import (
    MODES,
    RecallProbe,
    attending,
    attention_layers,
    block_mass,
    long_pieces,
    random_blocks,
    window_only,
)
from minicpm_ref.studies.ternary_training import set_activations
from minicpm_ref.tokenizer import Tokenizer
from minicpm_ref.training import Trainer
from minicpm_ref.training.recipes import get_recipe

SPARSE = SparseConfig(4, 2, 1, 8, 16, 4, dense_len=32)
CONFIG = ModelConfig(480, 64, 2, 4, 1, 96, max_position_embeddings=256, sparse_config=SPARSE)


def tensors(tokens: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, tokens, 16, generator=generator), torch.randn(1, 1, tokens, 16, generator=generator)


def test_a_record_is_resumed_and_refuses_other_settings(corpus: Corpus, tmp_path) -> None:
    record = Record("study", corpus, {"samples": 3}, tmp_path)
    record.part("rows")["a"] = 1
    record.save()
    assert Record("study", corpus, {"samples": 3}, tmp_path).part("rows") == {"a": 1}
    assert load_results("study", tmp_path)["settings"]["samples"] == 3
    with pytest.raises(ValueError, match="measured with other settings"):
        Record("study", corpus, {"samples": 4}, tmp_path)


def test_every_mode_sees_the_same_number_of_blocks_but_other_ones() -> None:
    q, k = tensors()
    window = window_only(SPARSE)
    assert window.visible_blocks == SPARSE.visible_blocks
    lists = {
        "sparse": select_blocks(q, k, SPARSE),
        "window": select_blocks(q, k, window),
        "random": random_blocks(q, k, SPARSE),
    }
    last = {mode: blocks[0, 0, -1].tolist() for mode, blocks in lists.items()}
    assert {len(set(blocks)) for blocks in last.values()} == {SPARSE.visible_blocks}
    assert last["window"] == [0, 8, 9, 10, 11, 12]  # 13 blocks in all
    assert last["random"] != last["sparse"]
    assert {0, 10, 11, 12} <= set(last["random"])


def test_attending_switches_and_switches_back() -> None:
    model = fresh_model(CONFIG, seed=0)
    ids = torch.arange(120)[None] % 480
    logits = {}
    for mode in MODES:
        with attending(model, mode), torch.no_grad():
            logits[mode] = model(ids)
    model_dense = fresh_model(replace(CONFIG, sparse_config=None), seed=0)
    with torch.no_grad():
        assert torch.allclose(logits["dense"], model_dense(ids), atol=1e-5)
        assert torch.equal(logits["sparse"], model(ids))
    model_window = fresh_model(replace(CONFIG, sparse_config=window_only(SPARSE)), seed=0)
    with torch.no_grad():
        assert torch.equal(logits["window"], model_window(ids))
    assert not torch.allclose(logits["window"][:, -1], logits["sparse"][:, -1], atol=1e-4)  # the control is another
    for mode in ("sparse", "window", "random"):
        assert not torch.allclose(logits[mode][:, -1], logits["dense"][:, -1], atol=1e-4)
    assert all(layer.sparse == SPARSE and layer.selector is None for layer in attention_layers(model))
    with pytest.raises(ValueError, match="mode 'other'"), attending(model, "other"):
        pass


def test_block_mass_is_a_distribution_over_the_past() -> None:
    q, k = tensors(50)
    mass = block_mass(q, k, torch.arange(50)[None], 8)
    assert mass.shape == (1, 1, 50, 7)
    assert torch.allclose(mass.sum(-1), torch.ones(1, 1, 50), atol=1e-6)
    assert mass[0, 0, 10, 2:].abs().max() == 0
    weights = (q[0, :, 20] @ k[0, 0, :21].T / 4).softmax(-1).mean(0)
    assert torch.allclose(mass[0, 0, 20, 1], weights[8:16].sum(), atol=1e-6)


def test_the_probe_reads_densely_and_orders_its_rules() -> None:
    model = fresh_model(CONFIG, seed=0)
    ids = torch.arange(128)[None] % 480
    with attending(model, "dense"), torch.no_grad():
        dense = model(ids)
    probe = RecallProbe([4, 6, 16])
    for layer in attention_layers(model):
        layer.selector = probe
    with torch.no_grad():
        assert torch.allclose(model(ids), dense, atol=1e-4)
    for rule in ("chosen", "random", "best"):
        shares = [sum(probe.recall[rule][budget]) for budget in (4, 6, 16)]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(2, abs=1e-4)  # every block, in both layers
    assert sum(probe.recall["best"][6]) >= sum(probe.recall["chosen"][6]) > sum(probe.recall["random"][6])


def test_long_pieces_are_as_long_as_asked(corpus: Corpus) -> None:
    pieces = long_pieces(corpus, 64, 3)
    assert len(pieces) == 3
    assert all(60 <= len(corpus.tokenizer.encode(piece)) <= 66 for piece in pieces)
    with pytest.raises(ValueError, match="expected 3"):
        long_pieces(corpus, 10**6, 3)


@pytest.mark.slow
def test_the_ablation_trains_every_point_once(corpus: Corpus, tmp_path) -> None:
    runs = ternary_ablation.measure(corpus, tmp_path, tokens=10 * 2048, seeds=(0,)).results["runs"]
    kinds = [run["kind"] for run in runs.values()]
    assert (kinds.count("fraction"), kinds.count("grid"), kinds.count("control")) == (6, len(GRIDS) - 1, 1)
    values = [run["held_out_bits_per_byte"] for run in runs.values()]
    assert len(set(values)) == len(values)  # no two points trained alike
    trained: list[str] = []
    again = ternary_ablation.measure(corpus, tmp_path, tokens=10 * 2048, seeds=(0,), report=trained.append)
    assert again.results["runs"] == runs
    assert trained == []


def test_activations_are_set_in_merged_and_single_layers() -> None:
    model = fresh_model(replace(CONFIG, intermediate_size=128, sparse_config=None), seed=0)
    to_ternary(model, group_size=32)
    set_activations(model, "float")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        exact = model(ids)
        set_activations(model, "int8")
        error = model(ids) - exact
        set_activations(model, "float")
        assert torch.equal(model(ids), exact)
    assert 0 < error.std() < 0.05 * exact.std()


def test_a_figure_can_say_where_a_study_was_measured(corpus: Corpus, tmp_path) -> None:
    Record("study", corpus, {"samples": 1}, tmp_path).save()
    results = load_results("study", tmp_path)
    assert machine(torch.device("cpu"))["device"] in source_note(results)


# ---- the base's own run


def test_the_recorded_repetition_stays_within_its_bound() -> None:
    """Recorded by `studies.reproduce`; what it compares with are the losses on the card of the stored state."""
    card = json.loads((EMBEDDED / "stable" / "card.json").read_text("utf-8"))
    results = load_results("reproduce")
    assert results["settings"]["state_sha256"] == card["state_sha256"]
    assert card["state_sha256"] == sha256_file(EMBEDDED / "stable" / "state.safetensors")
    assert results["settings"]["bound"] == reproduce.BOUND
    for name in reproduce.STRETCHES:
        assert results[name]["recorded"] == card[f"losses_{name}"]
        assert reproduce.difference(results[name]) <= reproduce.BOUND
    shifted = {"recorded": card["losses_from_here"][1:], "losses": results["from_here"]["losses"][:-1]}
    assert reproduce.difference(shifted) > reproduce.BOUND  # one step off is noticed


def test_another_corpus_cannot_repeat_the_run(corpus: Corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match="expected 77abdffbd95fdf75"):
        reproduce.measure(corpus, tmp_path)


def test_the_stable_state_is_one_to_go_on_from(tmp_path) -> None:
    """A decay branches off it at the stored step, at the rate that the plan says."""
    root = tmp_path / "sources"
    root.mkdir()
    for i in range(60):
        (root / f"module_{i}.py").write_text(f"def function_{i}(first):\n    return first + {i}\n" * 40)
    corpus = build_corpus(
        tmp_path / "corpus", {"stdlib": root}, tokenizer=Tokenizer.load(EMBEDDED / "base/tokenizer.json")
    )
    steps = 3949 + 4
    recipe = replace(
        get_recipe("base"), tokens=steps * 8192, decay=4.5 / steps, branch="stable", precision="float32", context=128
    )
    trainer = Trainer(replace(recipe, batch_tokens=8192), corpus, tmp_path / "run")
    assert trainer.step == 3949
    assert all("momentum_buffer" in state for state in trainer.optimizers[0].state.values())
    row = trainer.train_step()
    assert row["step"] == 3950
    assert row["lr_factor"] == 1.0
    assert row["loss"] < 4  # an untrained model is at 8.3
