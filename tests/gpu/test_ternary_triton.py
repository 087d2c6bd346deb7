"""What only a GPU can show about the ternary kernels: the assembly, splits that run at the same time, real shapes.

Kernels are imported inside the tests: this file is also collected where Triton cannot be installed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minicpm_ref.cases import TernaryMatmulCase
from minicpm_ref.ternary import ternary_matmul as reference

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 4096), (1024, 16384), (512, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 33, 255, 256])
def test_real_shapes(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same numbers as the reference, and the same bits on every run, whichever split finished first."""
    from minicpm_kernels.ternary_triton import ternary_matmul
    from minicpm_kernels.testing import check_kernel

    arguments = TernaryMatmulCase("row", (tokens,), *shape).build(dtype, "cuda")
    check_kernel(ternary_matmul, reference, arguments)
    once = ternary_matmul(*arguments)
    assert all(torch.equal(ternary_matmul(*arguments), once) for _ in range(10))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("subnormal", [True, False])
@pytest.mark.parametrize("name", ["_run_matvec", "_run_matmul"])
def test_each_kernel_and_both_ways_to_read_codes(
    name: str, subnormal: bool, tokens: int, shape: tuple[int, int]
) -> None:
    from minicpm_kernels import ternary_triton
    from minicpm_kernels.testing import check_kernel

    if subnormal and torch.version.hip is not None:
        pytest.skip("the assembly is NVIDIA's")

    def kernel(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return getattr(ternary_triton, name)(x, codes.view(torch.int32).squeeze(-1), scales, subnormal)

    check_kernel(kernel, reference, TernaryMatmulCase("row", (tokens,), *shape).build(torch.bfloat16, "cuda"))


def test_a_nan_stays_in_its_token() -> None:
    from minicpm_kernels.ternary_triton import ternary_matmul
    from minicpm_kernels.testing import assert_close

    for tokens in (2, 5):
        x, codes, scales, group = TernaryMatmulCase("row", (tokens,), 4096, 4096).build(torch.bfloat16, "cuda")
        x[1, 7] = torch.nan
        assert_close(ternary_matmul(x, codes, scales, group), reference(x.double(), codes, scales, group))
