"""The joint law of what the acceptance rules emit, counted; and known mistakes, each of which must be caught.

A random order-1 Markov target over 6 tokens, drafts restricted to 4 of them, rounds of up to 2 drafts, the first 4
emitted tokens: longer than a round, so that a wrong bonus shows. The histogram of 1296 cells must fit the exact product
law (chi-square, p >= 1e-6). The mistakes are those that were made in public; none of them looks wrong in a sample.
In the spirit of the rejection-sampler tests of vLLM: count, and compare with the law.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import stats

from minicpm_ref.speculative.acceptance import (
    accept_multi_round,
    accept_onehot,
    accept_sampled_chain,
    acceptance_rate,
    draw,
    match_path,
)

V, STEPS, LENGTH = 6, 2, 4
DRAWS, MUTANT_DRAWS = 20_000, 2_500
_RNG = np.random.default_rng(7)
P = _RNG.dirichlet(np.full(V, 0.7), V)  # [last token, next token]
Q = P * np.exp(0.8 * _RNG.standard_normal((V, V)))
Q[:, [1, 4]] = 0.0  # what the draft cannot say
Q /= Q.sum(1, keepdims=True)
HOT_Q = Q**0.5 / (Q**0.5).sum(1, keepdims=True)

Round = Callable[[int, np.random.Generator], list[int]]


def sampled_chain(accept: Callable[..., list[int]], drawn: np.ndarray = Q, told: np.ndarray = Q) -> Round:
    """A round that draws its drafts from `drawn` and tells the rule that they came from `told`."""

    def one(last: int, rng: np.random.Generator) -> list[int]:
        y = [draw(drawn[last], rng.random())]
        y.append(draw(drawn[y[0]], rng.random()))
        return accept(P[[last, *y]], told[[last, y[0]]], y, rng.random(STEPS + 1), rng)

    return one


def argmax_chain(accept: Callable[..., list[int]]) -> Round:
    def one(last: int, rng: np.random.Generator) -> list[int]:
        y = [int(Q[last].argmax())]
        y.append(int(Q[y[0]].argmax()))
        return accept(P[[last, *y]], Q[[last, y[0]]], y, rng.random(STEPS + 1), rng)

    return one


def topk_tree(accept: Callable[..., list[int]]) -> Round:
    """The root, its two likeliest children, and two of each of those."""
    parent = [-1, 0, 0, 1, 1, 2, 2]

    def one(last: int, rng: np.random.Generator) -> list[int]:
        first = np.argsort(-Q[last])[:2]
        tokens = [last, *first, *np.argsort(-Q[first[0]])[:2], *np.argsort(-Q[first[1]])[:2]]
        return accept(P[tokens], [int(t) for t in tokens], parent, rng.random(len(tokens)), rng)

    return one


def sampled_siblings(accept: Callable[..., list[int]], replacement: bool) -> Round:
    """The root with three sampled children, the first of which has two."""
    parent = [-1, 0, 0, 0, 1, 1]

    def siblings(last: int, count: int, rng: np.random.Generator) -> list[int]:
        q, found = Q[last].copy(), []
        for _ in range(count):
            found.append(draw(q, rng.random()))
            if not replacement:
                q[found[-1]] = 0.0
        return found

    def one(last: int, rng: np.random.Generator) -> list[int]:
        tokens = [last, *siblings(last, 3, rng)]
        tokens += siblings(tokens[1], 2, rng)
        return accept(P[tokens], Q[tokens], tokens, parent, rng.random(len(tokens)), rng)

    return one


def count(one: Round, draws: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """(histogram [V^4] of the first four tokens after token 0, mean tokens a round)."""
    rng = np.random.default_rng(seed)
    histogram, emitted, rounds = np.zeros(V**LENGTH), 0, 0
    for _ in range(draws):
        tokens: list[int] = []
        while len(tokens) < LENGTH:
            got = one(tokens[-1] if tokens else 0, rng)
            tokens += got
            emitted, rounds = emitted + len(got), rounds + 1
        histogram[np.ravel_multi_index(tokens[:LENGTH], (V,) * LENGTH)] += 1
    return histogram, emitted / rounds


@cache
def exact_law() -> np.ndarray:
    joint = P[0]
    for _ in range(LENGTH - 1):
        joint = joint[..., None] * P
    return joint.ravel()


def p_value(histogram: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of a histogram against a law, cells that expect fewer than five pooled; 0 if the impossible came."""
    if histogram[law == 0].any():
        return 0.0
    expected = law * histogram.sum()
    small = expected < 5
    observed = np.append(histogram[~small], histogram[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(statistic, keep.sum() - 1))


def total_variation(histogram: np.ndarray, law: np.ndarray) -> tuple[float, float]:
    """(distance, its expected size for a correct sampler)."""
    n = histogram.sum()
    return 0.5 * np.abs(histogram / n - law).sum(), 0.5 * np.sqrt(2 / np.pi) * np.sqrt(law * (1 - law) / n).sum()


def rule(accept: Callable[..., object]) -> Callable[..., list[int]]:
    """The production rule without the generator that the mutants get besides."""
    return lambda *arguments: accept(*arguments[:-1]).tokens  # type: ignore[attr-defined]


def onehot_chain(p, q, y, uniforms, rng) -> list[int]:
    return accept_onehot(p, [-1, *y], range(-1, len(y)), uniforms).tokens


def with_replacement(p, q, tokens, parent, uniforms, rng) -> list[int]:
    return accept_multi_round(p, q, tokens, parent, uniforms, replacement=True).tokens


CORRECT: dict[str, Round] = {
    "sampled chain": sampled_chain(rule(accept_sampled_chain)),
    "argmax chain": argmax_chain(onehot_chain),
    "sampled chain, one-hot rule": sampled_chain(onehot_chain),
    "top-k tree": topk_tree(rule(accept_onehot)),
    "independent siblings": sampled_siblings(with_replacement, True),
    "siblings without replacement": sampled_siblings(rule(accept_multi_round), False),
}


@pytest.mark.parametrize("name", CORRECT)
def test_the_joint_law_is_that_of_the_target(name: str) -> None:
    histogram, rate = count(CORRECT[name], DRAWS if name in ("sampled chain", "argmax chain") else DRAWS // 4)
    assert p_value(histogram, exact_law()) > 1e-6
    distance, noise = total_variation(histogram, exact_law())
    assert distance < 2 * noise
    assert rate > 1.2  # drafts are accepted at all


# ---- mistakes --------------------------------------------------------------------------------------------------------


def resample_from_p(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if not uniforms[i] * q[i, token] < p[i, token]:
            return [*y[:i], draw(p[i], uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def onehot_then_resample_from_p(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if not uniforms[i] < p[i, token]:
            return [*y[:i], draw(p[i], uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def argmax_test(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if token != p[i].argmax():
            return [*y[:i], draw(p[i], uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def shared_uniform(p, q, y, uniforms, rng) -> list[int]:
    return accept_sampled_chain(p, q, y, np.full_like(uniforms, uniforms[0])).tokens


def wrong_bonus(p, q, y, uniforms, rng) -> list[int]:
    found = accept_sampled_chain(p, q, y, uniforms)
    return [*y, draw(p[-2], uniforms[-1])] if found.accepted == len(y) else found.tokens


def greedy_bonus(p, q, y, uniforms, rng) -> list[int]:
    found = accept_sampled_chain(p, q, y, uniforms)
    return [*y, int(p[-1].argmax())] if found.accepted == len(y) else found.tokens


def zeroed_residual(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if not uniforms[i] * q[i, token] < p[i, token]:
            rest = p[i].copy()
            rest[token] = 0.0
            return [*y[:i], draw(rest, uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def scalar_residual(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if not uniforms[i] * q[i, token] < p[i, token]:
            rest = np.maximum(p[i] - q[i, token], 0)
            return [*y[:i], draw(rest if rest.any() else p[i], uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def typical(p, q, y, uniforms, rng) -> list[int]:
    for i, token in enumerate(y):
        if not (uniforms[i] * q[i, token] < p[i, token] or p[i, token] > 0.3):
            return [*y[:i], draw(np.maximum(p[i] - q[i], 0), uniforms[-1])]
    return [*y, draw(p[-1], uniforms[-1])]


def goes_on_after_a_rejection(p, q, y, uniforms, rng) -> list[int]:
    found = []
    for i, token in enumerate(y):
        passed = uniforms[i] * q[i, token] < p[i, token]
        found.append(token if passed else draw(np.maximum(p[i] - q[i], 0), rng.random()))
    return [*found, draw(p[-1], uniforms[-1])]


def tree_coins(p, tokens, parent, uniforms, rng, renormalise: bool) -> list[int]:
    """Accept child after child with its probability. Wrong twice: the last token comes from p as it was, and without
    `renormalise` so do the tests of the younger children."""
    node, emitted = 0, []
    while True:
        law, chosen = p[node].copy(), None
        for child in (v for v in range(len(parent)) if parent[v] == node):
            if rng.random() < law[tokens[child]]:
                chosen = child
                break
            if renormalise:
                law[tokens[child]] = 0.0
                law /= law.sum()
        if chosen is None:
            return [*emitted, draw(p[node], rng.random())]
        emitted.append(tokens[chosen])
        node = chosen


def siblings_without_residual(p, q, tokens, parent, uniforms, rng) -> list[int]:
    """p is not replaced by the residual after a rejection."""
    node, emitted = 0, []
    while True:
        children = (v for v in range(len(parent)) if parent[v] == node)
        chosen = next((v for v in children if uniforms[v] * q[node][tokens[v]] < p[node][tokens[v]]), None)
        if chosen is None:
            return [*emitted, draw(p[node], rng.random())]
        emitted.append(tokens[chosen])
        node = chosen


MUTANTS: dict[str, Round] = {
    "resamples from p after a rejection": sampled_chain(resample_from_p),
    "one-hot test, then resamples from p": argmax_chain(onehot_then_resample_from_p),
    "argmax drafts judged as samples": argmax_chain(rule(accept_sampled_chain)),
    "accepts what equals the argmax of p": argmax_chain(argmax_test),
    "drafts drawn at another temperature": sampled_chain(rule(accept_sampled_chain), HOT_Q, Q),
    "one uniform for everything": sampled_chain(shared_uniform),
    "bonus from the wrong place": sampled_chain(wrong_bonus),
    "bonus by argmax": sampled_chain(greedy_bonus),
    "residual is p without the token": sampled_chain(zeroed_residual),
    "residual subtracts a number": sampled_chain(scalar_residual),
    "typical acceptance": sampled_chain(typical),
    "goes on after a rejection": sampled_chain(goes_on_after_a_rejection),
    "siblings: no zero, no renormalisation": topk_tree(lambda *a: tree_coins(*a, renormalise=False)),
    "siblings: last token from p as it was": topk_tree(lambda *a: tree_coins(*a, renormalise=True)),
    "independent siblings, p stays": sampled_siblings(siblings_without_residual, True),
    "siblings without replacement, q stays": sampled_siblings(with_replacement, False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mistake_is_caught(name: str) -> None:
    histogram, _ = count(MUTANTS[name], MUTANT_DRAWS)
    assert p_value(histogram, exact_law()) < 1e-6, "this mistake passes the test"


def test_a_missing_bonus_is_lossless_and_caught_by_counting() -> None:
    """Its law is right; only the tokens a round tell."""

    def without_bonus(p, q, y, uniforms, rng) -> list[int]:
        found = accept_sampled_chain(p, q, y, uniforms)
        return found.tokens[:-1] if found.accepted == len(y) else found.tokens

    histogram, rate = count(sampled_chain(without_bonus), MUTANT_DRAWS)
    assert p_value(histogram, exact_law()) > 1e-6
    _, expected = count(CORRECT["sampled chain"], MUTANT_DRAWS)
    assert rate < expected - 0.2


def test_closed_forms_of_two_mistakes() -> None:
    """Resampling from p gives min(p, q) + (1 - a) p; an argmax draft judged as a sample gives a at its token and the
    residual elsewhere. The counts meet those formulas, so the harness measures what it says."""
    p, q = P[0], Q[0]
    overlap = np.minimum(p, q)
    rng = np.random.default_rng(3)
    found = np.zeros(V)
    for _ in range(4000):
        y = draw(q, rng.random())
        found[resample_from_p(np.stack([p, p]), q[None], [y], rng.random(2), rng)[0]] += 1
    assert p_value(found, overlap + (1 - overlap.sum()) * p) > 1e-6
    assert p_value(found, p) < 1e-6
    best, found = int(q.argmax()), np.zeros(V)
    passed = min(1.0, p[best] / q[best])
    residual = np.maximum(p - q, 0)
    for _ in range(4000):
        found[accept_sampled_chain(np.stack([p, p]), q[None], [best], rng.random(2)).tokens[0]] += 1
    assert p_value(found, passed * np.eye(V)[best] + (1 - passed) * residual / residual.sum()) > 1e-6


def test_acceptance_is_calibrated() -> None:
    """A sampled draft passes with sum min(p, q), an argmax draft with p of its token."""
    rng = np.random.default_rng(5)
    n, last = 5_000, 2
    for expected, one in (
        (float(acceptance_rate(P[last], Q[last])), None),
        (float(P[last, Q[last].argmax()]), int(Q[last].argmax())),
    ):
        passed = 0
        for _ in range(n):
            y = draw(Q[last], rng.random()) if one is None else one
            pair = P[[last, y]]
            if one is None:
                passed += accept_sampled_chain(pair, Q[[last]], [y], rng.random(2)).accepted
            else:
                passed += match_path(lambda v, rows=pair: draw(rows[v], rng.random()), [last, y], [-1, 0]).accepted
        assert abs(passed / n - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_samples_converge_to_the_target_and_not_to_another_law() -> None:
    """As vLLM tests its sampler: over five random vocabularies the distance to p shrinks as 1 / sqrt(n), while the
    distance to an unrelated law stays."""
    rng = np.random.default_rng(11)
    distances: dict[int, list[float]] = {100: [], 4_000: []}
    others = []
    for _ in range(5):
        p, q, other = rng.dirichlet(np.ones(30), 3)
        for n, found in distances.items():
            drafts = np.searchsorted(np.cumsum(q), rng.random(n) * q.sum(), "right").clip(max=29)
            tokens = [accept_sampled_chain([p, p], [q], [int(y)], rng.random(2)).tokens[0] for y in drafts]
            frequency = np.bincount(tokens, minlength=30) / n
            found.append(float(np.linalg.norm(frequency - p)))
        others.append(float(np.linalg.norm(frequency - other)))
    assert np.mean(distances[4_000]) < np.mean(distances[100]) / 5
    assert np.mean(others) > 10 * np.mean(distances[4_000])
