"""What the tests of the compiled engine share: it is compiled once, even when several processes run them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

import minicpm_kernels.engine.compiling as compiling


@pytest.fixture(autouse=True)
def _one_compiles_and_the_others_load() -> Iterator[None]:
    """A process that finds functions missing keeps the others waiting until they are in the cache."""
    lock = Path(compiling.__file__).with_name("__pycache__") / "compiling.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
