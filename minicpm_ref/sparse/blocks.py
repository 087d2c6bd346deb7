"""Stage 1 of InfLLM-V2, the dull version: compress keys, score them, pool the scores, pick blocks.

Keys are averaged over short overlapping windows (`compress_keys`). Every query token scores these few averages, the
query heads that share a key/value head add up their scores, and every block of `block_size` tokens takes the best score
of the windows it touches (`block_scores`). The first blocks and the local window are always kept; the best of the rest
fill the budget (`pick_blocks`, `select_blocks`).

Why a *coarse* normaliser. To add up heads, each head's scores must be put on one scale, which is a softmax over all
windows: a first pass over the keys. Windows four times as long and four times as far apart give nearly the same
log-sum-exp for a quarter of the work. A row of scores then sums to about four times the group size; only the order
inside a row matters. `SparseConfig.exact_lse` normalises with the fine windows instead.

Sources: paper "InfLLM-V2" (arXiv 2509.24663) and OpenBMB/infllmv2_cuda_impl. Where they differ this file follows the
code:
- *Budget.* topk + window_size / block_size blocks a token (published 64 + 32 = 96). The paper counts 1 initial + 63
  chosen + 32 local. In the code the local band includes both ends, own - 32 .. own, hence 1 + 62 + 33. That is
  `local_inclusive=True`; False gives the paper's count.
- *Pooling.* The paper pools windows 4k .. 4k+4 for block k; the code pools 4k-1 .. 4k+3, exactly the windows that
  touch it.
- *Causality.* A window is visible once its last token is not in the future. The CUDA code hides one window too many
  when the length is 15 modulo 16 (an off-by-one of its right alignment); that is not copied.
- *Score dtype.* The code rounds scores to 16 bits before the top-k and leaves ties open. Here scores are float32 and
  ties go to the lower block, so that the choice is a function of its inputs.

Left out: speed. Queries are processed in chunks; `minicpm_kernels` has the fast twins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicpm_ref.config import SparseConfig

COARSE_FACTOR = 4  # coarse windows are 4x as long and 4x as far apart: 128 and 64 for the published 32 and 16
CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in float32


class CompressedKeys(NamedTuple):
    """Mean-pooled keys: `fine` [B, G, Lf, D] to rank blocks, `coarse` [B, G, Lc, D] to normalise."""

    fine: Tensor
    coarse: Tensor


def window_count(tokens: int, kernel_size: int, stride: int) -> int:
    """How many complete windows of `kernel_size` tokens, `stride` apart, fit into `tokens` tokens."""
    return max(0, (tokens - kernel_size) // stride + 1)


def compress_keys(k: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Mean of every complete window of keys: out[..., j, :] = mean(k[..., stride*j : stride*j + kernel_size, :]).

    k [..., S, D] -> [..., L, D] in the dtype of k, L = floor((S - kernel_size) / stride) + 1, or 0 while S <
    kernel_size. A ragged tail is dropped, never padded. The sum runs in float32 (float64 for float64 keys), one key
    after another, and is rounded once: the bits do not depend on where the call starts or ends, which the incremental
    cache relies on.

    Source: arXiv 2509.24663, section 3.2; infllmv2_cuda_impl `CompressK`.
    """
    if kernel_size < 1 or stride < 1:
        raise ValueError(f"kernel_size and stride must be positive, got {kernel_size} and {stride}")
    count = window_count(k.shape[-2], kernel_size, stride)
    if count == 0:
        return k[..., :0, :]
    wide = widen(k)
    last = stride * (count - 1) + 1
    total = torch.zeros_like(wide[..., :last:stride, :])
    for offset in range(kernel_size):
        total = total + wide[..., offset : offset + last : stride, :]
    return (total / kernel_size).to(k.dtype)


def compress(k: Tensor, config: SparseConfig) -> CompressedKeys:
    """Fine and coarse compressed keys of k [B, G, S, D]."""
    size, stride = config.kernel_size, config.kernel_stride
    return CompressedKeys(
        fine=compress_keys(k, size, stride), coarse=compress_keys(k, COARSE_FACTOR * size, COARSE_FACTOR * stride)
    )


