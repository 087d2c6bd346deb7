"""Sparse attention in numba: what the rows of the case table leave out. Groups of many heads, shares of a list, 16-bit
inputs, strided caches, ready-made compressed keys, the model itself, planted bugs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("numba", reason="numba is not installed")
from minicpm_kernels.sparse import cpu as sparse_cpu  # noqa: E402  # imports numba
from minicpm_kernels.sparse._cpu_vectors import INSTRUCTION_SETS, SOURCES  # noqa: E402
from minicpm_kernels.sparse.cpu import (  # noqa: E402
    INSTRUCTION_SET,
    attend,
    compiled,
    pool,
    select,
    select_blocks,
    sparse_attention,
)
from minicpm_kernels.testing import assert_close, check_attention, default_bound, poisoned_memory  # noqa: E402
from minicpm_ref import sparse as reference  # noqa: E402
from minicpm_ref.cache import KVCache  # noqa: E402
from minicpm_ref.cases.sparse import SELECT_BLOCKS, SMALL, SPARSE_ATTENTION, SparseAttentionCase  # noqa: E402
from minicpm_ref.config import ModelConfig  # noqa: E402
from minicpm_ref.model import MiniCPM  # noqa: E402

LISTS = {case.name: case for case in SELECT_BLOCKS}
ROWS = {case.name: case for case in SPARSE_ATTENTION}


def choose(arguments: tuple[Any, ...], **keywords: Any) -> torch.Tensor:
    with poisoned_memory():
        return select_blocks(*arguments, **keywords)


@pytest.mark.parametrize("heads", [17, 40])
def test_groups_beyond_one_vector(heads: int) -> None:
    case = SparseAttentionCase("many-heads", 37, 150, query_heads=heads, kv_heads=1)
    q, k, v, blocks, *rest = case.build()
    assert torch.equal(choose((q, k, *rest)), blocks)
    check_attention(sparse_attention, reference.sparse_attention, (q, k, v, blocks, *rest))


def test_a_head_dimension_that_fills_no_tile() -> None:
    q, k, v, blocks, *rest = SparseAttentionCase("odd", 20, 150, head_dim=13).build()
    assert torch.equal(choose((q, k, *rest)), blocks)
    check_attention(sparse_attention, reference.sparse_attention, (q, k, v, blocks, *rest))


@pytest.mark.parametrize("name", ["decode", "decode-batch-static-cache", "random-lists-decode-batch", "block-plus-1"])
def test_shares_of_a_list_are_merged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than tiles: every tile is cut into shares, some of them without a block."""
    arguments = ROWS[name].build()
    monkeypatch.setattr(sparse_cpu, "thread_count", lambda: 20)
    monkeypatch.setattr(sparse_cpu, "numba_threads", _unchanged)
    check_attention(sparse_attention, reference.sparse_attention, arguments)


class _unchanged:
    """Stands in for `numba_threads`: the loops are shared out for more threads than there are."""

    def __init__(self, count: int) -> None:
        del count

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_order_repetitions_and_holes_in_a_list_do_not_matter() -> None:
    q, k, v, blocks, *rest = ROWS["chunk-at-an-offset"].build()
    more = torch.cat((blocks, blocks[..., :2], torch.full_like(blocks[..., :2], -1)), -1)
    shuffled = more[..., torch.randperm(more.shape[-1], generator=torch.Generator().manual_seed(0))]
    expected = sparse_attention(q, k, v, blocks, *rest)
    assert torch.equal(sparse_attention(q, k, v, shuffled.long(), *rest), expected)


