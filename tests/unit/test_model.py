"""The decoder against transformers' Granite, and against itself through the cache."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from fresh import fresh_model

from minicpm_ref.cache import KVCache
from minicpm_ref.config import LongRope, ModelConfig
from minicpm_ref.formats.granite import to_granite
from minicpm_ref.model import MiniCPM
from minicpm_ref.ops import apply_rope, causal_attention, rope_angles

ORIGINAL = 32  # LongRoPE's original length in these tests
SHORT = tuple(1.0 + 0.1 * i for i in range(8))
LONG = tuple(1.5 + 0.7 * i for i in range(8))


def config(heads: int, kv_heads: int, tied: bool, long_rope: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=300,
        hidden_size=16 * heads,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        max_position_embeddings=4 * ORIGINAL,
        rope_scaling=LongRope(SHORT, LONG, ORIGINAL) if long_rope else None,
        tie_word_embeddings=tied,
        initializer_range=0.04,
    )


def build(heads: int = 4, kv_heads: int = 2, tied: bool = False, long_rope: bool = False) -> MiniCPM:
    return fresh_model(config(heads, kv_heads, tied, long_rope), seed=1)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("long_rope", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 4, False), (4, 2, True), (8, 2, False), (16, 1, True)])
@torch.no_grad()
def test_logits_equal_transformers(heads: int, kv_heads: int, tied: bool, long_rope: bool) -> None:
    model = build(heads, kv_heads, tied, long_rope)
    granite = to_granite(model)
    for length in (1, 20, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL):
        ids = tokens(2, length)
        torch.testing.assert_close(model(ids), granite(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: replace(c, scale_emb=c.scale_emb * 1.01),
        lambda c: replace(c, scale_depth=c.scale_depth * 1.01),
        lambda c: replace(c, dim_model_base=c.dim_model_base + 2),
        lambda c: replace(c, rope_theta=c.rope_theta * 1.01),
        lambda c: replace(c, rope_scaling=replace(c.rope_scaling, long_factor=SHORT)),
        lambda c: replace(c, max_position_embeddings=8 * ORIGINAL),
    ],
)
@torch.no_grad()
def test_the_comparison_with_transformers_notices_a_wrong_constant(break_it) -> None:
    model = build(long_rope=True)
    granite = to_granite(model)
    wrong = MiniCPM(break_it(model.config))
    wrong.load_state_dict(model.state_dict())
    ids = tokens(1, 2 * ORIGINAL)
    assert (wrong(ids) - granite(ids).logits).abs().max() > 1e-4


def test_state_dict_has_the_published_names() -> None:
    names = set(build().state_dict())
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in build(tied=True).state_dict()
    layer = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    assert layer == {
        "input_layernorm.weight",
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        "post_attention_layernorm.weight",
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("chunks", [[17], [1] * 17, [5, 1, 7, 4], [16, 1]])
@torch.no_grad()
def test_cached_decode_equals_full_prefill(chunks: list[int]) -> None:
    model, ids = build(), tokens(2, 17)
    cache = KVCache(model.config, batch_size=2, capacity=17)
    parts = [model(piece, cache) for piece in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_future_is_invisible() -> None:
    model, ids = build(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 300
    torch.testing.assert_close(model(ids)[:, :8], model(changed)[:, :8], atol=0, rtol=0)
    assert (model(ids)[:, 8] - model(changed)[:, 8]).abs().max() > 1e-3


@torch.no_grad()
def test_sequences_of_different_lengths_share_a_batch_without_padding() -> None:
    model = build(long_rope=True)
    lengths = [1, 7, ORIGINAL, 2 * ORIGINAL]  # the last is long for LongRoPE, the others are not
    rows = [tokens(1, length, seed=length) for length in lengths]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cache = KVCache(model.config, batch_size=4, capacity=2 * ORIGINAL + 3)
    packed = model(torch.cat(rows, dim=1), cu_seqlens=bounds)
    cached = model(torch.cat(rows, dim=1), cache, bounds)
    torch.testing.assert_close(packed, cached, atol=1e-5, rtol=0)
    for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
        torch.testing.assert_close(packed[:, start:stop], model(row), atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == lengths
    step = tokens(4, 1, seed=9)  # one more token each: row b continues its own sequence
    keep = [0, 1, 3]  # row 2 crosses the original length, where only a recomputation is exact
    after = model(step, cache)
    for b in keep:
        whole = model(torch.cat((rows[b], step[b : b + 1]), dim=1))[:, -1]
        torch.testing.assert_close(after[b], whole, atol=2e-5, rtol=0)


@torch.no_grad()
def test_crossing_the_original_length_turns_cached_keys_to_the_long_angles() -> None:
    model, ids = build(long_rope=True), tokens(1, ORIGINAL + 1)
    cache, fresh = KVCache(model.config, 1, 64), KVCache(model.config, 1, 64)
    model(ids[:, :-1], cache)
    before = cache.keys[0].clone()
    model(ids[:, -1:], cache)
    model(ids, fresh)
    torch.testing.assert_close(cache.keys[0], fresh.keys[0], atol=1e-5, rtol=0)  # layer 0: exactly a new prefill's keys
    assert (before[..., :ORIGINAL, :] - fresh.keys[0][..., :ORIGINAL, :]).abs().max() > 1e-2


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    c = config(4, 2, False, False)
    x, y = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def turned(v: torch.Tensor, position: int) -> torch.Tensor:
        angles = rope_angles(c, torch.tensor([position]), torch.tensor([False]))
        return apply_rope(v, angles.cos(), angles.sin())

    assert torch.isclose(turned(x, 57).norm(), x.norm().float().to(turned(x, 57).dtype), rtol=1e-6)
    products = [(turned(x, base + 5) * turned(y, base)).sum() for base in (0, 3, 40)]
    assert max(products) - min(products) < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), "input_ids has shape"),
        (lambda m: m(tokens(1, 5), cu_seqlens=[0, 4]), "cu_seqlens"),
        (lambda m: m(tokens(1, 5), cu_seqlens=[0, 3, 3, 5]), "cu_seqlens"),
        (lambda m: m(tokens(2, 5), cu_seqlens=[0, 5]), "cu_seqlens"),
        (lambda m: m(tokens(1, 5), KVCache(m.config, 1, 4)), "capacity of 4"),
        (lambda m: m(tokens(3, 2), KVCache(m.config, 2, 4)), "3 sequences"),
        (lambda m: m(torch.tensor([[300]])), "300"),
        (lambda m: m(tokens(1, 129)), "129 tokens: expected 129 to max_position_embeddings = 128"),
        (lambda m: m(tokens(1, 5), KVCache(m.config, 1, 8), final_length=4), "final_length = 4: expected 5 to"),
        (lambda m: m(tokens(1, 5), KVCache(m.config, 1, 8), final_length=129), "final_length = 129"),
        (
            lambda m: m(tokens(1, 5), KVCache(m.config, 1, 8, dtype=torch.float16)),
            "float16 on cpu: expected",
        ),
        (lambda m: KVCache(m.config, 0, 4), "batch_size=0"),
        (lambda m: KVCache(m.config, 1, 4).truncate(torch.tensor([1])), "truncate"),
    ],
)
def test_bad_input_is_refused_in_words(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build())


def test_an_output_matrix_starts_at_zero_so_the_first_prediction_is_uniform() -> None:
    assert (MiniCPM(config(4, 2, False, False)).init_weights(0)(tokens(1, 5)) == 0).all()
    assert (MiniCPM(config(4, 2, True, False)).init_weights(0)(tokens(1, 5)) != 0).any()


@torch.no_grad()
def test_last_gives_one_row_of_logits_a_sequence() -> None:
    model, ids = build(), tokens(2, 9)
    torch.testing.assert_close(model(ids, last=True), model(ids)[:, -1:], atol=2e-5, rtol=0)
    packed = tokens(1, 9)
    torch.testing.assert_close(
        model(packed, cu_seqlens=[0, 4, 9], last=True),
        model(packed, cu_seqlens=[0, 4, 9])[:, [3, 8]],
        atol=2e-5,
        rtol=0,
    )


@torch.no_grad()
def test_a_prefill_computes_one_row_of_logits_and_keeps_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    states: list[weakref.ref[torch.Tensor]] = []
    alive, rows = [], []

    def layer_is_done(module, args, out):
        states.append(weakref.ref(out))
        alive.append(sum(state() is not None for state in states))

    for layer in model.model.layers:
        layer.register_forward_hook(layer_is_done)
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(hidden.shape[:-1].numel()) or logits(hidden))
    model(tokens(1, 50), KVCache(model.config, capacity=50), last=True)
    assert rows == [1]
    assert max(alive) <= 2  # what a layer reads, and what it gives
    alive.clear()
    states.clear()
    kept = model.hidden_states(tokens(1, 50))
    assert len(kept) == len(model.model.layers) + 2
    assert max(alive) == len(model.model.layers)  # so the count notices


@torch.no_grad()
def test_rows_that_stand_alike_share_one_call_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    calls = []

    def count(q, k, v):
        calls.append(q.shape[0])
        return causal_attention(q, k, v)

    monkeypatch.setattr("minicpm_ref.model.causal_attention", count)
    cache = KVCache(model.config, batch_size=4, capacity=20)
    ids = tokens(4, 9)
    model(ids, cache)
    model(tokens(3, 1, seed=2), cache)  # three of the rows go on
    calls.clear()
    after = model(tokens(4, 1, seed=3), cache)
    assert calls == [3, 1] * len(model.model.layers)
    for row in range(4):
        own = [ids[row : row + 1], *([tokens(3, 1, seed=2)[row : row + 1]] if row < 3 else [])]
        alone = model(torch.cat((*own, tokens(4, 1, seed=3)[row : row + 1]), dim=1))[:, -1]
        torch.testing.assert_close(after[row], alone, atol=2e-5, rtol=0)


def test_one_query_reads_the_keys_of_a_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of a group are folded into queries of one head: as many heads as keys have reach the attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 1 if heads == 8 else 30, 16, generator=generator) for heads in (8, 2, 2))
    heads = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        heads.append((query.shape[1], key.shape[1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    weights = (torch.einsum("bghd,bgsd->bghs", q.view(2, 2, 4, 16).double(), k.double()) / 4).softmax(-1)
    exact = torch.einsum("bghs,bgsd->bghd", weights, v.double()).reshape(2, 8, 1, 16)
    torch.testing.assert_close(causal_attention(q, k, v).double(), exact, atol=1e-5, rtol=0)
    assert heads == [(2, 2)]
