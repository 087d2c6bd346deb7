"""The case tables: the same numbers on every call, and the rows that catch masks and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from minicpm_kernels.testing import assert_close
from minicpm_ref.cases import ADD_RMS_NORM, RMS_NORM, TABLES, Case
from minicpm_ref.ops import add_rms_norm


@pytest.mark.parametrize("name", TABLES)
def test_rows_build_the_same_numbers_twice(name: str) -> None:
    for case in TABLES[name]:
        first, second = case.build(), case.build()
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other), f"{name}: {case.name}"


@pytest.mark.parametrize("table", [RMS_NORM, ADD_RMS_NORM], ids=["rms_norm", "add_rms_norm"])
def test_norm_rows_are_rounded_from_the_same_draw(table: Sequence[Case]) -> None:
    for case in table:
        wide: tuple[Any, ...] = case.build(torch.float32)
        narrow: tuple[Any, ...] = case.build(torch.float16)
        for one, other in zip(wide, narrow, strict=True):
            assert torch.equal(one.half(), other) if isinstance(one, torch.Tensor) else one == other


def test_norm_rows_hold_the_standing_ones() -> None:
    shapes = [case.shape for case in RMS_NORM]
    widths = {shape[-1] for shape in shapes}
    assert {1, 63, 64, 65, 101, 1024, 1025} <= widths
    assert {1, 31, 32, 33} <= {shape[0] for shape in shapes if len(shape) == 2}
    assert any(len(shape) > 2 and shape[0] > 1 for shape in shapes)
    large = next(case for case in RMS_NORM if case.name == "large-input")
    assert torch.isinf(large.build(torch.float16)[0].square().sum(-1)).all(), "float16 sums overflow on this row"


def test_the_fused_reference_is_the_two_steps() -> None:
    """Written out in float64: `add_rms_norm` is the residual add and the norm of its result."""
    for case in ADD_RMS_NORM:
        residual, branch, weight, eps, scale = case.build(torch.float64)
        hidden = residual + scale * branch
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        assert_close(add_rms_norm(residual, branch, weight, eps, scale), (hidden, normed))


def test_the_fused_reference_keeps_its_dtype() -> None:
    hidden, normed = add_rms_norm(*ADD_RMS_NORM[1].build(torch.bfloat16))
    assert hidden.dtype == normed.dtype == torch.bfloat16
