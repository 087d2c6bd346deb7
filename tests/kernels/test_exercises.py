"""The checkers of notebook 04 reject kernels with a planted bug, one at a time. (What else they are tried on is in
tests/unit/exercise_answers.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minicpm_kernels.testing import check_kernel
from minicpm_ref.exercises.nb04 import check_fixed_rms_norm

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
