"""Attention in row blocks: what the library's attention gives, forwards and backwards, within its own rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minicpm_ref import ops, row_blocks
from minicpm_ref.row_blocks import ROWS, row_block_attention

SHAPES = [(2, 4, 1, 300, 64), (1, 4, 4, 128, 32), (3, 6, 2, 129, 16), (1, 2, 1, 1, 8), (2, 4, 2, 2 * ROWS, 24)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, heads, groups, tokens, width = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((batch, heads, tokens, width), *[(batch, groups, tokens, width)] * 2, (batch, heads, tokens, width))
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    drawn[0] = drawn[0] * 2  # peaked attention, too
    return drawn


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def results(function, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the three gradients."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors[:3])
    out = function(q, k, v)
    out.backward(tensors[3])
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64_it_is_the_library_s_attention(shape: tuple[int, ...]) -> None:
    tensors = inputs(shape, torch.float64)
    for ours, theirs in zip(results(row_block_attention, tensors), results(library, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_errs_no_more_than_the_library(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Root of the mean squared error against float64 of the same inputs: at most three times the library's, plus one
    rounding of the dtype."""
    tensors = inputs(shape, dtype)
    exact = results(library, [tensor.double() for tensor in tensors])
    ours, theirs = results(row_block_attention, tensors), results(library, tensors)
    for name, right, mine, other in zip(("out", "dq", "dk", "dv"), exact, ours, theirs, strict=True):
        error, allowed = ((x.double() - right).square().mean().sqrt() for x in (mine, other))
        rounding = torch.finfo(dtype).eps * right.square().mean().sqrt()
        assert error <= 3 * allowed + rounding, name


def test_a_planted_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that shows each token the next one."""
    tensors = inputs(SHAPES[0], torch.float64)
    right = results(library, tensors)
    triu = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal: triu(self, diagonal + 1))
    wrong = results(row_block_attention, tensors)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(right, wrong, strict=True))


def test_training_in_bfloat16_takes_it_where_the_processor_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(ops, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(row_blocks, "row_block_attention", lambda q, k, v: calls.append(q.shape) or library(q, k, v))
    q, k, v, _ = inputs((1, 2, 1, 40, 16), torch.bfloat16)
    ops.causal_attention(q, k, v)
    assert len(calls) == 1
    ops.causal_attention(q.float(), k.float(), v.float())
    ops.causal_attention(q[:, :, -1:], k, v)
    with torch.no_grad():
        ops.causal_attention(q, k, v)
    monkeypatch.setattr(ops, "multiplies_bfloat16", lambda device: False)
    ops.causal_attention(q, k, v)
    assert len(calls) == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = inputs((1, 4, 2, 8, 16), torch.float32)
    with pytest.raises(ValueError, match="expected k and v of one shape"):
        row_block_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="expected k and v of one shape"):
        row_block_attention(q, k[:, :, :7], v[:, :, :7])
