"""Prompt lookup: draft by copying what followed the last time.

Problem. A trained draft head costs a training run and a matrix product a token. Much text repeats itself: code that
names the same variables, an answer that quotes the question, an edit that returns most of a file.

Idea. Take the last few tokens, find where they stood before, and propose what followed there. One dictionary look-up a
round, no weights, no features. The most recent place wins, the longest match first.

A draft costs something even so: verifying n tokens takes longer than one. The drafter therefore keeps an average of how
many of its drafts come true, compares that with what they cost, and stops proposing while they do not pay; after a
pause it tries again, since a text that did not repeat itself may begin to.

Left out: several candidates in one tree, and a corpus of other texts to copy from.
Source: Saxena, "Prompt Lookup Decoding" (2023); the published reports of what went wrong are in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.speculative.drafter import Draft

SMOOTHING = 0.8  # weight of the past in the running average, about five rounds
PAUSE = 32  # tokens without a proposal before the next trial


def flat_cost(tokens: int) -> float:
    """A guess at the time of verifying `tokens` tokens over that of one, where nothing was measured: a tenth a token,
    which a memory-bound step stays below."""
    return 1 + 0.1 * (tokens - 1)


class NGramDrafter:
    """Proposes up to `length` tokens that followed the last `largest`, ..., `smallest` tokens when they stood earlier.

    `stop_ids` end a draft: nothing is proposed from the first of them on. `cost(n)`: time of verifying n tokens over
    that of one (`tree_size.measure_verify` gives it); `always` proposes whatever the drafts were worth.
    Raises ValueError for lengths below 1.

    >>> drafter = NGramDrafter(length=3, largest=2)
    >>> drafter.start(5)
    >>> drafter.extend([6, 7, 8, 9, 10, 11, 7, 8], np.empty((8, 0), np.float32))
    >>> drafter.propose(3).tokens
    [9, 10, 11]
    """

    layers: tuple[int, ...] = ()

    def __init__(
        self,
        length: int = 8,
        largest: int = 4,
        smallest: int = 2,
        stop_ids: Sequence[int] = (),
        cost: Callable[[int], float] = flat_cost,
        always: bool = False,
    ):
        if length < 1 or not 1 <= smallest <= largest:
            raise ValueError(
                f"length = {length}, smallest = {smallest}, largest = {largest}: expected 1 <= smallest <= largest and "
                "length at least 1"
            )
        self.length, self.largest, self.smallest = length, largest, smallest
        self.stop_ids, self.cost, self.always = frozenset(stop_ids), cost, always
        self.start(0)

    def start(self, first: int) -> None:
        """Forget everything; a text begins with `first`."""
        self._ids = [first]
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where what followed them begins, the last time
        self._proposed: list[int] = []
        self._gain: float | None = None  # running average: time saved a draft, in steps of the target
        self._resume = 0  # text length from which to propose again

    def extend(self, tokens: Sequence[int], features: NDArray[np.float32]) -> None:
        """The text goes on with `tokens`; `features` are not looked at."""
        if self._proposed:
            self._judge(tokens)
        for token in tokens:
            # entered only now, when something follows: so the text's own end never matches itself
            for size in range(self.smallest, min(self.largest, len(self._ids)) + 1):
                self._after[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(int(token))

    def propose(self, most: int) -> Draft:
        """Up to `most` copied tokens, or an empty draft."""
        self._proposed = []
        if not self.always and len(self._ids) < self._resume:
            return Draft()
        for size in range(min(self.largest, len(self._ids)), self.smallest - 1, -1):
            begin = self._after.get(tuple(self._ids[-size:]))
            if begin is not None:
                self._proposed = self._ids[begin : begin + min(most, self.length)] if most > 0 else []
                break
        end = next((i for i, token in enumerate(self._proposed) if token in self.stop_ids), len(self._proposed))
        self._proposed = self._proposed[:end]
        return Draft.chain(self._proposed)

    def _judge(self, tokens: Sequence[int]) -> None:
        """Compare the last proposal with what came, and pause if proposals cost more than they save."""
        pairs = zip(self._proposed, tokens, strict=False)
        accepted = next((i for i, (guess, token) in enumerate(pairs) if guess != token), None)
        if accepted is None:
            accepted = min(len(self._proposed), len(tokens))
        gain = accepted - (self.cost(1 + len(self._proposed)) - 1)
        self._gain = gain if self._gain is None else SMOOTHING * self._gain + (1 - SMOOTHING) * gain
        self._proposed = []
        if self._gain < 0:
            self._resume = len(self._ids) + len(tokens) + PAUSE
            self._gain = None  # the next trial is judged by itself
