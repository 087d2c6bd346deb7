"""Logits to tokens: the exact distribution, and the decode loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fresh import fresh_model
from scipy.stats import chisquare

from minicpm_ref.cases import PROCESS_LOGITS
from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, choose_token, generate, process_logits, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0])


def tiny_model() -> MiniCPM:
    config = ModelConfig(50, 32, 2, 4, 2, 48, max_position_embeddings=64)
    return fresh_model(config, seed=3)


def test_greedy_takes_the_first_maximum() -> None:
    probabilities = process_logits(torch.tensor([1.0, 3.0, 3.0]), SamplingParams())
    assert probabilities.tolist() == [0.0, 1.0, 0.0]


def test_temperature_divides_the_logits() -> None:
    torch.testing.assert_close(
        process_logits(LOGITS, SamplingParams(temperature=0.5)), (LOGITS / 0.5).softmax(-1), atol=1e-7, rtol=0
    )


def test_top_k_keeps_k_and_renormalises() -> None:
    probabilities = process_logits(LOGITS, SamplingParams(temperature=1.0, top_k=2))
    torch.testing.assert_close(probabilities[:2], LOGITS[:2].softmax(-1))
    assert probabilities[2:].tolist() == [0.0] * 4


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    whole = LOGITS.softmax(-1)
    p = (whole[0] + whole[1]).item()
    for top_p, kept in ((p - 1e-3, 2), (p + 1e-3, 3), (1e-6, 1)):
        probabilities = process_logits(LOGITS, SamplingParams(temperature=1.0, top_p=top_p))
        assert (probabilities > 0).sum() == kept
        torch.testing.assert_close(probabilities[:kept], whole[:kept] / whole[:kept].sum())


def test_order_of_tokens_does_not_matter() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    params = SamplingParams(temperature=0.7, top_k=4, top_p=0.8)
    torch.testing.assert_close(process_logits(LOGITS[order], params), process_logits(LOGITS, params)[order])


def test_samples_follow_the_distribution() -> None:
    probabilities = process_logits(LOGITS, SamplingParams(temperature=1.0, top_k=4))
    draws = sample(probabilities.expand(20_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(draws, minlength=6)
    assert counts[4:].tolist() == [0, 0]
    assert chisquare(counts[:4], probabilities[:4].double() / probabilities[:4].double().sum() * 20_000).pvalue > 1e-3
    shifted = probabilities[:4].roll(1).double()  # the test can fail: a wrong distribution is noticed
    assert chisquare(counts[:4], shifted / shifted.sum() * 20_000).pvalue < 1e-9


UNIFORMS = (np.arange(4000) + 0.5) / 4000  # evenly spaced: counts are exact but for one draw at each border


def law_of(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """How often `choose_token` picks each token, over all uniforms."""
    draws = [choose_token(logits.float().numpy(), params, u, prompt, output) for u in UNIFORMS]
    return np.bincount(draws, minlength=len(logits)) / len(UNIFORMS)


SETTINGS = [
    SamplingParams(0.8, min_p=0.1),
    SamplingParams(0.8, top_k=3, min_p=0.3),
    SamplingParams(1.0, top_p=0.0),
    SamplingParams(1.0, repetition_penalty=1.5),
    SamplingParams(1.0, frequency_penalty=0.7, presence_penalty=-0.4),
    SamplingParams(1.0, logit_bias={0: -100, 5: 3.0}),
    SamplingParams(1.0, top_k=4, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_the_fast_choice_has_the_law_of_the_definition(params: SamplingParams) -> None:
    prompt, output = [1, 2], [2, 4, 4]
    expected = process_logits(LOGITS, params, prompt, output).numpy()
    assert np.abs(law_of(LOGITS, params, prompt, output) - expected).max() <= 2 / len(UNIFORMS)


@pytest.mark.parametrize("case", [case for case in PROCESS_LOGITS if case.name != "rows"], ids=lambda case: case.name)
def test_the_fast_choice_passes_every_case(case) -> None:
    logits, params = case.build()
    expected = process_logits(logits, params).numpy()
    assert np.abs(law_of(logits, params, [], []) - expected).max() <= 2 / len(UNIFORMS)


def test_ties_at_every_edge_go_to_the_lower_id() -> None:
    level = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    for params, kept in (
        (SamplingParams(), [1]),
        (SamplingParams(1.0, top_k=3), [0, 1, 3]),
        (SamplingParams(1.0, top_k=5), [0, 1, 2, 3, 4]),
        (SamplingParams(1e-6), [1, 3]),
        (SamplingParams(1e-6, top_p=0.5), [1]),
        (SamplingParams(1.0, top_k=1), [1]),
    ):
        assert process_logits(level, params).nonzero().flatten().tolist() == kept
        assert np.flatnonzero(law_of(level, params, [], [])).tolist() == kept


def test_a_flat_distribution_is_looked_at_in_full() -> None:
    """top-p over more tokens than the first look sorts."""
    logits = torch.linspace(0, 0.01, 5000)
    params = SamplingParams(1.0, top_p=0.7)
    kept = process_logits(logits.double(), params).nonzero().flatten()
    drawn = {choose_token(logits.numpy(), params, u) for u in np.linspace(0, 0.99999, 997)}
    assert min(drawn) - int(kept.min()) in range(-3, 9)  # float32 sums of 5000 numbers against float64
    assert len(drawn) == 997


def test_the_last_uniform_never_draws_the_impossible() -> None:
    logits = np.array([0.0, 0.0, -np.inf], np.float32)
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_p=0.99), SamplingParams(1.0, top_k=2)):
        assert choose_token(logits, params, 1 - 2**-53) == 1
        assert choose_token(logits, params, 0.0) == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 3e3])
def test_tiny_temperatures_are_the_limit(temperature: float, scale: float) -> None:
    logits = torch.tensor([9.0, 10.0, -5.0]) * scale
    for params in (
        SamplingParams(temperature),
        SamplingParams(temperature, 2, 0.9),
        SamplingParams(temperature, 0, 0.9),
    ):
        assert process_logits(logits, params).tolist() == [0.0, 1.0, 0.0]
        assert process_logits(logits.bfloat16(), params).tolist() == [0.0, 1.0, 0.0]
        assert choose_token(logits.numpy(), params, 0.999) == 1


def test_bias_bans_and_forces() -> None:
    huge = torch.tensor([900.0, 0.0, -900.0])  # beyond what adding 100 could turn
    for params, token in (
        (SamplingParams(logit_bias={0: -100.0}), 1),
        (SamplingParams(logit_bias={2: 100.0}), 2),
        (SamplingParams(1.0, logit_bias={0: -100.0, 1: -100.0}), 2),
        (SamplingParams(logit_bias={1: 2.5}), 0),
    ):
        assert choose_token(huge.numpy(), params, 0.5) == token
        assert process_logits(huge, params)[token] == 1
    with pytest.raises(ValueError, match="token 3: expected ids below 3"):
        choose_token(huge.numpy(), SamplingParams(logit_bias={3: 1.0}))
    with pytest.raises(RuntimeError, match="maximum"):
        choose_token(huge.numpy(), SamplingParams(logit_bias=dict.fromkeys(range(3), -100.0)))
    with pytest.raises(RuntimeError, match="nan"):
        choose_token(np.array([1.0, np.nan], np.float32), SamplingParams())


def test_penalties_are_the_formulas() -> None:
    ids = {"prompt": [1, 2], "output": [2, 3, 3]}
    odds = process_logits(LOGITS, SamplingParams(1.0), **ids)
    divided = LOGITS.clone()
    divided[1:4] /= 2.0  # 1.0, 0.5 and 0.0
    found = process_logits(LOGITS, SamplingParams(1.0, repetition_penalty=2.0), **ids)
    torch.testing.assert_close(found, divided.softmax(-1))
    assert not torch.allclose(found, odds)
    subtracted = LOGITS - torch.tensor([0, 0, 0.5 + 0.25, 2 * 0.5 + 0.25, 0, 0])
    found = process_logits(LOGITS, SamplingParams(1.0, frequency_penalty=0.5, presence_penalty=0.25), **ids)
    torch.testing.assert_close(found, subtracted.softmax(-1))


def test_a_prefill_computes_the_logits_of_one_token(monkeypatch) -> None:
    model, shapes = tiny_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: shapes.append(tuple(hidden.shape)) or logits(hidden))
    list(generate(model, torch.ones(1, 40, dtype=torch.int64), 2))
    assert shapes == [(1, 1, 32), (1, 1, 32)]  # one row of one token


def test_seeds_repeat_and_no_seed_does_not() -> None:
    model, ids = tiny_model(), torch.tensor([[1, 7, 9, 30]])
    seeded = [list(generate(model, ids, 12, SamplingParams(1.0, seed=seed))) for seed in (4, 4, 5, -1, -1)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert seeded[3] == seeded[4]
    free = {tuple(generate(model, ids, 12, SamplingParams(1.0))) for _ in range(3)}
    assert len(free) > 1


def test_cached_and_naive_generation_agree() -> None:
    model, ids = tiny_model(), torch.tensor([[1, 7, 9, 30]])
    for params in (SamplingParams(), SamplingParams(temperature=0.9, top_k=10, seed=5)):
        cached = list(generate(model, ids, 20, params))
        assert cached == list(generate(model, ids, 20, params, use_cache=False))
        assert len(cached) == 20


def test_generation_stops_before_a_stop_token() -> None:
    model, ids = tiny_model(), torch.tensor([[1, 7, 9, 30]])
    free = list(generate(model, ids, 20))
    stop = free[5]
    assert list(generate(model, ids, 20, stop_ids=[stop])) == free[: free.index(stop)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_nonsense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        next(generate(tiny_model(), torch.zeros(2, 3, dtype=torch.int64), 1))
