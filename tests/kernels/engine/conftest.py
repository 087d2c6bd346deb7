"""What the tests of the compiled engine share: the step is compiled once, even when several processes run them."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from fresh import fresh_model

import minicpm_kernels.engine.compiling as compiling
from minicpm_ref.config import ModelConfig
from minicpm_ref.engine.cpu_executor import CPUExecutor


@pytest.fixture(scope="session", autouse=True)
def _one_compiles_and_the_others_load() -> None:
    """The first process compiles the step, and those beside it wait until it is in the cache."""
    tiny = ModelConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    lock = Path(compiling.__file__).with_name("__pycache__") / "compiling.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for cache in ("float16", "float32"):
            CPUExecutor(fresh_model(tiny, seed=0), cache=cache, threads=1)
