"""Ternary layers in a decoder: training and packed inference agree, names stay, nothing dense is left behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicpm_ref import MiniCPM, ModelConfig
from minicpm_ref.lowbit import packing
from minicpm_ref.lowbit.layers import (
    MergedTernaryLinear,
    QuantizationAwareLinear,
    TernaryLinear,
    install_ternary,
    quantization_aware,
    ternary_state,
    to_ternary,
)
from minicpm_ref.lowbit.packing import TernaryTensor, size_report, unpack_tensors
from minicpm_ref.lowbit.ternary import dequantize, fake_quantize, quantize
from minicpm_ref.model import with_config

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    max_position_embeddings=32,
)
TOKENS = torch.tensor([[1, 5, 3, 2, 9, 17]])


@pytest.fixture
def model() -> MiniCPM:
    model = MiniCPM(CONFIG).init_weights(seed=0)
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))  # fresh ones may be zero
    return model


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPM_BACKEND", "torch")


def matrix(rows: int, columns: int, group_size: int = 128, seed: int = 0) -> TernaryTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return TernaryTensor(*quantize(w, group_size), group_size)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_quantization_aware_keeps_names_and_parameters(model: MiniCPM) -> None:
    before = dict(model.named_parameters())
    names = list(model.state_dict())
    assert quantization_aware(model) is model
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    aware = [name for name, layer in model.named_modules() if isinstance(layer, QuantizationAwareLinear)]
    assert len(aware) == CONFIG.num_hidden_layers * len(CONFIG.linear_shapes())
    assert all(name.startswith("model.layers.") for name in aware)
    assert type(model.lm_head) is nn.Linear


def test_the_aware_forward_is_the_forward_of_rounded_weights(model: MiniCPM) -> None:
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.copy_(fake_quantize(parameter))
    assert not torch.equal(rounded(TOKENS), model(TOKENS))
    assert torch.equal(quantization_aware(model)(TOKENS), rounded(TOKENS))


def test_every_parameter_learns(model: MiniCPM) -> None:
    quantization_aware(model)(TOKENS).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.usefixtures("torch_only")
def test_packed_inference_is_the_training_forward(model: MiniCPM) -> None:
    """With float activations the difference is the order of float32 sums."""
    expected = quantization_aware(model)(TOKENS).detach()
    with torch.no_grad():
        actual = to_ternary(model)(TOKENS)
    assert relative_error(actual, expected) < 1e-6


def test_the_cpu_kernel_is_close_to_the_training_forward(model: MiniCPM, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 activations cost under 1 % a product; two layers of random weights stay within 3 %."""
    pytest.importorskip("numba")
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    expected = quantization_aware(model)(TOKENS).detach()
    with torch.no_grad():
        actual = to_ternary(model)(TOKENS)
    assert 1e-4 < relative_error(actual, expected) < 0.03


