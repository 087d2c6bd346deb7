"""Published JSON files, read strictly: what `config.json` and its neighbours say, or a refusal in words.

A decoder with one wrong number still talks, only worse, and nobody would notice. So a file is either understood whole
or refused, naming the file, the key and the value:

- `architectures` and `model_type` decide the family. Tensor names alone do not: Llama, Mistral and Granite use the same
  ones with other multipliers.
- An absent key means what the *published configuration class* of that family says: for MiniCPM the three multipliers
  are 1 and the embeddings are tied; for Llama the multipliers do not exist and the output matrix is its own.
- A key that changes the computation in a way this package does not implement (another attention, experts, quantised
  tensors, a sliding window) is refused by name. Keys that do not change it (`use_cache`, `auto_map`) are ignored.
- Every number has a type and a range. JSON has no NaN and no infinity, and `"128"` is not 128.

Left out: YaRN, linear and Llama 3 scaling of RoPE. Sources: the configuration classes published with MiniCPM4
(openbmb/MiniCPM4-8B) and transformers' LlamaConfig; `rope_parameters` as transformers 5 writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = {"minicpm": "MiniCPMForCausalLM", "llama": "LlamaForCausalLM"}
"""`model_type` -> `architectures`: what this package can compute."""

MAX_BYTES = 64 * 2**20  # of a JSON file; the largest published index is under 1 MB, the largest tokenizer about 20 MB
MAX_SIZE = 2**31 - 1
_ABSENT = object()


def require(
    name: str,
    value: object,
    kind: type,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """`value` if it is a `kind` within low <= value <= high and value > above; else ValueError naming all of it.

    An int is accepted where a float is asked for, a bool is never a number, and NaN and infinity are never accepted.
    """
    wanted = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "an object"}
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise ValueError(f"{name} = {_shown(value)}: expected {wanted.get(kind, 'a list')}")
    if kind not in (int, float):
        return value
    bounds = (("at least", low), ("at most", high), ("more than", above))
    limits = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
    number = float(value) if abs(value) < 1e300 else math.inf  # type: ignore[arg-type]  # a JSON integer has no limit
    inside = math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)
    if not inside or (above is not None and number <= above):
        raise ValueError(f"{name} = {_shown(value)}: expected {' and '.join(limits) or 'a finite number'}")
    return number if kind is float else value


def require_list(name: str, value: object, kind: type, **limits: Any) -> list[Any]:
    """`value` if it is a list whose every element passes `require`; else ValueError naming the element."""
    return [require(f"{name}[{i}]", item, kind, **limits) for i, item in enumerate(require(name, value, list))]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file at `path`, with or without a byte-order mark.

    Raises FileNotFoundError, or ValueError naming the file, for anything else: no object, a repeated key, NaN, too
    many bytes, other encodings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (expected a {path.name})")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    try:
        return parse_json(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object `text`; raises ValueError for what JSON does not allow and for a key that occurs twice."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number that JSON knows")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return found

    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {_shown(content)}")
    return content


# ---- config.json -----------------------------------------------------------------------------------------------------

# Keys whose presence means another computation, with the values that mean none, and what they stand for.
_FOREIGN: dict[str, tuple[tuple[object, ...], str]] = {
    "quantization_config": ((None,), "quantised tensors (load the unquantised checkpoint or a GGUF file)"),
    "compression_config": ((None,), "quantised tensors (load the unquantised checkpoint or a GGUF file)"),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ((None, 0), "a mixture of experts"),
    ),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        ((None, 0), "multi-head latent attention"),
    ),
    **dict.fromkeys(("mixer_types", "linear_attn_config", "lightning_nope"), ((None,), "linear attention layers")),
    "layer_types": ((None,), "layers that differ"),
    "no_rope_layers": ((None, []), "layers without positions"),
    "sliding_window": ((None, 0), "a sliding window"),
    "partial_rotary_factor": ((None, 1, 1.0), "rotation of a part of each head"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias"), ((None, False), "biases")),
    **dict.fromkeys(("use_qk_norm", "qk_norm"), ((None, False), "normed queries and keys")),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"),
        ((None,), "Granite's multipliers"),
    ),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), ((None, 0), "capped logits")),
    **dict.fromkeys(("text_config", "vision_config", "audio_config"), ((None,), "a model of several parts")),
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def model_settings(content: object) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` that a published `config.json` means; `rope_scaling` and `sparse_config` stay
    objects of checked numbers.

    Raises ValueError naming the key and its value.
    """
    published: dict[str, Any] = require("config.json", content, dict)
    family = _family(published)
    _refuse_foreign(published)
    missing = [name for name in (*_SIZES, "max_position_embeddings") if published.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    settings: dict[str, Any] = {
        name: require(name, published[name], int, low=1, high=MAX_SIZE)
        for name in (*_SIZES, "max_position_embeddings")
    }
    read = _reader(published)
    heads = settings["num_attention_heads"]
    settings["num_key_value_heads"] = read("num_key_value_heads", heads, int, low=1, high=MAX_SIZE)
    if settings["hidden_size"] % heads and published.get("head_dim") is None:
        raise ValueError(f"hidden_size = {settings['hidden_size']} is not a multiple of num_attention_heads = {heads}")
    settings["head_dim"] = read("head_dim", settings["hidden_size"] // heads, int, low=1, high=MAX_SIZE)
    settings["rms_norm_eps"] = read("rms_norm_eps", 1e-6, float, low=0, high=1)
    settings["initializer_range"] = read("initializer_range", 0.02, float, low=0, high=1e6)
    settings["tie_word_embeddings"] = read("tie_word_embeddings", family == "minicpm", bool)
    settings["bos_token_id"] = read("bos_token_id", 1, int, low=0, high=settings["vocab_size"] - 1)
    eos = published.get("eos_token_id")
    settings["eos_token_id"] = token_ids("eos_token_id", 2 if eos is None else eos, settings["vocab_size"])
    if family == "minicpm":
        settings["scale_emb"] = read("scale_emb", 1.0, float, above=0)
        settings["scale_depth"] = read("scale_depth", 1.0, float, above=0)
        settings["dim_model_base"] = read("dim_model_base", 1, int, low=1, high=MAX_SIZE)
    else:  # a Llama decoder is the one whose three multipliers are 1, whatever a converted MiniCPM left in the file
        settings["scale_emb"] = 1.0
        settings["scale_depth"] = math.sqrt(settings["num_hidden_layers"])
        settings["dim_model_base"] = settings["hidden_size"]
    settings["rope_theta"], settings["rope_scaling"] = _rope(published, settings)
    sparse = published.get("sparse_config")
    if sparse is not None:
        settings["sparse_config"] = _sparse(sparse)
    return settings


def token_ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of ids as a tuple without repetitions; raises ValueError for one outside the vocabulary."""
    ids = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(require(name, i, int, low=0, high=vocab_size - 1) for i in ids))


def _reader(published: Mapping[str, Any]) -> Any:
    def read(name: str, default: object, kind: type, **limits: Any) -> Any:
        value = published.get(name)
        return default if value is None else require(name, value, kind, **limits)

    return read


def _family(published: Mapping[str, Any]) -> str:
    """"minicpm" or "llama"; a file that names no family at all is taken for ours."""
    model_type = published.get("model_type")
    architectures = published.get("architectures") or []
    if model_type is not None and (not isinstance(model_type, str) or model_type not in FAMILIES):
        raise ValueError(f"model_type = {model_type!r}: expected one of {', '.join(FAMILIES)}")
    names = {name: kind for kind, name in FAMILIES.items()}
    kinds = {model_type} if model_type is not None else set()
    for name in require_list("architectures", architectures, str):
        if name not in names:
            raise ValueError(f"architectures = {architectures!r}: expected one of {', '.join(names)}")
        kinds.add(names[name])
    if len(kinds) > 1:
        raise ValueError(f"model_type = {model_type!r} and architectures = {architectures!r} contradict each other")
    return kinds.pop() if kinds else "minicpm"


def _refuse_foreign(published: Mapping[str, Any]) -> None:
    if published.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act = {published['hidden_act']!r}: expected 'silu'")
    for name, (harmless, meaning) in _FOREIGN.items():
        value = published.get(name)
        if name == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if name == "sliding_window" and published.get("use_sliding_window") is False:
            continue
        if not any(value is known or (type(value) is type(known) and value == known) for known in harmless):
            raise ValueError(f"{name} = {_shown(value)}: {meaning}, which this package does not implement")


def _rope(published: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and LongRoPE's settings. transformers 5 writes both into `rope_parameters`, older files theta beside
    `rope_scaling`; the same number may stand in several places, two different ones are refused."""
    places: list[tuple[str, Mapping[str, Any]]] = [("", published)]
    for key in ("rope_scaling", "rope_parameters"):
        if published.get(key) is not None:
            places.append((f"{key}.", require(key, published[key], dict)))

    def agreed(name: str, *others: str) -> Any:
        found = {
            place + key: inside[key]
            for place, inside in places
            for key in (name, *others)
            if inside.get(key) is not None and not (place == "" and key in ("type", "rope_type", "factor"))
        }
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"{' and '.join(f'{k} = {_shown(v)}' for k, v in found.items())} contradict each other")
        return values[0] if values else None

    theta = agreed("rope_theta")
    theta = 10000.0 if theta is None else float(require("rope_theta", theta, float, above=0))
    partial = agreed("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor = {partial!r}: rotation of a part of each head is not implemented")
    kind = agreed("rope_type", "type")
    if kind in (None, "default"):
        return theta, None
    if kind != "longrope":
        raise ValueError(f"rope_type = {kind!r}: expected 'longrope' or 'default'")
    keys = ("short_factor", "long_factor", "original_max_position_embeddings")
    missing = [key for key in keys if agreed(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(f'rope_scaling.{key}' for key in missing)}")
    scaling: dict[str, Any] = {}
    pairs = settings["head_dim"] // 2
    for name in keys[:2]:
        factors = agreed(name)
        scaling[name] = tuple(
            float(f) for f in require_list(f"rope_scaling.{name}", factors, float, above=0, high=1e9)
        )
        if len(scaling[name]) != pairs:
            raise ValueError(f"rope_scaling.{name} holds {len(factors)} numbers: expected head_dim / 2 = {pairs}")
    original = agreed("original_max_position_embeddings")
    name = "rope_scaling.original_max_position_embeddings"
    scaling["original_max_position_embeddings"] = require(name, original, int, low=2, high=MAX_SIZE)
    _check_derived(agreed, settings["max_position_embeddings"] / original, original)
    return theta, scaling


def _check_derived(agreed: Any, scale: float, original: int) -> None:
    """`factor` and `attention_factor` follow from the two lengths; a file that says otherwise is refused."""
    derived = {"factor": scale, "attention_factor": math.sqrt(1 + math.log(max(scale, 1)) / math.log(original))}
    for name, expected in derived.items():
        value = agreed(name)
        given = expected if value is None else require(f"rope_scaling.{name}", value, float)
        if not math.isclose(given, expected, rel_tol=1e-6):
            raise ValueError(
                f"rope_scaling.{name} = {value}: expected {expected:g}, which follows from max_position_embeddings "
                "and original_max_position_embeddings"
            )


_SPARSE = {
    **dict.fromkeys(("kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk"), int),
    "dense_len": int,
    **dict.fromkeys(("use_nope", "exact_lse", "local_inclusive"), bool),
}


def _sparse(content: object) -> dict[str, Any]:
    published: dict[str, Any] = require("sparse_config", content, dict)
    limits = {"low": -1, "high": MAX_SIZE}
    return {
        name: require(f"sparse_config.{name}", published[name], kind, **(limits if kind is int else {}))
        for name, kind in _SPARSE.items()
        if published.get(name) is not None
    }
