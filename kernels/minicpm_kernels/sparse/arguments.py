"""What the sparse-attention kernels share: the checks of their arguments, and where queries sit in the cache.

The problem: q, k and v come as views (of a projection, of a static cache), at an offset, in batches of different
lengths. Copying a cache to make it contiguous would read every key, which is what sparse attention avoids.
The idea: kernels take the strides of batch, head and token, and only the head dimension must be contiguous. Where the
queries sit is two integers a sequence, `first` (position of its first query) and `stop` (how many of its keys are
real); query t stands at position first + t, and is padding when that is not below stop.

Left out: checks that must read values off the device while a CUDA graph is captured; they are skipped there, since
nothing can be read.
"""

from __future__ import annotations

import torch
import triton

from minicpm_kernels.checks import interpreting, require_runnable, require_tensor
from minicpm_kernels.sparse.windows import Settings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128)
BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


def require_heads(function: str, name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Ask that x is [batch, heads, tokens, D] with a contiguous head dimension, of the dtype, device, batch and D of
    `like`. Raises ValueError."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{function}: {name} is a {type(x).__name__}, expected a tensor")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}, expected [batch, heads, tokens, D], none 0")
    if x.dtype not in DTYPES:
        raise ValueError(f"{function}: {name} is {x.dtype}, expected {' or '.join(map(str, DTYPES))}")
    if x.shape[3] not in HEAD_DIMS:
        raise ValueError(f"{function}: {name} has head_dim {x.shape[3]}, expected one of {HEAD_DIMS}")
    if x.stride(3) != 1:
        raise ValueError(
            f"{function}: {name} has strides {list(x.stride())}, expected a contiguous head dimension (the last stride "
            f"1); call {name}.contiguous()"
        )
    if like is None:
        return
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{function}: {name} is {x.dtype} on {x.device}, expected {like.dtype} on {like.device}")
    if x.shape[0] != like.shape[0] or x.shape[3] != like.shape[3]:
        raise ValueError(
            f"{function}: {name} has shape {list(x.shape)}, expected batch {like.shape[0]} and head_dim "
            f"{like.shape[3]} as in {list(like.shape)}"
        )


def require_query_key(function: str, q: torch.Tensor, k: torch.Tensor, settings: Settings) -> None:
    """Ask that q [B, H, T, D] and k [B, G, S, D] can be attended here and now. Raises ValueError."""
    require_heads(function, "q", q)
    require_heads(function, "k", k, q)
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{function}: {q.shape[1]} query heads cannot be shared evenly by {k.shape[1]} key/value heads"
        )
    if settings.block_size not in BLOCK_SIZES:
        raise ValueError(f"{function}: block_size is {settings.block_size}, expected one of {BLOCK_SIZES}")
    require_runnable(function, q.detach(), k.detach())


def require_blocks(
    function: str, blocks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, block_size: int, values: bool
) -> None:
    """Ask that blocks is [B, G, T, K], integer, and with `values` within -1 .. number of blocks - 1. Raises
    ValueError."""
    require_tensor(function, "blocks", blocks, dtypes=(torch.int32, torch.int64), device=q.device)
    wanted = (q.shape[0], k.shape[1], q.shape[2])
    if blocks.ndim != 4 or tuple(blocks.shape[:3]) != wanted or blocks.shape[3] == 0:
        raise ValueError(f"{function}: blocks has shape {list(blocks.shape)}, expected {[*wanted, 'K']}, K at least 1")
    if not values or capturing(blocks):
        return
    low, high = (int(x) for x in torch.aminmax(blocks))
    count = triton.cdiv(k.shape[2], block_size)
    if low < -1 or high >= count:
        raise ValueError(f"{function}: blocks hold {low}..{high}, expected -1..{count - 1}")


def placement(
    function: str,
    q: torch.Tensor,
    k: torch.Tensor,
    query_start: int | torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, stop), int32 [B] each: position of query 0, and the number of real keys.

    Arguments and defaults as in `minicpm_ref.sparse.attention.query_positions`. Raises ValueError for a query outside
    the cache.
    """
    batch, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    start = keys - tokens if query_start is None else query_start
    known = [start] if isinstance(start, int) else [] if capturing(q) else start.tolist()
    if isinstance(start, torch.Tensor) and start.shape not in ((), (batch,)):
        raise ValueError(f"{function}: query_start has shape {list(start.shape)}, expected [] or [{batch}]")
    known = known if isinstance(known, list) else [known]
    if any(value < 0 for value in known):
        raise ValueError(f"{function}: query_start is {known}, expected 0 or more ({tokens} queries, {keys} keys)")
    if isinstance(start, torch.Tensor):
        first = start.to(q.device, torch.int32).expand(batch).contiguous()
    else:
        first = torch.full((batch,), start, dtype=torch.int32, device=q.device)
    if lengths is None:
        if any(value + tokens > keys for value in known):
            raise ValueError(f"{function}: query_start {known} + {tokens} queries exceeds the {keys} keys")
        return first, torch.full((batch,), keys, dtype=torch.int32, device=q.device)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"{function}: lengths is {lengths.dtype} {list(lengths.shape)}, expected integers [{batch}]")
    if not capturing(q) and any(not 0 <= value <= keys for value in lengths.tolist()):
        raise ValueError(f"{function}: lengths are {lengths.tolist()}, expected 0..{keys}")
    return first, lengths.to(q.device, torch.int32).contiguous()


def capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, when no value can be read off the device."""
    return x.is_cuda and not interpreting() and torch.cuda.is_current_stream_capturing()


def key_tile(block_size: int, dtype: torch.dtype) -> int:
    """Keys read a step: a tile of the tensor cores is at least 16 deep, and 64 keys of 128 numbers are 16 KiB."""
    widest = 32 if dtype == torch.float32 else 64
    return max(16, min(widest, block_size))


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token."""
    return x.stride(0), x.stride(1), x.stride(2)


def require_attention(
    function: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    config: Settings,
    check_blocks: bool = True,
) -> None:
    """Ask for what every attention over lists needs of q, k, v and the lists, of their values only with
    `check_blocks`. Raises ValueError."""
    require_query_key(function, q, k, config)
    require_heads(function, "v", v, q)
    if v.shape != k.shape:
        raise ValueError(f"{function}: v has shape {list(v.shape)}, expected {list(k.shape)} like k")
    require_blocks(function, blocks, q, k, config.block_size, check_blocks)
