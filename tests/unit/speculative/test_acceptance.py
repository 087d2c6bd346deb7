"""The acceptance rules on tables small enough to check by hand, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from minicpm_ref.speculative.acceptance import (
    accept_multi_round,
    accept_onehot,
    accept_sampled_chain,
    acceptance_rate,
    draw,
    match_path,
)

ALMOST_ONE = 1 - 2.0**-24
P, Q = [0.5, 0.3, 0.2], [0.2, 0.7, 0.1]
GRID = (np.arange(1000) + 0.5) / 1000


def law_of(emit, count: int = 3) -> np.ndarray:
    """The exact law of `emit(u1, u2)` on a grid of uniforms, up to 1/1000."""
    found = np.zeros(count)
    for u in GRID[::10]:
        for w in GRID[::10]:
            found[emit(u, w)] += 1
    return found / found.sum()


def test_the_worked_example_of_a_sampled_draft() -> None:
    """p = (.5, .3, .2), q = (.2, .7, .1): accepted with .6, the residual is (.75, 0, .25)."""
    assert acceptance_rate(P, Q) == pytest.approx(0.6)
    bonus = [1.0, 0.0, 0.0]
    below, above = np.nextafter(3 / 7, 0), np.nextafter(3 / 7, 1)
    assert accept_sampled_chain([P, bonus], [Q], [1], [below, 0.0]).tokens == [1, 0]
    assert accept_sampled_chain([P, bonus], [Q], [1], [above, 0.0]).tokens == [0]
    assert [accept_sampled_chain([P, bonus], [Q], [1], [above, u]).tokens for u in (0.74, 0.76)] == [[0], [2]]
    assert accept_sampled_chain([P, bonus], [Q], [0], [ALMOST_ONE, 0.0]).tokens == [0, 0]


def test_the_worked_example_of_a_one_hot_draft() -> None:
    """Drafting token 2 (index 1): accepted with .3, else tokens 0 and 2 with .5/.7 and .2/.7."""
    tokens = [accept_onehot([P, P], [0, 1], [-1, 0], [u, 0.0]).tokens for u in GRID]
    first = np.bincount([t[0] for t in tokens], minlength=3) / len(tokens)
    assert first == pytest.approx(P, abs=1e-3)
    assert all((len(t) == 2) == (t[0] == 1) for t in tokens)


def test_the_law_is_p_for_an_argmax_draft() -> None:
    """p = (.3, .5, .2), q = (.4, .35, .25), the draft always id 0: the p/q rule would give (.75, .25, 0)."""
    p = [0.3, 0.5, 0.2]
    found = np.bincount([accept_onehot([p, p], [9, 0], [-1, 0], [u, 0.5]).tokens[0] for u in GRID]) / 1000
    assert found == pytest.approx(p, abs=1e-3)
    q = [0.4, 0.35, 0.25]
    wrong = law_of(lambda u, w: accept_sampled_chain([p, p], [q], [0], [u, w]).tokens[0])
    assert wrong == pytest.approx([0.75, 0.25, 0.0], abs=0.02)


def test_q_is_the_law_drawn_from() -> None:
    """Drafts after top-k 2 of (.4, .3, .2, .1); p = (.5, .5, 0, 0): id 0 passes with 7/8."""
    p, q = [0.5, 0.5, 0, 0], [4 / 7, 3 / 7, 0, 0]
    passed = np.mean([accept_sampled_chain([p, p], [q], [0], [u, 0.5]).accepted for u in GRID])
    assert passed == pytest.approx(7 / 8, abs=1e-3)
    one = law_of(lambda u, w: accept_sampled_chain([p, p], [q], [0], [u, w]).tokens[0], 4)
    other = law_of(lambda u, w: accept_sampled_chain([p, p], [q], [1], [u, w]).tokens[0], 4)
    assert 4 / 7 * one + 3 / 7 * other == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
def test_a_token_without_probability_never_comes(uniform: float) -> None:
    zero = [0.0, 1.0, 0.0]
    assert draw(zero, uniform) == 1
    assert accept_onehot([zero, zero], [0, 0], [-1, 0], [uniform] * 2).tokens == [1]
    assert accept_sampled_chain([zero, zero], [[0.5, 0.25, 0.25]], [0], [uniform] * 2).tokens == [1]
    assert accept_multi_round([zero] * 2, [[0.5, 0.25, 0.25]] * 2, [0, 0], [-1, 0], [uniform] * 2).tokens == [1]
    third = np.full(3, 1 / 3)  # sums to one only up to rounding
    assert draw(third, uniform) == (0 if uniform == 0 else 2)


def test_equal_laws_always_accept() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        p = rng.dirichlet(np.full(5, 0.3), 3)
        y = [draw(p[i], rng.random()) for i in range(2)]
        assert accept_sampled_chain(p, p[:2], y, [ALMOST_ONE, ALMOST_ONE, rng.random()]).accepted == 2


def test_certain_and_impossible_drafts() -> None:
    one, zero = [1.0, 0.0], [0.0, 1.0]
    for u in (0.0, 0.5, ALMOST_ONE):
        assert accept_onehot([one, one], [0, 0], [-1, 0], [u, u]).accepted == 1
        assert accept_onehot([zero, one], [0, 0], [-1, 0], [u, u]).accepted == 0


def test_the_extra_token_uses_a_uniform_of_its_own() -> None:
    p = [[0.5, 0.5]] * 2
    a, b = (accept_sampled_chain(p, [[0.0, 1.0]], [1], [0.7, u]).tokens for u in (0.0, 0.9))
    assert a == b == [0]  # the residual is certain
    kept = [accept_sampled_chain(p, [[0.5, 0.5]], [1], [0.7, u]).tokens for u in (0.0, 0.9)]
    assert kept == [[1, 0], [1, 1]]  # the bonus is not, and follows the last uniform


def test_greedy_walk_of_the_worked_tree() -> None:
    """A B C D G of the specification: argmax A after the root, C after A, X after C: path [0, 1, 3], extra X."""
    a, b, c, d, g, x = range(6)
    tokens, parent = [9, a, b, c, d, g], [-1, 0, 0, 1, 1, 3]
    argmax = {0: a, 1: c, 3: x}
    found = match_path(argmax.__getitem__, tokens, parent)  # asks for the nodes of the path and no other
    assert (found.tokens, found.path, found.accepted) == ([a, c, x], [0, 1, 3], 2)
    p = np.eye(6)[[a, x, c, x, x, x]]
    p[1] = np.eye(6)[c]
    assert accept_onehot(p, tokens, parent, [0.5] * 6) == found


def test_an_empty_draft_emits_one_token() -> None:
    assert accept_onehot([P], [7], [-1], [0.6]).tokens == [1]
    assert accept_sampled_chain([P], [], [], [0.6]).tokens == [1]
    assert accept_multi_round([P], [P], [7], [-1], [0.6]).tokens == [1]


def test_equal_siblings_and_padding() -> None:
    found = accept_onehot([P, P, P], [9, 1, 1], [-1, 0, 0], [0.6, 0.0, 0.0])
    assert (found.tokens, found.path) == ([1, 0], [0, 1])
    assert accept_onehot([P, P, P], [9, -1, -1], [-1, 0, 0], [0.9, 0.0, 0.0]).tokens == [2]


def test_all_drafts_are_accepted_and_the_bonus_follows() -> None:
    """D9: an oracle gives g + 1 tokens a round; without the bonus it would be g."""
    chain = [-1, 0, 1, 2]
    p = np.eye(4)[[1, 2, 3, 0]]
    assert accept_onehot(p, [9, 1, 2, 3], chain, [0.3] * 4).tokens == [1, 2, 3, 0]
    assert accept_sampled_chain(p, p[:3], [1, 2, 3], [0.3] * 4).tokens == [1, 2, 3, 0]


def test_nothing_after_the_first_rejection_counts() -> None:
    """The second draft would pass, but it was drafted after a token that is not there."""
    p = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert accept_sampled_chain(p, [[0.0, 1.0], [0.0, 1.0]], [1, 1], [0.5, 0.0, 0.0]).tokens == [0]
    assert accept_onehot(p, [9, 1, 1], [-1, 0, 1], [0.5] * 3).tokens == [0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accept_onehot([P], [0, 1], [-1, 0], [0.1, 0.1]), r"p has shape \[1, 3\]: expected \[2, V\]"),
        (lambda: accept_onehot([P, P], [0, 1], [-1, 0], [0.1]), "1 uniforms: expected one for each of the 2 nodes"),
        (lambda: accept_onehot([P, P], [0, 1], [-1, 1], [0.1, 0.1]), r"parent\[1\] = 1: expected a node before it"),
        (lambda: accept_onehot([P], [0], [0], [0.1]), "expected equal lengths and parent"),
        (lambda: accept_sampled_chain([P], [Q], [0], [0.1, 0.1]), r"p has shape \[1, 3\]: expected \[2, V\]"),
        (lambda: accept_sampled_chain([P, P], [Q], [0], [0.1]), "1 uniforms: expected 2"),
        (lambda: accept_sampled_chain([P, P], [[1.0, 0, 0]], [1], [0.1, 0.1]), "draft token 1 has q = 0.0"),
        (lambda: draw(P, 1.0), "uniform = 1.0"),
        (lambda: draw([0.0, 0.0], 0.5), "weights sum to 0.0"),
        (lambda: draw([0.5, np.nan], 0.5), "weights sum to nan"),
    ],
)
def test_what_is_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
