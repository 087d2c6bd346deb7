"""What holds for sparse attention whatever the numbers: invariances, gradients, budgets, refusals."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_ref import sparse as reference
from minicpm_ref.cases.sparse import SELECT_BLOCKS, SMALL, SPARSE_ATTENTION, SelectBlocksCase
from minicpm_ref.config import SparseConfig
from minicpm_ref.sparse import block_scores, compress, pick_blocks, select_blocks, sparse_attention
from minicpm_ref.sparse import blocks as stage_1

BY_NAME = {case.name: case for case in SELECT_BLOCKS}
SMALL_STAGE_2 = [case for case in SPARSE_ATTENTION if not case.big]


def oracle_check():
    """`check` of the oracle's test file, which importlib mode does not let us import by name."""
    path = Path(__file__).with_name("test_attention.py")
    spec = importlib.util.spec_from_file_location("sparse_attention_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check


check = oracle_check()


@st.composite
def any_case(draw) -> SelectBlocksCase:
    """Any consistent settings, sizes and placement, small enough for the oracle."""
    stride = draw(st.integers(1, 4))
    block = stride * draw(st.integers(1, 4))
    init = draw(st.integers(0, 2))
    config = SparseConfig(
        kernel_size=stride * draw(st.integers(1, 5)),
        kernel_stride=stride,
        init_blocks=init,
        block_size=block,
        window_size=block * draw(st.integers(1, 3)),
        topk=init + draw(st.integers(1, 4)),
        exact_lse=draw(st.booleans()),
        local_inclusive=draw(st.booleans()),
    )
    keys = draw(st.integers(1, 90))
    tokens = draw(st.integers(1, min(keys, 6)))
    kv_heads = draw(st.integers(1, 2))
    batch = draw(st.integers(1, 2))
    starts = tuple(draw(st.integers(0, keys - tokens)) for _ in range(batch))
    return SelectBlocksCase(
        "drawn",
        tokens,
        keys,
        config,
        batch=batch,
        query_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=4,
        query_start=starts,
        lengths=tuple(draw(st.integers(start, min(keys, start + tokens))) for start in starts),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(any_case())
def test_any_consistent_setting_equals_the_oracle(case):
    check(reference, case)


@settings(max_examples=60, deadline=None)
@given(any_case())
def test_lists_are_what_they_promise(case):
    q, k, config, start, lengths = case.build()
    blocks = select_blocks(q, k, config, start, lengths)
    positions = reference.query_positions(q, k, start, lengths)
    for b in range(case.batch):
        for t, i in enumerate(positions[b].tolist()):
            own = i // config.block_size
            for g in range(case.kv_heads):
                row = blocks[b, g, t].tolist()
                chosen = [n for n in row if n >= 0]
                assert row == chosen + [-1] * (len(row) - len(chosen))
                assert chosen == sorted(set(chosen))
                assert len(chosen) == (0 if i < 0 else min(own + 1, config.visible_blocks))
                assert i < 0 or chosen[-1] == own


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ragged-last-block", "exact-lse", "windows-overlap-fourfold"])
def test_the_future_changes_nothing(name):
    q, k, v = BY_NAME[name].inputs(torch.float64)
    config = BY_NAME[name].config
    blocks = select_blocks(q, k, config)
    out = sparse_attention(q, k, v, blocks, config)
    for cut in (1, 47, 96, 111):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, cut:] = 5 * torch.randn_like(k[:, :, cut:])
        changed_v[:, :, cut:] = 5 * torch.randn_like(v[:, :, cut:])
        changed = select_blocks(q, changed_k, config)
        assert torch.equal(changed[:, :, :cut], blocks[:, :, :cut])
        changed_out = sparse_attention(q, changed_k, changed_v, changed, config)
        torch.testing.assert_close(changed_out[:, :, :cut], out[:, :, :cut], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(changed_out[:, :, cut:], out[:, :, cut:])


@pytest.mark.parametrize("step", [1, 7, 16, 64])
def test_chunked_prefill_and_decode_choose_and_compute_the_same(step):
    q, k, v = BY_NAME["ragged-last-block"].inputs(torch.float64)
    whole_blocks = select_blocks(q, k, SMALL)
    whole = sparse_attention(q, k, v, whole_blocks, SMALL)
    for start in range(0, q.shape[2], step):
        chunk = slice(start, start + step)
        seen = slice(0, min(start + step, k.shape[2]))
        # the cache as it is then, and the whole cache with the chunk placed inside it
        for keys, values, at in ((k[:, :, seen], v[:, :, seen], None), (k, v, start)):
            blocks = select_blocks(q[:, :, chunk], keys, SMALL, at)
            width = blocks.shape[-1]
            assert torch.equal(blocks, whole_blocks[:, :, chunk, :width])
            assert (whole_blocks[:, :, chunk, width:] == -1).all()
            out = sparse_attention(q[:, :, chunk], keys, values, blocks, SMALL, at)
            torch.testing.assert_close(out, whole[:, :, chunk], rtol=1e-12, atol=1e-12)


def test_internal_chunks_have_no_seams(monkeypatch):
    case = BY_NAME["padded-batch"]
    q, k, v = case.inputs(torch.float64)
    blocks = select_blocks(q, k, case.config, *case.placement())
    out = sparse_attention(q, k, v, blocks, case.config, *case.placement())
    monkeypatch.setattr(stage_1, "CHUNK_ELEMENTS", 7 * case.batch * case.query_heads * case.keys)
    assert [(c.start, c.stop) for c in stage_1.query_chunks(16, case.batch * case.query_heads * case.keys)] == [
        (0, 7),
        (7, 14),
        (14, 16),
    ]
    assert torch.equal(select_blocks(q, k, case.config, *case.placement()), blocks)
    chunked = sparse_attention(q, k, v, blocks, case.config, *case.placement())
    torch.testing.assert_close(chunked, out, rtol=1e-12, atol=1e-12)


def test_heads_of_a_group_are_interchangeable_and_share_one_list():
    q, k, config, *_ = BY_NAME["group-16"].build(torch.float64)
    scores = block_scores(q, k, config)
    assert scores.shape[1] == 1
    torch.testing.assert_close(block_scores(q.flip(1), k, config), scores, rtol=1e-12, atol=0)


def test_exact_normaliser_makes_a_row_sum_to_the_group_size():
    """With windows of one block side by side nothing overlaps: a softmax over blocks, summed over heads."""
    config = SparseConfig(
        kernel_size=16, kernel_stride=16, block_size=16, window_size=16, topk=2, dense_len=-1, exact_lse=True
    )
    q, k, _ = BY_NAME["group-16"].inputs(torch.float64)
    sums = block_scores(q, k, config).sum(-1)[0, 0]
    torch.testing.assert_close(sums[15:], torch.full_like(sums[15:], 16.0))
    assert not sums[:15].any()  # no window has ended yet
    coarse = block_scores(q, k, replace(config, exact_lse=False)).sum(-1)[0, 0]
    assert not coarse[:63].any()  # no coarse window has ended yet
    assert (coarse[63:] > 16).all()


def test_at_hand_compressed_keys_change_nothing_and_may_be_longer():
    case = BY_NAME["chunk-at-an-offset"]
    q, k, config, start, lengths = case.build()
    scores = block_scores(q, k, config, start, lengths)
    fine, coarse = compress(k, config)
    junk = torch.full_like(fine[:, :, :3], math.nan)
    longer = (torch.cat((fine, junk), 2), torch.cat((coarse, junk), 2))
    for compressed in ((fine, coarse), longer):
        assert torch.equal(block_scores(q, k, config, start, lengths, compressed=compressed), scores)
    with pytest.raises(ValueError, match="holds 38 fine and 9 coarse keys, but 160 keys need 39 and 9"):
        block_scores(q, k, config, start, lengths, compressed=(fine[:, :, :-1], coarse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_inputs_are_scored_in_float32(dtype):
    """Lists may differ from float64's only where scores are closer than float32 can tell: no more than 1e-4 is lost."""
    q, k, config, *_ = BY_NAME["prime"].build(dtype)
    exact_keys = tuple(x.double() for x in compress(k, config))  # compressed keys are rounded to the keys' dtype
    exact = block_scores(q.double(), k.double(), config, compressed=exact_keys)
    scores = block_scores(q, k, config)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=1e-7)


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_published_budget_is_one_initial_33_local_and_62_scored():
    config = SparseConfig()
    positions = torch.tensor([[64 * 150 + 13]])
    scores = torch.rand(1, 2, 1, 200, generator=torch.Generator().manual_seed(0))
    for settings_, local in ((config, 33), (replace(config, local_inclusive=False), 32)):
        blocks = pick_blocks(scores, positions, settings_)[0, 0, 0].tolist()
        forced = {0, *range(151 - local, 151)}
        assert len(blocks) == 96
        assert forced <= set(blocks)
        candidates = [n for n in range(151) if n not in forced]
        best = sorted(candidates, key=lambda n: -scores[0, 0, 0, n])[: 96 - len(forced)]
        assert set(blocks) - forced == set(best)


def test_a_score_that_overflowed_does_not_push_out_a_forced_block():
    scores = torch.full((1, 1, 1, 20), math.inf)
    blocks = pick_blocks(scores, torch.tensor([[16 * 19]]), SMALL)[0, 0, 0].tolist()
    assert blocks == [0, 1, 17, 18, 19]


def test_ties_go_to_the_lower_block():
    blocks = pick_blocks(torch.zeros(1, 1, 1, 20), torch.tensor([[16 * 19]]), replace(SMALL, topk=5))
    assert blocks[0, 0, 0].tolist() == [0, 1, 2, 3, 17, 18, 19]


# ---- stage 2 ---------------------------------------------------------------------------------------------------------


def token_mask(case, blocks: torch.Tensor) -> torch.Tensor:
    """[B, H, T, S] written out list by list."""
    q, k, _ = case.inputs()
    positions = reference.query_positions(q, k, *case.placement()).tolist()
    size, group = case.config.block_size, case.query_heads // case.kv_heads
    mask = torch.zeros(case.batch, case.query_heads, case.tokens, case.keys, dtype=torch.bool)
    for b in range(case.batch):
        for g in range(case.kv_heads):
            for t in range(case.tokens):
                for n in blocks[b, g, t].tolist():
                    stop = min((n + 1) * size, positions[b][t] + 1)
                    if n >= 0:
                        mask[b, g * group : (g + 1) * group, t, n * size : stop] = True
    return mask


@pytest.mark.parametrize("case", SMALL_STAGE_2, ids=lambda case: case.name)
def test_outputs_and_gradients_equal_masked_dense_attention(case):
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    blocks = case.build()[3]
    out = sparse_attention(*inputs, blocks, case.config, *case.placement())
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weight).sum(), inputs)

    mask = token_mask(case, blocks)
    repeat = case.query_heads // case.kv_heads
    q, k, v = inputs[0], *(x.repeat_interleave(repeat, dim=1) for x in inputs[1:])
    scores = (q @ k.transpose(-1, -2) / math.sqrt(case.head_dim)).masked_fill(~mask, -1e30)
    dense = scores.softmax(-1).masked_fill(~mask, 0) @ v
    expected = torch.autograd.grad((dense * weight).sum(), inputs)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)
    for name, got, want in zip("qkv", gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"d{name}: {m}")
        assert got.isfinite().all()


