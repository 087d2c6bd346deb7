"""The same weights in transformers' Llama: a MiniCPM decoder whose three multipliers are 1 is exactly a Llama decoder.

Granite (`formats.granite`) covers the others. transformers is optional; nothing else in the package needs it.
"""

from __future__ import annotations

from typing import Any

from minicpm_ref.config import ModelConfig
from minicpm_ref.formats.granite import granite_settings
from minicpm_ref.model import MiniCPM


def llama_settings(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of transformers' LlamaConfig. Raises ValueError for a decoder that is not a Llama."""
    if not config.is_llama:
        raise ValueError(
            f"scale_emb = {config.scale_emb}, scale_depth = {config.scale_depth}, dim_model_base = "
            f"{config.dim_model_base}: a Llama decoder has none of these multipliers and no sparse attention"
        )
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    shared = {name: value for name, value in granite_settings(config).items() if name not in multipliers}
    return shared | {"head_dim": config.head_dim}


def to_llama(model: MiniCPM) -> Any:
    """A transformers LlamaForCausalLM with the weights of `model`, in its dtype. Raises ImportError without
    transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(**llama_settings(model.config))).to(model.device, model.dtype).eval()
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    llama.load_state_dict(weights)
    return llama
