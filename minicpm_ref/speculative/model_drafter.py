"""Drafting with another model: a smaller one, or a cheaper copy of the target itself.

A copy of the target with ternary or 4-bit weights knows nearly all that the target knows, needs no training of its own
for drafting, and reads a fraction of the bytes (self-speculation). It is a whole model all the same: a draft token
costs one of its steps, not one layer.

The drafter runs over an executor of its own and must keep one row of it in step with the text. Its row holds the
text that it has seen and then its own last draft. Instead of counting what was accepted, and being wrong by one now
and then, it compares: whatever of the row equals the text stays, the rest is cut, what is missing is fed.

Left out: sharing the key-value cache between the copy and the target (QuantSpec keeps a 4-bit cache in an 8-bit one).
Sources: Leviathan et al., arXiv 2211.17192; QuantSpec, arXiv 2502.10424.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.speculative.drafter import Draft
from minicpm_ref.speculative.loop import Verifier


class ModelDrafter:
    """Greedy chains of up to `length` tokens from the model in row `row` of `executor`, which has the target's
    vocabulary.

    >>> copy, _ = load(variant="ternary")
    >>> drafter = ModelDrafter(TorchExecutor(copy, max_length=512), length=3)
    """

    layers: tuple[int, ...] = ()

    def __init__(self, executor: Verifier, length: int = 4, row: int = 0):
        if length < 1:
            raise ValueError(f"length = {length}: expected at least 1")
        self.executor, self.length, self.row = executor, length, row
        self.start(0)

    def start(self, first: int) -> None:
        """Forget everything; a text begins with `first`."""
        self._text = [first]
        self._held: list[int] = []  # the tokens in the executor's row
        self._agreed = 0  # how many of them are known to be the text's
        self.executor.truncate(self.row, 0)

    def extend(self, tokens: Sequence[int], features: NDArray[np.float32]) -> None:
        """The text goes on with `tokens`; `features` are not looked at."""
        self._text += [int(token) for token in tokens]

    def propose(self, most: int) -> Draft:
        """The model's own next tokens, or an empty draft where its row is full."""
        wanted = min(most, self.length, self.executor.max_length - len(self._text) + 1)
        if wanted < 1:
            return Draft()
        while self._agreed < min(len(self._held), len(self._text) - 1) and (
            self._held[self._agreed] == self._text[self._agreed]
        ):
            self._agreed += 1  # never the whole text: its last token must be fed to see what follows it
        self.executor.truncate(self.row, self._agreed)
        logits = self.executor.prefill(self.row, self._text[self._agreed :])
        self._held = list(self._text)
        self._agreed = len(self._text)
        guesses = [int(logits.argmax())]
        while len(guesses) < wanted:
            logits = self.executor.decode([self.row], [guesses[-1]])[0]
            self._held.append(guesses[-1])
            guesses.append(int(logits.argmax()))
        return Draft.chain(guesses)
