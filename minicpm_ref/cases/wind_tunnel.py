"""Cases of the wind tunnel: configurations whose multiplied parameters are counted.

Every factor of the count differs from every other somewhere: query and key-value width, a head dim that is not width /
heads, layers, vocabulary, tied or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minicpm_ref.config import ModelConfig


@dataclass(frozen=True)
class MultipliedParametersCase:
    """One row: `multiplied_parameters(config)`."""

    name: str
    config: ModelConfig

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[ModelConfig]:
        """(config,); neither a dtype nor a device matters."""
        return (self.config,)


_BASE = ModelConfig(4096, 256, 4, 4, 1, 576, 512)
MULTIPLIED_PARAMETERS: tuple[MultipliedParametersCase, ...] = (
    MultipliedParametersCase("base", _BASE),
    MultipliedParametersCase("tied", replace(_BASE, tie_word_embeddings=True)),
    MultipliedParametersCase("one-layer", replace(_BASE, num_hidden_layers=1)),
    MultipliedParametersCase("no-groups", replace(_BASE, num_key_value_heads=4)),
    MultipliedParametersCase("narrow", ModelConfig(480, 16, 2, 1, 1, 48, 64)),
    MultipliedParametersCase("prime", ModelConfig(257, 22, 3, 11, 1, 13, 64)),
)