def test_a_flipped_code_and_a_lost_scale_are_noticed(model: MiniCPM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPM_BACKEND", "torch")
    expected = quantization_aware(model)(TOKENS).detach()
    to_ternary(model)
    layer = model.model.layers[0].mlp.down_proj
    for buffer, change in (("codes", layer.codes ^ (layer.codes & 1)), ("scales", torch.ones_like(layer.scales))):
        kept = getattr(layer, buffer)
        setattr(layer, buffer, change)
        with torch.no_grad():
            assert relative_error(model(TOKENS), expected) > 1e-3
        setattr(layer, buffer, kept)


class Largest(TorchDispatchMode):
    """The size of the largest floating-point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.numbers = max(self.numbers, leaf.numel())
        return result


def held_by(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def test_no_dense_copy_is_kept_or_made(model: MiniCPM, monkeypatch: pytest.MonkeyPatch) -> None:
    """After packing, the layers hold 2.125 bits a weight, no tensor of a matrix's size exists, and a step makes
    none.
    """
    pytest.importorskip("numba")
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    shapes = set(CONFIG.linear_shapes().values())
    weights = CONFIG.num_hidden_layers * sum(rows * columns for rows, columns in CONFIG.linear_shapes().values())
    to_ternary(model)
    with torch.no_grad():
        model(TOKENS)  # whatever a first call might cache is cached now
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and tuple(thing.shape) in shapes]
    assert not [tensor.dtype for tensor in alive if tensor.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_by(model.model.layers)}
    norms = 2 * CONFIG.num_hidden_layers * CONFIG.hidden_size * 4
    assert sum(storages.values()) == weights * 2.125 / 8 + norms
    with torch.no_grad(), Largest() as largest:
        model(TOKENS[:, :1])
    smallest_matrix = min(rows * columns for rows, columns in shapes)
    assert 0 < largest.numbers < smallest_matrix


def test_the_memory_test_sees_a_dense_copy(model: MiniCPM) -> None:
    layer = to_ternary(model).model.layers[0].mlp.up_proj
    with torch.no_grad(), Largest() as largest:
        dequantize(layer.matrix().codes, layer.matrix().scales)
    assert largest.numbers >= layer.in_features * layer.out_features


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.usefixtures("torch_only")
def test_a_packed_file_gives_the_same_model(model: MiniCPM, packing: str, tmp_path: Path) -> None:
    to_ternary(model)
    with torch.no_grad():
        expected = model(TOKENS)
    tensors, metadata = ternary_state(model, packing)
    dense = {name: t for name, t in model.state_dict().items() if not name.endswith((".codes", ".scales"))}
    path = tmp_path / "model.safetensors"
    save_file(tensors | dense, path, metadata)
    assert size_report(path).bits_per_weight < {"2bit": 2.126, "base3": 1.726}[packing]

    with torch.device("meta"):
        loaded = MiniCPM(CONFIG)
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        used = install_ternary(loaded, unpack_tensors(stored, file.metadata()))
    rest = {name: tensor for name, tensor in stored.items() if name not in used}
    missing, unexpected = loaded.load_state_dict(rest, strict=False, assign=True)
    assert not unexpected
    assert all(name.endswith((".codes", ".scales")) for name in missing)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), expected)


def test_a_file_for_another_model_is_refused(model: MiniCPM) -> None:
    tensors, metadata = ternary_state(to_ternary(copy.deepcopy(model)))
    other = MiniCPM(dataclasses.replace(CONFIG, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: packed ternary in the file, but the model"):
        install_ternary(other, unpack_tensors(tensors, metadata))
    wide = MiniCPM(dataclasses.replace(CONFIG, intermediate_size=512))
    with pytest.raises(ValueError, match=r"mlp.gate_proj: \[256, 128\] in the file, expected \[512, 128\]"):
        install_ternary(wide, unpack_tensors(tensors, metadata))
    assert not any(isinstance(layer, TernaryLinear) for layer in wide.modules()), "a refusal changes nothing"


@pytest.mark.usefixtures("torch_only")
def test_published_fake_quantized_weights_are_recovered(model: MiniCPM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.copy_(fake_quantize(parameter).bfloat16())
        expected = model(TOKENS)
        recovered = to_ternary(copy.deepcopy(model), recover=True)(TOKENS)
    assert relative_error(recovered, expected) < 1e-6
    model.model.layers[1].mlp.up_proj.weight.data[3, 200 - 128] += 0.1
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: group 0 of row 3 is not ternary"):
        to_ternary(model, recover=True)
    assert not any(isinstance(layer, TernaryLinear) for layer in model.modules()), "a refusal changes nothing"


def test_what_cannot_be_ternary_is_refused(model: MiniCPM) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: .* group_size 96"):
        quantization_aware(model, group_size=96)
    with pytest.raises(ValueError, match="grid 'octal'"):
        quantization_aware(model, grid="octal")
    assert not any(isinstance(layer, QuantizationAwareLinear) for layer in model.modules()), "a refusal changes nothing"
    with pytest.raises(ValueError, match=r"q_proj: trained on the grid 'five'"):
        to_ternary(quantization_aware(copy.deepcopy(model), grid="five"))
    with pytest.raises(ValueError, match="no nn.Linear"):
        to_ternary(to_ternary(copy.deepcopy(model)))
    model.model.layers[1].mlp.up_proj = nn.Linear(128, 256)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj has a bias"):
        to_ternary(model)
    with pytest.raises(ValueError, match='activations \'int4\': expected "float", "int8" or None'):
        TernaryLinear(matrix(16, 128), activations="int4")


def test_scales_stay_float16() -> None:
    layer = TernaryLinear(matrix(16, 128))
    scales = layer.scales.clone()
    for dtype in (torch.bfloat16, torch.float64):
        assert layer.to(dtype).scales.dtype == torch.float16
        assert torch.equal(layer.scales, scales)
    assert layer.codes.dtype == torch.uint8
    assert nn.Sequential(layer).bfloat16()[0] is layer
    assert torch.equal(layer.scales, scales)


def test_a_gradient_reaches_the_input() -> None:
    """Packed layers are for inference, but a head trained on top of them must not be cut off silently."""
    layer = TernaryLinear(matrix(16, 128))
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    dense = dequantize(layer.matrix().codes, layer.matrix().scales)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, -1))


@pytest.mark.parametrize("activations", [None, "float", "int8"])
def test_merged_layers_answer_like_their_parts(activations: str | None) -> None:
    parts = [TernaryLinear(matrix(rows, 256, seed=rows), activations) for rows in (64, 16, 16)]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [part(x) for part in parts]
        merged = MergedTernaryLinear(parts)
        for one, other, part in zip(merged(x), expected, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
            assert torch.equal(part(x), other) or activations == "float"
    assert [tuple(y.shape) for y in merged(x)] == [(3, 64), (3, 16), (3, 16)]


def test_merged_layers_share_memory_and_keep_names() -> None:
    parts = nn.ModuleDict({f"part{i}": TernaryLinear(matrix(32, 128, seed=i)) for i in range(2)})
    names = list(parts.state_dict())
    before = parts["part1"].codes.clone()
    module = nn.ModuleDict({"parts": parts, "merged": MergedTernaryLinear(list(parts.values()))})
    assert list(module.state_dict()) == [f"parts.{name}" for name in names]

    def shared() -> bool:
        merged = module["merged"]
        return all(
            part.codes.untyped_storage().data_ptr() == merged.codes.untyped_storage().data_ptr()
            and part.scales.untyped_storage().data_ptr() == merged.scales.untyped_storage().data_ptr()
            for part in parts.values()
        )

    assert shared()
    assert torch.equal(parts["part1"].codes, before)
    module.to(torch.bfloat16)
    module._apply(torch.clone)  # what a move to another device does to every buffer
    assert shared()
    assert module["merged"].scales.dtype == torch.float16
    changed = {name: tensor.clone().flip(0) for name, tensor in module.state_dict().items()}
    module.load_state_dict(changed)
    assert torch.equal(module["merged"].codes[2:], before.flip(0)), "loading a part loads the merged layer"


def test_only_layers_that_fit_together_are_merged() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        MergedTernaryLinear([TernaryLinear(matrix(16, 128)), TernaryLinear(matrix(16, 256))])


class Projections(nn.Module):
    """A module that asks for its projections to be merged, as the decoder's modules do."""

    merges: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj: nn.Module | None = None
        self.gate_proj, self.up_proj = (nn.Linear(128, 32, bias=False) for _ in range(2))


def test_reserved_attributes_are_filled() -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([Projections()])
    to_ternary(model)
    layer = model.model.layers[0]
    assert isinstance(layer.gate_up_proj, MergedTernaryLinear)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate, up = layer.gate_up_proj(x)
        assert torch.equal(gate, layer.gate_proj(x))
        assert torch.equal(up, layer.up_proj(x))


def test_the_decoder_multiplies_by_merged_projections(model: MiniCPM) -> None:
    layer = to_ternary(copy.deepcopy(model)).model.layers[0]
    assert isinstance(layer.self_attn.qkv_proj, MergedTernaryLinear)
    assert isinstance(layer.mlp.gate_up_proj, MergedTernaryLinear)
    x = torch.randn(1, 3, model.config.hidden_size)
    before = layer.mlp(x)
    layer.mlp.gate_up_proj = None  # the parts alone give the same
    torch.testing.assert_close(layer.mlp(x), before, atol=1e-6, rtol=1e-5)


def test_float_activations_are_not_rounded() -> None:
    """Asked for "float", the layer multiplies x itself: int8 activations would err by about half a percent."""
    layer = TernaryLinear(matrix(16, 128), activations="float")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ dequantize(layer.matrix().codes, layer.matrix().scales).double().T
    with torch.no_grad():
        assert relative_error(layer(x), exact) < 1e-5
        layer.activations = "int8"
        assert relative_error(layer(x), exact) > 1e-4


def test_a_group_size_without_a_kernel_is_refused_by_a_backend_asked_for_by_name(monkeypatch) -> None:
    pytest.importorskip("numba")
    layer = TernaryLinear(matrix(16, 64, 64))
    x = torch.ones(1, 64)
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    assert layer(x).shape == (1, 16)
    monkeypatch.setenv("MINICPM_BACKEND", "numba")
    with pytest.raises(RuntimeError, match="MINICPM_BACKEND=numba.*group_size 64"):
        layer(x)


def test_a_packed_model_runs_in_float64_and_under_another_config(model: MiniCPM, monkeypatch) -> None:
    monkeypatch.delenv("MINICPM_BACKEND", raising=False)
    packed = to_ternary(copy.deepcopy(model)).requires_grad_(False)
    ids = torch.arange(5)[None]
    other = with_config(packed, max_position_embeddings=64)
    assert other.config.max_position_embeddings == 64
    assert torch.equal(other(ids), packed(ids))
    assert other.model.layers[0].mlp.up_proj.codes.data_ptr() != packed.model.layers[0].mlp.up_proj.codes.data_ptr()
    assert isinstance(other.model.layers[0].self_attn.qkv_proj, MergedTernaryLinear)
    wide = packed.double()(ids)
    assert wide.dtype == torch.float64
    assert relative_error(packed.float()(ids), wide) < 0.05  # int8 activations


def test_loading_holds_one_unpacked_matrix_at_a_time(model: MiniCPM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a code is five times the file: all matrices at once would not fit where the packed model does."""
    tensors, metadata = ternary_state(to_ternary(copy.deepcopy(model)))
    unpack, codes, alive = packing.unpack, [], []

    def count(*arguments):
        matrix = unpack(*arguments)
        codes.append(weakref.ref(matrix))
        alive.append(sum(made() is not None for made in codes))
        return matrix

    monkeypatch.setattr(packing, "unpack", count)
    install_ternary(copy.deepcopy(model), packing.unpack_tensors(tensors, metadata))
    assert len(codes) == 7 * model.config.num_hidden_layers
    assert max(alive) <= 2  # the one before is freed when the next one is there
    alive.clear()
    kept = list(packing.unpack_tensors(tensors, metadata))
    assert max(alive) == len(kept)  # so the count notices
