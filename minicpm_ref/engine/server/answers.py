"""The shape of what comes back: chat answers, completions and their chunks, usage, logarithms.

One `Answer` describes one request in the shape of its endpoint; streamed or not, it is filled by the same pieces.
"""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from minicpm_ref.engine.request import Piece, Request, TokenLogprob
from minicpm_ref.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # stands for the logarithm of zero, which JSON cannot write
Json = dict[str, Any]


def usage(requests: Sequence[Request]) -> Json:
    """What was read and written, in tokens."""
    read = sum(request.statistics.prompt_tokens for request in requests)
    written = sum(request.statistics.completion_tokens for request in requests)
    reused = sum(request.statistics.reused_tokens for request in requests)
    counts: Json = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return counts | {"prompt_tokens_details": {"cached_tokens": reused}}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


class Answer:
    """Ids and time of one answer, the same in all its chunks, and the tokens' spellings."""

    def __init__(self, model: str, tokenizer: Tokenizer, prefix: str):
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.tokenizer = tokenizer

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token) or self.tokenizer.token(token).encode()


class ChatAnswer(Answer):
    """Of /v1/chat/completions: the answer in `content`, the thought before it in `reasoning_content`."""

    def __init__(self, model: str, tokenizer: Tokenizer):
        super().__init__(model, tokenizer, "chatcmpl")

    def whole(self, request: Request, pieces: Sequence[Piece]) -> Json:
        """The answer in one object."""
        thought = "".join(piece.text for piece in pieces if piece.thought)
        message: Json = {"role": "assistant", "content": "".join(p.text for p in pieces if not p.thought)}
        message |= {"refusal": None} | ({"reasoning_content": thought} if thought else {})
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {"index": 0, "message": message, "finish_reason": request.finish_reason}
        choice["logprobs"] = self._logprobs(tokens) if request.wants_logprobs else None
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage([request])}

    def first(self) -> Json:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, request: Request, piece: Piece) -> Json:
        """One piece."""
        delta = {"reasoning_content" if piece.thought else "content": piece.text} if piece.text else {}
        return self._chunk(delta, self._logprobs(piece.tokens) if request.wants_logprobs else None, None)

    def last(self, request: Request) -> Json:
        """The chunk that says why it ended."""
        return self._chunk({}, None, request.finish_reason)

    def counts(self, requests: Sequence[Request]) -> Json:
        """The chunk with the usage and nothing else."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(requests)}

    def _chunk(self, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json:
        return {
            "content": [
                self._entry(token.token, token.logprob)
                | {"top_logprobs": [self._entry(other, logprob) for other, logprob in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> Json:
        spelled = self._bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(spelled)}


class CompletionAnswer(Answer):
    """Of /v1/completions: one choice for each prompt; `text_offset` counts characters from the start of the prompt."""

    def __init__(self, model: str, tokenizer: Tokenizer, requests: Sequence[Request], texts: Sequence[str], echo: bool):
        super().__init__(model, tokenizer, "cmpl")
        self._echo, self._texts = echo, list(texts)
        self._offsets = [len(text) for text in texts]
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in requests]

    def whole(self, requests: Sequence[Request], pieces: Sequence[Sequence[Piece]]) -> Json:
        """The answers in one object."""
        choices = []
        for index, (request, own) in enumerate(zip(requests, pieces, strict=True)):
            tokens = [token for piece in own for token in piece.tokens]
            text = (self._texts[index] if self._echo else "") + "".join(piece.text for piece in own)
            choices.append(self._choice(index, text, request, tokens, request.finish_reason))
        return {**self.head, "object": "text_completion", "choices": choices, "usage": usage(requests)}

    def first(self, request: Request, index: int) -> Json | None:
        """The chunk with the echoed prompt, if it was asked for."""
        return self._chunk(self._choice(index, self._texts[index], request, [], None)) if self._echo else None

    def chunk(self, request: Request, piece: Piece, index: int) -> Json:
        """One piece of one answer."""
        return self._chunk(self._choice(index, piece.text, request, piece.tokens, None))

    def last(self, request: Request, index: int) -> Json:
        """The chunk that says why one answer ended."""
        return self._chunk(self._choice(index, "", request, [], request.finish_reason))

    def counts(self, requests: Sequence[Request]) -> Json:
        """The chunk with the usage and nothing else."""
        return {**self.head, "object": "text_completion", "choices": [], "usage": usage(requests)}

    def _chunk(self, choice: Json) -> Json:
        return {**self.head, "object": "text_completion", "choices": [choice]}

    def _choice(
        self, index: int, text: str, request: Request, tokens: Sequence[TokenLogprob], reason: str | None
    ) -> Json:
        choice: Json = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if not request.wants_logprobs:
            return choice
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].decode(self.tokenizer.token_bytes(token.token)))
        wanted = any(token.top for token in tokens)
        tops = [{self._spelled(other): _finite(logprob) for other, logprob in token.top} for token in tokens]
        choice["logprobs"] = {
            "tokens": [self._spelled(token.token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": tops if wanted else None,
            "text_offset": offsets,
        }
        return choice

    def _spelled(self, token: int) -> str:
        """Readable, and different for different tokens even where bytes alone are no characters."""
        spelled = self._bytes(token)
        text = spelled.decode("utf-8", "replace")
        return f"bytes:{spelled.hex()}" if "\ufffd" in text else text
