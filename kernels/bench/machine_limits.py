"""What this CPU can do at most: bytes read a second, and int8 multiply-adds a second.

The problem: a benchmark that only compares programs says nothing about how much is left. The two limits of a matrix
product on packed weights are reading them and multiplying them, and both are measured here, in the run that they are
compared with.

- `read_limit`: the sum of a buffer several times the last cache. It does nothing but load.
- `vnni_peak`: sixteen independent chains of vpdpbusd, all in registers. It does nothing but multiply.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils
from numba.extending import intrinsic

from minicpm_kernels.lowbit._ternary_cpu_codegen import I32, I64, INSTRUCTION_SETS
from minicpm_kernels.lowbit.ternary_cpu import SUPPORTED

STREAMS = 4  # places that a thread reads from in turn; one alone, or a loop that is not vectorized, reads less
CHAINS = 16  # the instruction takes five cycles and two start in each: ten would do


@njit(parallel=True, fastmath=True)
def _read(buffer, parts):  # type: ignore[no-untyped-def]
    size = len(buffer) // (STREAMS * parts)
    sums = np.zeros(parts, np.float32)
    for part in prange(parts):
        at = STREAMS * part * size
        a, b = buffer[at : at + size], buffer[at + size : at + 2 * size]
        c, d = buffer[at + 2 * size : at + 3 * size], buffer[at + 3 * size : at + 4 * size]
        total = np.float32(0)
        for i in range(size):
            total += (a[i] + b[i]) + (c[i] + d[i])
        sums[part] = total
    return sums.sum()


@intrinsic
def _spin(typing_context, rounds):  # type: ignore[no-untyped-def]
    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]
        vnni = INSTRUCTION_SETS["avx512_vnni"](tokens=2)
        some = b.trunc(args[0], I32)
        digits = b.insert_element(ir.Constant(ir.VectorType(I32, 16), [1] * 16), some, ir.Constant(I32, 0))
        chains = [cgutils.alloca_once_value(b, ir.Constant(digits.type, [k] * 16)) for k in range(CHAINS)]
        with cgutils.for_range(b, args[0], intp=I64):
            for chain in chains:
                b.store(vnni.dot(b, b.load(chain), digits, some), chain)
        total = b.load(chains[0])
        for chain in chains[1:]:
            total = b.add(total, b.load(chain))
        return b.sext(b.extract_element(total, ir.Constant(I32, 0)), I64)

    return numba.int64(numba.int64), codegen


@njit
def _multiply(rounds):  # type: ignore[no-untyped-def]
    return _spin(rounds)


def read_limit(size: int, threads: int, repeats: int) -> list[float]:
    """Seconds that `threads` threads need to read `size` bytes, once for each repeat."""
    buffer = np.ones(size // 4, np.float32)
    numba.set_num_threads(threads)
    return _times(lambda: _read(buffer, threads), repeats)


def vnni_peak(rounds: int, repeats: int) -> tuple[int, list[float]] | None:
    """(multiply-adds, seconds for each repeat) of one thread; None on a CPU without AVX-512 VNNI."""
    if "avx512_vnni" not in SUPPORTED:
        return None
    return rounds * CHAINS * 64, _times(lambda: _multiply(rounds), repeats)


def _times(function: Callable[[], object], repeats: int) -> list[float]:
    function()  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds
