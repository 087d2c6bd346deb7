"""A candidate's muP groups, its counts, and that a branch of a stable run equals the run that was planned that way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minicpm_ref.config import ModelConfig
from minicpm_ref.data import Corpus
from minicpm_ref.training import Trainer
from minicpm_ref.training.optimizers import build_optimizers
from minicpm_ref.wind_tunnel import Candidate, multiplied_parameters, training_flops
from minicpm_ref.wind_tunnel.one_run import branch_plan, train_branches, train_candidate

TINY = Candidate(
    width=32, base_width=16, tokens=0, lr=0.01, context=32, batch_tokens=128, warmup_tokens=256, evaluation_bytes=2000
)


def rates(candidate: Candidate) -> dict[str, float]:
    model = candidate.recipe(480).build_model()
    optimizers = build_optimizers(
        model, model.config, candidate.optimizer, candidate.lr, candidate.matrix_lr, candidate.weight_decay
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["lr"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_at_the_base_width_both_forms_are_one_model_bit_for_bit() -> None:
    forms = [replace(TINY, width=16, parametrization=form) for form in ("mup", "standard")]
    first, second = (form.recipe(480).build_model() for form in forms)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert rates(forms[0]) == rates(forms[1])
    assert first.config.logit_divisor == second.config.logit_divisor == 1


def test_at_four_times_the_base_hidden_rates_are_a_quarter() -> None:
    mup, standard = (rates(replace(TINY, width=64, parametrization=form)) for form in ("mup", "standard"))
    for name, rate in mup.items():
        hidden = ".layers." in name and "norm" not in name
        assert rate == pytest.approx(standard[name] / 4 if hidden else standard[name]), name


def test_both_forms_start_with_the_same_weights() -> None:
    mup, standard = (
        replace(TINY, width=64, parametrization=form).recipe(480).build_model() for form in ("mup", "standard")
    )
    for (name, a), b in zip(mup.named_parameters(), standard.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda words, name=name: f"{name}: {words}")


def test_a_base_is_asked_for() -> None:
    with pytest.raises(TypeError, match="base_width"):
        Candidate(width=64, tokens=0, lr=0.01)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="base_width = 0"):
        replace(TINY, base_width=0)
    with pytest.raises(ValueError, match="parametrization 'mu'"):
        replace(TINY, parametrization="mu")


def test_parameters_and_flops_are_counted_by_the_named_convention() -> None:
    config = ModelConfig(4096, 256, 4, 4, 1, 576, 512)
    assert multiplied_parameters(config) == 2_424_832 + 1_048_576
    assert training_flops(config, 1) == 20_840_448
    tied = replace(config, tie_word_embeddings=True)
    assert multiplied_parameters(tied) == multiplied_parameters(config), "tied or not, the product is made"


def test_a_branch_equals_the_run_that_was_planned_that_short(corpus: Corpus, tmp_path: Path) -> None:
    candidate = replace(TINY, decay=0.2)
    settings = candidate.settings() | {"stable_steps": [4, 8], "corpus_manifest_sha256": corpus.manifest_sha256}
    inputs = {"corpus": str(corpus.folder)}
    result = train_branches(settings, tmp_path / "branches", inputs)
    for end in result["branches"]:
        planned = replace(candidate, tokens=end["tokens"])
        alone = train_candidate(
            planned.settings() | {"corpus_manifest_sha256": corpus.manifest_sha256},
            tmp_path / f"alone_{end['tokens']}",
            inputs,
        )
        assert alone["held_out_bits_per_byte"] == end["held_out_bits_per_byte"]
    # planted: a warmup that is a share of the run's length gives another rate in the stable part
    short, long = (replace(candidate, tokens=t, warmup_tokens=t // 4).recipe(480) for t in (5 * 128, 10 * 128))
    losses = []
    for name, recipe in (("short", short), ("long", long)):
        trainer = Trainer(recipe, corpus, tmp_path / name)
        losses.append([trainer.train_step()["loss"] for _ in range(4)])
    assert losses[0] != losses[1]


def test_branches_that_no_run_has_are_refused() -> None:
    assert branch_plan(replace(TINY, decay=0.2), 8) == 10 * 128
    with pytest.raises(ValueError, match="stable step 7"):
        branch_plan(replace(TINY, decay=0.2), 7)


def test_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    settings = TINY.settings() | {"corpus_manifest_sha256": "0" * 64}
    with pytest.raises(ValueError, match="build the corpus that the sweep was planned for"):
        train_candidate(settings, tmp_path, {"corpus": str(corpus.folder)})
