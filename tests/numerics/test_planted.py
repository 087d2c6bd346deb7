"""The smallest mistakes that matter, in every row of the case tables: one block, one scale, one position.

A bound that holds on any processor is only worth something if a mistake still exceeds it on any processor. So these
run under every setting of `lane.py`, and each mistake is as small as its kind allows: one block of one token's list is
not read; one scale is wrong by the last bit of its float16; one key's value, or one token's angle, is that of the next
position. The same call without the mistake passes, so the judge does not simply refuse everything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minicpm_kernels.registry import KERNELS, Kernel
from minicpm_kernels.testing import check_attention, check_kernel
from minicpm_ref.cases import TERNARY_MATMUL, Case
from minicpm_ref.cases.decoder import APPLY_ROPE
from minicpm_ref.cases.sparse import SPARSE_ATTENTION
from minicpm_ref.ops import apply_rope

# Triton is interpreted here, some seconds a call: a row or two must do.
INTERPRETED = ("decode", "tokens-5", "many-groups")


def rows(name: str, table: tuple[Any, ...]) -> list[Any]:
    return [
        pytest.param(kernel, case, id=f"{kernel.language}-{case.name}")
        for kernel in KERNELS
        for case in table
        if kernel.name == name and not getattr(case, "big", False)
        if kernel.language == "numba" or case.name in INTERPRETED
    ]


def functions(kernel: Kernel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(kernel, reference)."""
    pytest.importorskip(kernel.language)
    return tuple(getattr(importlib.import_module(m), kernel.name) for m in (kernel.module, kernel.reference))  # type: ignore[return-value]


def refuses(judge: Callable[..., None], *arguments: Any) -> None:
    with pytest.raises(AssertionError, match="error relative|NaN or infinite"):
        judge(*arguments)


@pytest.mark.parametrize(("kernel", "case"), rows("sparse_attention", SPARSE_ATTENTION))
def test_one_block_of_one_token(kernel: Kernel, case: Case) -> None:
    function, reference = functions(kernel)

    def forgetful(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *rest: Any) -> Tensor:
        lists = blocks.clone()
        batch, group, token, entry = (lists >= 0).nonzero()[len((lists >= 0).nonzero()) // 2].tolist()
        lists[batch, group, token, entry] = -1
        return function(q, k, v, lists, *rest)

    refuses(check_attention, forgetful, reference, case.build())


@pytest.mark.parametrize(
    ("kernel", "case"),
    rows("sparse_attention", tuple(row for row in SPARSE_ATTENTION if row.keys > 1 and not row.random_lists)),
)
def test_one_value_of_the_next_position(kernel: Kernel, case: Case) -> None:
    function, reference = functions(kernel)

    def shifted(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, config: Any, *rest: Any) -> Tensor:
        moved = v.clone()
        position = int(blocks[0, 0, q.shape[2] // 2].max()) * config.block_size  # in the block of the query itself
        position = min(position, k.shape[2] - 2)
        moved[0, 0, position] = v[0, 0, position + 1]
        return function(q, k, moved, blocks, config, *rest)

    refuses(check_attention, shifted, reference, case.build())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", [case for case in APPLY_ROPE if case.tokens > 1], ids=lambda case: case.name)
def test_one_angle_of_the_next_position(case: Case, dtype: torch.dtype) -> None:
    def shifted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        order = torch.arange(x.shape[-2])
        order[len(order) // 2] -= 1
        return apply_rope(x, cos[..., order, :], sin[..., order, :])

    check_kernel(apply_rope, apply_rope, case.build(dtype))
    refuses(check_kernel, shifted, apply_rope, case.build(dtype))


# numbers near the smallest normal float32 have fewer bits than a float16 scale
@pytest.mark.parametrize(
    ("kernel", "case"), rows("ternary_matmul_int8", tuple(row for row in TERNARY_MATMUL if row.kind != "tiny"))
)
def test_the_last_bit_of_one_scale(kernel: Kernel, case: Case) -> None:
    function, reference = functions(kernel)

    def careless(x: Tensor, codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
        changed = scales.clone()
        group = 0 if case.kind == "outlier" else -1  # an outlier outweighs every other group; a group of zeros is first
        changed[0, group, 3] = torch.nextafter(changed[0, group, 3], torch.tensor(torch.inf, dtype=scales.dtype))
        return function(x, codes, changed, group_size)

    check_kernel(function, reference, case.build())
    refuses(check_kernel, careless, reference, case.build())
