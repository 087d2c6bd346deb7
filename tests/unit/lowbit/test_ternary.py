"""The quantizer, its grids, the straight-through estimator, the import of fake-quantized weights, the packed
product.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicpm_ref.cases import FAKE_QUANTIZE, QUANTIZE, TERNARY_MATMUL, FakeQuantizeCase, QuantizeCase, TernaryMatmulCase
from minicpm_ref.lowbit.packing import from_lanes, scales_from_lanes, scales_to_lanes, to_lanes
from minicpm_ref.lowbit.ternary import (
    GRIDS,
    SMALLEST_SCALE,
    dequantize,
    fake_quantize,
    quantize,
    quantize_activations,
    recover_ternary,
    ternary_matmul,
    ternary_matmul_int8,
)


def by_hand(w: Tensor, group_size: int, levels: tuple[float, ...], mean: bool, divisor: float) -> Tensor:
    """A grid one weight at a time: the nearest level in units of the scale, by looking at all of them."""
    out = torch.empty_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group_size):
            group = w[row, start : start + group_size]
            statistic = group.abs().mean() if mean else group.abs().max()
            scale = max(statistic / divisor, torch.tensor(SMALLEST_SCALE)).half().float()
            for k, value in enumerate(group):
                out[row, start + k] = min(levels, key=lambda level: abs(float(value / scale) - level)) * scale
    return out


@pytest.mark.parametrize("case", QUANTIZE, ids=lambda case: case.name)
def test_codes_and_scales(case: QuantizeCase) -> None:
    w, group_size = case.build()
    codes, scales = quantize(w, group_size)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    assert scales.shape == (case.rows, case.columns // group_size)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert (scales > 0).all()
    groups = w.view(case.rows, -1, group_size)
    torch.testing.assert_close(
        scales.float(), groups.abs().mean(-1).clamp(min=SMALLEST_SCALE), rtol=2**-11, atol=2**-25
    )
    # the code is the nearest of the three levels
    error = (dequantize(codes, scales, group_size) - w).abs()
    for level in (-1, 0, 1):
        other = dequantize(torch.full_like(codes, level), scales, group_size)
        assert (error <= (other - w).abs() + 1e-7 * w.abs().max()).all()


def test_halfway_rounds_to_even() -> None:
    """|w| / s = 1/2 goes to 0, as torch rounds; a quotient a little above does not."""
    w, group_size = next(case for case in QUANTIZE if case.name == "ties").build()
    codes, scales = quantize(w, group_size)
    assert (scales == 1).all()
    assert torch.equal(codes, (w.abs() == 1.5) * w.sign().to(torch.int8))
    codes, _ = quantize(torch.tensor([[0.5001, 1.4999]]), 2)
    assert codes.tolist() == [[1, 1]]


def test_a_group_of_zeros_is_zero() -> None:
    codes, scales = quantize(torch.zeros(2, 8), 8)
    assert not codes.any()
    assert torch.equal(scales, torch.full((2, 1), SMALLEST_SCALE, dtype=torch.float16))
    assert torch.equal(dequantize(codes, scales, 8), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (torch.ones(2, 130), r"up_proj: shape \[2, 130\], expected .* multiple of group_size 128"),
        (torch.ones(128), r"up_proj: shape \[128\], expected \[out, in\]"),
        (torch.ones(1, 128).index_fill(1, torch.tensor(7), torch.nan), r"up_proj: nan at \[0, 7\]"),
        (torch.ones(3, 128).index_fill(0, torch.tensor(2), -torch.inf), r"up_proj: -inf at \[2, 0\]"),
        (torch.full((2, 128), 1e5), r"scale of up_proj: inf at \[0, 0\]"),
    ],
)
def test_quantize_refuses(w: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize(w, name="up_proj")


@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 4), groups=st.integers(1, 3), size=st.sampled_from([1, 4, 16, 128])
)
@settings(max_examples=30, deadline=None)
def test_groups_do_not_see_each_other(seed: int, rows: int, groups: int, size: int) -> None:
    """Every group quantized alone gives what it gives inside the matrix."""
    w = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize(w, size)
    for row in range(rows):
        for group in range(groups):
            cut = slice(group * size, (group + 1) * size)
            alone, scale = quantize(w[row : row + 1, cut], size)
            assert torch.equal(codes[row : row + 1, cut], alone)
            assert scales[row, group] == scale


@pytest.mark.parametrize("case", [case for case in FAKE_QUANTIZE if case.kind != "ties"], ids=lambda case: case.name)
def test_grids_take_the_nearest_level(case: FakeQuantizeCase) -> None:
    divisor = {"ternary": 1, "asymmetric4": 1.5, "half4": 1.5, "nonzero4": 2, "five": 2}[case.grid]
    w, group_size, grid = case.build()
    expected = by_hand(w, group_size, GRIDS[grid].levels, grid == "ternary", divisor)
    torch.testing.assert_close(fake_quantize(w, group_size, grid), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", QUANTIZE, ids=lambda case: case.name)
def test_training_and_packing_see_the_same_weights(case: QuantizeCase) -> None:
    w, group_size = case.build()
    assert torch.equal(fake_quantize(w, group_size), dequantize(*quantize(w, group_size), group_size))


def test_an_unrounded_scale_would_not_agree() -> None:
    """The reason for rounding the scale inside the quantizer: without it, training sees other weights than the file."""
    w, group_size = QUANTIZE[1].build()
    groups = w.view(1, -1, group_size)
    scales = groups.abs().mean(-1, keepdim=True)
    unrounded = ((groups / scales).round().clamp(-1, 1) * scales).view_as(w)
    difference = (fake_quantize(w, group_size) - unrounded).abs().max() / scales.max()
    assert 0 < difference < 2**-11


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_goes_straight_through(grid: str) -> None:
    w = QUANTIZE[3].weight().requires_grad_()
    weights = torch.arange(w.numel(), dtype=torch.float32).view_as(w)
    (fake_quantize(w, 128, grid) * weights).sum().backward()
    assert torch.equal(w.grad, weights)


def test_fake_quantize_keeps_the_dtype_and_spreads_nan() -> None:
    w = QUANTIZE[3].weight()
    assert fake_quantize(w.bfloat16()).dtype == torch.bfloat16
    w[2, 130] = torch.nan
    poisoned = fake_quantize(w).isnan()
    assert poisoned[2, 128:256].all()
    assert poisoned.sum() == 128
    with pytest.raises(ValueError, match="grid 'quaternary': expected one of ternary, "):
        fake_quantize(w, 128, "quaternary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_recover_gives_back_what_was_published(dtype: torch.dtype) -> None:
    codes, scales = quantize(QUANTIZE[3].weight())
    scales = scales.to(dtype).half()  # a scale that the published dtype holds
    published = dequantize(codes, scales).to(dtype)
    recovered, found = recover_ternary(published)
    assert torch.equal(recovered, codes)
    assert torch.equal(found, scales)
    assert not torch.equal(quantize(published)[1], scales), "quantizing again is not the same thing"


def test_recover_refuses_by_tensor_and_group() -> None:
    codes, scales = quantize(QUANTIZE[3].weight())
    published = dequantize(codes, scales)
    broken = published.clone()
    broken[4, 256 + int(codes[4, 256:].nonzero()[0])] *= 1.01
    with pytest.raises(
        ValueError, match=r"mlp.up: group 2 of row 4 is not ternary at group_size 128: \|w\| takes 0, 0.0"
    ):
        recover_ternary(broken, name="mlp.up")
    with pytest.raises(ValueError, match=r"group 0 of row 0 is not ternary at group_size 384"):
        recover_ternary(published, 384)
    with pytest.raises(ValueError, match=r"group 0 of row 0 has a scale that is not a float16"):
        recover_ternary(published * (1 + 2**-12))
    with pytest.raises(ValueError, match="inf"):
        recover_ternary(published.index_fill(0, torch.tensor(1), torch.inf))


@given(seed=st.integers(0, 2**31), power=st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_int8_activations(seed: int, power: int) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scales = quantize_activations(x, 32)
    assert q.shape == (2, 3, 2, 32)
    assert scales.shape == (2, 3, 2)
    groups = x.view(2, 3, 2, 32)
    assert torch.equal(q.abs().amax(-1), torch.full((2, 3, 2), 127, dtype=torch.int8))
    assert ((q * scales.unsqueeze(-1) - groups).abs() <= 0.5001 * scales.unsqueeze(-1)).all()


@pytest.mark.parametrize("case", TERNARY_MATMUL, ids=lambda case: case.name)
def test_the_product_is_the_product(case: TernaryMatmulCase) -> None:
    """Both arithmetics against float64 on the dense matrix; int8 with the activations that it says it multiplies."""
    x, codes, scales, group_size = case.build()
    w = from_lanes(codes).double() * scales_from_lanes(scales).double().repeat_interleave(group_size, 1)  # [out, in]
    size = (x.double() @ w.T).norm()
    assert (ternary_matmul(x, codes, scales, group_size) - x.double() @ w.T).norm() <= 1e-6 * size + 1e-43
    q, q_scales = quantize_activations(x, group_size)
    rounded = (q * q_scales.double().unsqueeze(-1)).flatten(-2)
    assert (ternary_matmul_int8(x, codes, scales, group_size) - rounded @ w.T).norm() <= 1e-6 * (rounded @ w.T).norm()


@pytest.mark.parametrize("function", [ternary_matmul, ternary_matmul_int8])
def test_the_product_refuses(function) -> None:  # type: ignore[no-untyped-def]
    x, codes, scales, _ = TERNARY_MATMUL[2].build()
    with pytest.raises(ValueError, match="x has 128 columns, expected 256"):
        function(x[:, :128], codes, scales)
    with pytest.raises(ValueError, match=r"scales \[2, 2, 16\], expected \[2, 4, 16\]"):
        function(x, codes, scales, 64)
    damaged = codes.clone()
    damaged[1, 2, 3, 0] |= 3
    with pytest.raises(ValueError, match=r"codes: byte \d+ at \[1, 2, 3, 0\] is out of range"):
        function(x, damaged, scales)


def test_the_reference_takes_other_group_sizes() -> None:
    codes, scales = quantize(QUANTIZE[3].weight()[:4].repeat(4, 1), 64)
    x = torch.randn(2, 384, generator=torch.Generator().manual_seed(1))
    y = ternary_matmul(x, to_lanes(codes), scales_to_lanes(scales), 64)
    torch.testing.assert_close(y, x @ dequantize(codes, scales, 64).T)
