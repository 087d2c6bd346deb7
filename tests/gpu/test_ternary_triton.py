"""What only a GPU can show about the ternary kernels: the assembly, splits that run at the same time, real shapes.

Kernels are imported inside the tests: this file is also collected where Triton cannot be installed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minicpm_ref.cases import TernaryMatmulCase
from minicpm_ref.lowbit.ternary import quantize_activations
from minicpm_ref.lowbit.ternary import ternary_matmul as reference
from minicpm_ref.lowbit.ternary import ternary_matmul_int8 as reference_int8

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 4096), (1024, 16384), (512, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 33, 255, 256])
def test_real_shapes(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same numbers as the reference, and the same bits on every run, whichever split finished first."""
    from minicpm_kernels.lowbit.ternary_triton import ternary_matmul
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
    from minicpm_kernels.lowbit import ternary_triton
    from minicpm_kernels.testing import check_kernel

    if subnormal and torch.version.hip is not None:
        pytest.skip("the assembly is NVIDIA's")

    def kernel(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return getattr(ternary_triton, name)(x, codes.view(torch.int32).squeeze(-1), scales, subnormal)

    check_kernel(kernel, reference, TernaryMatmulCase("row", (tokens,), *shape).build(torch.bfloat16, "cuda"))


def test_a_nan_stays_in_its_token() -> None:
    from minicpm_kernels.lowbit.ternary_triton import ternary_matmul
    from minicpm_kernels.testing import assert_close

    for tokens in (2, 5):
        x, codes, scales, group = TernaryMatmulCase("row", (tokens,), 4096, 4096).build(torch.bfloat16, "cuda")
        x[1, 7] = torch.nan
        assert_close(ternary_matmul(x, codes, scales, group), reference(x.double(), codes, scales, group))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 16, 33, 64, 257])
def test_int8_activations(tokens: int, shape: tuple[int, int]) -> None:
    """Both kernels, dp4a and tensor cores: as the reference, whose integers are exact, and the same bits every time."""
    from minicpm_kernels.lowbit import ternary_triton_int8 as kernels
    from minicpm_kernels.testing import check_kernel

    def matvec(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        return kernels._run_matvec(x, codes.view(torch.int32).squeeze(-1), scales)

    arguments = TernaryMatmulCase("row", (tokens,), *shape).build(torch.float32, "cuda")
    for kernel in (kernels.ternary_matmul_int8, *([matvec] if tokens <= 4 else [])):
        check_kernel(kernel, reference_int8, arguments)
        once = kernel(*arguments)
        assert all(torch.equal(kernel(*arguments), once) for _ in range(10))


def test_activations_are_rounded_as_in_the_reference() -> None:
    """To the last bit: division and rounding half to even, which fused or approximate arithmetic would miss."""
    from minicpm_kernels.lowbit.ternary_triton_int8 import _prepare

    x, *_ = TernaryMatmulCase("row", (33,), 16, 4096).build(torch.bfloat16, "cuda")
    x[0, :128] = torch.arange(128, device="cuda") + 0.5  # 127.5 / 127.5 * 127 and many values next to halves
    q, scales, sums = _prepare(x, 48)
    expected, expected_scales = quantize_activations(x)
    sorted_q = expected.view(33, 32, 8, 4, 4).transpose(2, 3).reshape(33, 4096)  # by bit pair
    assert torch.equal(q[:33], sorted_q)
    assert torch.equal(scales.T[:33], expected_scales)
    assert torch.equal(sums.T[:33], expected.sum(-1, dtype=torch.int32))
    assert not q[33:].any()
