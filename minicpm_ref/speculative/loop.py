"""Decoding with drafts: a round of guessing, one pass that checks all guesses, and the accepted tokens.

Problem. A decode step of one token reads every weight and uses it once. Checking ten guessed tokens reads the weights
once, too. If guesses are cheap and often right, text comes several tokens a pass.

Idea. The *root* is the last token of the text, which the target has not seen yet. A round

1. asks the drafter for a tree below the root,
2. runs the target once on root and tree (`verify`): logits after every node,
3. walks from the root: at each node choose the token exactly as plain decoding would from these logits, and go on to
   the child that holds it, if one does (`acceptance.match_path`),
4. keeps the walked nodes in the target's cache (`keep`) and tells the drafter what came.

Nothing is random but the choice, and the choice is made once an emitted token, with the same numbers that plain
decoding would use. So the text is *the same text*, not only one of the same distribution: for a seed, a temperature, a
penalty, a grammar. Where floating-point sums depend on how many tokens a pass holds, two nearly equal logits can swap.

A token that ends the text ends it wherever in a round it stands; so does the length. A draft never reaches past the
length at which the target changes its kind of attention or of angles (`config.next_border`), since tokens beyond it
would be scored by another rule than plain decoding's.

Left out: several rows in one verification. Sources: Leviathan et al., arXiv 2211.17192; EAGLE, arXiv 2401.15077.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.config import ModelConfig, next_border
from minicpm_ref.sampling import SamplingParams, choose_token
from minicpm_ref.speculative.acceptance import match_path
from minicpm_ref.speculative.drafter import Draft, Drafter

Logits = NDArray[np.float32]
Choose = Callable[[Logits, list[int]], int]
"""From logits [V] and the tokens that this round has emitted so far, the next token."""


class Verifier(Protocol):
    """What speculation needs of `engine.executor.Executor`, which says what each method promises."""

    config: ModelConfig
    max_length: int

    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> Logits: ...

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> Logits: ...

    def verify(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> Logits: ...

    def keep(self, row: int, base: int, path: Sequence[int]) -> None: ...

    def truncate(self, row: int, length: int) -> None: ...

    def length(self, row: int) -> int: ...

    def hidden(self, row: int, layers: Sequence[int]) -> NDArray[np.float32]: ...


@dataclass
class Tally:
    """What the rounds of a text were worth. `reached[i]`: rounds in which at least i + 1 drafts were accepted."""

    rounds: int = 0
    drafted: int = 0
    emitted: int = 0
    reached: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        """Count one round."""
        self.rounds, self.drafted, self.emitted = self.rounds + 1, self.drafted + drafted, self.emitted + accepted + 1
        self.reached += [0] * (accepted - len(self.reached))
        for depth in range(accepted):
            self.reached[depth] += 1

    @property
    def acceptance_length(self) -> float:
        """Tokens a verification, the extra one included: 1 is plain decoding."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def rates(self) -> list[float]:
        """Share of rounds in which at least 1, 2, ... drafts were accepted; their sum plus 1 is `acceptance_length`."""
        return [count / self.rounds for count in self.reached]


