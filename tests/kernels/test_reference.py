"""Every kernel equals its reference on every row of its case table: Triton kernels in the interpreter, numba kernels
as compiled.

The judge is `minicpm_kernels.testing`: inputs between stretches of NaN, outputs poisoned, error relative to the
reference's size.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from minicpm_kernels.registry import KERNELS, Kernel
from minicpm_kernels.testing import check_attention, check_kernel
from minicpm_ref.cases import TABLES, Case


def rows() -> list[Any]:
    """One parameter set for every kernel, row and dtype; rows marked `big` are too slow for the interpreter."""
    return [
        pytest.param(kernel, case, dtype, id=f"{kernel.name}-{kernel.language}-{case.name}-{dtype}")
        for kernel in KERNELS
        for case in TABLES[kernel.name]
        if not (kernel.language == "triton" and getattr(case, "big", False))
        for dtype in kernel.dtypes
    ]


@pytest.mark.parametrize(("kernel", "case", "dtype"), rows())
def test_kernel_equals_reference(kernel: Kernel, case: Case, dtype: str) -> None:
    if kernel.language == "triton":
        pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    function, reference = (getattr(importlib.import_module(m), kernel.name) for m in (kernel.module, kernel.reference))
    judge = check_attention if kernel.softmax else check_kernel
    judge(function, reference, case.build(getattr(torch, dtype)))
