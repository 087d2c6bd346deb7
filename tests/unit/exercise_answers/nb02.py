"""Answers to the exercises of notebook 02, right and wrong."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb02
from minicpm_ref.training.optimizers import orthogonalize


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


RIGHT: list[Right] = [
    (nb02.check_encode_word, encode_word),
    (nb02.check_half_life_factor, half_life),
    (nb02.check_muon_update, muon),
]

WRONG: dict[str, Wrong] = {
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
}
