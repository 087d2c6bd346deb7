"""Every Triton kernel equals its reference on a GPU, on every row, in float32, float16 and bfloat16: `make test-gpu`.

The same rows and the same judge as without a GPU; what a GPU adds is bfloat16, compiled code, and real races. The
reference runs there too, in float64.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from minicpm_kernels.registry import KERNELS, Kernel
from minicpm_kernels.testing import check_attention, check_kernel
from minicpm_ref.cases import TABLES, Case

pytestmark = pytest.mark.gpu


def rows() -> list[Any]:
    """One parameter set for every Triton kernel, row and dtype."""
    return [
        pytest.param(kernel, case, dtype, id=f"{kernel.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for kernel in KERNELS
        if kernel.language == "triton"
        for case in TABLES[kernel.name]
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if dtype == torch.float32 or "float16" in kernel.dtypes  # lists of indices are compared in float32 only
    ]


@pytest.mark.parametrize(("kernel", "case", "dtype"), rows())
def test_kernel_equals_reference(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    function, reference = (getattr(importlib.import_module(m), kernel.name) for m in (kernel.module, kernel.reference))
    judge = check_attention if kernel.softmax else check_kernel
    judge(function, reference, case.build(dtype, "cuda"))
