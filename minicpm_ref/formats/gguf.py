"""GGUF, the file of llama.cpp: weights in many quantised types, the vocabulary and the chat template in one file.

A file is a header (keys with values, then name, shape, type and place of each tensor) and a block of data. The header
is read here, by hand: the reader of the `gguf` package turns each of the 150,000 strings of a vocabulary into arrays
and takes seconds for it. What it does well is the arithmetic of some thirty quantised types (`gguf.dequantize`), so
that is not written again. Ternary matrices (TQ1_0, TQ2_0) never become floats: their codes go into packed layers.

Three things differ from the published layout. Names are others (`blk.0.attn_q` for `model.layers.0.self_attn.q_proj`).
Rows of q and k are ordered so that the two numbers that RoPE rotates are neighbours, where the published layout has
them half a head apart. And MiniCPM's multipliers are written as they are applied: scale_depth / sqrt(L) for
scale_depth.

Left out: architectures other than `llama` and `minicpm`, big-endian files, models split over several files. Sources:
the GGUF specification (ggml/docs/gguf.md); the layouts of TQ1_0 and TQ2_0 as `gguf.quants` computes them; llama.cpp's
conversion of both architectures.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.formats.folder import Contents
from minicpm_ref.formats.gguf_vocabulary import read_vocabulary
from minicpm_ref.lowbit import TernaryTensor
from minicpm_ref.published import require

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TERNARY_BLOCK = 256  # weights that share a scale in TQ1_0 and TQ2_0
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: its shape as torch writes it ([out, in]), ggml's number of its type, its first byte."""

    shape: tuple[int, ...]
    kind: int
    start: int