def test_empty_lists_give_zero() -> None:
    q, k, v, blocks, *rest = ROWS["chunk-at-an-offset"].build()
    with poisoned_memory():
        assert not sparse_attention(q, k, v, torch.full_like(blocks, -1), *rest).any()
        assert not sparse_attention(q, k, v, blocks[..., :0], *rest).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_widened_as_in_the_reference(dtype: torch.dtype) -> None:
    q, k, config, *place = LISTS["padded-batch"].build(dtype)
    chosen = choose((q, k, config, *place))
    assert torch.equal(chosen, reference.select_blocks(q, k, config, *place))
    v = k.flip(2)
    out = sparse_attention(q, k, v, chosen, config, *place)
    assert out.dtype == dtype
    expected = reference.sparse_attention(q.double(), k.double(), v.double(), chosen, config, *place)
    assert_close(out, expected, default_bound(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["decode", "padded-batch", "group-3"])
def test_16_bits_are_widened_without_an_error(name: str, dtype: torch.dtype) -> None:
    """The same floats in the same code: the bits of a call with everything widened beforehand."""
    q, k, v, blocks, *rest = (
        x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in ROWS[name].build()
    )
    compressed = reference.compress(k, rest[0])
    wide = [x.float() for x in (q, k, v)]
    fine, coarse = (x.float() for x in compressed)
    expected = choose((wide[0], wide[1], *rest), compressed=(fine, coarse))
    assert torch.equal(choose((q, k, *rest), compressed=compressed), expected)
    out = sparse_attention(q, k, v, blocks, *rest)
    assert torch.equal(out, sparse_attention(*wide, blocks, *rest).to(dtype))
    mixed = sparse_attention(q, k.float(), v, blocks, *rest)  # each of the two as it comes
    assert torch.equal(mixed, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 17])
