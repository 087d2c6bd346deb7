"""The environment of every test, set before torch or triton is imported, and the lanes.

One process cannot run a Triton kernel in the interpreter and also compile it: `TRITON_INTERPRET` is read when a
kernel is decorated. So there are lanes, a process each: interpreted (the default here), `aot` and `gpu` (both with
TRITON_INTERPRET=0, see the Makefile). A test that is asked for in the wrong lane skips and says which command runs it.
Notebook kernels are child processes and inherit what is set here.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, spelled out: Triton 3.9 warns on stderr otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a bug
os.environ.setdefault("TQDM_DISABLE", "1")  # bars go to stderr, which nbval compares
# One thread a process: workers already fill the cores, and a float32 sum depends on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns on stderr after a fork otherwise

MARKERS = {
    "slow": "takes more than about five seconds; `make test-fast` leaves it out",
    "aot": "compiles kernels ahead of time, in a process without the interpreter: make test-aot",
    "gpu": "runs kernels on a GPU, in a process without the interpreter: make test-gpu",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = wrong_lane({mark.name for mark in item.iter_markers()})
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def wrong_lane(markers: set[str]) -> str | None:
    """Why a test with these markers cannot run in this process, or None."""
    interpreted = os.environ["TRITON_INTERPRET"] != "0"
    if "aot" in markers and interpreted:
        return "needs a process without Triton's interpreter: make test-aot"
    if "gpu" in markers:
        import torch

        if not torch.cuda.is_available():
            return "no GPU on this machine (torch.cuda.is_available() is False)"
        if interpreted:
            return "needs a process without Triton's interpreter: make test-gpu"
    return None
