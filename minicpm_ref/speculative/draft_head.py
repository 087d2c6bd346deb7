"""The EAGLE-3 draft head: one decoder layer that guesses what the target will say, from what the target has thought.

Problem. A separate small model that drafts must understand the text anew, and knows less than the target.

Idea. The target's residual streams already hold its thoughts. Take three of them (low, middle, high) at token t,
project them to one vector (`fc`), put the embedding of the *next* token t + 1 beside it, and let one decoder layer
guess token t + 2. To guess further, feed the layer's own output back in place of the projected streams: that is the
whole recurrence. Where most heads go silently wrong:

- a row pairs the features of token t with the embedding of token t + 1, at rotary position t;
- features go through `fc`, a fed-back state does not, and it is fed back before the final norm;
- the layer's input is [normed embedding, normed feature], embedding first; the residual is the feature without norm;
- the layer is a plain Llama layer even under MiniCPM: no muP multiplier, no division of logits. The streams carry the
  target's multipliers already, and a norm stands before everything that could feel a constant factor;
- draft logits cover a smaller vocabulary; `d2t` holds *offsets*: draft id i is target id i + d2t[i].

Published checkpoints load by their own names (`midlayer.*`, also `layers.0.*`), safetensors only.

Left out: heads of more than one layer, norms on the streams before `fc` (EAGLE-3.1), the older EAGLE-1 heads.
Sources: EAGLE-3, arXiv 2503.01840; the tensor names of SafeAILab/EAGLE; how vLLM and SGLang run MiniCPM4.1's head.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minicpm_ref.config import ModelConfig
from minicpm_ref.files import replacing, write_text
from minicpm_ref.model import MiniCPM, RMSNorm, SwiGLU
from minicpm_ref.ops import apply_rope, rope_angles, rope_attention_factor
from minicpm_ref.published import read_json, require, require_list

TAPS = 3  # streams that are laid side by side


@dataclass(frozen=True)
class DraftHeadConfig:
    """Sizes of a head. `decoder`: its one Llama layer, whose vocabulary is the target's. `layers`: the target's streams
    that it sees, as `MiniCPM.hidden_states` counts them (i is the input of layer i). Raises ValueError for others than
    three ascending ones."""

    decoder: ModelConfig
    draft_vocab_size: int
    layers: tuple[int, ...]
    target_hidden_size: int

    def __post_init__(self) -> None:
        if len(self.layers) != TAPS or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers = {list(self.layers)}: expected {TAPS} different layers in ascending order")
        if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
            raise ValueError(f"draft_vocab_size = {self.draft_vocab_size}: expected 1 to {self.decoder.vocab_size}")
        if not self.decoder.is_llama or self.decoder.num_hidden_layers != 1:
            raise ValueError("decoder: expected one Llama layer, whose multipliers are all 1")

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int | None = None, layers: tuple[int, ...] | None = None
    ) -> DraftHeadConfig:
        """A head as wide as `target`, with a layer like the target's."""
        sizes = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
        sizes += ["max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "head_dim"]
        one_llama_layer: dict[str, Any] = {
            "num_hidden_layers": 1,
            "scale_emb": 1.0,
            "scale_depth": 1.0,
            "initializer_range": 0.02,
        }
        decoder = ModelConfig(
            **{name: getattr(target, name) for name in sizes}, **one_llama_layer, dim_model_base=target.hidden_size
        )
        return cls(
            decoder,
            target.vocab_size if draft_vocab_size is None else draft_vocab_size,
            default_layers(target.num_hidden_layers) if layers is None else layers,
            target.hidden_size,
        )

    @classmethod
    def from_dict(cls, published: Mapping[str, Any], target: ModelConfig) -> DraftHeadConfig:
        """Read a published head's `config.json`. RoPE is the head's own (base 10000 unless the file says another), only
        a missing `rope_scaling` is the target's. Raises ValueError naming the key and its value."""
        refused = {"fc_norm": (False,), "norm_output": (True,), "norm_before_residual": (False,)}
        for key, known in {**refused, "num_hidden_layers": (1,)}.items():
            if published.get(key) not in (None, *known):
                raise ValueError(f"{key} = {published[key]!r}: expected {known[0]!r}, others are not implemented")
        own = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
        own |= {"rms_norm_eps", "vocab_size", "rope_theta", "rope_scaling", "rope_parameters"}
        own |= {"max_position_embeddings", "hidden_act", "attention_bias", "mlp_bias"}
        decoder = ModelConfig.from_dict(
            {"max_position_embeddings": target.max_position_embeddings}
            | {key: published[key] for key in own if key in published}
            | {"model_type": "llama", "num_hidden_layers": 1}
        )
        if decoder.vocab_size != target.vocab_size:
            raise ValueError(f"vocab_size = {decoder.vocab_size}: the target's is {target.vocab_size}")
        if published.get("rope_scaling") is None and published.get("rope_parameters") is None:
            scaling, longest = target.rope_scaling, target.max_position_embeddings
            if scaling is not None and target.head_dim == decoder.head_dim:
                decoder = dataclasses.replace(decoder, rope_scaling=scaling, max_position_embeddings=longest)
        vocabulary = published.get("draft_vocab_size")
        width = published.get("target_hidden_size")
        return cls(
            decoder,
            decoder.vocab_size if vocabulary is None else require("draft_vocab_size", vocabulary, int, low=1),
            _read_layers(published, target.num_hidden_layers),
            target.hidden_size if width is None else require("target_hidden_size", width, int, low=1),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that `from_dict` reads back to an equal object."""
        names = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
        names += ["rms_norm_eps", "vocab_size", "rope_theta", "max_position_embeddings"]
        out: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu"}
        out |= {name: getattr(self.decoder, name) for name in names} | {"num_hidden_layers": 1}
        if self.decoder.rope_scaling is not None:
            out["rope_scaling"] = self.decoder.to_dict()["rope_scaling"]
        return out | {
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(self.layers),  # inputs of these layers, as vLLM counts
            "tie_word_embeddings": False,
        }


def default_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """The three streams that published heads use, inputs of layers 2, N / 2 and N - 3.

    Raises ValueError for fewer than seven layers, where these would repeat or run backwards.

    >>> default_layers(32)
    (2, 16, 29)
    """
    if num_hidden_layers < 7:
        raise ValueError(f"a target of {num_hidden_layers} layers has no default streams: name three, e.g. (1, 2, 3)")
    return 2, num_hidden_layers // 2, num_hidden_layers - 3


def _read_layers(published: Mapping[str, Any], num_hidden_layers: int) -> tuple[int, ...]:
    """Two conventions exist: the flat key counts inputs of layers, `eagle_config` counts outputs."""
    key = "eagle_aux_hidden_state_layer_ids"
    flat, nested = published.get(key), (published.get("eagle_config") or {}).get(key)
    found = [tuple(require_list(key, flat, int, low=0))] if flat is not None else []
    if nested is not None:
        found.append(tuple(layer + 1 for layer in require_list(f"eagle_config.{key}", nested, int, low=-1)))
    if len(set(found)) > 1:
        raise ValueError(f"{key} = {flat} and eagle_config.{key} = {nested} contradict each other (inputs and outputs)")
    layers = found[0] if found else default_layers(num_hidden_layers)
    if layers and max(layers) > num_hidden_layers:
        raise ValueError(f"{key} = {list(layers)} (inputs): the target has {num_hidden_layers} layers")
    return layers


class Memory(NamedTuple):
    """Keys and values [B, G, S, D] of a head's earlier rows."""

    keys: Tensor
    values: Tensor

    def append(self, other: Memory) -> Memory:
        """These rows, then those of `other`."""
        return Memory(torch.cat((self.keys, other.keys), 2), torch.cat((self.values, other.values), 2))

    def rows(self, chosen: slice) -> Memory:
        """A part of the rows."""
        return Memory(self.keys[:, :, chosen], self.values[:, :, chosen])


class _Attention(nn.Module):
    """The four matrices under their published names; q, k and v read the doubled width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.mlp = SwiGLU(config)


class DraftHead(nn.Module):
    """An EAGLE-3 head; `state_dict` uses the published names. `embedding` [V, C] is the target's table, frozen and not
    part of the head, unless the checkpoint brings its own as `embed_tokens.weight`."""

    d2t: Tensor

    def __init__(self, config: DraftHeadConfig, embedding: Tensor):
        super().__init__()
        self.config = config
        width = config.decoder.hidden_size
        self.fc = nn.Linear(TAPS * config.target_hidden_size, width, bias=False)
        self.midlayer = _Layer(config.decoder)
        self.norm = RMSNorm(width, config.decoder.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.embedding = embedding.detach()

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's streams that the head sees."""
        return self.config.layers

    def forward(
        self,
        tokens: Tensor,
        features: Tensor,
        positions: Tensor,
        past: Memory | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """States [B, T, C] of T rows, and the memory with them.

        tokens [B, T]: target ids. features [B, T, 3C'] from the target, or [B, T, C] states of this head. positions
        [T]: of the features. `past` holds S rows that every row sees; mask [T, S + T] (bool) says which rows see which,
        None: each sees those before it and itself.
        """
        inputs, residual = self.inputs(tokens, features)
        q, own = self.rotated(inputs, positions)
        memory = own if past is None else past.append(own)
        if mask is None:
            rows, total = tokens.shape[1], memory.keys.shape[2]
            mask = torch.ones(rows, total, dtype=torch.bool, device=tokens.device).tril(total - rows)
        attended = nn.functional.scaled_dot_product_attention(
            q, memory.keys, memory.values, attn_mask=mask, enable_gqa=True
        )
        return self.finish(residual, attended), memory

    def inputs(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input [B, T, 2C], embedding half first, and its residual [B, T, C]."""
        layer, target_width = self.midlayer, TAPS * self.config.target_hidden_size
        if features.shape[-1] not in (target_width, self.config.decoder.hidden_size):
            raise ValueError(
                f"features are {features.shape[-1]} wide: expected {target_width} (the target's streams) or "
                f"{self.config.decoder.hidden_size} (this head's states)"
            )
        residual = self.fc(features) if features.shape[-1] == target_width else features
        embedded = nn.functional.embedding(tokens, self.embedding)
        return torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(residual)), -1), residual

    def rotated(self, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Memory]:
        """Queries [B, H, T, D], keys and values [B, G, T, D] of inputs [B, T, 2C] at `positions` [T]."""
        config, attention = self.config.decoder, self.midlayer.self_attn
        scaling = config.rope_scaling
        long = positions >= (scaling.original_max_position_embeddings if scaling is not None else 2**31)
        angles = rope_angles(config, positions, long)  # computed, so that no table can end
        cos, sin = angles.cos() * rope_attention_factor(config), angles.sin() * rope_attention_factor(config)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (rearrange(p(inputs), "b t (h d) -> b h t d", d=config.head_dim) for p in projections)
        return apply_rope(q, cos, sin), Memory(apply_rope(k, cos, sin), v)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """States [B, T, C] from the residual [B, T, C] and what attention found [B, H, T, D]."""
        x = residual + self.midlayer.self_attn.o_proj(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.midlayer.mlp(self.midlayer.post_attention_layernorm(x))

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., Vd] over the draft vocabulary of states [..., C]."""
        return self.lm_head(self.norm(states))

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Target ids of draft ids, any shape."""
        return draft_ids + self.d2t[draft_ids]

    @property
    def vocabulary(self) -> Tensor:
        """The target ids [Vd] that the head can say, ascending."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


def load_head(folder: str | Path, target: MiniCPM) -> DraftHead:
    """The head in `folder` (`config.json`, `model.safetensors`) for `target`, on its device and in its dtype.

    Raises FileNotFoundError or ValueError; missing, extra and misshapen tensors are one error that lists them all.

    >>> model, tokenizer = load()
    >>> head = load_head("path/of/the/head", model)
    """
    folder = Path(folder)
    published = read_json(folder / "config.json")
    try:
        config = DraftHeadConfig.from_dict(published, target.config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    path = folder / "model.safetensors"
    if not path.is_file():
        pickled = any(folder.glob("*.bin"))
        advice = (
            " (the .bin beside it is a pickle, which can run code, and is never read: convert it)" if pickled else ""
        )
        raise FileNotFoundError(f"{path}: no such file{advice}")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    tensors = {_native(name): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise ValueError(f"{path}: a tensor stands there under two names")
    try:
        return _assemble(config, tensors, target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_head(head: DraftHead, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `head` under the published names; the target's embedding is not stored."""
    folder = Path(folder)
    tensors = {
        name: (tensor if name == "d2t" else tensor.to(dtype)).detach().cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    vocabulary = head.vocabulary.cpu()
    tensors["t2d"] = torch.zeros(head.config.decoder.vocab_size, dtype=torch.bool).index_fill_(0, vocabulary, True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    content = head.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(content, indent=2))


def _native(name: str) -> str:
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _assemble(config: DraftHeadConfig, tensors: dict[str, Tensor], target: MiniCPM) -> DraftHead:
    """A head of `tensors`, each of which is checked."""
    table = tensors.pop("embed_tokens.weight", None)
    shared = target.model.embed_tokens.weight
    width = config.decoder.hidden_size
    problems = []
    if table is None and shared.shape[1] != width:
        problems.append(f"embed_tokens.weight is missing, and the target's is {shared.shape[1]} wide, not {width}")
    if table is not None and tuple(table.shape) != (config.decoder.vocab_size, width):
        problems.append(f"embed_tokens.weight is {list(table.shape)}")
    if config.target_hidden_size != target.config.hidden_size:
        found = target.config.hidden_size
        problems.append(f"target_hidden_size = {config.target_hidden_size}, the target's is {found}")
    with torch.device("meta"):
        head = DraftHead(config, shared)
    offsets = _check_vocabulary(config, tensors.pop("d2t", None), tensors.pop("t2d", None), problems)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if name != "d2t"}
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(f"{name} is {list(tensor.shape)}, config.json implies {list(shape)}")
        if tensor is not None and not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected floating point")
    if problems:
        raise ValueError("; ".join(problems))
    dense = {name: tensor.to(target.device, target.dtype) for name, tensor in tensors.items()}
    head.load_state_dict(dense | {"d2t": offsets.to(target.device)}, assign=True)
    head.embedding = (shared if table is None else table.to(target.device, target.dtype)).detach()
    return head.requires_grad_(False).eval()


def _check_vocabulary(
    config: DraftHeadConfig, offsets: Tensor | None, members: Tensor | None, problems: list[str]
) -> Tensor:
    """`d2t`, or zeros for a head of the whole vocabulary; adds to `problems` what is wrong with it."""
    size, full = config.draft_vocab_size, config.decoder.vocab_size
    if offsets is None:
        if size < full:
            problems.append(f"d2t is missing, although the head knows {size} of {full} tokens")
        return torch.zeros(size, dtype=torch.int64)
    if tuple(offsets.shape) != (size,) or offsets.is_floating_point():
        problems.append(f"d2t is {offsets.dtype} {list(offsets.shape)}, expected integers [{size}]")
        return torch.zeros(size, dtype=torch.int64)
    ids = torch.arange(size) + offsets.long()
    if bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= full:
        problems.append(f"d2t: i + d2t[i] must ascend from 0 or more and stay below {full} (d2t holds offsets)")
    elif members is not None and not torch.equal(members.nonzero().flatten(), ids):
        problems.append("t2d marks other tokens than d2t")
    return offsets.long()
