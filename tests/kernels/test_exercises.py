"""The checkers of notebook 04 reject what they ask the reader to find, one bug at a time, and accept what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minicpm_kernels.testing import check_kernel
from minicpm_ref.exercises.nb04 import check_fixed_rms_norm, check_fused_add, check_softmax
from minicpm_ref.fused import add_rms_norm
from minicpm_ref.model import rms_norm

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
tl = pytest.importorskip("triton.language")


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, C, eps, BUG: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < C
    if BUG == "mask":
        x = tl.load(x_ptr + row * C + col)
    else:
        x = tl.load(x_ptr + row * C + col, mask=inside, other=0.0)
    if BUG != "float32":
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0)
    total = tl.sum(x * x, axis=0)
    if BUG == "mean":
        scale = tl.rsqrt(total / BLOCK + eps)
    elif BUG == "eps":
        scale = tl.rsqrt(total / C) + eps
    else:
        scale = tl.rsqrt(total / C + eps)
    tl.store(out_ptr + row * C + col, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def kernel_with(bug: str) -> Any:
    def function(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        C = x.shape[-1]
        _rms_norm[(x.numel() // C,)](x, weight, out, C, eps, BUG=bug, BLOCK=triton.next_power_of_2(C))
        return out

    return function


@pytest.mark.parametrize(
    ("bug", "hint"),
    [("mask", "beyond C"), ("mean", "divide by"), ("eps", "under the root"), ("float32", "kept in float32")],
)
def test_each_planted_bug_is_rejected_with_its_hint(bug: str, hint: str) -> None:
    with pytest.raises(AssertionError, match=hint):
        check_fixed_rms_norm(kernel_with(bug), check_kernel)


def test_right_answers_are_accepted() -> None:
    assert check_fixed_rms_norm(rms_norm, check_kernel) == "fixed_rms_norm: solved"
    assert check_softmax(lambda x: torch.softmax(x, -1), check_kernel) == "softmax: solved"
    assert check_fused_add(add_rms_norm, check_kernel) == "fused_add: solved"


def test_an_untouched_exercise_is_not_an_error() -> None:
    def untouched(*arguments: Any) -> Any:
        raise NotImplementedError

    assert check_softmax(untouched, check_kernel) == "softmax: not solved yet"


def test_a_softmax_whose_padding_is_zero_is_rejected() -> None:
    def padded_with_zero(x: torch.Tensor) -> torch.Tensor:
        padding = torch.zeros(x.shape[0], triton.next_power_of_2(x.shape[1]) - x.shape[1])
        return torch.softmax(torch.cat([x, padding], 1), -1)[:, : x.shape[1]]

    with pytest.raises(AssertionError, match="row width-block-1"):
        check_softmax(padded_with_zero, check_kernel)


def test_a_fused_add_that_swaps_its_results_is_rejected() -> None:
    with pytest.raises(AssertionError, match="row one-number|row length-1"):
        check_fused_add(lambda *arguments: add_rms_norm(*arguments)[::-1], check_kernel)
