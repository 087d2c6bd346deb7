"""What the wrappers of minicpm_kernels.ops refuse, in words, before any memory is touched."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_kernels.ops import WIDEST, add_rms_norm, rms_norm  # noqa: E402  # imports triton

X, W = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(2, 8, dtype=torch.float64), W, "x is torch.float64, expected torch.float32 or"),
        (X, W.half(), "weight is torch.float16, expected torch.float32"),
        (X, torch.ones(9), r"weight has shape \[9\], expected \[8\]"),
        (torch.ones(8, 2).T, W, r"x of shape \[2, 8\] has strides \[1, 2\].*x.contiguous"),
        (torch.ones(0, 8), W, r"x has shape \[0, 8\].*at least one number"),
        (torch.ones(()), W, r"x has shape \[\]"),
        (torch.ones(1, WIDEST + 1), torch.ones(WIDEST + 1), f"rows of {WIDEST + 1} numbers, expected at most {WIDEST}"),
        ([1.0], W, "x is a list, expected a tensor"),
    ],
)
def test_arguments_are_checked(x: torch.Tensor, weight: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: .*{words}"):
        rms_norm(x, weight, 1e-6)


def test_the_branch_is_checked() -> None:
    with pytest.raises(ValueError, match=r"add_rms_norm: branch has shape \[3, 8\], expected \[2, 8\]"):
        add_rms_norm(X, torch.ones(3, 8), W, 1e-6, 1.0)


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(ValueError, match="bfloat16 is wrong in Triton's interpreter"):
        rms_norm(X.bfloat16(), W.bfloat16(), 1e-6)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the tensors are on cpu, expected a CUDA or ROCm device"):
        rms_norm(X, W, 1e-6)


def test_a_gradient_is_refused() -> None:
    weight = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="rms_norm computes no gradient"):
        rms_norm(X, weight, 1e-6)
    with torch.no_grad():
        assert torch.isfinite(rms_norm(X, weight, 1e-6)).all()
