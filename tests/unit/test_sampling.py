"""Logits to tokens: the exact distribution, and the decode loop."""

from __future__ import annotations

import pytest
import torch
from fresh import fresh_model
from scipy.stats import chisquare

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate, process_logits, sample

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
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_nonsense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        next(generate(tiny_model(), torch.zeros(2, 3, dtype=torch.int64), 1))
