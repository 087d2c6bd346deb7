"""A retrieval task made of real code and planted facts, for training sparse attention and for finding out what it lost.

The problem: bits per byte hardly notice whether a model can look far back, because nearly every token of a program is
predictable from its neighbourhood. The idea: plant facts whose answer is nowhere else. A fact is a comment that stands
far above,

    # given alpha beta alpha beta alpha beta alpha beta

and a question that comes below it, after other code and other facts:

    # then alpha beta

The last word of the question can be told only by looking up what followed the first, and the choice among a few hundred
words makes guessing hopeless. Words are single tokens of the vocabulary. One fact in eight, by a hash of its two words,
is kept for the evaluation, so that no fact of the evaluation was ever seen in training. (The words were: a model this
small learns to copy the words it has copied before, and fails on words it never had to copy.)

Why a fact repeats itself: sparse attention chooses blocks by the *mean* of their keys, in which a single token that
matches the question drowns. What is worth finding fills its neighbourhood; a name that is defined is used nearby, too.

Related: the needle tests of RULER (arXiv 2404.06654). Left out: paraphrase, several hops; a model of five million
parameters copies, it does not reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from minicpm_ref.data import Document
from minicpm_ref.model import MiniCPM
from minicpm_ref.tokenizer import Tokenizer

Ids = list[int]
Fact = tuple[int, int]  # token ids of key and value
REPEATS = 4  # how often a fact says itself
FACT_SPACING = 32  # tokens to a planted fact: dense enough to be learned within minutes


def _kept_from_training(key: int, value: int) -> bool:
    return hashlib.sha256(f"{key} {value}".encode()).digest()[0] % 8 == 0


@dataclass(frozen=True)
class Planter:
    """Writes facts and questions into token sequences. `held_out` picks the facts that are kept from training.

    Raises ValueError for a vocabulary with too few words.
    """

    tokenizer: Tokenizer
    held_out: bool = False

    @cached_property
    def words(self) -> np.ndarray:
        """Token ids of the words that facts are made of."""
        found = []
        for token_id in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode([token_id])
            if re.fullmatch(r" [a-z]{4,9}", text) and text not in (" given", " then"):
                found.append(token_id)
        if len(found) < 16:
            raise ValueError(f"a vocabulary with {len(found)} words of 4 to 9 letters: expected at least 16")
        return np.array(found)

    @cached_property
    def breaks(self) -> np.ndarray:
        """Token ids that begin with a line break: a line may be planted before each of them."""
        ids = range(self.tokenizer.vocab_size)
        return np.array([i for i in ids if self.tokenizer.decode([i]).startswith("\n")])

    @cached_property
    def frame(self) -> tuple[Ids, Ids]:
        """What stands before the key of a fact, and before that of a question."""
        given, then = (self.tokenizer.encode(text, add_bos=False) for text in ("\n# given", "\n# then"))
        return given, then

    def draw(self, rng: Generator, count: int) -> list[Fact]:
        """`count` facts: a key, different in each, and a value that is no key."""
        keys, rest = np.split(rng.permutation(self.words), [count])
        facts = []
        for key in keys.tolist():
            if not any(_kept_from_training(key, value) == self.held_out for value in rest.tolist()):
                raise ValueError(
                    f"{count} facts from {len(self.words)} words: none is left that may be the value of "
                    f"{self.tokenizer.decode([key])!r}; expected a larger vocabulary, or fewer facts"
                )
            value = int(rng.choice(rest))
            while _kept_from_training(key, value) != self.held_out:
                value = int(rng.choice(rest))
            facts.append((key, value))
        return facts

    def fact_line(self, fact: Fact) -> Ids:
        """The tokens of a fact."""
        return [*self.frame[0], *fact * REPEATS]

    def question_line(self, fact: Fact) -> Ids:
        """The tokens of a fact's question, its answer last."""
        return [*self.frame[1], *fact]

    def line_starts(self, code: np.ndarray) -> np.ndarray:
        """Positions of `code` [n] before which a line may be planted; every position, where there is no line break."""
        places = np.flatnonzero(np.isin(code, self.breaks))
        return places if len(places) else np.arange(len(code) + 1)

    def plant(self, code: np.ndarray, count: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
        """`code` (ids [n]) with `count` facts and, below each, its question: ids [n + added], and True at the answers.

        Distances, counted in lines, are drawn evenly.
        """
        starts = self.line_starts(code)
        planted: list[tuple[int, Ids, bool]] = []  # place, line, whether its last token is an answer
        for fact in self.draw(rng, count):
            distance = int(rng.integers(len(starts)))
            first = int(rng.integers(len(starts) - distance))
            planted += [
                (int(starts[first]), self.fact_line(fact), False),
                (int(starts[first + distance]), self.question_line(fact), True),
            ]
        planted.sort(key=lambda entry: entry[0])  # stable: a fact stays before its question
        ids: Ids = []
        answers: list[bool] = []
        done = 0
        for place, line, answer in planted:
            ids += [*code[done:place].tolist(), *line]
            answers += [False] * (place - done + len(line) - 1) + [answer]
            done = place
        ids += code[done:].tolist()
        answers += [False] * (len(code) - done)
        return np.array(ids), np.array(answers)

    def added(self, count: int) -> int:
        """How many tokens `plant` adds for `count` facts."""
        given, then = self.frame
        return count * (len(given) + len(then) + 2 * REPEATS + 2)

    def exam(
        self, code: np.ndarray, distances: Sequence[int], others: int, rng: Generator
    ) -> tuple[np.ndarray, list[int]]:
        """As many ids as `code` has: code with facts, then a question for each of `distances`, answer included; and
        where each answer is.

        The fact of a question ends `distance` tokens before its answer does; `others` facts are asked for by nobody.
        Raises ValueError for facts that do not fit, or would overlap.
        """
        facts = self.draw(rng, len(distances) + others)
        ids = np.full(len(code), -1)
        end = len(code)
        answers: list[int] = []
        for fact, distance in reversed(list(zip(facts[: len(distances)], distances, strict=True))):
            question, line = self.question_line(fact), self.fact_line(fact)
            self._put(ids, end - len(question), question, "question")
            self._put(ids, end - distance - len(line), line, f"distance {distance}")
            answers.insert(0, end - 1)
            end -= len(question)
        for fact in facts[len(distances) :]:
            line = self.fact_line(fact)
            room = np.lib.stride_tricks.sliding_window_view(ids[:end] < 0, len(line)).all(-1)
            if not room.any():
                raise ValueError(f"{others} other facts: expected fewer, {len(code)} ids are full")
            self._put(ids, int(rng.choice(np.flatnonzero(room))), line, "fact")
        free = np.flatnonzero(ids < 0)
        ids[free] = code[len(code) - len(free) :]
        return ids, answers

    @staticmethod
    def _put(ids: np.ndarray, begin: int, line: Ids, name: str) -> None:
        if begin < 0 or (ids[begin : begin + len(line)] >= 0).any():
            raise ValueError(f"{name}: its line would begin at {begin} of {len(ids)} ids, outside or on another line")
        ids[begin : begin + len(line)] = line


@torch.no_grad()
def retrieval_accuracy(
    model: MiniCPM,
    planter: Planter,
    documents: Sequence[Document],
    length: int,
    distances: Sequence[int],
    samples: int = 32,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> dict[int, float]:
    """Share of `samples` questions at each distance (in tokens) whose answer `model` ranks first.

    Sequences of `length` tokens are cut from `documents` laid end to end, with one fact in FACT_SPACING tokens. The
    same seed asks every model the same questions. Raises ValueError for too little text, and as `Planter.exam` does.
    """
    encoded = planter.tokenizer.encode_batch([document.text for document in documents])
    code = np.concatenate([np.array(ids) for ids in encoded])
    if len(code) <= length:
        raise ValueError(f"documents of {len(code)} tokens in all: expected more than {length}")
    rng = np.random.default_rng((seed, length))
    right = torch.zeros(len(distances))
    rows = max(1, batch_tokens // length)
    for done in range(0, samples, rows):
        exams = []
        for _ in range(min(rows, samples - done)):
            start = int(rng.integers(0, len(code) - length))
            others = max(0, length // FACT_SPACING - len(distances))
            exams.append(planter.exam(code[start : start + length], distances, others, rng))
        ids = torch.from_numpy(np.stack([ids for ids, _ in exams])).to(model.device)
        answers = torch.tensor(exams[0][1], device=model.device)  # the same in every row
        hidden = model.hidden_states(ids)[-1][:, answers - 1]  # [B, distances, C]
        right += (model.logits(hidden).argmax(-1) == ids[:, answers]).sum(0).cpu()
    return {distance: float(share) for distance, share in zip(distances, right / samples, strict=True)}


def planted_batch(
    tokens: np.ndarray, planter: Planter, rows: int, length: int, share: float, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets [rows, length] (int64) cut from the stream `tokens`, and True at the answers among the
    targets.

    A row gets planted facts, one in FACT_SPACING tokens, with probability `share`; else it is plain code.
    """
    count = max(1, length // FACT_SPACING)
    lines = []
    for _ in range(rows):
        planted = rng.random() < share
        size = length + 1 - (planter.added(count) if planted else 0)
        start = int(rng.integers(0, len(tokens) - size))
        code = np.asarray(tokens[start : start + size], dtype=np.int64)
        lines.append(planter.plant(code, count, rng) if planted else (code, np.zeros(size, dtype=bool)))
    ids = torch.from_numpy(np.stack([line for line, _ in lines]))
    answers = torch.from_numpy(np.stack([marks for _, marks in lines]))
    return ids[:, :-1], ids[:, 1:], answers[:, 1:]
