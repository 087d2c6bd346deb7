"""Which executor runs a model, and in which number format.

"auto" takes the compiled one where it can do the work (a CPU, numba, matrices of floats, dense attention) and the torch
executor otherwise; a name takes that one or fails with the reason. `why` says what was decided, for the statistics and
the command line.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from minicpm_ref import backend
from minicpm_ref.engine.executor import Executor
from minicpm_ref.engine.torch_executor import TorchExecutor
from minicpm_ref.lowbit import TernaryLinear
from minicpm_ref.model import MiniCPM

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("auto", *FLOATS, "int8", "int4", "ternary")
EXECUTORS = ("auto", "torch", "compiled")


def obstacle(model: MiniCPM, max_length: int, weights: str = "auto") -> str | None:
    """Why the compiled executor cannot run this model, or None if it can."""
    sparse = model.config.sparse_config
    if os.environ.get(backend.ENVIRONMENT, "auto").lower() == "torch":
        return f"{backend.ENVIRONMENT} = torch"
    if model.device.type != "cpu":
        return f"the weights are on {model.device}"
    if any(importlib.util.find_spec(name) is None for name in ("numba", "minicpm_kernels")):
        return "numba is not installed: pip install 'minicpm_ref[kernels]'"
    if is_ternary(model) or weights == "ternary":
        return "the weights are ternary"
    if sparse is not None and max_length >= sparse.dense_len:
        return f"max_length = {max_length} reaches dense_len = {sparse.dense_len}, where attention is sparse"
    return None


def is_ternary(model: MiniCPM) -> bool:
    """Whether its matrices are packed ternary weights."""
    return any(isinstance(module, TernaryLinear) for module in model.modules())


def build_executor(
    model: MiniCPM,
    name: str,
    weights: str,
    batch: int,
    max_length: int,
    chunk_length: int,
    capture_layers: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
) -> Executor:
    """The executor `name` for `model`, its matrices as `weights`. Raises ValueError for what it cannot do, and why."""
    reason = obstacle(model, max_length, weights)
    if name == "compiled" and reason is not None:
        raise ValueError(f"executor = 'compiled', but {reason}; expected executor = 'torch' for this")
    if weights == "ternary" and not is_ternary(model):
        raise ValueError("weights = 'ternary', but these are floats: expected weights trained to be ternary")
    if reason is None and name != "torch":
        from minicpm_ref.engine.cpu_executor import CPUExecutor

        stored = weights if weights != "auto" else "float32" if model.dtype == torch.float32 else "bfloat16"
        return CPUExecutor(
            model,
            batch,
            max_length,
            stored,
            cache="float32" if stored == "float32" else "float16",  # full precision means all of it
            chunk_length=chunk_length,
            capture_layers=capture_layers,
            progress=progress,
        )
    if weights in ("int8", "int4"):
        raise ValueError(f"weights = {weights!r}: the torch executor multiplies floats and ternary weights")
    if weights in FLOATS and model.dtype != FLOATS[weights]:
        model = copy.deepcopy(model).to(FLOATS[weights])
    return TorchExecutor(model, batch, max_length, chunk_length, capture_layers)