def test_every_number_of_16_bits_is_read_as_torch_reads_it(dtype: torch.dtype, width: int) -> None:
    """One key of weight 1 for each head: the result is its value, subnormal, infinite or NaN as it may be."""
    heads = -(-(1 << 16) // width)
    patterns = torch.arange(heads * width).remainder(1 << 16).to(torch.uint16).view(torch.int16)
    v = patterns.view(dtype).view(1, heads, 1, width)
    q = torch.zeros(1, heads, 1, width)
    k = torch.zeros(1, heads, 1, width, dtype=dtype)
    out = sparse_attention(q, k, v, torch.zeros(1, heads, 1, 1, dtype=torch.int32), SMALL)
    torch.testing.assert_close(out, v.float(), rtol=0, atol=0, equal_nan=True)


class Largest(TorchDispatchMode):
    """The most elements that any operation of torch has made at once, views left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = [x.numel() for x in tree_leaves(out) if torch.is_tensor(x)]
            self.elements = max(self.elements, *made, 0)
        return out


@torch.no_grad()
def test_a_decode_step_copies_no_cache_of_16_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, t, 32, generator=generator).bfloat16() for h, t in ((8, 1), (2, 4096), (2, 4096)))
    compressed = reference.compress(k, SMALL)
    with Largest() as step:
        blocks = select_blocks(q, k, SMALL, compressed=compressed)
        sparse_attention(q, k, v, blocks, SMALL)
    assert 0 < step.elements < min(x.numel() for x in (k, *compressed))
    with Largest() as copied:  # so the count would notice
        sparse_attention(q, k.float(), v, blocks, SMALL)
    assert copied.elements == k.numel()


def test_machine_code_is_not_kept_beyond_an_edit_of_its_generator() -> None:
    """numba compares one file and free variables; the content of all the files is a free variable of each loop."""
    for function in (attend, pool, select):
        assert [cell.cell_contents for cell in function.__closure__ or ()] == [SOURCES]


@pytest.mark.parametrize("name", ["chunk-at-an-offset", "padded-batch"])
def test_a_strided_cache_is_read_in_place(name: str) -> None:
    q, k, v, blocks, *rest = ROWS[name].build()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]  # D is not contiguous: copied
    for views in (strided, transposed):
        assert torch.equal(choose((*views[:2], *rest)), blocks)
        assert torch.equal(sparse_attention(*views, blocks, *rest), sparse_attention(q, k, v, blocks, *rest))


@pytest.mark.parametrize("name", ["decode", "chunk-at-an-offset", "exact-lse"])
def test_ready_made_compressed_keys_give_the_same_lists(name: str) -> None:
    q, k, config, start, lengths = LISTS[name].build()
    longer = torch.cat((k, torch.full_like(k, math.nan)), dim=2)  # a static cache, longer than the text
    compressed = reference.compress(longer, config)
    expected = reference.select_blocks(q, k, config, start, lengths)
    never_read = torch.full_like(k, math.nan)
    assert torch.equal(choose((q, never_read, config, start, lengths), compressed=compressed), expected)


def test_the_means_have_the_bits_of_the_reference() -> None:
    for dtype in (torch.float32, torch.float16):
        k = torch.randn(2, 2, 113, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(sparse_cpu._compress(k, 8, 4, 1), reference.compress_keys(k, 8, 4))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, window_size=16, local_inclusive=False),
        replace(SMALL, kernel_size=16, window_size=16, local_inclusive=False),
        replace(SMALL, kernel_size=32, window_size=16, topk=4),
    ],
    ids=["window-of-one-block", "long-kernels", "kernels-longer-than-a-block"],
)
def test_a_short_window_needs_the_causal_rule(config: Any) -> None:
    """The best windows of the block before the query's reach into the query's block."""
    q, k, *_ = LISTS["whole-blocks"].build()
    assert torch.equal(choose((q, k, config)), reference.select_blocks(q, k, config))


def test_ties_go_to_the_lower_block() -> None:
    q, k = torch.ones(1, 4, 160, 16), torch.ones(1, 2, 160, 16)
    assert torch.equal(choose((q, k, SMALL)), reference.select_blocks(q, k, SMALL))


def test_scores_that_overflow_tie() -> None:
    """A key that only one window holds: its score is far above what the coarse normaliser knows of."""
    q, k = torch.ones(1, 4, 160, 16), torch.zeros(1, 2, 160, 16)
    k[:, :, 40] = k[:, :, 70] = 400.0
    assert torch.equal(choose((q, k, SMALL)), reference.select_blocks(q, k, SMALL))


def test_one_machine_code_serves_all_shapes() -> None:
    for name in ("decode", "padded-batch", "group-3"):
        q, k, v, blocks, *rest = ROWS[name].build()
        sparse_attention(q, k, v, select_blocks(q, k, *rest), *rest)
    assert [len(compiled(function).signatures) for function in (attend, pool, select)] == [1, 1, 1]  # type: ignore[attr-defined]
    assert INSTRUCTION_SET in INSTRUCTION_SETS


# ---- the model -------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=256,
    dim_model_base=32,
    sparse_config=SMALL,
)
TOKENS = torch.randint(61, (1, 150), generator=torch.Generator().manual_seed(0))


def model() -> MiniCPM:
    built = MiniCPM(CONFIG).init_weights(seed=3)
    torch.nn.init.normal_(built.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(4))
    return built


@torch.no_grad()
def test_the_model_decodes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill, a chunk and single tokens: the logits of the torch reference."""
    built, found, calls = model(), {}, []
    original = compiled

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        calls.append(function.__name__)
        return original(function)

    monkeypatch.setattr(sparse_cpu, "compiled", counted)
    for name in ("torch", "numba"):
        monkeypatch.setenv("MINICPM_BACKEND", name)
        cache = KVCache(CONFIG, capacity=150)
        found[name] = torch.cat([built(piece, cache) for piece in TOKENS.split([100, 40, *[1] * 10], dim=1)], dim=1)
        assert len(calls) == (0 if name == "torch" else 2 * 2 * 12)  # two stages, two layers, twelve pieces
    assert found["torch"].std() > 0.01
    torch.testing.assert_close(found["numba"], found["torch"], rtol=1e-4, atol=1e-5)


def test_training_keeps_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    monkeypatch.setattr(sparse_cpu, "compiled", lambda function: pytest.fail(f"{function.__name__} has no gradient"))
    built = model()
    built(TOKENS).square().mean().backward()
    weight = built.model.layers[0].self_attn.k_proj.weight
    assert weight.grad is not None
    assert weight.grad.any()
    monkeypatch.setenv("MINICPM_BACKEND", "numba")  # asked for by name, it does not step back without a word
    with pytest.raises(RuntimeError, match="MINICPM_BACKEND=numba.*a gradient"):
        built(TOKENS)
    built.double()
    with torch.no_grad(), pytest.raises(RuntimeError, match="MINICPM_BACKEND=numba.*float64"):
        built(TOKENS)
    monkeypatch.delenv("MINICPM_BACKEND")
    with torch.no_grad():
        assert built(TOKENS).dtype == torch.float64


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., None], place: int, change: Any) -> None:
    """Launch one of the compiled loops with one argument changed."""
    original = compiled

    def changed(asked: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            if asked is function:
                arguments = (*arguments[:place], change(arguments[place]), *arguments[place + 1 :])
            original(asked)(*arguments)

        return launch

    monkeypatch.setattr(sparse_cpu, "compiled", changed)


@pytest.mark.parametrize(
    ("place", "change"),
    [(15, lambda scale: 4 * scale), (4, lambda starts: starts + 1), (4, lambda starts: starts - 1)],
    ids=["the scale is dropped", "a token sees its successor", "a token does not see itself"],
)
def test_a_planted_bug_in_stage_2_is_caught(place: int, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ROWS["chunk-at-an-offset"].build()
    plant(monkeypatch, attend, place, change)
    with pytest.raises(AssertionError, match="error relative|NaN or infinite"):
        check_attention(sparse_attention, reference.sparse_attention, arguments)


def test_a_flipped_causal_sign_is_caught() -> None:
    """Positions counted backwards: every token sees the keys after it."""
    q, k, v, blocks, config, *_ = ROWS["block-plus-1"].build()

    def flipped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        return sparse_attention(q.flip(2), k.flip(2), v.flip(2), *rest).flip(2)

    with pytest.raises(AssertionError, match="error relative"):
        check_attention(flipped, reference.sparse_attention, (q, k, v, blocks, config))


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (13, lambda scale: scale / 4),
        (11, lambda s: (*s[:2], s[2] - 1, *s[3:])),
        (11, lambda s: (*s[:4], s[5], s[5], s[6])),
        (2, lambda norm: np.zeros_like(norm)),
    ],
    ids=["the scale is dropped", "the window is a block short", "windows do not reach over", "no normaliser"],
)
def test_a_planted_bug_in_stage_1_is_caught(place: int, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = LISTS["whole-blocks"].build()
    plant(monkeypatch, select, place, change)
    assert not torch.equal(choose(arguments), reference.select_blocks(*arguments))


# ---- refusals --------------------------------------------------------------------------------------------------------

Q, K, BLOCKS = torch.ones(1, 4, 9, 16), torch.ones(1, 2, 30, 16), torch.zeros(1, 2, 9, 3, dtype=torch.int32)
SHARED: list[dict[str, Any]] = [  # refused by the reference, too, in the same words
    {"q": Q[0]},
    {"q": Q[..., :8]},
    {"q": Q[:, :3]},
    {"q": Q[:, :, :0]},
    {"query_start": 22},
    {"query_start": -1},
    {"query_start": torch.tensor([22])},
    {"lengths": torch.tensor([31])},
    {"lengths": torch.tensor([1, 2])},
]


def words_of(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"\w") as refused:
        function(**arguments)
    return str(refused.value)


@pytest.mark.parametrize("change", [*SHARED, {"compressed": (K[:, :, :2], K)}])
def test_stage_1_refuses_in_the_words_of_the_reference(change: dict[str, Any]) -> None:
    arguments = {"q": Q, "k": K, "config": SMALL} | change
    assert words_of(select_blocks, arguments) == words_of(reference.select_blocks, arguments)


@pytest.mark.parametrize(
    "change",
    [
        *SHARED,
        {"v": K[:, :, :29]},
        {"blocks": BLOCKS.float()},
        {"blocks": BLOCKS[:, :, :8]},
        {"blocks": BLOCKS + 2},
        {"blocks": BLOCKS - 2},
    ],
)
def test_stage_2_refuses_in_the_words_of_the_reference(change: dict[str, Any]) -> None:
    arguments = {"q": Q, "k": K, "v": K, "blocks": BLOCKS, "config": SMALL} | change
    assert words_of(sparse_attention, arguments) == words_of(reference.sparse_attention, arguments)


def test_what_only_the_kernels_refuse() -> None:
    with pytest.raises(ValueError, match="select_blocks: q is torch.float64, expected torch.float32 or"):
        select_blocks(Q.double(), K, SMALL)
    with pytest.raises(ValueError, match="select_blocks: k is on meta, expected the CPU"):
        select_blocks(Q, K.to("meta"), SMALL)
    with pytest.raises(ValueError, match=r"fine compressed keys have shape \[1, 1, 30, 16\], expected \[1, 2, 'L',"):
        select_blocks(Q, K, SMALL, compressed=(K[:, :1], K))
    with pytest.raises(ValueError, match="sparse_attention: v is torch.float64, expected torch.float32 or"):
        sparse_attention(Q, K, K.double(), BLOCKS, SMALL)


def test_a_gradient_is_refused() -> None:
    leaf = Q.clone().requires_grad_()
    assert not select_blocks(leaf, K, SMALL).requires_grad  # it has none anyway
    with pytest.raises(RuntimeError, match="sparse_attention computes no gradient"):
        sparse_attention(leaf, K, K, BLOCKS, SMALL)
    with torch.no_grad():
        assert torch.equal(sparse_attention(leaf, K, K, BLOCKS, SMALL), sparse_attention(Q, K, K, BLOCKS, SMALL))
