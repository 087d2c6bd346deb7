"""Drafting with an EAGLE head: a chain, or a tree that grows where the head is sure.

Problem. The likeliest chain is wrong early as often as not. Alternatives at every step would save it, but k of them at
each of D steps are k^D drafts.

Idea (EAGLE-2). The probability that a node is accepted is about the product of the head's probabilities on its path.
So grow level by level, expanding only the k best nodes of each level, and at the end keep the n best nodes of *all*
levels. A node's score is never above its parent's, so what is kept is a tree. One pass of the head a level, k rows
each: D passes for a tree of any size. k = 1 is a chain.

The tree is a function of the text alone. That is what lets the one-hot rule of `acceptance` accept from it without
changing a probability; it must never be mixed with the rules for sampled drafts.

The head's memory holds rows made from the target's own features, and keeps them; the rows of a draft are made from the
head's guesses and are dropped with it. In long texts only the last `window` rows are looked at.

Sources: EAGLE-2, arXiv 2406.16858; EAGLE-3, arXiv 2503.01840; the window: MiniCPM4 report (arXiv 2506.07900) 4.1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicpm_ref.speculative.draft_head import DraftHead, Memory
from minicpm_ref.speculative.drafter import Draft


class Guesses(NamedTuple):
    """The best continuations of some nodes: token ids [rows, k] and their log-probabilities [rows, k], best first."""

    tokens: NDArray[np.int64]
    logs: NDArray[np.float64]


Expand = Callable[[list[int], list[int]], Guesses]
"""From the tokens of a level's best nodes, and which row of the previous level each descends from (-1: the root), to
what may follow them."""


def grow(first: Guesses, expand: Expand, depth: int, nodes: int) -> Draft:
    """The `nodes` best drafts of a tree of up to `depth` levels, k wide, where first [1, k] follows the root.

    `expand` is called once a level after the first. Ties go to the earlier candidate.
    """
    tokens, parents, scores = list(first.tokens[0]), [-1] * first.tokens.shape[1], list(first.logs[0])
    width = len(tokens)
    beam, slots = list(range(width)), [-1] * width
    for _ in range(2, depth + 1):
        guesses = expand([int(tokens[node]) for node in beam], slots)
        begin = len(tokens)
        for node, row, logs in zip(beam, guesses.tokens, guesses.logs, strict=True):
            tokens += list(row)
            parents += [node] * len(row)
            scores += list(scores[node] + np.minimum(logs, 0.0))
        level = _best(scores, range(begin, len(tokens)), width)
        slots = [(node - begin) // width for node in level]
        beam = level
    chosen = sorted(_best(scores, range(len(tokens)), nodes))
    place = {-1: -1} | {node: new for new, node in enumerate(chosen)}
    return Draft([int(tokens[node]) for node in chosen], [place[parents[node]] for node in chosen])


def _best(scores: Sequence[float], candidates: range, count: int) -> list[int]:
    """The `count` candidates of the highest score, best first; a parent comes before a child of equal score."""
    return sorted(candidates, key=lambda node: (-scores[node], node))[:count]


class HeadDrafter:
    """Drafts with an EAGLE-3 head: `depth` passes over up to `width` nodes each, of which the `nodes` best are
    proposed. width 1 is a chain.

    Raises ValueError for sizes below 1.

    >>> drafter = HeadDrafter(load_head(folder, model), width=4, depth=4, nodes=16)
    """

    def __init__(self, head: DraftHead, width: int = 4, depth: int = 4, nodes: int = 16, window: int = 1024):
        for name, value in (("width", width), ("depth", depth), ("nodes", nodes), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        self.head, self.window = head, window
        self.width, self.depth, self.nodes = min(width, head.config.draft_vocab_size), depth, nodes
        self.layers = head.layers
        self.start(0)

    def start(self, first: int) -> None:
        """Forget everything. The first token itself is never embedded: rows pair a feature with the token after it."""
        self.rows = 0  # rows of the text so far; the next one's position
        self.memory: Memory | None = None  # of rows made from the target's features, the last `window`
        self._state: Tensor | None = None  # the last such row's state [1, 1, C]

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], features: NDArray[np.float32]) -> None:
        """The text goes on with `tokens` [m]; features [m, 3C] stand before each."""
        head = self.head
        weight = head.fc.weight
        ids = torch.tensor([list(tokens)], device=weight.device)
        taps = torch.from_numpy(np.ascontiguousarray(features))[None].to(weight.device, weight.dtype)
        positions = torch.arange(self.rows, self.rows + len(tokens), device=weight.device)
        if len(tokens) > 1:  # keys and values need no attention; only the last row's state is wanted
            _, own = head.rotated(head.inputs(ids[:, :-1], taps[:, :-1])[0], positions[:-1])
            self.memory = own if self.memory is None else self.memory.append(own)
        recent = None if self.memory is None or self.window == 1 else self.memory.rows(slice(1 - self.window, None))
        self._state, self.memory = head(ids[:, -1:], taps[:, -1:], positions[-1:], recent)
        self.rows += len(tokens)

    @torch.no_grad()
    def propose(self, most: int) -> Draft:
        """A tree of at most `most` levels; empty before any text and for `most` below 1."""
        if self._state is None or self.memory is None or most < 1:
            return Draft()
        states, memory = self._state, self.memory  # what the level above left; grows with scratch rows
        committed = memory.keys.shape[2]
        seen = torch.empty(0, 0, dtype=torch.bool)  # [rows of the level above, all scratch rows so far]
        level = 0

        def expand(tokens: list[int], slots: list[int]) -> Guesses:
            nonlocal states, memory, seen, level
            rows, scratch = len(tokens), memory.keys.shape[2] - committed
            parents = torch.tensor(slots)
            # a row sees what its parent saw, its parent among it, and itself
            above = torch.zeros(rows, scratch, dtype=torch.bool) if level == 0 else seen[parents]
            seen = torch.cat((above, torch.eye(rows, dtype=torch.bool)), dim=1)
            mask = torch.cat((torch.ones(rows, committed, dtype=torch.bool), seen), dim=1)
            device = states.device
            gathered = states[:, parents.clamp(min=0).to(device)]
            positions = torch.full((rows,), self.rows + level, device=device)
            ids = torch.tensor([tokens], device=device)
            states, memory = self.head(ids, gathered, positions, memory, mask.to(device))
            level += 1
            return self._guesses(states)

        return grow(self._guesses(states), expand, min(self.depth, most), self.nodes)

    def _guesses(self, states: Tensor) -> Guesses:
        logs, ids = self.head.logits(states)[0].float().log_softmax(-1).topk(self.width)
        return Guesses(self.head.to_target(ids).cpu().numpy(), logs.cpu().double().numpy())