def query_positions(
    q: Tensor, k: Tensor, query_start: int | Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Absolute position of every query token, int64 [B, T]; -1 for a row of padding, which sees nothing.

    q [B, H, T, D] starts at `query_start` (int, or int tensor [B]) in a cache k [B, G, S, D] of which the first
    `lengths` [B] tokens are real, the query tokens included. Defaults: every token is real, and the queries are the
    last T of the S keys. So nothing is needed for a whole prefill or for a decode step on an exact cache; a
    right-padded batch needs `lengths`; a static cache needs both.

    Raises ValueError when a query lies outside the cache.
    """
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    start = keys - tokens if query_start is None else query_start
    first = torch.as_tensor(start, device=q.device, dtype=torch.int64).expand(batch)
    if bool((first < 0).any()):
        raise ValueError(f"query_start must not be negative, got {first.tolist()} (T={tokens} queries, S={keys} keys)")
    positions = first[:, None] + torch.arange(tokens, device=q.device)  # [B, T]
    if lengths is None:
        if bool((positions >= keys).any()):
            raise ValueError(f"query_start {first.tolist()} + T={tokens} exceeds the S={keys} keys")
        return positions
    lengths = lengths.to(q.device, torch.int64)
    if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > keys)).any()):
        raise ValueError(f"lengths must be [B={batch}] with values in 0..S={keys}, got {lengths.tolist()}")
    return torch.where(positions < lengths[:, None], positions, -1)


@torch.no_grad()
def block_scores(
    q: Tensor,
    k: Tensor,
    config: SparseConfig,
    query_start: int | Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Score of every key block for every query token, shared by the query heads of a group. No gradient.

    q [B, H, T, D], k [B, G, S, D] -> float32 [B, G, T, N] with N = ceil(S / block_size) (float64 for float64 inputs):

        lse_h(i)  = log sum_c exp(q_h . coarse_c / sqrt(D))          over the coarse windows that end at or before i
        S(i, j)   = sum_h exp(q_h . fine_j / sqrt(D) - lse_h(i))     over the fine windows that end at or before i
        out(i, n) = max_j S(i, j)                                    over the fine windows that touch block n

    0 where block n touches no visible window, and in the whole row while no coarse window is visible (then every
    block is kept anyway, unless the budget is smaller than a coarse window). Blocks that `pick_blocks` forces are not
    treated apart.

    query_start, lengths: see `query_positions`. compressed: (fine, coarse) of k when they are at hand, as in decoding.
    Raises ValueError for inconsistent shapes. Source: arXiv 2509.24663, section 3.2; infllmv2_cuda_impl
    `max_pooling_1d.cuh`, with stride and padding derived from the config instead of hard-wired to 4 and 1.
    """
    check_query_key(q, k)
    size, stride, block = config.kernel_size, config.kernel_stride, config.block_size
    keys = k.shape[2]
    fine_count = window_count(keys, size, stride)
    coarse_count = window_count(keys, COARSE_FACTOR * size, COARSE_FACTOR * stride)
    fine, coarse = compress(k, config) if compressed is None else compressed
    if fine.shape[2] < fine_count or coarse.shape[2] < coarse_count:
        raise ValueError(
            f"compressed holds {fine.shape[2]} fine and {coarse.shape[2]} coarse keys, "
            f"but {keys} keys need {fine_count} and {coarse_count}"
        )
    fine, coarse = fine[:, :, :fine_count], coarse[:, :, :coarse_count]
    fine_end = stride * torch.arange(fine_count, device=q.device) + size - 1  # last token of each window
    coarse_end = COARSE_FACTOR * (stride * torch.arange(coarse_count, device=q.device) + size) - 1
    if config.exact_lse:
        coarse, coarse_end = fine, fine_end

    per_block = block // stride  # windows that start in a block
    before = size // stride - 1  # windows that start earlier and reach into it
    blocks = math.ceil(keys / block)
    positions = query_positions(q, k, query_start, lengths)
    grouped = _group_heads(widen(q), k.shape[1])
    out = []
    for chunk in query_chunks(q.shape[2], q.shape[0] * q.shape[1] * max(fine_count, 1)):
        at = positions[:, None, None, chunk, None]  # [B, 1, 1, t, 1]
        coarse_logits = _logits(grouped[:, :, :, chunk], coarse).masked_fill(coarse_end > at, -math.inf)
        lse = coarse_logits.logsumexp(-1, keepdim=True)  # [B, G, h, t, 1]
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # nothing to compare with: score 0, not 0/0
        fine_logits = _logits(grouped[:, :, :, chunk], fine).masked_fill(fine_end > at, -math.inf)
        scores = (fine_logits - lse).exp().sum(2)  # [B, G, t, Lf]
        padded = F.pad(scores, (before, blocks * per_block - fine_count))
        out.append(padded.unfold(-1, per_block + before, per_block).amax(-1))  # [B, G, t, N]
    return torch.cat(out, dim=2)


@torch.no_grad()
def pick_blocks(scores: Tensor, positions: Tensor, config: SparseConfig) -> Tensor:
    """The budget: forced blocks first, then the best scored ones, never a block of the future.

    scores [B, G, T, N], positions int [B, T] (-1 for padding) -> int32 [B, G, T, K], ascending, -1 at the tail, K =
    min(topk + window_size / block_size, N). With own = position // block_size and local = window_size / block_size,
    block n is forced when n < init_blocks or own - local <= n <= own (own - local < n when local_inclusive is False).
    Equal scores go to the lower block. A token with no more than K blocks before its end keeps them all, which is
    dense attention.

    Source: infllmv2_cuda_impl (budget, forced band); see the module docstring for the paper's count.
    """
    blocks = scores.shape[-1]
    block = torch.arange(blocks, device=scores.device)
    own = (positions // config.block_size)[:, None, :, None]  # [B, 1, T, 1]
    first_local = own - config.window_blocks if config.local_inclusive else own - config.window_blocks + 1
    past = (block <= own).expand(scores.shape)
    forced = past & ((block < config.init_blocks) | (block >= first_local))
    # a score that overflowed to inf must not outrank a forced block
    rank = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(forced, math.inf).masked_fill(~past, -math.inf)
    budget = min(config.visible_blocks, blocks)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    chosen = torch.where(past.gather(-1, best), best, blocks).sort(dim=-1).values  # `blocks` sorts behind every block
    return torch.where(chosen == blocks, -1, chosen).to(torch.int32)


def select_blocks(
    q: Tensor,
    k: Tensor,
    config: SparseConfig,
    query_start: int | Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    compressed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Stage 1: the blocks each query token may read, int32 [B, G, T, K]; arguments as in `block_scores`, result as in
    `pick_blocks`. No gradient."""
    scores = block_scores(q, k, config, query_start=query_start, lengths=lengths, compressed=compressed)
    return pick_blocks(scores, query_positions(q, k, query_start, lengths), config)


def _logits(grouped: Tensor, k: Tensor) -> Tensor:
    """Scaled dot products of q [B, G, h, t, D] with k [B, G, S, D]: [B, G, h, t, S]."""
    return grouped @ widen(k)[:, :, None].transpose(-1, -2) / math.sqrt(k.shape[-1])


def _group_heads(q: Tensor, groups: int) -> Tensor:
    return rearrange(q, "B (G h) T D -> B G h T D", G=groups)


def widen(x: Tensor) -> Tensor:
    """x in float32, or float64 when it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def query_chunks(tokens: int, elements_per_query: int) -> Iterator[slice]:
    """Slices of the query axis that hold at most CHUNK_ELEMENTS elements each (and at least one query)."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_query))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def check_query_key(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q [B, H, T, D] and k [B, G, S, D] fit together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q must be [B, H, T, D] and k [B, G, S, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head dimension")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared evenly by {k.shape[1]} key/value heads")
    if q.shape[2] == 0 or k.shape[2] == 0:
        raise ValueError(f"q and k need at least one token, got T={q.shape[2]} and S={k.shape[2]}")
