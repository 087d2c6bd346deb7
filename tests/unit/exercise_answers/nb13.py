"""Answers to the exercises of notebook 13, right and wrong."""

from __future__ import annotations

import math

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb13


def tokens_per_parameter(flops: float, a: float, alpha: float, b: float, beta: float) -> float:
    n = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return flops / 6 / n**2


def loss_for(score: float, floor: float, ceiling: float, slope: float, middle: float) -> float:
    return middle + math.log((ceiling - score) / (score - floor)) / slope


def fewest_parameters(loss: float, tokens: float, a: float, alpha: float, b: float, beta: float, floor: float) -> float:
    left = loss - floor - b * tokens**-beta
    return (a / left) ** (1 / alpha) if left > 0 else math.inf


def without_exponents(flops: float, a: float, alpha: float, b: float, beta: float) -> float:
    n = (a / b) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return flops / 6 / n**2


def no_way_out(loss: float, tokens: float, a: float, alpha: float, b: float, beta: float, floor: float) -> float:
    return (a / abs(loss - floor - b * tokens**-beta)) ** (1 / alpha)


RIGHT: list[Right] = [
    (nb13.check_tokens_per_parameter, tokens_per_parameter),
    (nb13.check_loss_for, loss_for),
    (nb13.check_fewest_parameters, fewest_parameters),
]

WRONG: dict[str, Wrong] = {
    "no exponents in the ratio": (nb13.check_tokens_per_parameter, without_exponents, "lower than with your"),
    "twenty": (nb13.check_tokens_per_parameter, lambda *_, **__: 20.0, "lower than with your"),
    "upside down": (
        nb13.check_tokens_per_parameter,
        lambda flops, **law: 1 / tokens_per_parameter(flops, **law),
        "turn it over",
    ),
    "mirrored": (nb13.check_loss_for, lambda s, f, c, k, m: 2 * m - loss_for(s, f, c, k, m), "lower loss"),
    "no floor": (nb13.check_loss_for, lambda s, f, c, k, m: loss_for(s, 0.0, c, k, m), "middle"),
    "never infinite": (nb13.check_fewest_parameters, no_way_out, "infinity"),
    "tokens forgotten": (
        nb13.check_fewest_parameters,
        lambda loss, tokens, a, alpha, b, beta, floor: (a / (loss - floor)) ** (1 / alpha),
        "expected",
    ),
}
