"""Fresh models for tests."""

from __future__ import annotations

import torch

from minicpm_ref.config import ModelConfig
from minicpm_ref.model import MiniCPM


def fresh_model(config: ModelConfig, seed: int) -> MiniCPM:
    """A model with random weights throughout: `init_weights` starts an output matrix at zero, which hides mistakes."""
    model = MiniCPM(config).init_weights(seed)
    if not config.tie_word_embeddings:
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight, std=config.initializer_range, generator=generator)
    return model.eval()
