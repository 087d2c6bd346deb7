"""minicpm_ref: what makes MiniCPM4.1-8B fast on small devices, small enough to read.

>>> from minicpm_ref import load, generate
>>> model, tokenizer = load()  # the embedded weights; or a folder, or a hub id
>>> logits = model(input_ids)  # [B, T] -> [B, T, V]

Everything else is one import deeper, in the file that the design names after it.
"""

from minicpm_ref.cache import KVCache
from minicpm_ref.checkpoint import load, save
from minicpm_ref.config import ModelConfig, SparseConfig
from minicpm_ref.engine import Engine
from minicpm_ref.evaluate import bits_per_byte
from minicpm_ref.model import MiniCPM
from minicpm_ref.sampling import SamplingParams, generate
from minicpm_ref.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "KVCache",
    "MiniCPM",
    "ModelConfig",
    "SamplingParams",
    "SparseConfig",
    "Tokenizer",
    "bits_per_byte",
    "generate",
    "load",
    "save",
]
