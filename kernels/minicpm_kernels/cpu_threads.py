"""numba's threads: as many as torch uses, and one caller at a time.

numba has a pool of its own beside torch's. `numba_threads` sets how many of it work, for the time of one call; the
pool that numba uses where there is no OpenMP dies of two callers, so the second waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

_ONE_AT_A_TIME = threading.Lock()


def thread_count() -> int:
    """How many threads a parallel loop gets: those of torch, as far as numba's pool goes."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


@contextmanager
def numba_threads(count: int) -> Iterator[None]:
    """Let `count` threads of the pool work inside, and nobody else start a parallel loop."""
    with _ONE_AT_A_TIME:
        before = numba.get_num_threads()
        numba.set_num_threads(count)
        try:
            yield
        finally:
            numba.set_num_threads(before)
