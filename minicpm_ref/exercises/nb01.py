"""Checkers of 01_inside_the_decoder: a sliding window, the multipliers folded into the weights, and weights from the
other rotary layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.exercises import attempt
from minicpm_ref.model import MiniCPM
from minicpm_ref.ops import apply_rope, causal_attention


def check_window_attention(window_attention: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> str:
    """Check `window_attention(q, k, v, window)`: causal attention in which a token sees the last `window` tokens, its
    own included; q [B, H, T, D], k and v [B, G, T, D]."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(2, 4, 9, 8, generator=generator)
        k, v = torch.randn(2, 2, 2, 9, 8, generator=generator)
        found = window_attention(q, k, v, 9)
        assert found.shape == q.shape, f"expected shape {tuple(q.shape)}, got {tuple(found.shape)}"
        assert torch.allclose(found, causal_attention(q, k, v), atol=1e-5), "a window as long as the text hides nothing"
        own = v.repeat_interleave(2, dim=1)
        assert torch.allclose(window_attention(q, k, v, 1), own, atol=1e-5), "window 1: a token sees only itself"
        found = window_attention(q, k, v, 3)
        last = causal_attention(q[:, :, 8:], k[:, :, 6:], v[:, :, 6:])
        assert torch.allclose(found[:, :, 8:], last, atol=1e-5), "window 3: token 8 sees tokens 6, 7 and 8, no others"
        assert torch.allclose(found[:, :, :3], causal_attention(q, k, v)[:, :, :3], atol=1e-5), (
            "the first tokens see what there is"
        )

    return attempt("window_attention", check)


def check_fold_multipliers(fold_multipliers: Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]]) -> str:
    """Check `fold_multipliers(weights, config)`: weights that give the same logits when all three multipliers are 1."""

    def check() -> None:
        config = ModelConfig(
            vocab_size=50,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=96,
            max_position_embeddings=64,
            dim_model_base=16,
        )
        model = MiniCPM(config).init_weights(0)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))  # it starts at zero
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        folded = fold_multipliers({name: tensor.clone() for name, tensor in before.items()}, config)
        assert folded.keys() == before.keys(), "expected the same tensor names"
        for name, tensor in before.items():
            if name.endswith("norm.weight"):
                assert torch.equal(folded[name], tensor), f"{name}: a norm needs no change"
        plain = dataclasses.replace(
            config, scale_emb=1.0, scale_depth=math.sqrt(config.num_hidden_layers), dim_model_base=config.hidden_size
        )
        llama = MiniCPM(plain)
        llama.load_state_dict(folded)
        ids = torch.tensor([[7, 3, 41, 0, 12]])
        with torch.no_grad():
            ours, theirs = model.hidden_states(ids), llama.hidden_states(ids)
            assert torch.allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-4), "the embedded tokens differ: scale_emb"
            assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4), (
                "layer 0 differs: both branches of a layer end in a matrix that can hold the residual scale"
            )
            assert torch.allclose(model(ids), llama(ids), rtol=1e-4, atol=1e-4), "the logits differ: the output matrix"

    return attempt("fold_multipliers", check)


def check_from_interleaved(from_interleaved: Callable[[Tensor, int], Tensor]) -> str:
    """Check `from_interleaved(weight, head_dim)`: rows of a [H * D, C] query or key matrix made for the layout that
    pairs entries 2j and 2j + 1, in the order that `apply_rope` needs."""

    def check() -> None:
        generator = torch.Generator().manual_seed(0)
        d, tokens = 8, 5
        w_q, w_k = torch.randn(2, 2 * d, 6, generator=generator)
        x = torch.randn(tokens, 6, generator=generator)
        angles = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(0, d, 2) / d)
        cos, sin = angles.cos(), angles.sin()

        def interleaved(weight: Tensor) -> Tensor:
            a, b = rearrange(x @ weight.T, "t (h j two) -> two h t j", j=d // 2, two=2)
            return rearrange([a * cos - b * sin, b * cos + a * sin], "two h t j -> h t (j two)")

        def half_split(weight: Tensor) -> Tensor:
            return apply_rope(rearrange(x @ weight.T, "t (h d) -> h t d", d=d), cos, sin)

        found_q, found_k = from_interleaved(w_q.clone(), d), from_interleaved(w_k.clone(), d)
        assert found_q.shape == w_q.shape, f"expected shape {tuple(w_q.shape)}, got {tuple(found_q.shape)}"
        assert torch.equal(found_q.flatten().sort().values, w_q.flatten().sort().values), "only the order may change"
        expected = interleaved(w_q) @ interleaved(w_k).mT
        scores = half_split(found_q) @ half_split(found_k).mT
        assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-3), (
            "the attention scores changed: in each head, entry 2j goes to j and entry 2j + 1 to j + D/2"
        )

    return attempt("from_interleaved", check)
