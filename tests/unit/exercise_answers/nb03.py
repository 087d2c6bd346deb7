"""Answers to the exercises of notebook 03, right and wrong."""

from __future__ import annotations

from typing import Any

from exercise_answers import Right, Wrong
from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb03
from minicpm_ref.tokenizer import stream_text


def free_tokens(config: ModelConfig, past: int, bandwidth: float, peak: float, per_token: bool = False) -> int:
    flops = count = 0
    while True:
        flops += config.flops_per_token(past if per_token else past + count + 1)
        if flops / peak > config.decode_bytes(past + count + 1) / bandwidth:
            return count
        count += 1


def decode_rate(config: ModelConfig, batch: int, context: int, bandwidth: float, peak: float) -> float:
    read = config.decode_bytes(0) + batch * context * config.kv_bytes_per_token()
    return batch / max(read / bandwidth, batch * config.flops_per_token(context) / peak)


def one_by_one(tokenizer: Any, tokens: Any) -> Any:
    return (tokenizer.decode([token]) for token in tokens)


def all_at_once(tokenizer: Any, tokens: Any) -> Any:
    yield tokenizer.decode(list(tokens))


def drops_the_rest(tokenizer: Any, tokens: Any) -> Any:
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)


RIGHT: list[Right] = [
    (nb03.check_free_tokens, free_tokens),
    (nb03.check_decode_rate, decode_rate),
    (nb03.check_stream_pieces, stream_text),
]

WRONG: dict[str, Wrong] = {
    "one too many": (nb03.check_free_tokens, lambda *a: free_tokens(*a) + 1, "slower than the bytes"),
    "one too few": (nb03.check_free_tokens, lambda *a: max(0, free_tokens(*a) - 1), "free as well"),
    "constant context": (nb03.check_free_tokens, lambda *a: free_tokens(*a, per_token=True), "slower|as well"),
    "weights again for each": (
        nb03.check_decode_rate,
        lambda c, b, n, bandwidth, peak: bandwidth / c.decode_bytes(n),
        "limited by arithmetic|read once",
    ),
    "memory only": (nb03.check_decode_rate, lambda c, b, n, w, p: decode_rate(c, b, n, w, 1e30), "by arithmetic"),
    "one token, one piece": (nb03.check_stream_pieces, one_by_one, "the pieces give"),
    "waits for the end": (nb03.check_stream_pieces, all_at_once, "comes then"),
    "drops the rest": (nb03.check_stream_pieces, drops_the_rest, "must still come out"),
}
