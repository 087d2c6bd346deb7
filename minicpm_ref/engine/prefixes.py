"""Which cached tokens a new prompt may keep.

Problem. The second turn of a chat is the first turn, its answer, and a few new words. Computing all of it again makes
each turn slower than the one before.

Idea. A row whose request has ended keeps its tokens. A new prompt takes the free row that shares the longest beginning
with it and computes the rest. Two rules make this exact:

- *At least one token is computed*, because the logits of the last one are what a prompt is computed for.
- *A token is kept only if it was computed by the rule that holds now.* A model with a `dense_len` attends densely in a
  short sequence and sparsely in a long one; LongRoPE has two lists of angles. A prompt is one or the other as a whole,
  so what was cached under one rule is of no use under the other. `kind` names the rule.

Left out: copying a beginning from a row that is busy, and a tree of shared blocks (radix attention, arXiv 2312.07104):
rows are few here, and looking at all of them takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minicpm_ref.config import ModelConfig

Kind = tuple[bool, bool]


def kind(config: ModelConfig, length: int) -> Kind:
    """Whether a sequence of `length` tokens is attended to sparsely, and whether it has LongRoPE's long angles."""
    sparse = config.sparse_config is not None and length >= config.sparse_config.dense_len
    long = config.rope_scaling is not None and length > config.rope_scaling.original_max_position_embeddings
    return sparse, long


@dataclass
class Row:
    """The tokens that are surely in one row of the cache, and the rule by which each was computed."""

    number: int
    tokens: list[int] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    last_use: int = 0

    def append(self, ids: Sequence[int], kinds: Sequence[Kind]) -> None:
        """The executor has taken `ids`."""
        self.tokens += ids
        self.kinds += kinds

    def cut(self, length: int) -> None:
        """Forget what lies behind `length`."""
        del self.tokens[length:], self.kinds[length:]

    def shared(self, prompt: Sequence[int], now: Kind) -> int:
        """How many tokens `prompt` can keep of this row, at most all but its last."""
        most = min(len(self.tokens), len(prompt) - 1)
        for place in range(most):
            if self.tokens[place] != prompt[place] or self.kinds[place] != now:
                return place
        return most


def best_row(rows: Sequence[Row], prompt: Sequence[int], now: Kind) -> tuple[Row, int]:
    """Of these free rows the one that saves most, and how many tokens; of equal ones that whose tokens are least worth
    keeping: an empty one, else the one that was used longest ago.

    >>> row, kept = best_row([Row(0, [1, 2, 3], [(False, False)] * 3), Row(1)], [1, 2, 9], (False, False))
    >>> row.number, kept
    (0, 2)
    """
    kept = {row.number: row.shared(prompt, now) for row in rows}
    row = min(rows, key=lambda row: (-kept[row.number], bool(row.tokens), row.last_use))
    return row, kept[row.number]
