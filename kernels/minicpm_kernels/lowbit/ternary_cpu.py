"""Ternary matrix times vector and matrix on a CPU, compiled by numba: 2.125 bits a weight, read once, at memory
speed.

The problem: at one token the product is bound by the bytes of the weights, so two-bit weights should be 7.5 times
faster than 16-bit ones. They are not, in most libraries: rows are laid out one after the other, so every row (or
every scale group) ends in a sum across the lanes of a vector, and unpacking costs as much as reading.

The ideas:
- *Rows in lanes.* Sixteen output rows share a vector, one 32-bit lane each; 64 bytes hold 16 rows by 16 columns. One
  stream of memory, no sum across lanes, and the float16 scales of a group of 128 columns are one vector: they cost
  one conversion and two multiplications for 2048 weights.
- *Digits instead of signs.* Stored are u = code + 1 in {0, 1, 2}. Unsigned times signed bytes is what the dot-product
  instructions take; the offset is the sum of the activations, known before the first weight is read.
- *Activations in int8*, rounded a group of 128 at a time, so that the sums of a group are exact integers and every
  instruction set returns the same bits as `minicpm_ref.lowbit.ternary.ternary_matmul_int8`.
- *Several tokens at once* reuse the unpacked digits: tiles of up to 16 tokens, the remainder in a smaller tile.

Threads share out the blocks of sixteen rows. Below about a quarter of a megabyte of packed weights (times tokens) one
thread is faster: entering a parallel region costs microseconds.

Left out: base-3 weights (1.725 bits; the decoding costs more than the bytes it saves), other group sizes, and the
gradient. The code generator and the three instruction sets are in `_ternary_cpu_codegen`.
Source of the storage: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
"""

from __future__ import annotations

import functools
from typing import NoReturn

import numba
import torch
from numba.core.codegen import get_host_cpu_features

from minicpm_kernels.checks import require_tensor
from minicpm_kernels.cpu_threads import numba_threads, thread_count
from minicpm_kernels.lowbit._ternary_cpu_codegen import GROUP, INSTRUCTION_SETS, ROWS, compiled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARALLEL_BYTES = 1 << 18  # packed bytes times tokens from which several threads pay


def _supported() -> list[str]:
    """The instruction sets that numba may use on this CPU, best first."""
    given = numba.config.CPU_FEATURES  # NUMBA_CPU_FEATURES compiles for another CPU
    features = (get_host_cpu_features() if given is None else given).split(",")
    return [name for name, isa in INSTRUCTION_SETS.items() if all(f"+{need}" in features for need in isa.needs)]


SUPPORTED = _supported()
INSTRUCTION_SET = SUPPORTED[0]


def ternary_matmul_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int = 128
) -> torch.Tensor:
    """x [..., in], rounded to int8, times the transpose of a packed ternary matrix; twin of
    `minicpm_ref.lowbit.ternary.ternary_matmul_int8`.

    x float32, float16 or bfloat16; codes uint8 [out / 16, in / 16, 16, 4] and scales float16 [out / 16, in / 128, 16]
    in the rows-in-lanes layout, contiguous; all on the CPU. Contents are not checked: a pair of bits that is 3 counts
    as weight 2, and scales must be finite and not negative (`minicpm_ref.lowbit.packing` sees to both). Returns
    [..., out] in x's dtype, the same bits as the reference on any CPU and with any number of threads.

    Raises ValueError for anything else, other group sizes included, and RuntimeError when a gradient would be needed.
    """
    columns = x.shape[-1] if x.ndim else 0
    blocks = codes.shape[0] if codes.ndim else 0
    fits = (
        x.dtype in DTYPES
        and group_size == GROUP
        and columns % GROUP == 0
        and columns > 0
        and codes.dtype == torch.uint8
        and scales.dtype == torch.float16
        and codes.shape == (blocks, columns // 16, ROWS, 4)
        and scales.shape == (blocks, columns // GROUP, ROWS)
        and codes.is_contiguous()
        and scales.is_contiguous()
        and x.is_cpu
        and codes.is_cpu
        and scales.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
    )
    if not fits:  # this runs for every layer and token, so the words are put together only when they are needed
        _refuse(x, codes, scales, group_size)
    work = codes.numel() * (x.numel() // columns)
    threads = 1 if work < PARALLEL_BYTES else thread_count()
    y = _multiply(x, codes, scales, INSTRUCTION_SET, threads)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _multiply(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, instruction_set: str, threads: int
) -> torch.Tensor:
    """x [..., in] -> float32 [..., out]; nothing is checked."""
    flat = x.to(torch.float32).contiguous()  # itself, for contiguous float32
    blocks, groups = codes.shape[0], x.shape[-1] // GROUP
    tokens = x.numel() // x.shape[-1]
    full, largest, last = _tiles(tokens, INSTRUCTION_SETS[instruction_set].tiles)
    padded = full * largest + last
    y = flat.new_empty(padded, blocks * ROWS)
    addresses = flat.data_ptr(), codes.data_ptr(), scales.data_ptr(), y.data_ptr()
    if threads == 1:
        compiled(instruction_set, parallel=False)(*addresses, tokens, groups, blocks, full, largest, last)
    else:
        with numba_threads(threads):
            compiled(instruction_set, parallel=True)(*addresses, tokens, groups, blocks, full, largest, last)
    if padded != tokens:
        y = y[:tokens]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], blocks * ROWS)


@functools.lru_cache
def _tiles(tokens: int, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """(full, largest, last): how many tiles of the largest size, that size, and the size of the last tile or 0."""
    full, rest = divmod(tokens, sizes[-1])
    return full, sizes[-1], next(size for size in sizes if size >= rest) if rest else 0


def _refuse(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> NoReturn:
    """Raise for what `ternary_matmul_int8` cannot do, with the reason."""
    name = "ternary_matmul_int8"
    if group_size != GROUP:
        raise ValueError(f"{name}: group_size {group_size}, expected {GROUP}, which this kernel is compiled for")
    if x.device.type != "cpu":
        raise ValueError(f"{name}: x is on {x.device}, expected the CPU")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}, expected {', '.join(map(str, DTYPES))}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % GROUP:
        raise ValueError(f"{name}: x has shape {list(x.shape)}, expected [..., in] with `in` a multiple of {GROUP}")
    blocks, columns = codes.shape[0] if codes.ndim else 0, x.shape[-1]
    require_tensor(name, "codes", codes, (blocks, columns // 16, ROWS, 4), (torch.uint8,), x.device)
    require_tensor(name, "scales", scales, (blocks, columns // GROUP, ROWS), (torch.float16,), x.device)
    raise RuntimeError(f"{name} computes no gradient; call it under torch.no_grad(), or use the reference")
