"""minicpm_ref: what makes MiniCPM4.1-8B fast on small devices, small enough to read.

>>> from minicpm_ref import load
>>> model, tokenizer = load()                      # embedded weights, a folder, or a hub id
>>> logits = model(input_ids)                      # [B, T] -> [B, T, V]
"""

from minicpm_ref.cache import KVCache
from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.model import MiniCPM

__version__ = "0.1.0"
__all__ = ["KVCache", "MiniCPM", "ModelConfig", "SparseConfig"]
