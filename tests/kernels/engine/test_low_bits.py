"""The compiled executor on rounded weights, against a decoder that rounds the same way in PyTorch.

The oracle holds the weights that the format holds and rounds activations to int8 as the products do. A float32 sum in
another order pushes an activation over the border between two integers now and then, the next layer sees another input
and has more of those, and in a random model, whose attention is sharp, they end up everywhere. Two roundings that have
nothing to do with each other differ by sqrt(2) of what one costs, so 1.5 of that is the bound: the cost is measured,
with a decoder that does not round activations. (What a product does is tested to the last bit in `test_products`.)
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import fresh_model

from minicpm_ref.config import ModelConfig
from minicpm_ref.engine.cpu_executor import FORMATS, INTEGER_GROUP, QUANTIZERS, TERNARY_GROUP, CPUExecutor
from minicpm_ref.lowbit import dequantize, to_ternary
from minicpm_ref.lowbit.ternary import quantize_activations
from minicpm_ref.model import MiniCPM

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
WIDE = ModelConfig(**SIZES, hidden_size=128, num_key_value_heads=1, intermediate_size=256)
NARROW = ModelConfig(**SIZES, hidden_size=40, num_key_value_heads=2, intermediate_size=72, tie_word_embeddings=True)
IDS = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(7)).tolist()


class Rounding(torch.nn.Module):
    """A linear layer that sees its input in int8, `group` columns with one scale."""

    def __init__(self, weight: torch.Tensor, group: int):
        super().__init__()
        self.weight, self.group = torch.nn.Parameter(weight, requires_grad=False), group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        q, scales = quantize_activations(F.pad(x, (0, -width % self.group)), self.group)
        return F.linear((q * scales[..., None]).flatten(-2)[..., :width].to(x.dtype), self.weight)


def oracle(model: MiniCPM, weights: str, round_activations: bool) -> MiniCPM:
    """`model` with the numbers of a format."""
    found = copy.deepcopy(model)
    head = rounded(found.model.embed_tokens.weight, FORMATS[weights][1])
    found.model.embed_tokens.weight.data = head
    if not found.config.tie_word_embeddings:
        head = rounded(found.lm_head.weight, FORMATS[weights][1])
    for layer in found.model.layers:
        layer.self_attn.qkv_proj = layer.mlp.gate_up_proj = None
        for parent, names in ((layer.self_attn, "q k v o"), (layer.mlp, "gate up down")):
            for name in names.split():
                linear = getattr(parent, f"{name}_proj")
                if weights == "ternary":
                    matrix, group = linear.matrix(), TERNARY_GROUP
                    weight = dequantize(matrix.codes, matrix.scales, group)
                else:
                    weight, group = rounded(linear.weight, FORMATS[weights][0]), INTEGER_GROUP
                setattr(parent, f"{name}_proj", Rounding(weight, group if round_activations else 1))
    found.output = Rounding(head, INTEGER_GROUP if round_activations else 1)
    found.logits = lambda hidden: found.output(hidden / found.config.logit_divisor)
    return found


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """The weights that a format makes of a matrix."""
    width = weight.shape[1]
    codes, scales, *minimums = QUANTIZERS[form](F.pad(weight.detach(), (0, -width % INTEGER_GROUP)), INTEGER_GROUP)
    found = dequantize(codes, scales, INTEGER_GROUP)
    for minimum in minimums:
        found = found + minimum.float().repeat_interleave(INTEGER_GROUP, dim=1)
    return found[:, :width]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


@torch.no_grad()
def logits_of(model: MiniCPM) -> np.ndarray:
    return model(torch.tensor([IDS]))[0].numpy()


@pytest.mark.parametrize(
    ("weights", "config"),
    [("int8", WIDE), ("int8", NARROW), ("int4", WIDE), ("int4", NARROW), ("int4-minimum", NARROW), ("ternary", WIDE)],
)
def test_rounded_weights_agree_with_a_decoder_that_rounds(weights: str, config: ModelConfig) -> None:
    model = fresh_model(config, seed=3)
    if weights == "ternary":
        to_ternary(model)
    executor = CPUExecutor(model, weights=weights, cache="float32", threads=1)
    exact = logits_of(oracle(model, weights, True).double())
    allowed = 1.5 * rms(logits_of(oracle(model, weights, False).double()) - exact)
    assert rms(executor.verify(0, IDS) - exact) <= allowed
    # decoded, verified and prefilled tokens agree in every bit, as in float32
    expected = executor.verify(0, IDS[:9])
    executor.truncate(0, 50)
    np.testing.assert_array_equal(np.stack([executor.decode([0], [token])[0] for token in IDS[:9]]), expected)
    # planted: each group has the scales of the one before it
    stream, form = executor._decoder._stream, executor._decoder.form
    layers = stream.data[: stream.offsets[-1, 0]].reshape(-1, form.group_bytes)
    layers[:, -32:] = np.roll(layers[:, -32:], 1, axis=0)
    executor.truncate(0, 0)
    assert rms(executor.verify(0, IDS) - exact) > allowed


def test_a_model_without_ternary_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 is no TernaryLinear"):
        CPUExecutor(fresh_model(WIDE, seed=3), weights="ternary")


def test_ternary_layers_run_in_float32_too() -> None:
    model = to_ternary(fresh_model(WIDE, seed=3))
    executor = CPUExecutor(model, cache="float32", threads=1)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for linear in parent.children():
                linear.activations = "float"
        for merged in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            merged.activations = "float"
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))[0].numpy()
    np.testing.assert_allclose(executor.verify(0, IDS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
