"""The sparse-attention reference against loops over single tokens, and the loops against planted bugs."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from minicpm_ref import sparse as reference
from minicpm_ref.cases.sparse import COMPRESS_KEYS, PICK_BLOCKS, SELECT_BLOCKS, SelectBlocksCase
from minicpm_ref.config import SparseConfig
from minicpm_ref.sparse import attention as stage_2_module
from minicpm_ref.sparse import blocks as stage_1_module

SMALL_CASES = [case for case in SELECT_BLOCKS if not case.big]
BIG_CASES = [case for case in SELECT_BLOCKS if case.big]
BY_NAME = {case.name: case for case in SELECT_BLOCKS}


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# ---- the oracle: one token, one head, one block at a time, float64, straight from the formulas -----------------------


def place(case: SelectBlocksCase) -> list[list[int | None]]:
    """Position of each query, None for padding."""
    start = case.keys - case.tokens if case.query_start is None else case.query_start
    starts = start if isinstance(start, tuple) else (start,) * case.batch
    lengths = case.lengths or (case.keys,) * case.batch
    return [[s + t if s + t < n else None for t in range(case.tokens)] for s, n in zip(starts, lengths, strict=True)]


def oracle_scores(q: np.ndarray, k: np.ndarray, i: int, config: SparseConfig) -> list[float]:
    """Scores of all blocks for the token at position i; q [h, D] of one group, k [S, D] of its kv head."""
    keys, width = k.shape

    def windows(size: int, stride: int) -> list[np.ndarray]:
        return [k[j : j + size].mean(0) for j in range(0, keys, stride) if j + size <= keys and j + size - 1 <= i]

    size, stride, block = config.kernel_size, config.kernel_stride, config.block_size
    fine = windows(size, stride)
    coarse = fine if config.exact_lse else windows(4 * size, 4 * stride)
    window_score = [0.0] * len(fine)
    for head in q:
        normaliser = sum(math.exp(head @ key / math.sqrt(width)) for key in coarse)
        for j, key in enumerate(fine):
            if normaliser > 0:
                window_score[j] += math.exp(head @ key / math.sqrt(width)) / normaliser
    best = [0.0] * math.ceil(keys / block)
    for j, score in enumerate(window_score):
        for token in range(stride * j, stride * j + size):  # every block that the window touches
            best[token // block] = max(best[token // block], score)
    return best


def oracle_blocks(scores: list[float], i: int, config: SparseConfig) -> list[int]:
    own = i // config.block_size
    local = config.window_size // config.block_size
    nearest = own - local + (0 if config.local_inclusive else 1)
    forced = [n for n in range(own + 1) if n < config.init_blocks or n >= nearest]
    others = sorted((n for n in range(own + 1) if n not in forced), key=lambda n: (-scores[n], n))
    return sorted((forced + others)[: config.topk + local])


def oracle_output(q: np.ndarray, k: np.ndarray, v: np.ndarray, i: int, blocks: list[int], size: int) -> np.ndarray:
    tokens = [token for token in range(len(k)) if token // size in blocks and token <= i]
    weights = [math.exp(q @ k[token] / math.sqrt(len(q))) for token in tokens]
    return sum(w * v[token] for w, token in zip(weights, tokens, strict=True)) / sum(weights)


def check(module: ModuleType, case: SelectBlocksCase) -> None:
    """Both stages of `module` agree with the oracle on every token of the row: equal lists, outputs to 1e-12."""
    q, k, v = case.inputs(torch.float64)
    config, placement = case.config, case.placement()
    blocks = module.select_blocks(q, k, config, *placement)
    out = module.sparse_attention(q, k, v, blocks, config, *placement)
    scores = module.block_scores(q, k, config, *placement)
    # scores of few values, so that ties abound, and future blocks have scores too
    made_up = torch.randint(4, scores.shape, generator=torch.Generator().manual_seed(case.seed)) / 4
    made_up_blocks = module.pick_blocks(made_up, module.query_positions(q, k, *placement), config)
    assert blocks.dtype == torch.int32
    assert out.shape == q.shape
    assert blocks.shape[-1] == min(config.topk + config.window_size // config.block_size, scores.shape[-1])
    group = case.query_heads // case.kv_heads
    qn, kn, vn = q.numpy(), k.numpy(), v.numpy()
    for b, positions in enumerate(place(case)):
        for t, i in enumerate(positions):
            for g in range(case.kv_heads):
                row = blocks[b, g, t].tolist()
                heads = slice(g * group, (g + 1) * group)
                if i is None:
                    assert set(row) == {-1}
                    assert not out[b, heads, t].any()
                    continue
                wanted_scores = oracle_scores(qn[b, heads, t], kn[b, g], i, config)
                wanted = oracle_blocks(wanted_scores, i, config)
                wanted_made_up = oracle_blocks(made_up[b, g, t].tolist(), i, config)
                np.testing.assert_allclose(scores[b, g, t], wanted_scores, rtol=1e-11, atol=1e-13)
                assert row == wanted + [-1] * (len(row) - len(wanted)), (case.name, b, g, i)
                assert made_up_blocks[b, g, t].tolist() == wanted_made_up + [-1] * (len(row) - len(wanted))
                for h in range(heads.start, heads.stop):
                    expected = oracle_output(qn[b, h, t], kn[b, g], vn[b, g], i, wanted, config.block_size)
                    np.testing.assert_allclose(out[b, h, t], expected, rtol=1e-11, atol=1e-12)


@rows(SMALL_CASES)
def test_equals_the_oracle(case):
    check(reference, case)


@rows(COMPRESS_KEYS)
def test_compressed_keys_equal_the_oracle(case):
    k, size, stride = case.build(torch.float64)
    got = reference.compress_keys(k, size, stride)
    starts = [start for start in range(0, case.keys, stride) if start + size <= case.keys]
    assert got.shape == (case.batch, case.kv_heads, len(starts), case.head_dim)
    for j, start in enumerate(starts):
        np.testing.assert_allclose(got[:, :, j], k.numpy()[:, :, start : start + size].mean(2), rtol=1e-12, atol=1e-13)


@rows(PICK_BLOCKS)
def test_picked_blocks_equal_the_oracle(case):
    scores, positions, config = case.build()
    blocks = reference.pick_blocks(scores, positions, config)
    for b, row in enumerate(positions.tolist()):
        for t, i in enumerate(row):
            for g in range(case.kv_heads):
                wanted = oracle_blocks(scores[b, g, t].tolist(), i, config)
                assert blocks[b, g, t].tolist() == wanted + [-1] * (blocks.shape[-1] - len(wanted))


@rows(BIG_CASES)
def test_equals_the_oracle_on_sampled_tokens_of_a_big_row(case):
    """Loops over every token would take minutes; eight tokens spread over the row (the last one included) do not."""
    q, k, v = case.inputs(torch.float64)
    config, placement = case.config, case.placement()
    blocks = reference.select_blocks(q, k, config, *placement)
    out = reference.sparse_attention(q, k, v, blocks, config, *placement)
    group = case.query_heads // case.kv_heads
    b, g = case.batch - 1, case.kv_heads - 1
    real = [(t, i) for t, i in enumerate(place(case)[b]) if i is not None]
    for t, i in real[:: max(1, len(real) // 7)] + real[-1:]:
        heads = slice(g * group, (g + 1) * group)
        wanted = oracle_blocks(oracle_scores(q[b, heads, t].numpy(), k[b, g].numpy(), i, config), i, config)
        row = blocks[b, g, t].tolist()
        assert row == wanted + [-1] * (len(row) - len(wanted))
        expected = oracle_output(
            q[b, heads.start, t].numpy(), k[b, g].numpy(), v[b, g].numpy(), i, wanted, config.block_size
        )
        np.testing.assert_allclose(out[b, heads.start, t], expected, rtol=1e-10, atol=1e-12)


# ---- planted bugs ---------------------------------------------------------------------------------------------------

BUGS = {
    "causal sign flipped in stage 2": ("token <= positions", "token >= positions"),
    "stage 2 sees one token of the future": ("token <= positions", "token <= 1 + positions"),
    "stage 2 not causal": (" & (token <= positions[:, None, :, None])", ""),
    "causal sign flipped for fine windows": ("fine_end > at", "fine_end < at"),
    "fine windows reach into the future": ("fine_end > at", "fine_end > at + 4"),
    "coarse windows one too few": ("coarse_end > at", "coarse_end >= at"),
    "head sum dropped": (".exp().sum(2)", ".exp()[:, :, 0]"),
    "heads shared the wrong way round": ('"B (G h) T D -> B G h T D"', '"B (h G) T D -> B G h T D"'),
    "pool offset by one, as in the paper": (
        "(before, blocks * per_block - fine_count)",
        "(0, before + blocks * per_block - fine_count)",
    ),
    "pool one window short": ("unfold(-1, per_block + before, per_block)", "unfold(-1, per_block, per_block)"),
    "pool takes the mean": (".amax(-1)", ".mean(-1)"),
    "normaliser over fine windows": ("if config.exact_lse:", "if not config.exact_lse:"),
    "local window one block short": ("own - config.window_blocks if", "own - config.window_blocks + 1 if"),
    "local window one block long": ("config.window_blocks + 1\n", "config.window_blocks\n"),
    "initial block forgotten": ("(block < config.init_blocks) | ", ""),
    "budget without the window": ("min(config.visible_blocks, blocks)", "min(config.topk, blocks)"),
    "future blocks selected": (".masked_fill(~past, -math.inf)", ""),
    "ties to the upper block": (
        "rank.sort(dim=-1, descending=True, stable=True).indices",
        "(blocks - 1 - rank.flip(-1).sort(dim=-1, descending=True, stable=True).indices)",
    ),
    "list not sorted": (
        "past.gather(-1, best), best, blocks).sort(dim=-1).values",
        "past.gather(-1, best), best, blocks)",
    ),
    "mean forgets to divide": ("(total / kernel_size)", "total"),
    "softmax scale dropped": (" / math.sqrt(k.shape[-1])", ""),
    "padding rows attend": ("torch.where(positions < lengths[:, None], positions, -1)", "positions"),
    "offset ignored": ("first[:, None] + torch", "0 * first[:, None] + torch"),
}
SENSITIVE = [
    BY_NAME[name]
    for name in ("chunk-at-an-offset", "padded-batch", "window-counts-own-block", "exact-lse", "ragged-last-block")
]


def variant(old: str, new: str) -> ModuleType:
    """Both stages in one module, with one piece of their source replaced."""
    stage_1, stage_2 = (Path(module.__file__).read_text("utf-8") for module in (stage_1_module, stage_2_module))
    shared = [line for line in stage_2.splitlines() if line.startswith("from minicpm_ref.sparse.blocks import")]
    assert len(shared) == 1
    source = stage_1 + stage_2.replace(shared[0], "").replace("from __future__ import annotations", "")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    module = ModuleType("minicpm_ref.sparse_variant")
    exec(compile(source.replace(old, new), "variant", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    module = variant(*BUGS[bug])
    with pytest.raises(AssertionError):  # noqa: PT012 - any row may catch it
        for case in SENSITIVE:
            check(module, case)
