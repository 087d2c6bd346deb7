"""Growing draft trees on tables, where every candidate can be listed."""

from __future__ import annotations

import numpy as np
import pytest

from minicpm_ref.speculative import Draft, Guesses, grow

A, B, C, D, E, F, G, H, I, J = range(10)


def test_the_worked_example() -> None:
    """k = 2, D = 3, n = 6 of the specification: nodes A B C D G with parents root, root, A, A, C."""
    levels = [
        (([C, D], [-0.4, -1.5]), ([E, F], [-0.3, -1.9])),
        (([G, H], [-0.5, -1.3]), ([I, J], [-0.3, -2.0])),
    ]
    asked = []

    def expand(tokens: list[int], slots: list[int]) -> Guesses:
        asked.append((tokens, slots))
        rows = levels[len(asked) - 1]
        return Guesses(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]))

    draft = grow(Guesses(np.array([[A, B]]), np.array([[-0.2, -1.8]])), expand, depth=3, nodes=5)
    assert draft == Draft([A, B, C, D, G], [-1, -1, 0, 0, 2])
    assert draft.depths == [1, 1, 2, 2, 3]
    assert asked == [([A, B], [-1, -1]), ([C, D], [0, 0])]  # D at -1.7 is expanded, E at -2.1 is not


class RandomModel:
    """Log-probabilities over V tokens that depend on the whole path; remembers each row's path and every candidate."""

    def __init__(self, seed: int, vocabulary: int, width: int):
        self.seed, self.vocabulary, self.width = seed, vocabulary, width
        self.paths: list[tuple[int, ...]] = []
        self.candidates: dict[tuple[int, ...], float] = {}
        self.scores: dict[tuple[int, ...], float] = {(): 0.0}

    def follow(self, paths: list[tuple[int, ...]]) -> Guesses:
        tokens, logs = [], []
        for path in paths:
            random = np.random.default_rng([self.seed, *path])
            law = np.log(random.dirichlet(np.full(self.vocabulary, 0.5)) + 1e-12)
            best = np.argsort(-law)[: self.width]
            tokens.append(best)
            logs.append(law[best])
            for token, log in zip(best, law[best], strict=True):
                self.candidates[(*path, int(token))] = self.scores[path] + min(log, 0.0)
        self.scores |= self.candidates
        return Guesses(np.array(tokens), np.array(logs))

    def first(self) -> Guesses:
        return self.follow([()])

    def expand(self, tokens: list[int], slots: list[int]) -> Guesses:
        above = self.paths or [()]
        self.paths = [(*(above[slot] if slot >= 0 else ()), token) for token, slot in zip(tokens, slots, strict=True)]
        return self.follow(self.paths)


@pytest.mark.parametrize(("width", "depth", "nodes"), [(1, 3, 3), (2, 3, 5), (4, 3, 15), (10, 4, 39), (3, 5, 400)])
def test_the_best_of_all_candidates_are_chosen(width: int, depth: int, nodes: int) -> None:
    """D7: ancestor-closed, parents first, at most n nodes, different siblings, and exactly the best candidates."""
    for seed in range(20):
        model = RandomModel(seed, 12, width)
        draft = grow(model.first(), model.expand, depth, nodes)
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert len(set(paths)) == len(paths) <= nodes  # the same path twice would be equal siblings
        brute = sorted(model.candidates.values(), reverse=True)[:nodes]
        assert sorted((model.candidates[path] for path in paths), reverse=True) == pytest.approx(brute)
        assert max(map(len, paths)) <= depth
        assert len(model.candidates) == width + (depth - 1) * width * width
        if width == 1:
            assert draft.is_chain


def test_a_tie_between_parent_and_child_keeps_the_parent() -> None:
    """A certain child has its parent's score; a set that dropped the parent would be no tree."""
    certain = Guesses(np.array([[1, 2], [3, 4]]), np.array([[0.0, -9.0], [0.0, -9.0]]))
    first = Guesses(np.array([[5, 6]]), np.array([[-0.5, -0.5]]))
    for nodes in range(1, 8):
        draft = grow(first, lambda tokens, slots: certain, 3, nodes)
        assert len(draft.tokens) == nodes  # Draft itself refuses a parent that does not come first


def test_rounding_above_zero_does_not_lift_a_child_over_its_parent() -> None:
    first = Guesses(np.array([[5]]), np.array([[-0.5]]))
    draft = grow(first, lambda tokens, slots: Guesses(np.array([[6]]), np.array([[1e-7]])), 2, 1)
    assert draft == Draft([5], [-1])


def test_one_level_asks_nobody() -> None:
    def refuse(tokens: list[int], slots: list[int]) -> Guesses:
        raise AssertionError

    first = Guesses(np.array([[5, 6, 7]]), np.array([[-0.5, -0.6, -0.7]]))
    assert grow(first, refuse, 1, 2) == Draft([5, 6], [-1, -1])
