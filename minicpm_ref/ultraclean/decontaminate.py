"""Decontamination: no document that holds what the model will be measured on, with the evidence beside the verdict.

The problem: a test item that stands in the training data measures memory. It stands there rewrapped, in capitals, or in
the middle of a longer text, so neither equality nor a share of the *document* finds it.
The idea: runs of 13 words, over all words of a text with line breaks as spaces and without case and punctuation. The
score of a document for an item is the share of the *item's* runs that the document holds: an item copied whole scores 1
wherever it stands. A document is flagged if and only if its best score is above 0 and reaches the limit.

Long items (held-out files) are cut into passages of about 200 words, so that a document which holds one function of a
held-out file is found. Items of fewer than 13 words match as a whole, from `shortest` words on; below that a match says
nothing, and they are counted as too short.

Sources: Brown et al., arXiv 2005.14165 appendix C (13-grams); marin-community/marin#6852 and PR 5650 (what goes wrong).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpm_ref.ultraclean.documents import Unread, make_plan, read_piece
from minicpm_ref.ultraclean.normalise import words_of

PASSAGE = 200  # words


@dataclass(frozen=True)
class Match:
    """The evidence: which item, the share of its n-grams that the document holds, and the first of them."""

    item: str
    score: float
    ngram: str


class Contamination:
    """The n-grams of all evaluation items. `items` are (name, text); `too_short` lists the names that cannot match.

    Raises ValueError for a limit outside [0, 1].

    >>> poem = "shall I compare thee to a summer's day thou art more lovely and more temperate"
    >>> Contamination([("sonnet 18", poem)], limit=0.8).match("He wrote: " + poem.upper() + "!").score
    1.0
    """

    def __init__(self, items: Iterable[tuple[str, str]], limit: float = 0.5, n: int = 13, shortest: int = 8):
        if not 0 <= limit <= 1:
            raise ValueError(f"limit = {limit}: expected a share between 0 and 1")
        self.limit, self.n = limit, n
        self.too_short: list[str] = []
        self.names: list[str] = []
        self.sizes: list[int] = []  # distinct n-grams of each passage
        self._holders: dict[str, list[int]] = defaultdict(list)  # n-gram -> passages
        self._lengths: set[int] = set()
        for name, text in items:
            words = words_of(text)
            if len(words) < shortest:
                self.too_short.append(name)
                continue
            passages = _passages(words, PASSAGE)
            for i, passage in enumerate(passages):
                length = min(n, len(passage))
                grams = set(_ngrams(passage, length))
                self._lengths.add(length)
                for gram in grams:
                    self._holders[gram].append(len(self.names))
                self.names.append(name if len(passages) == 1 else f"{name} (passage {i + 1} of {len(passages)})")
                self.sizes.append(len(grams))

    def match(self, text: str) -> Match | None:
        """The best match of a document, of equals the first item; None unless its score reaches the limit."""
        words = words_of(text)
        found: dict[int, dict[str, None]] = defaultdict(dict)  # passage -> its n-grams in the document, in order
        for length in sorted(self._lengths):
            for gram in _ngrams(words, length):
                for passage in self._holders.get(gram, ()):
                    found[passage][gram] = None
        if not found:
            return None
        best = min(found, key=lambda passage: (-len(found[passage]) / self.sizes[passage], passage))
        score = len(found[best]) / self.sizes[best]
        return Match(self.names[best], score, next(iter(found[best]))) if score >= self.limit else None


def _ngrams(words: Sequence[str], n: int) -> list[str]:
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def _passages(words: Sequence[str], size: int) -> list[Sequence[str]]:
    """Equal parts of at most `size` words; no n-gram runs from one part into the next."""
    count = math.ceil(len(words) / size)
    bounds = [round(i * len(words) / count) for i in range(count + 1)]
    return [words[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def read_items(paths: Sequence[str | Path]) -> list[tuple[str, str]]:
    """(name, text) of every document in the given files or folders. Raises ValueError for one that cannot be read: an
    evaluation set must be whole."""
    items = []
    for shard in make_plan(paths).shards:
        for piece in shard:
            for document in read_piece(piece, largest=1 << 30):
                if isinstance(document, Unread):
                    raise ValueError(f"evaluation item {document.id}: {document.reason} {document.detail}")
                items.append((document.id, document.text))
    return items


def embedded_items(path: str | Path) -> list[tuple[str, str]]:
    """(group/path, text) of a `held_out.jsonl` as `minicpm-ref data` writes it."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]
    return [(f"{row['group']}/{row['path']}", row["text"]) for row in rows]
