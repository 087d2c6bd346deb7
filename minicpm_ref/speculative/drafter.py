"""What a drafter is: something that guesses the next tokens, as a chain or as a tree.

A draft is only a guess, so nothing about it can be wrong except its worth. That is why one small protocol holds for a
trained head (`draft_tree`), for copying from the text (`ngram`) and for a smaller model (`model_drafter`): it hears
every token that is certain, and is asked for a draft once a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Draft:
    """A tree of guesses below the last certain token, the root.

    `tokens` [n] and `parents` [n]: token i follows token `parents[i]` < i, or the root if that is -1. A chain has
    parents -1, 0, 1, ...

    >>> Draft([7, 8, 9], [-1, 0, 0]).depths
    [1, 2, 2]
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens and {len(self.parents)} parents: expected as many of each")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"parents[{node}] = {parent}: expected -1 (the root) or an earlier token")

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """Each token follows the one before it."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    @property
    def is_chain(self) -> bool:
        """Whether no token has a sibling."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    @property
    def depths(self) -> list[int]:
        """How many steps each token is below the root: 1 for its children."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return found

    def within(self, nodes: int, depth: int, banned: Sequence[int] = ()) -> Draft:
        """The part that is at most `depth` deep and free of `banned` tokens and what is below them; of that the first
        `nodes` tokens (parents come first, so what is left is a tree)."""
        place = {-1: -1}
        kept: list[int] = []
        for node, (token, parent, own) in enumerate(zip(self.tokens, self.parents, self.depths, strict=True)):
            if own <= depth and len(kept) < nodes and token not in banned and parent in place:
                place[node] = len(kept)
                kept.append(node)
        return Draft([self.tokens[node] for node in kept], [place[self.parents[node]] for node in kept])


class Drafter(Protocol):
    """Guesses for one sequence at a time.

    `layers`: whose residual streams of the target it wants to see (`MiniCPM.hidden_states` numbering), () for none.
    """

    layers: tuple[int, ...]

    def start(self, first: int) -> None:
        """Forget everything; a text begins with the token `first`."""
        ...

    def extend(self, tokens: Sequence[int], features: NDArray[np.float32]) -> None:
        """The text goes on with `tokens` [m]. features [m, len(layers) * C]: row i is what the target computed at the
        token *before* tokens[i], its streams side by side."""
        ...

    def propose(self, most: int) -> Draft:
        """A draft of what follows, not deeper than `most` tokens; empty if there is nothing worth a guess."""
        ...