class Header:
    """The header of the GGUF file at `path`: `fields` {key: value} and `tensors` {name: TensorEntry}.

    Raises ValueError naming the file for one that is damaged or of another kind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.stat().st_size:
            raise ValueError(f"{path}: an empty file")
        with open(path, "rb") as file:
            self._data = np.memmap(file, np.uint8, "r")
        self._at = 0
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: not a GGUF file, or a damaged one (at byte {self._at}: {error!r})") from error

    def _parse(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError(f"{self.path}: does not begin with 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version}, expected 2 or 3 (little-endian)")
        count, fields = self._number("Q"), self._number("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            self.fields[key] = self._value(self._number("I"))
        places = []
        for _ in range(count):
            name, dimensions = self._string(), self._number("I")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            places.append((name, shape, self._number("I"), self._number("Q")))
        alignment = require("general.alignment", self.fields.get("general.alignment", 32), int, low=1, high=2**20)
        begin = -(-self._at // alignment) * alignment
        self.tensors = {name: TensorEntry(shape, kind, begin + offset) for name, shape, kind, offset in places}
        if len(self.tensors) != count:
            raise ValueError(f"{self.path}: two tensors have the same name")

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise struct.error(f"{size} bytes wanted, {len(self._data) - self._at} left")
        self._at += size
        return self._data[self._at - size : self._at].tobytes()

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        inner, size = self._number("I"), self._number("Q")
        if inner in (_STRING, _ARRAY):
            return [self._value(inner) for _ in range(size)]
        form = _SCALARS[inner]
        return list(struct.unpack(f"<{size}{form}", self._take(size * struct.calcsize(f"<{form}"))))

    def blocks(self, name: str) -> tuple[NDArray[np.uint8], str]:
        """A tensor's bytes [..., bytes of a row] and the name of its type."""
        import gguf

        entry = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(entry.kind)
            width = gguf.quant_shape_to_byte_shape(entry.shape, kind)
        except ValueError as error:
            raise ValueError(f"{self.path}: tensor {name!r}: {error}") from error
        size = math.prod(width)
        if entry.start + size > len(self._data):
            raise ValueError(f"{self.path}: tensor {name!r} ends {entry.start + size - len(self._data)} bytes too late")
        return self._data[entry.start : entry.start + size].reshape(width), kind.name

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, whatever type it is stored in."""
        import gguf

        data, kind = self.blocks(name)
        try:
            floats = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name!r} is {kind}, which the gguf package cannot read") from error
        return torch.from_numpy(np.array(floats, np.float32)).view(self.tensors[name].shape)


def read_gguf(path: str | Path) -> Contents:
    """What a GGUF file of a Llama or MiniCPM decoder holds, under published names and in the published order.

    Raises RuntimeError without the `gguf` package, ValueError naming the file and the key or tensor.

    >>> contents = read_gguf("model.gguf")
    """
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("GGUF files need the package gguf (pip install 'minicpm_ref[gguf]')")
    header = Header(path)
    try:
        config = _config(header)
        tokenizer = read_vocabulary(header.fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ternary, tensors = [], {}
    for name, entry in header.tensors.items():
        if name.startswith("rope_factors_"):
            continue  # in the config
        published = _published_name(header, name)
        if entry.kind in _ternary_kinds() and "_proj." in published:
            ternary.append((name, published))
        else:
            tensors[published] = _reordered(header.tensor(name), published, config)
    matrices = ((new.removesuffix(".weight"), _ternary(header, old, new, config)) for old, new in ternary)
    return Contents(Path(path), config, tensors, matrices, tokenizer)


def _published_name(header: Header, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if suffix == "weight" and stem in NAMES:
        return f"{NAMES[stem]}.weight"
    match stem.split("."):
        case ["blk", number, part] if suffix == "weight" and number.isdecimal() and part in LAYER_NAMES:
            return f"model.layers.{int(number)}.{LAYER_NAMES[part]}.weight"
    raise ValueError(f"{header.path}: tensor {name!r} belongs to no part of a Llama or MiniCPM decoder")


def _reordered(rows: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Undo the interleaving of rotary pairs in the rows of q and k: (pair, half) back to (half, pair)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return rows
    return rearrange(rows, "(h pair half) c -> (h half pair) c", half=2, pair=config.head_dim // 2).contiguous()


# ---- ternary types ---------------------------------------------------------------------------------------------------


def _ternary_kinds() -> set[int]:
    import gguf

    return {gguf.GGMLQuantizationType.TQ1_0.value, gguf.GGMLQuantizationType.TQ2_0.value}


def _ternary(header: Header, name: str, published: str, config: ModelConfig) -> TernaryTensor:
    """A TQ1_0 or TQ2_0 matrix as codes and scales. Groups of 256 are two groups of 128 with the same scale, and 128 is
    what the kernels are compiled for."""
    data, kind = header.blocks(name)
    rows, columns = header.tensors[name].shape
    blocks = data.reshape(-1, 54 if kind == "TQ1_0" else 66)
    scales = blocks[:, -2:].copy().view(np.float16)  # [blocks, 1]
    codes = (_trits if kind == "TQ1_0" else _pairs)(blocks[:, :-2])
    if codes.max(initial=0) > 2:
        raise ValueError(f"{header.path}: tensor {name!r} holds a code that is not -1, 0 or 1")
    signed = (codes.astype(np.int8) - 1) * np.where(scales < 0, -1, 1).astype(np.int8)
    codes_out = torch.from_numpy(signed).view(rows, columns)
    scales_out = torch.from_numpy(np.abs(scales)).view(rows, columns // TERNARY_BLOCK).repeat_interleave(2, dim=1)
    codes_out, scales_out = (_reordered(part, published, config) for part in (codes_out, scales_out))
    return TernaryTensor(codes_out, scales_out.contiguous(), TERNARY_BLOCK // 2)


def _pairs(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """TQ2_0: two bits a code; byte j of a half holds codes j, j + 32, j + 64 and j + 96 of its 128."""
    halves = blocks.reshape(-1, 2, 1, 32)
    return ((halves >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3).astype(np.uint8).reshape(-1, TERNARY_BLOCK)


def _trits(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """TQ1_0: five codes a byte, as the fraction 0.d1 d2 d3 d4 d5 in base 3: times 3^n, without its whole part, its next
    digit is the whole part of three times the rest. Bytes come in strides of 32, 16 and, with four codes, 4."""
    digits = []
    for start, stop, powers in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        shifted = blocks[:, None, start:stop] * (3 ** np.arange(powers)).astype(np.uint8)[:, None]  # wraps at 256
        digits.append(((shifted.astype(np.uint16) * 3) >> 8).reshape(len(blocks), -1))
    return np.concatenate(digits, axis=1).astype(np.uint8)


# ---- config ----------------------------------------------------------------------------------------------------------


def _config(header: Header) -> ModelConfig:
    """The configuration that the keys and tensors of a file describe, read by the rules of a published one."""
    fields = header.fields
    family = require("general.architecture", fields.get("general.architecture"), str)
    if family not in ("llama", "minicpm"):
        raise ValueError(f"general.architecture = {family!r}: expected 'llama' or 'minicpm'")

    def get(name: str) -> Any:
        return fields.get(f"{family}.{name}")

    for name in ("expert_count", "attention.sliding_window"):
        if get(name):
            raise ValueError(f"{family}.{name} = {get(name)!r}: not implemented by this package")
    if "rope_freqs.weight" in header.tensors:
        raise ValueError("tensor 'rope_freqs.weight': Llama 3's scaling of RoPE is not implemented")
    layers = require(f"{family}.block_count", get("block_count"), int, low=1, high=2**31 - 1)
    width = require(f"{family}.embedding_length", get("embedding_length"), int, low=1, high=2**31 - 1)
    published = {
        "model_type": family,
        "vocab_size": header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else None,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length") or get("rope.dimension_count"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(get("rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            fields[key]
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if fields.get(key) is not None
        ]
        or None,
    }
    if family == "minicpm":  # absent keys are those of the first files, from before the keys existed
        depth, divisor = get("residual_scale"), get("logit_scale")
        published["scale_emb"] = 12.0 if get("embedding_scale") is None else _short(get("embedding_scale"))
        published["scale_depth"] = 1.4 if depth is None else _short(depth * math.sqrt(layers))
        published["dim_model_base"] = 256 if divisor is None else round(width / divisor)
    kind = get("rope.scaling.type")
    if kind not in (None, "none"):
        published["rope_scaling"] = {"rope_type": kind} | _long_rope(header, get)
    return ModelConfig.from_dict(published)


def _long_rope(header: Header, get: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"original_max_position_embeddings": get("rope.scaling.original_context_length")}
    for name in ("short", "long"):
        if f"rope_factors_{name}.weight" in header.tensors:
            found[f"{name}_factor"] = [_short(f) for f in header.tensor(f"rope_factors_{name}.weight").tolist()]
    return found


def _short(value: Any) -> Any:
    """A float32 from the file as the decimal number that it was made from: 1e-05, not 9.999999747378752e-06."""
    return float(np.format_float_positional(np.float32(value))) if isinstance(value, float) else value
