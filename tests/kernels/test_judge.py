"""The judge itself: broken kernels and wrong results must not pass.

Each kernel below is a copy with one bug that plain comparisons let through now and then: memory that happens to hold
zeros forgives a missing mask, and memory that happens to hold the last result forgives a missing store.
"""

from __future__ import annotations

import pytest
import torch

from minicpm_kernels.testing import (
    Bound,
    assert_close,
    check_kernel,
    default_bound,
    guarded,
    poisoned_memory,
    relative_error,
)

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
tl = pytest.importorskip("triton.language")

BLOCK = 16


@triton.jit
def _sum(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, STORE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if MASK_LOAD:
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    else:
        x = tl.load(x_ptr + i)
    if STORE:
        tl.store(out_ptr, tl.sum(x, axis=0))


@triton.jit
def _double_in_place(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n, other=0.0))


def total(x: torch.Tensor, mask_load: bool = True, store: bool = True) -> torch.Tensor:
    out = torch.empty((), dtype=x.dtype)
    _sum[(1,)](x, out, x.numel(), BLOCK=BLOCK, MASK_LOAD=mask_load, STORE=store)
    return out


def reference(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


X = torch.arange(1.0, 12.0)


def test_a_right_kernel_passes() -> None:
    check_kernel(total, reference, (X,))


def test_a_missing_load_mask_is_caught() -> None:
    with pytest.raises(AssertionError, match="NaN or infinite"):
        check_kernel(lambda x: total(x, mask_load=False), reference, (X,))


def test_an_unwritten_output_is_caught() -> None:
    with pytest.raises(AssertionError, match="NaN or infinite"):
        check_kernel(lambda x: total(x, store=False), reference, (X,))


def test_a_store_outside_the_tensor_is_caught() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        _double_in_place[(1,)](x, x.numel(), BLOCK=BLOCK)
        return x.sum()

    with pytest.raises(AssertionError, match="outside its input"):
        check_kernel(kernel, reference, (X,))


def test_a_changed_input_is_caught() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        out = x.sum()
        x[0] = 7
        return out

    with pytest.raises(AssertionError, match="changed its input"):
        check_kernel(kernel, reference, (X,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes_and_more_does_not(dtype: torch.dtype) -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.to(dtype)
    assert_close(rounded, exact)
    one_wrong = rounded.clone()
    one_wrong[17] += 8 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(one_wrong, exact)
    all_off = (rounded.double() * (1 + 4.5 * torch.finfo(dtype).eps)).to(torch.float64)
    with pytest.raises(AssertionError, match="mean square"):
        assert_close(all_off, exact, default_bound(dtype))


def test_the_error_is_relative_to_the_reference() -> None:
    expected = torch.tensor([3e-5, -4e-5], dtype=torch.float64)
    peak, rms = relative_error(expected * 1.01, expected)
    assert peak == pytest.approx(0.01 * 4 / 12.5**0.5)
    assert rms == pytest.approx(0.01)


def test_infinities_must_agree() -> None:
    expected = torch.tensor([1.0, float("-inf")])
    assert_close(expected.clone(), expected)
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_close(torch.tensor([1.0, float("inf")]), expected)
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_close(torch.tensor([1.0, float("nan")]), expected)


def test_structures_and_integers_are_compared() -> None:
    expected = ({"ids": torch.tensor([1, 2])}, [1.0, "a", None])
    assert_close(({"ids": torch.tensor([1, 2])}, [1.0, "a", None]), expected)
    for wrong in (({"ids": torch.tensor([1, 3])}, [1.0, "a", None]), ({"ids": torch.tensor([1, 2])}, [1.1, "a", None])):
        with pytest.raises(AssertionError):
            assert_close(wrong, expected)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2, 1), torch.ones(2))


def test_memory_is_poisoned_only_inside() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert torch.empty(5, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_guarded_tensor_is_a_copy_between_nans() -> None:
    guard = guarded(X, width=64)
    assert torch.equal(guard.tensor, X)
    assert guard.tensor.data_ptr() % 16 == 0
    assert guard.arena[:64].isnan().all()
    guard.check()


def test_bounds_are_stated_for_each_format() -> None:
    assert default_bound(torch.bfloat16) == Bound(peak=2**-5, rms=0.75 * 2**-7)
