"""The engine: one object that takes prompts and gives text, fast, and however it is interrupted stays usable.

It joins the parts that stand in files of their own: an executor runs the model (`executor`), a scheduler fills its rows
(`scheduler`, `prefixes`), a request becomes text (`request`, `text`), and memory is counted first (`memory`).

There is no thread of its own. Whoever waits for a text drives: it takes the lock, makes a step for everybody, and looks
whether something came for it. Several threads may wait at once, and a stream that nobody reads costs nothing.

Source of the feature list: CPM.cu (OpenBMB) and the MiniCPM4 report, arXiv 2506.07900, section 4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from minicpm_ref.checkpoint import load
from minicpm_ref.engine.conversation import chat_prompt
from minicpm_ref.engine.executor import Executor
from minicpm_ref.engine.executors import EXECUTORS, FLOATS, WEIGHTS, build_executor
from minicpm_ref.engine.memory import check_memory, free_bytes
from minicpm_ref.engine.request import Piece, Request, Statistics
from minicpm_ref.engine.scheduler import Scheduler
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams
from minicpm_ref.speculative import Drafter
from minicpm_ref.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class ContextLengthError(ValueError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Result:
    """An answer. `tokens` are the chosen ids without the one that ended the text; `text` is what they spell up to a
    stop string; `thought` is what a chat model wrote between `<think>` tags. `finish_reason`: "stop" for an end token
    or a stop string, "length" for a limit, "cancelled"."""

    text: str
    tokens: list[int]
    finish_reason: str
    statistics: Statistics
    thought: str = ""


class Stream:
    """The pieces of one text as they come; `close` (or leaving a `with` block, or forgetting it) cancels.

    >>> with engine.generate("import os", 20, stream=True) as stream:
    ...     for text in stream:
    ...         print(text, end="")
    >>> stream.result.finish_reason
    'length'
    """

    def __init__(self, engine: Engine, request: Request):
        self._engine, self._request = engine, request
        self._taken: list[Piece] = []

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return self.next_piece().text

    def next_piece(self) -> Piece:
        """The next piece of text, with what belongs to it. Raises StopIteration at the end, and the executor's error if
        it had one."""
        request = self._request
        while True:
            if request.pieces:
                self._taken.append(request.pieces.popleft())
                return self._taken[-1]
            if request.finish_reason is None:
                self._engine.step(request)
            elif not request.pieces:
                if request.error is not None:
                    raise RuntimeError(f"the request failed: {request.error}") from request.error
                raise StopIteration

    def close(self) -> None:
        """Stop: the row is free before the next step. What came so far stays in `result`."""
        self._request.cancelled = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether everything has come."""
        return self._request.finish_reason is not None and not self._request.pieces

    @property
    def result(self) -> Result:
        """What has been read so far; after the end, everything."""
        request = self._request
        text = "".join(piece.text for piece in self._taken if not piece.thought)
        thought = "".join(piece.text for piece in self._taken if piece.thought)
        reason = request.finish_reason or "cancelled"
        return Result(text, list(request.output), reason, request.statistics, thought)


