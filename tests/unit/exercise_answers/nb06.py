"""Answers to the exercises of notebook 06, right and wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_ref.exercises import nb06


def intensity(tokens: int, group: int, overlap: float, width: int = 2) -> float:
    return 4 * tokens * group / (2 * overlap * width)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(0)
    if lse == -torch.inf:
        return torch.zeros_like(outs[0]), lse
    return (lses - lse).exp() @ outs.nan_to_num(0.0), lse


def plain_weights(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    weights = lses.exp()
    return weights @ outs / weights.sum(), weights.sum().log()


def softmax(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return lses.softmax(0) @ outs, lses.logsumexp(0)


def only_cleaned(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return lses.softmax(0) @ outs.nan_to_num(0.0), lses.logsumexp(0)


def invert(blocks: Tensor, count: int, stable: bool = True) -> tuple[Tensor, Tensor]:
    token, slot = torch.nonzero(blocks >= 0, as_tuple=True)
    listed = blocks[token, slot].long()
    if not stable:
        token, listed = token.flip(0), listed.flip(0)
    order = listed.argsort(stable=True)
    start = torch.zeros(count + 1, dtype=torch.int64)
    start[1:] = torch.bincount(listed, minlength=count).cumsum(0)
    return token[order], start


def with_holes(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return invert(blocks.clamp(min=0), count)


RIGHT: list[Right] = [
    (nb06.check_intensity, intensity),
    (nb06.check_merge, merge),
    (nb06.check_invert, invert),
]

WRONG: dict[str, Wrong] = {
    "overlap forgotten": (nb06.check_intensity, lambda t, g, o, w=2: 2 * t * g / w, "share half"),
    "waste counted": (nb06.check_intensity, lambda t, g, o, w=2: 2 * t * g * o / w, "share half"),
    "always 16 bits": (nb06.check_intensity, lambda t, g, o, w=2: t * g / o, "8 bits"),
    "keys alone": (nb06.check_intensity, lambda t, g, o, w=2: 4 * t * g / (o * w), "every number serves 2"),
    "mean": (nb06.check_merge, lambda outs, lses: (outs.mean(0), lses.logsumexp(0)), "three parts"),
    "exp of the lse": (nb06.check_merge, plain_weights, "overflows"),
    "zero times NaN": (nb06.check_merge, softmax, "an empty part"),
    "nothing at all": (nb06.check_merge, only_cleaned, "nothing but empty"),
    "descending": (nb06.check_invert, lambda blocks, count: invert(blocks, count, stable=False), "ascending"),
    "-1 kept": (nb06.check_invert, with_holes, "are not -1"),
    "no last bound": (nb06.check_invert, lambda b, n: (invert(b, n)[0], invert(b, n)[1][:-1]), "start has"),
}
