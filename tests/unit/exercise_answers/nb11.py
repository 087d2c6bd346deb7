"""Answers to the exercises of notebook 11, right and wrong."""

from __future__ import annotations

import numpy as np

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb11


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    rest = np.maximum(p - q, 0)
    return rest / rest.sum()


def best_drafts(rate: float, verify: float, draft: float, extra: int = 1) -> int:
    speeds = [sum(rate**i for i in range(1 - extra, count + 1)) / (1 + (verify + draft) * count) for count in range(33)]
    return int(np.argmax(speeds))


RIGHT: list[Right] = [(nb11.check_residual, residual), (nb11.check_best_drafts, best_drafts)]

WRONG: dict[str, Wrong] = {
    "the target's law": (nb11.check_residual, lambda p, q: p, "which is not p"),
    "not normalised": (nb11.check_residual, lambda p, q: np.maximum(p - q, 0), "add up to"),
    "without the clamp": (nb11.check_residual, lambda p, q: p - q, "below zero"),
    "the other way round": (nb11.check_residual, lambda p, q: residual(q, p), "which is not p"),
    "one number": (nb11.check_residual, lambda p, q: np.maximum(p - q, 0).sum(), "shape"),
    "drafts are free": (nb11.check_best_drafts, lambda rate, verify, draft: best_drafts(rate, verify, 0), "drafts run"),
    "verification is free": (
        nb11.check_best_drafts,
        lambda rate, verify, draft: best_drafts(rate, 0, draft),
        "drafts run",
    ),
    "no extra token": (
        nb11.check_best_drafts,
        lambda rate, verify, draft: best_drafts(rate, verify, draft, extra=0),
        "drafts run",
    ),
    "as many as allowed": (nb11.check_best_drafts, lambda rate, verify, draft: 33, "expected 0 to 32"),
}