class Speculation:
    """Rounds of drafting and verification for one `row` of an executor.

    `prefilled` hears every part of the prompt right after the executor has taken it; then `round` gives tokens.
    `tally` counts.
    """

    def __init__(self, executor: Verifier, row: int, drafter: Drafter, tally: Tally | None = None):
        self.executor, self.row, self.drafter = executor, row, drafter
        self.tally = Tally() if tally is None else tally
        # A drafter is told pairs (features of a token, the token after it). Features come one token earlier, so the
        # last ones wait for their token: one more row of features than of tokens.
        self._tokens: list[int] = []
        self._features: list[NDArray[np.float32]] = []

    def prefilled(self, ids: Sequence[int]) -> None:
        """The row's last call appended `ids`, the prompt or its next part."""
        tokens = list(ids)
        if not self._features:
            self.drafter.start(tokens.pop(0))
        self._tokens += tokens
        self._features += list(self._hidden(len(ids)))

    def round(self, root: int, choose: Choose, most: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """The 1 to `most` tokens that follow `root`, the text's last token, which is not in the row yet.

        One of `stop_ids` can only be the last of them. `choose` is called once for each, in order.
        Raises ValueError for `most` below 1, for a full row and before a prompt.
        """
        if most < 1:
            raise ValueError(f"most = {most}: expected at least 1 token")
        if not self._features:
            raise ValueError("round before prefilled: the drafter does not know the prompt")
        self.drafter.extend([*self._tokens, root], np.stack(self._features))
        base = self.executor.length(self.row)
        draft = self._allowed(base, self.drafter.propose(most - 1), most - 1, stop_ids)
        parents = [-1, *(parent + 1 for parent in draft.parents)]
        logits = self._verify([root, *draft.tokens], None if draft.is_chain else parents)
        emitted: list[int] = []

        def follow(node: int) -> int:
            emitted.append(choose(logits[node], list(emitted)))
            return emitted[-1]

        path = match_path(follow, [root, *draft.tokens], parents).path
        self._features = list(self._hidden(len(parents))[path])
        self._tokens = emitted[:-1]
        self.executor.keep(self.row, base, path)
        self.tally.add(len(draft.tokens), len(emitted) - 1)
        return emitted

    def _allowed(self, base: int, draft: Draft, most: int, stop_ids: Sequence[int]) -> Draft:
        """The part of a draft that fits into the row, the text's length, and this side of the next border.

        A stop id is never worth a place: where the target chooses it, it comes as the extra token and ends the text.
        """
        border = next_border(self.executor.config, base)
        depth = most if border is None else min(most, border - base - 1)
        return draft.within(self.executor.max_length - base - 1, depth, stop_ids)

    def _verify(self, ids: list[int], parents: list[int] | None) -> Logits:
        if len(ids) == 1:
            return self.executor.decode([self.row], ids)
        return self.executor.verify(self.row, ids, parents)

    def _hidden(self, count: int) -> NDArray[np.float32]:
        """Features [count, len(layers) * C] of the last call's tokens."""
        if not self.drafter.layers:
            return np.empty((count, 0), np.float32)
        streams = self.executor.hidden(self.row, self.drafter.layers)  # [layers, count, C]
        return np.moveaxis(streams, 0, 1).reshape(count, -1)


def speculate(
    executor: Verifier,
    drafter: Drafter,
    prompt: Sequence[int],
    max_new_tokens: int,
    params: SamplingParams | None = None,
    stop_ids: Sequence[int] = (),
    row: int = 0,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Yield what `sampling.generate` would: up to `max_new_tokens` tokens after `prompt`, ending before any of
    `stop_ids`. The text is the same for the same `params` with a seed; only the number of passes differs.

    `row` of `executor` is used and emptied first. `tally` is added to.

    >>> executor = TorchExecutor(model, max_length=256)
    >>> tokens = list(speculate(executor, NGramDrafter(), tokenizer.encode("import os"), 64))
    """
    params = params or SamplingParams()
    random = params.generator()
    output: list[int] = []

    def choose(logits: Logits, ahead: list[int]) -> int:
        return choose_token(logits, params, random.random(), prompt, [*output, *ahead])

    if max_new_tokens < 1:
        return
    executor.truncate(row, 0)
    logits = executor.prefill(row, prompt)
    speculation = Speculation(executor, row, drafter, tally)
    speculation.prefilled(prompt)
    tokens = [choose(logits, [])]
    while True:
        for token in tokens:
            if token in stop_ids:
                return
            output.append(token)
            yield token
        if len(output) >= max_new_tokens:
            return
        tokens = speculation.round(output[-1], choose, max_new_tokens - len(output), stop_ids)
