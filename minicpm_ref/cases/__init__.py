"""Named test cases, one table a function: the rows that every implementation of that function must pass.

The problem: a reference, its kernel, its notebook derivation and its benchmark drift apart when each invents its own
inputs. The idea: the inputs live here, once. A row is a small frozen dataclass with a name and a `build(dtype,
device)` that returns the positional arguments of the function, in the order of its signature, from a seeded
generator. Whoever implements the function, in whatever language, runs `function(*case.build(...))` on every row of
`TABLES["function"]` and compares.

Standing rows, in every table where they make sense: length 1; one below, at and above the block a kernel works in; a
prime; a ragged last block; batch above 1; for grouped heads the groups 1, 2, 4 and 16; for a top-k fewer blocks than
k. They are where masks, strides and loop bounds go wrong.

To add a component: write `cases/<component>.py` with its dataclass and its tables, and add the tables to `TABLES`
below. Nothing here imports pytest: notebooks and benchmarks read the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from minicpm_ref.cases.decoder import (
    APPLY_ROPE,
    CAUSAL_ATTENTION,
    ROPE_FREQUENCIES,
    ApplyRopeCase,
    CausalAttentionCase,
    RopeFrequenciesCase,
)
from minicpm_ref.cases.duplicates import CANDIDATE_PROBABILITY, CandidateProbabilityCase
from minicpm_ref.cases.norm import ADD_RMS_NORM, RMS_NORM, AddNormCase, NormCase
from minicpm_ref.cases.quality import BLOCK_MASS, WINDOW_ONLY, BlockMassCase, WindowOnlyCase
from minicpm_ref.cases.sampling import PROCESS_LOGITS, ProcessLogitsCase
from minicpm_ref.cases.sparse import (
    COMPRESS_KEYS,
    PICK_BLOCKS,
    SELECT_BLOCKS,
    SPARSE_ATTENTION,
    CompressKeysCase,
    PickBlocksCase,
    SelectBlocksCase,
    SparseAttentionCase,
)
from minicpm_ref.cases.sparse_tree import SPARSE_TREE_ATTENTION, SparseTreeCase
from minicpm_ref.cases.speculative import ACCEPT_SAMPLED_CHAIN, CHAIN_GAIN, ChainGainCase, SampledChainCase
from minicpm_ref.cases.ternary import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    PACK,
    QUANTIZE,
    TERNARY_MATMUL,
    TO_LANES,
    DequantizeCase,
    FakeQuantizeCase,
    PackCase,
    QuantizeCase,
    TernaryMatmulCase,
    ToLanesCase,
)
from minicpm_ref.cases.training import (
    BITS_PER_BYTE,
    ORTHOGONALIZE,
    WSD_FACTOR,
    BitsPerByteCase,
    OrthogonalizeCase,
    WsdCase,
)
from minicpm_ref.cases.wind_tunnel import MULTIPLIED_PARAMETERS, MultipliedParametersCase


class Case(Protocol):
    """What a row of any table offers."""

    @property
    def name(self) -> str:
        """Short and unique in its table; it becomes the test's id."""

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        """The positional arguments of the function under test; the same values on every call, rounded to `dtype`."""


# keyed by the function's name, which is the same in the notebook, the reference and the kernel
TABLES: dict[str, Sequence[Case]] = {
    "rms_norm": RMS_NORM,
    "add_rms_norm": ADD_RMS_NORM,
    "rope_frequencies": ROPE_FREQUENCIES,
    "apply_rope": APPLY_ROPE,
    "causal_attention": CAUSAL_ATTENTION,
    "compress_keys": COMPRESS_KEYS,
    "block_scores": SELECT_BLOCKS,
    "pick_blocks": PICK_BLOCKS,
    "select_blocks": SELECT_BLOCKS,
    "sparse_attention": SPARSE_ATTENTION,
    "sparse_tree_attention": SPARSE_TREE_ATTENTION,
    "candidate_probability": CANDIDATE_PROBABILITY,
    "window_only": WINDOW_ONLY,
    "block_mass": BLOCK_MASS,
    "quantize": QUANTIZE,
    "dequantize": DEQUANTIZE,
    "fake_quantize": FAKE_QUANTIZE,
    "pack": PACK,
    "to_lanes": TO_LANES,
    "ternary_matmul": TERNARY_MATMUL,
    "ternary_matmul_int8": TERNARY_MATMUL,
    "wsd_factor": WSD_FACTOR,
    "orthogonalize": ORTHOGONALIZE,
    "bits_per_byte": BITS_PER_BYTE,
    "process_logits": PROCESS_LOGITS,
    "accept_sampled_chain": ACCEPT_SAMPLED_CHAIN,
    "chain_gain": CHAIN_GAIN,
    "multiplied_parameters": MULTIPLIED_PARAMETERS,
}

__all__ = [
    "ACCEPT_SAMPLED_CHAIN",
    "CHAIN_GAIN",
    "ChainGainCase",
    "SampledChainCase",
    "ADD_RMS_NORM",
    "APPLY_ROPE",
    "BITS_PER_BYTE",
    "BLOCK_MASS",
    "CANDIDATE_PROBABILITY",
    "CAUSAL_ATTENTION",
    "COMPRESS_KEYS",
    "DEQUANTIZE",
    "FAKE_QUANTIZE",
    "MULTIPLIED_PARAMETERS",
    "ORTHOGONALIZE",
    "PACK",
    "PICK_BLOCKS",
    "PROCESS_LOGITS",
    "QUANTIZE",
    "RMS_NORM",
    "ROPE_FREQUENCIES",
    "SELECT_BLOCKS",
    "SPARSE_ATTENTION",
    "SPARSE_TREE_ATTENTION",
    "TABLES",
    "TERNARY_MATMUL",
    "TO_LANES",
    "WINDOW_ONLY",
    "WSD_FACTOR",
    "AddNormCase",
    "ApplyRopeCase",
    "BitsPerByteCase",
    "BlockMassCase",
    "CandidateProbabilityCase",
    "Case",
    "CausalAttentionCase",
    "CompressKeysCase",
    "DequantizeCase",
    "FakeQuantizeCase",
    "MultipliedParametersCase",
    "NormCase",
    "OrthogonalizeCase",
    "PackCase",
    "PickBlocksCase",
    "ProcessLogitsCase",
    "QuantizeCase",
    "RopeFrequenciesCase",
    "SelectBlocksCase",
    "SparseAttentionCase",
    "SparseTreeCase",
    "TernaryMatmulCase",
    "ToLanesCase",
    "WindowOnlyCase",
    "WsdCase",
]
