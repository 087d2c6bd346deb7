"""Checkers of 04_triton_from_zero: planted bugs in a fused RMSNorm, a row-wise softmax, and the fused residual add.

They run the reader's wrapper as the tests run kernels: `judge` is `minicpm_kernels.testing.check_kernel`, which the
notebook passes in. It puts the inputs between stretches of NaN, so that a load without its mask shows, poisons the
outputs, and compares with float64. The hints go with the row that failed, because the row says where to look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minicpm_ref.cases import ADD_RMS_NORM, RMS_NORM
from minicpm_ref.exercises import attempt
from minicpm_ref.ops import add_rms_norm, rms_norm

Judge = Callable[[Callable[..., Any], Callable[..., Any], tuple[Any, ...]], None]

# what each row of the RMSNorm table is the first to show
_FORMULA = "no padding here, only the formula: is eps added to the mean square, under the root?"
HINTS = {
    "one-number": _FORMULA,
    "width-block-1": "C is below the block: what is loaded beyond C, and what does the mean divide by?",
    "tiny-input": _FORMULA,
    "large-input": "the squares exceed 65504: is the sum kept in float32?",
}


def check_fixed_rms_norm(fixed_rms_norm: Callable[[Tensor, Tensor, float], Tensor], judge: Judge) -> str:
    """Check `fixed_rms_norm(x, weight, eps)`, the kernel with planted bugs, on every row of the RMSNorm table."""

    def check() -> None:
        for case in RMS_NORM:
            for dtype in (torch.float32, torch.float16):
                _judge_row(judge, fixed_rms_norm, rms_norm, case.build(dtype), f"{case.name}, {dtype}", case.name)

    return attempt("fixed_rms_norm", check)


def check_softmax(softmax: Callable[[Tensor], Tensor], judge: Judge) -> str:
    """Check `softmax(x)` over the last axis of x [R, C], one program a row."""

    def check() -> None:
        for case in RMS_NORM:
            if len(case.shape) == 2:
                x = case.build()[0]
                _judge_row(judge, softmax, _softmax, (x,), case.name)
                # a padded column that counts as 0 would be the largest number here, and take the whole sum
                _judge_row(judge, softmax, _softmax, (x - 200,), f"{case.name}, all far below zero")

    return attempt("softmax", check)


def check_fused_add(
    fused_add: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]], judge: Judge
) -> str:
    """Check `fused_add(residual, branch, weight, eps, scale)` -> (hidden, normed) against `minicpm_ref.ops`."""

    def check() -> None:
        for case in ADD_RMS_NORM:
            for dtype in (torch.float32, torch.float16):
                _judge_row(judge, fused_add, add_rms_norm, case.build(dtype), f"{case.name}, {dtype}", case.name)

    return attempt("fused_add", check)


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=-1)


def _judge_row(
    judge: Judge,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    row: str,
    hint: str = "",
) -> None:
    try:
        judge(function, reference, arguments)
    except AssertionError as error:
        raise AssertionError(f"row {row}: {error}. {HINTS.get(hint, '')}".rstrip()) from None
