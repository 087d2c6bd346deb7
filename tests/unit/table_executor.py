"""Stubs for speculative decoding: a target without weights, and drafters that are always, never or sometimes right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.config import ModelConfig
from minicpm_ref.speculative.drafter import Draft

CONFIG = ModelConfig(
    vocab_size=12, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
    intermediate_size=4, max_position_embeddings=4096,
)  # fmt: skip


class TableExecutor:
    """An executor whose logits [V] are a function of the tokens so far; counts its calls.

    `hidden` gives each token's (id, position), so that a drafter can check what it is told.
    """

    def __init__(self, logits: Callable[[list[int]], NDArray[np.float32]], max_length: int = 4096):
        self.logits, self.max_length, self.config = logits, max_length, CONFIG
        self.ids: list[int] = []
        self.calls: list[int] = []  # tokens of each decode or verify
        self._paths: list[list[int]] = []

    def _append(self, ids: Sequence[int], parents: Sequence[int] | None) -> NDArray[np.float32]:
        assert len(self.ids) + len(ids) <= self.max_length
        past = list(self.ids)
        chain = list(range(-1, len(ids) - 1))
        self._paths = []
        for token, parent in zip(ids, chain if parents is None else parents, strict=True):
            self._paths.append([*(past if parent < 0 else self._paths[parent]), int(token)])
        self.ids += [int(token) for token in ids]
        return np.stack([self.logits(path) for path in self._paths])

    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> NDArray[np.float32]:
        return self._append(ids, None)[-1]

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append(1)
        return self._append(ids, None)

    def verify(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> NDArray[np.float32]:
        self.calls.append(len(ids))
        return self._append(ids, parents)

    def keep(self, row: int, base: int, path: Sequence[int]) -> None:
        self.ids = self.ids[:base] + [self.ids[base + index] for index in path]

    def truncate(self, row: int, length: int) -> None:
        self.ids = self.ids[:length]

    def length(self, row: int) -> int:
        return len(self.ids)

    def hidden(self, row: int, layers: Sequence[int]) -> NDArray[np.float32]:
        told = [[path[-1], len(path) - 1] for path in self._paths]
        return np.array([told] * len(layers), np.float32)


def order_two(vocabulary: int = 12, seed: int = 0, spread: float = 2.0) -> Callable[[list[int]], NDArray[np.float32]]:
    """Random logits that depend on the last two tokens."""
    table = spread * np.random.default_rng(seed).standard_normal((vocabulary, vocabulary, vocabulary))
    return lambda ids: table[ids[-2] if len(ids) > 1 else 0, ids[-1]].astype(np.float32)


class Scripted:
    """Knows the text G that will come and drafts from it: token i of the text is passed through `say(token, place)`.

    Checks on the way that it is told every token once, in order, with the features of the token before it.
    """

    def __init__(
        self, text: Sequence[int], length: int, say: Callable[[int, int], int] = lambda token, place: token,
        layers: tuple[int, ...] = (1,),
    ):  # fmt: skip
        self.future, self.length, self.say, self.layers = list(text), length, say, layers

    def start(self, first: int) -> None:
        self.text = [first]

    def extend(self, tokens: Sequence[int], features: NDArray[np.float32]) -> None:
        assert len(features) == len(tokens)
        for token, feature in zip(tokens, features, strict=True):
            if self.layers:
                assert feature.tolist() == [self.text[-1], len(self.text) - 1] * len(self.layers)
            self.text.append(int(token))

    def propose(self, most: int) -> Draft:
        known = len(self.text)
        rest = self.future[known : known + min(self.length, most)]
        return Draft.chain([self.say(token, known + i) for i, token in enumerate(rest)])


class RandomTree(Scripted):
    """A random tree of guesses, some of them right."""

    def __init__(self, text: Sequence[int], nodes: int, seed: int = 0, vocabulary: int = 12):
        super().__init__(text, nodes)
        self.random, self.vocabulary = np.random.default_rng(seed), vocabulary

    def propose(self, most: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        for node in range(self.length):
            parent = int(self.random.integers(-1, node))
            place = len(self.text) + (0 if parent < 0 else Draft(tokens, parents).depths[parent])
            right = self.future[place] if place < len(self.future) else 0
            tokens.append(right if self.random.random() < 0.6 else int(self.random.integers(self.vocabulary)))
            parents.append(parent)
        return Draft(tokens, parents)
