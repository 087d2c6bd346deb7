"""Answers to the exercises of notebook 04, right and wrong. Wrong kernels, for a GPU or the interpreter, are in
tests/kernels/test_exercises.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exercise_answers import Right, Wrong
from minicpm_kernels.testing import check_kernel
from minicpm_ref.exercises import nb04
from minicpm_ref.ops import add_rms_norm, rms_norm

EXTRA = (check_kernel,)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x.float() * (x.float().square().mean(-1, keepdim=True).rsqrt() + eps) * weight).to(x.dtype)


def padded_with_zero(x: Tensor) -> Tensor:
    columns = x.shape[1]
    padding = torch.zeros(x.shape[0], (1 << (columns - 1).bit_length()) - columns)
    return torch.softmax(torch.cat([x, padding], 1), -1)[:, :columns]


RIGHT: list[Right] = [
    (nb04.check_fixed_rms_norm, rms_norm),
    (nb04.check_softmax, softmax),
    (nb04.check_fused_add, add_rms_norm),
]

WRONG: dict[str, Wrong] = {
    "eps outside the root": (nb04.check_fixed_rms_norm, eps_outside, "under the root"),
    "padding counts": (nb04.check_softmax, padded_with_zero, "row width-block-1"),
    "results swapped": (
        nb04.check_fused_add,
        lambda *arguments: add_rms_norm(*arguments)[::-1],
        "row one-number|row length-1",
    ),
}
