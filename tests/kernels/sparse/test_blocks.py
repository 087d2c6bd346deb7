"""Stage 1 in Triton: what the rows of the case table leave out. 16-bit inputs, settings that need the causal mask,
chunks, ready-made compressed keys, strided caches, planted bugs, and what is refused.

In 16 bits the reference keeps its means in float64 while the kernel rounds them, so near-equal scores may swap. There
the lists are judged by what they are worth: the scores, by the reference, of what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minicpm_kernels.sparse import blocks as sparse_select  # noqa: E402  # imports triton
from minicpm_kernels.sparse.blocks import compress_keys, select_blocks  # noqa: E402
from minicpm_kernels.testing import poisoned_memory, upcast  # noqa: E402
from minicpm_ref import sparse as reference  # noqa: E402
from minicpm_ref.cases.sparse import SELECT_BLOCKS, SMALL, SelectBlocksCase  # noqa: E402

ROWS = {case.name: case for case in SELECT_BLOCKS}


def choose(arguments: tuple[Any, ...], **keywords: Any) -> torch.Tensor:
    with poisoned_memory():
        return select_blocks(*arguments, **keywords)


@pytest.mark.parametrize("case", [case for case in SELECT_BLOCKS if not case.big], ids=lambda case: case.name)
def test_float16_choices_are_worth_as_much(case: SelectBlocksCase) -> None:
    arguments = case.build(torch.float16)
    scores = reference.block_scores(*[upcast(value) for value in arguments])
    wanted = reference.select_blocks(*[upcast(value) for value in arguments])
    actual = choose(arguments)

    def worth(blocks: torch.Tensor) -> torch.Tensor:
        return scores.gather(-1, blocks.clamp(min=0).long()).masked_fill(blocks < 0, 0.0).sort(-1).values

    assert torch.equal(actual >= 0, wanted >= 0)  # as many, with the empty slots at the tail
    assert bool(((actual.diff(dim=-1) > 0) | (actual[..., 1:] < 0)).all())
    # a mean of keys rounded to 11 bits moves a logit by 2e-3, and with it the scores
    torch.testing.assert_close(worth(actual), worth(wanted), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, window_size=16, local_inclusive=False),
        replace(SMALL, kernel_size=16, window_size=16, local_inclusive=False),
    ],
    ids=["window-of-one-block", "and-long-kernels"],
)
def test_a_short_window_needs_the_causal_mask(config: Any) -> None:
    """The best windows of the block before the query's reach into the query's block."""
    arguments = SelectBlocksCase("short-window", 100, 100, config=config).build()
    assert torch.equal(choose(arguments), reference.select_blocks(*arguments))


def test_a_window_that_reaches_over_the_edge_counts_for_both_blocks() -> None:
    """One key is large, and the only whole window that holds it begins in the block before."""
    q, k = torch.ones(1, 1, 160, 16), torch.zeros(1, 1, 160, 16)
    k[:, :, 48:52] = 3.0  # first tokens of block 3; windows 11 (44..51) and 12 (48..55) hold them
    config = replace(SMALL, topk=4)
    assert torch.equal(choose((q, k, config)), reference.select_blocks(q, k, config))


def test_long_prompts_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_select, "SCORE_BYTES", 1)  # then a chunk is one tile of tokens
    for name in ("ragged-last-block", "padded-batch"):
        arguments = ROWS[name].build()
        assert torch.equal(choose(arguments), reference.select_blocks(*arguments))


@pytest.mark.parametrize("name", ["decode", "chunk-at-an-offset", "exact-lse"])
def test_ready_made_compressed_keys_give_the_same_lists(name: str) -> None:
    case = ROWS[name]
    q, k, config, start, lengths = case.build()
    longer = torch.cat((k, torch.full_like(k, math.nan)), dim=2)  # a static cache, longer than the text
    compressed = reference.CompressedKeys(*(x.contiguous() for x in reference.compress(longer, config)))
    expected = reference.select_blocks(q, k, config, start, lengths)
    assert torch.equal(choose((q, k, config, start, lengths), compressed=compressed), expected)


def test_a_strided_cache_is_read_in_place() -> None:
    q, k, *rest = ROWS["chunk-at-an-offset"].build()
    strided_q, strided_k = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not strided_k.is_contiguous()
    assert torch.equal(choose((strided_q, strided_k, *rest)), reference.select_blocks(q, k, *rest))
    assert torch.equal(compress_keys(strided_k, 8, 4), reference.compress_keys(k, 8, 4))


def test_the_means_have_the_bits_of_the_reference() -> None:
    for dtype in (torch.float32, torch.float16):
        k = torch.randn(1, 2, 113, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(compress_keys(k, 8, 4), reference.compress_keys(k, 8, 4))


def test_no_gradient_is_asked_for() -> None:
    q, k, *rest = ROWS["block-plus-1"].build()
    assert not select_blocks(q.requires_grad_(), k, *rest).requires_grad


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"scale_log2": lambda x: x / 4}, "whole-blocks"),
        ({"local_reach": lambda x: x - 1}, "whole-blocks"),
        ({"BEFORE": lambda x: 0}, "whole-blocks"),
        ({"norm_count": lambda x: 0}, "whole-blocks"),
    ],
    ids=["the scale is dropped", "the window is a block short", "windows do not reach over", "no normaliser"],
)
def test_a_planted_bug_is_caught(
    change: dict[str, Callable[[Any], Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ROWS[name].build()
    for kernel in ("_score", "_top_k"):
        monkeypatch.setattr(sparse_select, kernel, Planted(getattr(sparse_select, kernel), change))
    assert not torch.equal(choose(arguments), reference.select_blocks(*arguments))


class Planted:
    """A jitted function that is launched with some arguments changed."""

    def __init__(self, function: Any, change: dict[str, Callable[[Any], Any]]) -> None:
        self.function, self.change = function, change

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            named = dict(zip(self.function.arg_names, arguments, strict=False)) | keywords
            for name, how in self.change.items():
                if name in named:
                    named[name] = how(named[name])
            self.function[grid](**named)

        return launch


Q, K = torch.ones(1, 4, 9, 16), torch.ones(1, 2, 30, 16)


@pytest.mark.parametrize(
    ("q", "k", "keywords", "words"),
    [
        (Q.double(), K, {}, "q is torch.float64, expected torch.float32 or"),
        (Q, K.half(), {}, "k is torch.float16 on cpu, expected torch.float32"),
        (Q[0], K, {}, r"q has shape \[4, 9, 16\], expected \[batch, heads, tokens, D\]"),
        (Q[..., :8], K[..., :8], {}, "head_dim 8, expected one of"),
        (torch.ones(1, 4, 16, 9).transpose(2, 3), K, {}, r"strides \[576, 144, 1, 9\].*q.contiguous"),
        (Q[:, :3], K, {}, "3 query heads cannot be shared evenly by 2"),
        (torch.ones(2, 4, 9, 16), K, {}, "k has shape .* expected batch 2"),
        (Q, K, {"query_start": 25}, r"query_start \[25\] \+ 9 queries exceeds the 30 keys"),
        (Q, K, {"query_start": -1}, r"query_start is \[-1\], expected 0 or more"),
        (Q, K, {"lengths": torch.tensor([31])}, r"lengths are \[31\], expected 0..30"),
        (Q, K, {"lengths": torch.tensor([1, 2])}, r"lengths is torch.int64 \[2\], expected integers \[1\]"),
        (Q, K, {"compressed": (K[:, :, :2], K)}, "fine compressed keys have shape"),
        (Q, K, {"compressed": (K.half(), K)}, "fine compressed keys are torch.float16"),
    ],
)
def test_arguments_are_checked(q: torch.Tensor, k: torch.Tensor, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"select_blocks: .*{words}"):
        select_blocks(q, k, SMALL, **keywords)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="block_size is 48, expected one of"):
        select_blocks(Q, K, replace(SMALL, block_size=48, window_size=48))
    with pytest.raises(ValueError, match="kernel_size is 24, expected at most block_size .* = 20"):
        select_blocks(Q, K, replace(SMALL, kernel_size=24))


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(ValueError, match="select_blocks: bfloat16 is wrong in Triton's interpreter"):
        select_blocks(Q.bfloat16(), K.bfloat16(), SMALL)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="select_blocks: the tensors are on cpu, expected a CUDA or ROCm device"):
        select_blocks(Q, K, SMALL)
