"""The benchmark of sparse attention, as far as a machine without a GPU can go: its lists, its rows, and its refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_ref.cases.sparse import SMALL  # noqa: E402

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import sparse_lists

    return sparse_lists


def draw(lists: ModuleType, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = lists.draw_inputs(kind, 1, 256, 16, 1, 16, torch.float32, "cpu", 0)
    assert q.shape == (1, 16, 256, 16)
    assert k.shape == v.shape == (1, 1, 256, 16)
    return q, k, lists.draw_lists(kind, q, k, SMALL, 0)


def test_every_kind_lists_the_past_in_order(lists: ModuleType) -> None:
    for kind in lists.KINDS:
        _, _, blocks = draw(lists, kind)
        own = (torch.arange(256) // SMALL.block_size)[:, None]
        valid = blocks >= 0
        assert bool((blocks <= own).all()), kind
        assert bool(((blocks.diff(dim=-1) > 0) | ~valid[..., 1:]).all()), kind


def test_public_lists_are_half_empty_and_the_others_full(lists: ModuleType) -> None:
    slots = SMALL.visible_blocks
    _, _, public = draw(lists, "public")
    assert lists.valid_blocks(public) == pytest.approx(slots * 17 / 32, rel=0.1)  # a past block of 16, own included
    for kind in ("random", "selected"):
        _, _, blocks = draw(lists, kind)
        assert bool((blocks[:, :, 16 * slots :] >= 0).all()), kind  # from the token on that has enough blocks


def test_overlap_is_one_for_one_query_and_more_for_independent_lists(lists: ModuleType) -> None:
    found = {}
    for kind in ("same", "random"):
        q, k, blocks = draw(lists, kind)
        found[kind] = lists.overlap(q, k, blocks, SMALL)
    assert found["same"] == pytest.approx(1.0, abs=0.1)  # a tile may lie where the best blocks have just changed
    assert 1.3 < found["random"] <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run")
def test_it_refuses_without_a_gpu() -> None:
    command = [sys.executable, str(BENCH / "sparse_attention.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "needs a CUDA GPU: torch.cuda.is_available() is False" in result.stderr