class Engine:
    """A model, ready to write.

    `source`: a loaded `MiniCPM` (give its `tokenizer`), or what `load` takes: a folder, a hub id, None for the embedded
    weights, of which `variant` names one. `weights` "auto" keeps the type of the weights; "float32", "bfloat16",
    "int8", "int4" and "ternary" name one. `executor`: "torch", "compiled", or "auto" (`executors` says when it is
    which); `progress` hears what is being compiled. `batch` requests run at a time, each of up to `max_length` tokens
    (None: what the model was made for); prompts pass in chunks of `chunk_length`. Everything is allocated here, once.
    `draft` guesses tokens for one request at a time (`speculative`), which changes the speed and not the text.

    Raises ValueError for what cannot fit into memory, with the numbers.

    >>> engine = Engine(batch=4, max_length=1024)
    >>> engine.generate("import os\\n", max_new_tokens=20).text
    >>> engine.generate([{"role": "user", "content": "Hello!"}], temperature=0.7, seed=1).text
    >>> for text in engine.generate("import os\\n", 100, stream=True):
    ...     print(text, end="", flush=True)
    """

    def __init__(
        self,
        source: MiniCPM | str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        draft: Drafter | None = None,
        *,
        weights: str = "auto",
        max_length: int | None = None,
        chunk_length: int = 512,
        batch: int = 1,
        executor: str = "auto",
        device: str | torch.device = "cpu",
        variant: str = "base",
        progress: Callable[[str], None] | None = None,
    ):
        if weights not in WEIGHTS:
            raise ValueError(f"weights = {weights!r}: expected one of {', '.join(WEIGHTS)}")
        if executor not in EXECUTORS:
            raise ValueError(f"executor = {executor!r}: expected one of {', '.join(EXECUTORS)}")
        for name, value in (("batch", batch), ("chunk_length", chunk_length), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if isinstance(source, MiniCPM):
            model = source
        else:
            model, found = load(source, device, FLOATS.get(weights), variant)
            tokenizer = tokenizer or found
        if tokenizer is None:
            raise ValueError("tokenizer is None: expected one, since the weights come without a tokenizer.json")
        self.tokenizer, self.config = tokenizer, model.config
        self.max_length = self.config.max_position_embeddings if max_length is None else max_length
        free = free_bytes(model.device)
        check_memory(self.config, batch, self.max_length, chunk_length, model.dtype.itemsize, free)
        self.executor: Executor = build_executor(
            model, executor, weights, batch, self.max_length, chunk_length, draft.layers if draft else (), progress
        )
        self._scheduler = Scheduler(self.executor, chunk_length, draft)
        self._lock = threading.Lock()

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        enable_thinking: bool | None = None,
    ) -> Any:  # Result, Stream, or a list of them: what was asked for decides
        """Write what follows `prompt`: a text, chat messages, token ids, or a list of such prompts.

        Returns a `Result`, with `stream` a `Stream` of text pieces; for a list of prompts a list of them, which share
        the batch. `max_new_tokens` None writes to the end of the row. The sampling parameters are those of
        `SamplingParams`; each prompt of a list has a random generator of its own with the same `seed`. `stop` strings
        end the text and are not part of it. `enable_thinking` is for messages; True splits the thought from the answer.

        Raises ValueError for an empty prompt, unknown ids, a prompt that does not fit, and parameters out of range.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
        several = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], int | Mapping)
        requests = [
            self.request(one, max_new_tokens, params, stop, enable_thinking)
            for one in (cast(Sequence[Prompt], prompt) if several else [cast(Prompt, prompt)])
        ]
        streams = [self.submit(request) for request in requests]
        if stream:
            return streams if several else streams[0]
        results = [self._finish(one) for one in streams]
        return results if several else results[0]

    def request(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        params: SamplingParams | None = None,
        stop: str | Sequence[str] | None = None,
        enable_thinking: bool | None = None,
        split_thoughts: bool | None = None,
        top_logprobs: int | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> Request:
        """Check and prepare one request, from any thread; `submit` starts it. See `generate` and `Request`."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = chat_prompt(self.tokenizer, cast(Sequence[Message], prompt), enable_thinking)
        else:
            ids = list(cast(Sequence[int], prompt))
        if not ids:
            raise ValueError("prompt is empty: expected at least one token")
        wrong = [token for token in ids if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise ValueError(f"prompt holds the token id {wrong[0]}: expected 0 <= id < {self.config.vocab_size}")
        if params is not None and max(params.logit_bias, default=0) >= self.config.vocab_size:
            raise ValueError(
                f"logit_bias names token {max(params.logit_bias)}: expected ids below {self.config.vocab_size}"
            )
        room = self.max_length - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens: expected fewer than max_length = {self.max_length}"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
        return Request(
            ids,
            self.tokenizer,
            params or SamplingParams(),
            room if max_new_tokens is None else min(max_new_tokens, room),
            [stop] if isinstance(stop, str) else list(stop or ()),
            bool(enable_thinking) if split_thoughts is None else split_thoughts,
            top_logprobs,
            on_change,
        )

    def submit(self, request: Request) -> Stream:
        """Put a request into the queue. It moves when somebody calls `step`, as reading its stream does."""
        request.statistics.memory = self.executor.memory()
        self._scheduler.submit(request)
        return Stream(self, request)

    def step(self, request: Request | None = None) -> None:
        """One step for all requests, by the calling thread; none if `request` has something new or ended meanwhile."""
        with self._lock:
            if request is None or (request.finish_reason is None and not request.pieces):
                self._scheduler.step()

    def forget(self) -> None:
        """Drop what free rows keep for later prompts; requests that run are not touched."""
        with self._lock:
            self._scheduler.forget()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return self._scheduler.busy

    @property
    def active(self) -> int:
        """Requests that are running or waiting."""
        return len(self._scheduler.jobs) + len(self._scheduler.waiting)

    def _finish(self, stream: Stream) -> Result:
        for _ in stream:
            pass
        return stream.result