def test_gradients_of_recomputed_chunks(monkeypatch):
    """The backward pass recomputes each chunk; several chunks must add up to the gradient of one."""
    case = SPARSE_ATTENTION[[row.name for row in SPARSE_ATTENTION].index("random-lists")]
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    rest = case.build()[3:]
    one = torch.autograd.grad(sparse_attention(*inputs, *rest).square().sum(), inputs)
    monkeypatch.setattr(stage_1, "CHUNK_ELEMENTS", 11 * case.query_heads * case.keys)
    many = torch.autograd.grad(sparse_attention(*inputs, *rest).square().sum(), inputs)
    for got, want in zip(many, one, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_no_gradient_through_the_choice():
    q, k, _ = (x.requires_grad_() for x in BY_NAME["prime"].inputs())
    assert not block_scores(q, k, SMALL).requires_grad
    assert not select_blocks(q, k, SMALL).requires_grad


def test_with_every_block_it_is_dense_attention():
    q, k, v = BY_NAME["ragged-last-block"].inputs()
    config = replace(SMALL, topk=50)
    out = sparse_attention(q, k, v, select_blocks(q, k, config), config)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_wide_and_rounded_once(dtype):
    q, k, v = BY_NAME["prime"].inputs(dtype)
    blocks = select_blocks(q, k, SMALL)
    out = sparse_attention(q, k, v, blocks, SMALL)
    assert out.dtype == dtype
    assert torch.equal(out, sparse_attention(q.float(), k.float(), v.float(), blocks, SMALL).to(dtype))


def test_order_and_repetition_in_a_list_do_not_matter():
    q, k, v = BY_NAME["prime"].inputs()
    blocks = select_blocks(q, k, SMALL)
    shuffled = torch.cat((blocks.flip(-1), blocks), dim=-1)
    assert torch.equal(sparse_attention(q, k, v, shuffled, SMALL), sparse_attention(q, k, v, blocks, SMALL))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_inconsistent_arguments_are_refused_in_words():
    q, k, v = BY_NAME["prime"].inputs()
    blocks = select_blocks(q, k, SMALL)
    refusals = [
        (lambda: block_scores(q[0], k, SMALL), r"q must be \[B, H, T, D\]"),
        (lambda: block_scores(q[:, :3], k, SMALL), "3 query heads cannot be shared evenly by 2"),
        (lambda: block_scores(q[..., :8], k, SMALL), "must agree in batch and head dimension"),
        (lambda: block_scores(q[:, :, :0], k, SMALL), "at least one token, got T=0"),
        (lambda: select_blocks(q, k, SMALL, 1), r"query_start \[1\] \+ T=113 exceeds the S=113 keys"),
        (lambda: select_blocks(q, k, SMALL, -1), "must not be negative"),
        (lambda: select_blocks(q, k[:, :, :100], SMALL), "must not be negative"),
        (lambda: select_blocks(q, k, SMALL, 0, torch.tensor([114])), r"lengths must be .* in 0..S=113, got \[114\]"),
        (lambda: select_blocks(q, k, SMALL, 0, torch.tensor([3, 3])), r"lengths must be \[B=1\]"),
        (lambda: sparse_attention(q, k, v[:, :, 1:], blocks, SMALL), "v must have the shape of k"),
        (lambda: sparse_attention(q, k, v, blocks[:, :1], SMALL), r"blocks must be \[B=1, G=2, T=113, K\]"),
        (lambda: sparse_attention(q, k, v, blocks.float(), SMALL), "int32 or int64, got torch.float32"),
        (lambda: sparse_attention(q, k, v, blocks + 4, SMALL), r"must lie in -1..7, got 3..11"),
        (lambda: reference.compress_keys(k, 8, 0), "must be positive"),
    ]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"topk": 0}, "topk = 0: expected at least 1"),
        ({"topk": 1}, "topk = 1: expected at least 2; the first 1 blocks and the local window are always visible"),
        ({"topk": 2, "init_blocks": 3, "local_inclusive": False}, "topk = 2: expected at least 3"),
        ({"kernel_stride": 0}, "kernel_stride = 0"),
        ({"kernel_size": 24}, "kernel_size = 24 is not a multiple of kernel_stride = 16"),
        ({"kernel_size": 8}, "kernel_size = 8 is not a multiple of kernel_stride = 16"),
        ({"block_size": 72}, "block_size = 72 is not a multiple of kernel_stride = 16"),
        ({"window_size": 32}, "window_size = 32 is not a multiple of block_size = 64"),
        ({"init_blocks": -1}, "init_blocks = -1"),
        ({"dense_len": -2}, "dense_len = -2"),
        ({"use_nope": True}, "use_nope = true"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings_, reason):
    with pytest.raises(ValueError, match=reason):
        SparseConfig(**settings_)
