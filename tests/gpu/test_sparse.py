"""Sparse attention on a GPU, what the rows of the case tables leave out: choices and gradients in bfloat16, the same
bits twice, and both stages inside a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minicpm_ref import sparse as reference
from minicpm_ref.cases.sparse import SELECT_BLOCKS, SPARSE_ATTENTION

pytestmark = pytest.mark.gpu
LISTS = {case.name: case for case in SELECT_BLOCKS}
ROWS = {case.name: case for case in SPARSE_ATTENTION}
BIG = ("medium", "medium-batch", "published-chunk")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*BIG, "group-3", "padded-batch", "published-decode"])
def test_choices_are_worth_as_much(name: str, dtype: torch.dtype) -> None:
    from minicpm_kernels.sparse.blocks import select_blocks
    from minicpm_kernels.testing import poisoned_memory, upcast

    arguments = LISTS[name].build(dtype, "cuda")
    wide = [upcast(value) for value in arguments]
    scores, wanted = reference.block_scores(*wide), reference.select_blocks(*wide)
    with poisoned_memory():
        actual = select_blocks(*arguments)
    assert torch.equal(actual >= 0, wanted >= 0)

    def worth(blocks: torch.Tensor) -> torch.Tensor:
        return scores.gather(-1, blocks.clamp(min=0).long()).masked_fill(blocks < 0, 0.0).sort(-1).values

    # the means of the keys are rounded to the dtype: eps times logits of a few units, and the scores with them
    torch.testing.assert_close(worth(actual), worth(wanted), rtol=16 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*BIG, "group-3", "padded-batch", "block-is-one-stride", "random-lists"])
def test_gradients(name: str, dtype: torch.dtype) -> None:
    from minicpm_kernels.sparse.attention import sparse_attention
    from minicpm_kernels.testing import assert_as_close, largest_logit, poisoned_memory

    q, k, v, *rest = ROWS[name].build(dtype, "cuda")
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)

    def gradients(function: Any, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(wide).detach().requires_grad_() for x in (q, k, v)]
        with poisoned_memory():
            out = function(*leaves, *rest)
            return out.detach(), *torch.autograd.grad(out, leaves, dout.to(wide))

    expected = gradients(reference.sparse_attention, torch.float64)
    actual = gradients(sparse_attention, dtype)
    own = gradients(reference.sparse_attention, dtype)
    assert_as_close(actual, own, expected, largest_logit(q, k), "(out, dq, dk, dv)")
    again = gradients(sparse_attention, dtype)
    assert all(torch.equal(one, other) for one, other in zip(actual, again, strict=True))


def test_a_decode_step_fits_in_a_graph() -> None:
    """No value is read off the device on the way, and a replay follows changed inputs."""
    from minicpm_kernels.sparse.attention import sparse_attention
    from minicpm_kernels.sparse.blocks import compress_keys, select_blocks

    q, k, v, _, config, *_ = ROWS["published-decode"].build(torch.bfloat16, "cuda")
    size, stride = config.kernel_size, config.kernel_stride
    compressed = compress_keys(k, size, stride), compress_keys(k, 4 * size, 4 * stride)

    def step() -> torch.Tensor:
        return sparse_attention(q, k, v, select_blocks(q, k, config, compressed=compressed), config)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, step())
