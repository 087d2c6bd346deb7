"""Eight and four bits: every weight on its nearest level, and nothing worse than half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicpm_ref.lowbit.int4 import quantize_int4, quantize_int4_minimum
from minicpm_ref.lowbit.int8 import quantize_int8
from minicpm_ref.lowbit.ternary import dequantize

QUANTIZERS = {"int8": (quantize_int8, -127, 127), "int4": (quantize_int4, -8, 7)}


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]


@pytest.mark.parametrize("group_size", [32, 128])
def test_each_weight_gets_the_nearest_level(quantizer, group_size: int) -> None:
    quantize, low, high = quantizer
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    w[3, :128] = 0  # whole groups of zeros
    codes, scales = quantize(w, group_size)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    levels = torch.arange(low, high + 1)
    steps = scales.double().repeat_interleave(group_size, dim=1)
    best = (levels * steps[..., None] - w.double()[..., None]).abs().amin(-1)
    found = (codes.double() * steps - w.double()).abs()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-7)  # a division in float32 may take the other of two
    assert (dequantize(codes, scales, group_size)[3, :128] == 0).all()


def test_the_largest_weight_stands_on_minus_eight_whatever_its_sign() -> None:
    w = torch.tensor([[0.5, -4.0, 1.0, 3.0], [0.5, 4.0, 1.0, -3.0]])
    codes, scales = quantize_int4(w, 4)
    assert codes.tolist() == [[1, -8, 2, 6], [-1, -8, -2, 6]]
    assert scales.tolist() == [[0.5], [-0.5]]


def test_scales_that_vanish_in_float16_leave_no_infinity(quantizer) -> None:
    quantize = quantizer[0]
    w = torch.full((16, 32), 1e-9)
    w[0] = torch.linspace(-1, 1, 32) * 127 * 3e-8  # a scale of half the smallest float16
    codes, scales = quantize(w)
    assert dequantize(codes, scales, 32).isfinite().all()
    assert (dequantize(codes, scales, 32) - w).abs().max() <= w.abs().max()


def test_what_cannot_be_rounded_is_named(quantizer) -> None:
    quantize = quantizer[0]
    for wrong in (torch.nan, torch.inf, 1e9):
        w = torch.ones(2, 32)
        w[1, 5] = wrong
        with pytest.raises(ValueError, match="up_proj"):
            quantize(w, name="up_proj")
    with pytest.raises(ValueError, match="multiple of group_size 32"):
        quantize(torch.ones(2, 48))


def test_a_minimum_uses_all_levels_of_a_group_that_lies_elsewhere() -> None:
    w = 3 + torch.rand(16, 64, generator=torch.Generator().manual_seed(1))
    codes, scales, minimums = quantize_int4_minimum(w)
    assert codes.view(16, 2, 32).amin(-1).eq(0).all()
    assert codes.view(16, 2, 32).amax(-1).eq(15).all()
    restored = dequantize(codes, scales, 32) + minimums.float().repeat_interleave(32, dim=1)
    # half a step, and what float16 rounds off a minimum of 3 to 4 (2^-10) and off 15 scales (2^-11 of 1)
    assert (restored - w).abs().max() <= 0.5 / 15 + 2**-10 + 2**-11
    symmetric = dequantize(*quantize_int4(w), 32)
    assert (restored - w).square().mean() < (symmetric - w).square().mean() / 16


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_what_a_gguf_file_holds_is_found_again_bit_for_bit(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((48, 128)) * np.exp(rng.standard_normal((48, 1)) * 3)).astype(np.float32)
    w[0] = 0
    stored = gguf.quantize(w, gguf.GGMLQuantizationType[kind])
    restored = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind]).copy())
    if kind == "Q4_1":
        codes, scales, minimums = quantize_int4_minimum(restored)
        again = codes.float().view(48, 4, 32) * scales.float()[..., None] + minimums.float()[..., None]
    else:
        codes, scales = (quantize_int8 if kind == "Q8_0" else quantize_int4)(restored)
        again = codes.float().view(48, 4, 32) * scales.float()[..., None]
    assert torch.equal(again.flatten(1), restored)
    blocks = torch.from_numpy(stored.copy()).view(48, 4, -1)
    assert torch.equal(scales[1:], blocks[1:, :, :2].contiguous().view(torch.float16)[..., 0])
