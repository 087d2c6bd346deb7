"""The checkers of notebooks 02 and 03 accept right answers, name each usual mistake, and wait for an untouched cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import nb02, nb03
from minicpm_ref.optimizers import orthogonalize
from minicpm_ref.tokenizer import stream_text


def untouched(*_: object) -> Any:
    raise NotImplementedError


def encode_word(word: str, merges: list[tuple[str, str]], overlap: bool = False) -> list[str]:
    parts = list(word)
    while present := [pair for pair in zip(parts, parts[1:], strict=False) if pair in merges]:
        first = max(present, key=present.count) if overlap else min(present, key=merges.index)
        at = next(i for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair == first)
        parts[at : at + 2] = ["".join(first)]
    return parts


def in_order(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The mistake of joining only once a pair, from right to left."""
    parts = list(word)
    for first, second in merges:
        for i in reversed(range(len(parts) - 1)):
            if parts[i : i + 2] == [first, second]:
                parts[i : i + 2] = [first + second]
    return parts


def half_life(step: int, warmup: int, start: int, half: float) -> float:
    return min(1.0, (step + 1) / warmup if warmup else 1.0) * 0.5 ** (max(0, step - start) / half)


def muon(
    weight: Tensor, gradient: Tensor, buffer: Tensor, lr: float, momentum: float, decay: float, **change: Any
) -> Any:
    new = buffer.lerp(gradient, 1 - momentum)
    direction = new if change.get("no_lookahead") else gradient.lerp(new, momentum)
    tall = 1.0 if change.get("square_only") else max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    if change.get("in_place"):
        buffer.copy_(new)
    return weight * (1 - lr * decay) - lr * tall * orthogonalize(direction), new


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


RIGHT: list[tuple[Callable[..., str], Callable[..., Any]]] = [
    (nb02.check_encode_word, encode_word),
    (nb02.check_half_life_factor, half_life),
    (nb02.check_muon_update, muon),
    (nb03.check_free_tokens, free_tokens),
    (nb03.check_decode_rate, decode_rate),
    (nb03.check_stream_pieces, stream_text),
]

WRONG: dict[str, tuple[Callable[..., str], Callable[..., Any], str]] = {
    "characters": (nb02.check_encode_word, lambda word, merges: list(word), "both merges"),
    "most frequent first": (nb02.check_encode_word, lambda w, m: encode_word(w, m, overlap=True), "was learned before"),
    "right to left": (nb02.check_encode_word, in_order, "left to right"),
    "a step early": (nb02.check_half_life_factor, lambda s, w, d, h: half_life(s, w, d - 1, h), "step 80"),
    "no warmup": (nb02.check_half_life_factor, lambda s, w, d, h: half_life(s, 0, d, h), "step 0"),
    "steps in the decay": (
        nb02.check_half_life_factor,
        lambda s, w, d, h: half_life(s, w, d, h) if s < d else 0.5 ** ((s - d) // h),
        "no steps of its own",
    ),
    "no lookahead": (nb02.check_muon_update, lambda *a: muon(*a, no_lookahead=True), "the weight differs"),
    "tall as wide": (nb02.check_muon_update, lambda *a: muon(*a, square_only=True), r"\(12, 4\).*the weight differs"),
    "in place": (nb02.check_muon_update, lambda *a: muon(*a, in_place=True), "changed in place"),
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


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda value: getattr(value, "__name__", ""))
def test_right_answers_pass(check: Callable[..., str], answer: Callable[..., Any]) -> None:
    assert check(answer).endswith(": solved")


@pytest.mark.parametrize("check", [check for check, _ in RIGHT], ids=lambda check: check.__name__)
def test_an_untouched_cell_is_no_error(check: Callable[..., str]) -> None:
    assert check(untouched).endswith(": not solved yet")


@pytest.mark.parametrize("mistake", WRONG)
def test_each_mistake_is_named(mistake: str) -> None:
    check, answer, hint = WRONG[mistake]
    with pytest.raises(AssertionError, match=hint):
        check(answer)
