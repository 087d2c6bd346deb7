"""One request: what was asked, how far it is, and what it has to say.

A request belongs to the thread that drives the engine. Two things may be done to it from any other thread: read its
`pieces` (a deque, which is safe) and set `cancelled`, at which the scheduler looks between two steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minicpm_ref.engine.text import StopStrings, TextStream, Thoughts
from minicpm_ref.sampling import SamplingParams
from minicpm_ref.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, the logarithm of its probability under the model itself (before temperature and penalties), and
    the most likely tokens of its place, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """Some text of an answer, or of the thought before it, with the tokens that were chosen since the piece before."""

    text: str
    thought: bool = False
    tokens: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Statistics:
    """What a request cost. Seconds are wall time: of waiting for a row, from there to the first token, and from the
    first to the last. `reused_tokens` of the prompt were in the cache already, `prefill_tokens` were computed."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    completion_tokens: int = 0
    waiting_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0  # of the model, for the tokens after the first
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of the prompt's computed part."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens a pass of the model: 1 without a draft."""
        return (self.completion_tokens - 1) / self.passes if self.passes else 1.0


class Request:
    """A prompt on its way to a text.

    `limit`: most tokens. `top_logprobs` None: no logarithms; else how many alternatives to report. `split_thoughts`:
    a leading `<think>...</think>` becomes pieces of its own, and `stops` look at the answer only. `on_change` is called
    in the driving thread whenever there is something new.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        params: SamplingParams,
        limit: int,
        stops: Sequence[str] = (),
        split_thoughts: bool = False,
        top_logprobs: int | None = None,
        on_change: Callable[[], None] | None = None,
    ):
        self.prompt, self.params, self.limit = list(prompt), params, limit
        self.output: list[int] = []
        self.pieces: deque[Piece] = deque()
        self.finish_reason: str | None = None  # "stop", "length", "cancelled", "error"
        self.error: BaseException | None = None
        self.cancelled = False
        self.statistics = Statistics(prompt_tokens=len(self.prompt))
        self._tokenizer, self._top, self._on_change = tokenizer, top_logprobs, on_change
        self._random = params.generator()
        self._text, self._stop_strings = TextStream(tokenizer), StopStrings(stops)
        self._thoughts = Thoughts() if split_thoughts else None
        self._fresh: list[TokenLogprob] = []  # tokens that no piece has carried yet
        self._submitted = self._clock = time.perf_counter()

    @property
    def wants_logprobs(self) -> bool:
        """Whether its pieces carry the tokens' logarithms."""
        return self._top is not None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self._tokenizer.eos_ids

    def uniform(self) -> float:
        """The next random number of this request: one for each token, whoever else is in the batch."""
        return float(self._random.random())

    # ---- the scheduler tells it what happens ----------------------------------------------------------------------

    def admitted(self, reused: int) -> None:
        """A row begins with it; `reused` tokens of the prompt are there already."""
        self.statistics.reused_tokens, self.statistics.prefill_tokens = reused, len(self.prompt) - reused
        self._clock = time.perf_counter()
        self.statistics.waiting_seconds = self._clock - self._submitted

    def take(self, token: int, logits: NDArray[np.float32] | None = None) -> None:
        """One more token was chosen, from these logits [V]; may finish the request."""
        counts, now = self.statistics, time.perf_counter()
        if counts.completion_tokens == 0:
            counts.prefill_seconds, self._clock = now - self._clock, now
        else:
            counts.decode_seconds = now - self._clock
        counts.completion_tokens += 1
        if self._top is not None and logits is not None:
            self._fresh.append(_logprob(token, logits, self._top))
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.output.append(token)
        self._show(self._text.push(token))
        if self._stop_strings.hit:
            self.finish("stop")
        elif len(self.output) >= self.limit:
            self.finish("length")
        else:
            self.changed()

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """No more tokens come; what was held back is shown."""
        if self.finish_reason is not None:
            return
        if not self._stop_strings.hit:
            self._show(self._text.flush(), last=True, cut=reason != "stop")
        if self._stop_strings.hit and reason == "length":
            reason = "stop"  # the last held-back bytes completed a stop string
        if self._fresh:
            self.pieces.append(Piece("", tokens=self._fresh))
            self._fresh = []
        self.error, self.finish_reason = error, reason  # the reason comes last: who sees it sees everything
        self.changed()

    def changed(self) -> None:
        """Tell whoever waits."""
        if self._on_change is not None:
            self._on_change()

    def _show(self, text: str, last: bool = False, cut: bool = False) -> None:
        if self._thoughts is None:
            parts = [(False, text)]
        else:
            parts = self._thoughts.push(text) + (self._thoughts.flush(cut) if last else [])
        for thought, part in parts:
            self._add(part if thought else self._stop_strings.push(part), thought)
        if last:
            self._add(self._stop_strings.flush(), False)

    def _add(self, text: str, thought: bool) -> None:
        if text:
            self.pieces.append(Piece(text, thought, self._fresh))
            self._fresh = []


def _logprob(token: int, logits: NDArray[np.float32], top: int) -> TokenLogprob:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    best = np.argsort(-wide, kind="stable")[:top]
    return TokenLogprob(token, float(wide[token]), [(int(i), float(wide[i])) for i in best])
