"""The same weights in Hugging Face transformers: an independent decoder to compare with.

transformers' Granite has MiniCPM's four multipliers under other names, so with them mapped the two must agree to
rounding. transformers is optional; nothing else in the package needs it.
"""

from __future__ import annotations

from typing import Any

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM


def granite_settings(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of transformers' GraniteConfig that describe the same decoder."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        original = config.rope_scaling.original_max_position_embeddings
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(config.rope_scaling.short_factor),
            "long_factor": list(config.rope_scaling.long_factor),
            "factor": config.max_position_embeddings / original,
            "original_max_position_embeddings": original,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
        "embedding_multiplier": config.scale_emb,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
        "attention_multiplier": config.head_dim**-0.5,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": None,
    }


def to_granite(model: MiniCPM) -> Any:
    """A transformers GraniteForCausalLM with the weights of `model`, in its dtype. Raises ImportError without
    transformers."""
    from transformers import GraniteConfig, GraniteForCausalLM

    granite = GraniteForCausalLM(GraniteConfig(**granite_settings(model.config))).to(model.device, model.dtype).eval()
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    granite.load_state_dict(weights)
    return granite
