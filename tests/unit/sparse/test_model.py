"""MiniCPM with sparse attention: the dense/sparse switch, and decoding that selects and computes like a prefill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.cache import KVCache
from minicpm_ref.config import LongRope, ModelConfig, SparseConfig
from minicpm_ref.model import MiniCPM
from minicpm_ref.sparse import CompressedKeyCache, compress_keys
from minicpm_ref.sparse import attention as attention_module

SPARSE = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=3, dense_len=-1)
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=256,
    dim_model_base=32,
    sparse_config=SPARSE,
)
TOKENS = 150
# float32 sums in another order; logits are of size 1
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The torch reference, gradients or not; the kernels' own tests run the model with them."""
    monkeypatch.setenv("MINICPM_BACKEND", "torch")


def build(sparse: SparseConfig | None = SPARSE, **changes) -> MiniCPM:
    return fresh_model(replace(CONFIG, sparse_config=sparse, **changes), seed=3)


def tokens(count: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: MiniCPM, ids: torch.Tensor, sizes: list[int], cache: KVCache | None = None) -> torch.Tensor:
    cache = KVCache(model.config, capacity=TOKENS) if cache is None else cache
    return torch.cat([model(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.fixture
def selections(monkeypatch) -> list[torch.Tensor]:
    """Every list of blocks that the model selects, in order of the calls."""
    found = []
    select = attention_module.select_blocks

    def record(*args, **kwargs):
        found.append(select(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(attention_module, "select_blocks", record)
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [[1] * TOKENS, [64, 64, 22], [37, 1, 1, 100, 11], [TOKENS]],
    ids=["token-by-token", "chunks", "ragged-chunks", "whole"],
)
@pytest.mark.parametrize("options", [{}, {"exact_lse": True}, {"local_inclusive": False}], ids=str)
def test_pieces_select_the_same_blocks_and_give_the_same_logits(sizes, options, selections):
    model = build(replace(SPARSE, **options))
    whole = model(tokens())
    expected = selections.copy()
    selections.clear()
    pieces = in_pieces(model, tokens(), sizes)
    layers = CONFIG.num_hidden_layers
    for layer in range(layers):
        start = 0
        for size, found in zip(sizes, selections[layer::layers], strict=True):
            wanted = expected[layer][:, :, start : start + size]
            assert torch.equal(found, wanted[..., : found.shape[-1]])
            assert (wanted[..., found.shape[-1] :] == -1).all()
            start += size
    torch.testing.assert_close(pieces, whole, **CLOSE)


@torch.no_grad()
def test_the_choice_matters_here():
    """Otherwise the tests of this file would pass with attention left dense."""
    dense, sparse = build(None)(tokens()), build()(tokens())
    visible = SPARSE.visible_blocks * SPARSE.block_size
    torch.testing.assert_close(sparse[:, :visible], dense[:, :visible], **CLOSE)
    assert (sparse - dense)[:, visible:].abs().max() > 100 * CLOSE["atol"]


@torch.no_grad()
def test_dense_below_dense_len_and_sparse_from_it_on():
    switching, dense, sparse = build(replace(SPARSE, dense_len=120)), build(None), build()
    assert torch.equal(switching(tokens(119)), dense(tokens(119)))
    assert torch.equal(switching(tokens(120)), sparse(tokens(120)))
    assert not torch.allclose(sparse(tokens(120)), dense(tokens(120)), **CLOSE)


@torch.no_grad()
def test_decoding_across_dense_len():
    """119 tokens dense, then sparse over the keys those left: in one chunk or token by token the same."""
    switching, dense = build(replace(SPARSE, dense_len=120)), build(None)
    one_chunk = in_pieces(switching, tokens(), [119, 31])
    torch.testing.assert_close(in_pieces(switching, tokens(), [119] + [1] * 31), one_chunk, **CLOSE)
    torch.testing.assert_close(in_pieces(switching, tokens(), [1] * 150), one_chunk, **CLOSE)
    torch.testing.assert_close(one_chunk[:, :119], dense(tokens())[:, :119], **CLOSE)
    assert not torch.allclose(one_chunk[:, 119:], dense(tokens())[:, 119:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * TOKENS, [100, 28, 22]], ids=["token-by-token", "chunks"])
def test_a_prompt_in_pieces_that_knows_its_length_is_one_pass(sizes):
    model = build(replace(SPARSE, dense_len=120))
    cache = KVCache(model.config, capacity=TOKENS)
    pieces = [model(piece, cache, final_length=TOKENS) for piece in tokens().split(sizes, dim=1)]
    whole = model(tokens())
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
    assert not torch.allclose(in_pieces(model, tokens(), sizes), whole, **CLOSE)  # what the length is needed for


@torch.no_grad()
def test_rows_of_equal_lengths_are_attended_together():
    model = build()
    ids = torch.cat([tokens(100, seed) for seed in range(3)])
    cache = KVCache(CONFIG, batch_size=3, capacity=TOKENS)
    together = torch.cat([model(piece, cache) for piece in ids.split([70, 29, 1], dim=1)], dim=1)
    torch.testing.assert_close(together, model(ids), **CLOSE)
    assert torch.equal(pooled_keys(cache), fresh_keys(cache))


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache():
    model = build()
    lengths = [97, 1, 130]
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    cache = KVCache(CONFIG, batch_size=3, capacity=TOKENS)
    bounds = [0, 97, 98, 228]
    packed = model(torch.cat(prompts, dim=1), cache, bounds)
    following = tokens(6, seed=9).view(3, 2)
    together = model(following, cache)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, following[row : row + 1]), dim=1))
        torch.testing.assert_close(packed[:, bounds[row] : bounds[row + 1]], alone[:, :-2], **CLOSE)
        torch.testing.assert_close(together[row], alone[0, -2:], **CLOSE)


def reject_drafts(model: MiniCPM, cache: KVCache) -> torch.Tensor:
    """Prefill 128, draft 20 (both read by stage 1), take 18 back, and go on with other tokens."""
    model(tokens(128), cache)
    model(tokens(20, seed=7), cache)
    cache.truncate(torch.tensor([130]))
    return model(tokens(20, seed=8), cache)


@torch.no_grad()
def test_rejected_drafts_leave_no_trace():
    model = build()
    accepted = torch.cat((tokens(128), tokens(20, seed=7)[:, :2], tokens(20, seed=8)), dim=1)
    out = reject_drafts(model, KVCache(CONFIG, capacity=TOKENS))
    torch.testing.assert_close(out, model(accepted)[:, 130:], **CLOSE)


@torch.no_grad()
def test_that_needs_the_cache_to_forget_windows(monkeypatch):
    model = build()
    kept = KVCache(CONFIG, capacity=TOKENS)
    reject_drafts(model, kept)
    assert torch.equal(pooled_keys(kept), fresh_keys(kept))
    monkeypatch.setattr(CompressedKeyCache, "truncate", lambda self, row, length, layer=None: None)
    stale = KVCache(CONFIG, capacity=TOKENS)
    reject_drafts(model, stale)
    assert not torch.equal(pooled_keys(stale), fresh_keys(stale))


def pooled_keys(cache: KVCache) -> torch.Tensor:
    assert cache.compressed is not None
    assert (cache.compressed.pooled == cache.lengths).all()
    return cache.compressed.fine[:, 0, :, : (int(cache.lengths[0]) - 8) // 4 + 1]


def fresh_keys(cache: KVCache) -> torch.Tensor:
    return compress_keys(cache.keys[:, 0, :, : int(cache.lengths[0])], 8, 4)


@torch.no_grad()
def test_a_cache_can_be_used_again():
    model = build()
    cache = KVCache(CONFIG, capacity=TOKENS)
    model(tokens(seed=1), cache)
    cache.reset()
    torch.testing.assert_close(in_pieces(model, tokens(), [100, 50], cache), model(tokens()), **CLOSE)


@torch.no_grad()
def test_entering_long_context_pools_the_turned_keys_again():
    """LongRoPE turns every cached key when a row crosses the original length; what was pooled before is then wrong."""
    half = CONFIG.head_dim // 2
    rope = LongRope((1.0,) * half, tuple(1.0 + j for j in range(half)), original_max_position_embeddings=100)
    model = build(rope_scaling=rope)
    cache = KVCache(model.config, capacity=TOKENS)
    in_pieces(model, tokens(100), [90, 10], cache)
    before = pooled_keys(cache).clone()
    model(tokens(1, seed=5), cache)
    assert torch.equal(pooled_keys(cache), fresh_keys(cache))
    assert not torch.allclose(pooled_keys(cache)[:, :, : before.shape[2]], before, atol=1e-3)


def test_memory_is_only_taken_when_attention_can_become_sparse():
    assert KVCache(replace(CONFIG, sparse_config=None), capacity=99).compressed is None
    at_120 = replace(CONFIG, sparse_config=replace(SPARSE, dense_len=120))
    assert KVCache(at_120, capacity=119).compressed is None
    assert KVCache(at_120, capacity=120).compressed is not None


@torch.no_grad()
def test_a_cache_made_for_a_dense_config_still_gives_the_right_logits():
    model = build()
    cache = KVCache(replace(CONFIG, sparse_config=None), capacity=TOKENS)
    torch.testing.assert_close(in_pieces(model, tokens(), [140, 10], cache), model(tokens()), **CLOSE)


def test_training_packed_sequences_equals_training_them_apart():
    model = build()
    ids = tokens()
    parts = (ids[:, :110], ids[:, 110:])

    def gradients(losses) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    packed = gradients([model(ids, cu_seqlens=[0, 110, 150]).square().sum()])
    apart = gradients([model(part).square().sum() for part in parts])
    for name, gradient in packed.items():
        assert gradient.isfinite().all()
        assert gradient.any()
        torch.testing.assert_close(gradient, apart[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
