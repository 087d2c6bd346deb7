"""InfLLM-V2 sparse attention on a CPU, both stages, compiled by numba: forward only, reading the cache in place.

The problem: a decode step is worth as much as the bytes it does not read, and a prompt as much as the products it does
not compute. The reference builds a mask and computes everything; a dense library call reads every key; gathering the
chosen blocks first would write and read them once more.

The ideas:
- *Heads in lanes.* The query heads that share a key/value head sit in the lanes of a vector, so each number of the
  cache is read once for all of them and every step of the softmax is element-wise (`_cpu_vectors`).
- *Stage 1* walks the compressed keys twice, coarse ones for the log-sum-exp and fine ones for the shared scores, which
  never become a matrix. Forced blocks are not scored; a token that may keep everything is not scored at all. Scores are
  not negative, so the K-th largest is found by halving the range of their bit patterns: no sort.
- *Stage 2* sends a tile of up to 32 neighbouring tokens through the union of their lists in ascending order. A block is
  fetched once for the tile and multiplied only with the tokens that list it. While a block's keys are multiplied its
  values are prefetched, and then the keys of the next listed block: jumps from block to block cost no waiting.
- *Threads* share out the tiles. When there are fewer tiles than threads (decoding), the lists are cut into shares whose
  softmaxes are merged; stage 1, which reads little, then has a thread for each kv head.

A token's list costs 4 K B D operations a query head however long the text is (K blocks of B tokens); stage 1 adds 1/16
and 1/64 of the dense work with the published windows.

float16 and bfloat16 are widened to float32 as in the reference, a listed block at a time: a cache in 16 bits is never
copied, and half the bytes are read. Keys and values with D contiguous are read in place whatever their other strides
are, best with one token behind another. Left out: gradients and float64 (both are the reference's), and more threads
than kv heads in stage 1 of a decode step.
Source: arXiv 2509.24663, sections 3.1 and 3.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from minicpm_kernels.cpu_threads import numba_threads, thread_count
from minicpm_kernels.disk_cache import cached_njit
from minicpm_kernels.sparse._cpu_attend import ATTEND_SIGNATURE, attend
from minicpm_kernels.sparse._cpu_select import CHUNK, POOL_SIGNATURE, SELECT_SIGNATURE, pool, select
from minicpm_kernels.sparse._cpu_vectors import BFLOAT16, FLOAT16, FLOAT32, INSTRUCTION_SET, LANES, TILE
from minicpm_kernels.sparse.windows import COARSE_FACTOR, LOG2_E, Settings, local_reach, window_count

__all__ = ["INSTRUCTION_SET", "select_blocks", "sparse_attention"]

STORAGE = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
DTYPES = tuple(STORAGE)
_SIGNATURES = {attend: ATTEND_SIGNATURE, pool: POOL_SIGNATURE, select: SELECT_SIGNATURE}


@functools.cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`attend`, `pool` or `select` as machine code; strides and storage are arguments like any other, so there is one
    of each."""
    return cached_njit(_SIGNATURES[function], parallel=True)(function)


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    config: Settings,
    query_start: int | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Stage 1: the blocks each query token may read; twin of `minicpm_ref.sparse.attention.select_blocks`.

    q [B, H, T, D], k [B, G, S, D] -> int32 [B, G, T, K], ascending, -1 at the tail. float32, float16 or bfloat16 on the
    CPU; any sizes, any group H / G. Scores are float32, ties go to the lower block. With `compressed` only the
    compressed keys are read, of k no more than the shape. No gradient.

    Raises ValueError on anything else, in the reference's words where it has some.
    """
    function = "select_blocks"
    _check_query_key(function, q, k)
    starts, stops = _placement(q, k, query_start, lengths)
    (batch, heads, tokens, width), (groups, keys) = q.shape, k.shape[1:3]
    block, size, stride = config.block_size, config.kernel_size, config.kernel_stride
    factor = 1 if config.exact_lse else COARSE_FACTOR
    threads = thread_count()
    if compressed is None:
        fine = _compress(k, size, stride, threads)
        norm = fine if config.exact_lse else _compress(k, factor * size, factor * stride, threads)
    else:
        counts = [window_count(keys, f * size, f * stride) for f in (1, COARSE_FACTOR)]
        fine, coarse = _check_compressed(function, k, compressed, counts)
        norm = fine if config.exact_lse else coarse
    blocks = -(-keys // block)
    slots = min(config.visible_blocks, blocks)
    reach = local_reach(config)
    passes, tile = -(-heads // groups // LANES), min(TILE, tokens)
    lists = torch.empty(batch, groups, tokens, slots, dtype=torch.int32)
    scratch = [torch.empty(threads, tile, passes, rows, LANES) for rows in (width, 3)]
    scratch += [torch.empty(threads, CHUNK, LANES), torch.empty(threads, tile, blocks * (block // stride))]
    scratch += [torch.empty(threads, blocks)]
    wide = torch.empty(threads, CHUNK if {fine.dtype, norm.dtype} != {torch.float32} else 0, width)
    (fine_words, fine_storage), (norm_words, norm_storage) = _words(fine), _words(norm)
    with numba_threads(threads):
        compiled(select)(
            _floats(q), fine_words, norm_words, starts, stops, lists.numpy(), *(x.numpy() for x in scratch),
            (block, config.init_blocks, reach, slots, size, stride, factor), threads, LOG2_E / math.sqrt(width),
            (fine_storage, norm_storage), wide.numpy(),
        )  # fmt: skip
    return lists


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    config: Settings,
    query_start: int | torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    check_blocks: bool = True,
) -> torch.Tensor:
    """Stage 2: causal softmax over the listed blocks; twin of `minicpm_ref.sparse.attention.sparse_attention`.

    q [B, H, T, D], k and v [B, G, S, D], blocks int32 or int64 [B, G, T, K] (order free, -1 = empty) -> [B, H, T, D] in
    the dtype of q, computed in float32. float32, float16 or bfloat16 on the CPU; any sizes, any group H / G. A row of
    padding, or one without blocks, gives 0. `check_blocks=False` skips the look at the lists' values.

    Raises ValueError on anything else, in the reference's words where it has some, and RuntimeError when a gradient
    would be needed.
    """
    function = "sparse_attention"
    _check_query_key(function, q, k)
    _check_dtype(function, "v", v)
    (batch, heads, tokens, width), (groups, keys) = q.shape, k.shape[1:3]
    count = -(-keys // config.block_size)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if blocks.ndim != 4 or blocks.shape[:3] != (batch, groups, tokens):
        raise ValueError(f"blocks must be [B={batch}, G={groups}, T={tokens}, K], got {tuple(blocks.shape)}")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks must be int32 or int64, got {blocks.dtype}")
    low, high = (int(x) for x in torch.aminmax(blocks)) if check_blocks and blocks.numel() else (-1, -1)
    if low < -1 or high >= count:
        raise ValueError(f"blocks must lie in -1..{count - 1}, got {low}..{high}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(f"{function} computes no gradient; call it under torch.no_grad(), or use the reference")
    starts, stops = _placement(q, k, query_start, lengths)
    threads, passes, tile = thread_count(), -(-heads // groups // LANES), min(TILE, tokens)
    tasks = batch * groups * -(-tokens // tile)
    shares = -(-threads // tasks)
    places = threads if shares == 1 else tasks * shares
    out = torch.empty(batch, heads, tokens, width)
    scratch = [torch.empty(places, count, dtype=torch.int64)]
    scratch += [torch.empty(places, tile, passes, rows, LANES) for rows in (width, 3, width)]
    scratch += [torch.empty(places, config.block_size, LANES)]
    wide = torch.empty(places, 2, config.block_size if {k.dtype, v.dtype} != {torch.float32} else 0, width)
    (key_words, key_storage), (value_words, value_storage) = _words(k), _words(v)
    with numba_threads(threads):
        compiled(attend)(
            _floats(q), key_words, value_words, blocks.to(torch.int32).numpy(), starts, stops, out.numpy(),
            *(x.numpy() for x in scratch), threads, shares, config.block_size, LOG2_E / math.sqrt(width),
            (key_storage, value_storage), wide.numpy(),
        )  # fmt: skip
    return out.to(q.dtype)


def _compress(k: torch.Tensor, size: int, stride: int, threads: int) -> torch.Tensor:
    """`minicpm_ref.sparse.attention.compress_keys`, the same bits."""
    out = torch.empty(*k.shape[:2], window_count(k.shape[2], size, stride), k.shape[3])
    if out.numel():
        with numba_threads(threads):
            compiled(pool)(_floats(k), out.numpy(), size, stride, threads)
    return out.to(k.dtype)




def _floats(x: torch.Tensor) -> np.ndarray:
    """x in float32 with D contiguous; itself where it is that already."""
    wide = x.detach().to(torch.float32)
    return (wide if wide.stride(3) == 1 else wide.contiguous()).numpy()


def _words(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """x in place as 16-bit words, two a number if it is float32, and which of the three dtypes it is."""
    x = x.detach()
    return (x if x.stride(3) == 1 else x.contiguous()).view(torch.int16).numpy(), STORAGE[x.dtype]


def _placement(
    q: torch.Tensor, k: torch.Tensor, query_start: int | torch.Tensor | None, lengths: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """(position of the first query, number of real keys) of every sequence, int64 [B]."""
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    start = keys - tokens if query_start is None else query_start
    first = start.expand(batch).tolist() if isinstance(start, torch.Tensor) else [start] * batch
    if min(first) < 0:
        raise ValueError(f"query_start must not be negative, got {first} (T={tokens} queries, S={keys} keys)")
    if lengths is None:
        if max(first) + tokens > keys:
            raise ValueError(f"query_start {first} + T={tokens} exceeds the S={keys} keys")
        return np.array(first, np.int64), np.full(batch, keys, np.int64)
    stop = lengths.tolist()
    if lengths.shape != (batch,) or min(stop) < 0 or max(stop) > keys:
        raise ValueError(f"lengths must be [B={batch}] with values in 0..S={keys}, got {stop}")
    return np.array(first, np.int64), np.array(stop, np.int64)


def _check_query_key(function: str, q: torch.Tensor, k: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q must be [B, H, T, D] and k [B, G, S, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head dimension")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared evenly by {k.shape[1]} key/value heads")
    if q.shape[2] == 0 or k.shape[2] == 0:
        raise ValueError(f"q and k need at least one token, got T={q.shape[2]} and S={k.shape[2]}")
    _check_dtype(function, "q", q)
    _check_dtype(function, "k", k)


def _check_dtype(function: str, name: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{function}: {name} is {x.dtype}, expected {' or '.join(map(str, DTYPES))}")
    if not x.is_cpu:
        raise ValueError(f"{function}: {name} is on {x.device}, expected the CPU")


def _check_compressed(
    function: str, k: torch.Tensor, compressed: tuple[torch.Tensor, torch.Tensor], counts: list[int]
) -> list[torch.Tensor]:
    """(fine, coarse), each cut to as many windows as the keys have."""
    for name, x in zip(("fine", "coarse"), compressed, strict=True):
        if x.ndim != 4 or x.shape[:2] != k.shape[:2] or x.shape[3] != k.shape[3]:
            wanted = [*k.shape[:2], "L", k.shape[3]]
            raise ValueError(f"{function}: {name} compressed keys have shape {list(x.shape)}, expected {wanted}")
        _check_dtype(function, f"{name} compressed keys", x)
    held = [x.shape[2] for x in compressed]
    if held[0] < counts[0] or held[1] < counts[1]:
        raise ValueError(
            f"compressed holds {held[0]} fine and {held[1]} coarse keys, "
            f"but {k.shape[2]} keys need {counts[0]} and {counts[1]}"
        )
    return [x[:, :, :count] for x, count in zip(compressed, counts, strict=True)]
