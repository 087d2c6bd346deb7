"""Will it fit? Asked before anything is allocated.

Problem. An allocation that is too large fails late (in the middle of a prompt), or not at all: the system pages, and
everything stands still.

Idea. Nothing of an engine grows, so its size is a formula: the weights, a cache of `batch` rows of `max_length` tokens,
and the activations of one chunk. Compare it with what is free, and say in numbers what would fit.

Left out: other programs, which may take what was free a moment ago; a tenth is left to them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minicpm_ref.config import ModelConfig

SHARE = 0.9  # of the free memory that an engine may take
GIB = 2**30


def cache_bytes(config: ModelConfig, batch: int, max_length: int, bytes_per_element: int) -> int:
    """Bytes of keys, values and (for sparse attention) pooled keys of `batch` rows of `max_length` tokens."""
    total = batch * max_length * config.kv_bytes_per_token(bytes_per_element)
    sparse = config.sparse_config
    if sparse is not None and max_length >= sparse.dense_len:
        # one fine key a stride and one coarse key every four, keys only: half of what a token costs each
        pooled = max_length // sparse.kernel_stride + max_length // (4 * sparse.kernel_stride)
        total += batch * pooled * config.kv_bytes_per_token(bytes_per_element) // 2
    return int(total)


def scratch_bytes(config: ModelConfig, batch: int, chunk_length: int, bytes_per_element: int) -> int:
    """Bytes of the widest activations of one pass, and of the float32 logits of a batch."""
    widest = max(config.hidden_size * 4, config.intermediate_size * 3)
    return max(chunk_length, batch) * widest * bytes_per_element + batch * config.vocab_size * 4


def free_bytes(device: torch.device) -> int | None:
    """Memory that nobody uses on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    information = Path("/proc/meminfo")
    if device.type != "cpu" or not information.is_file():
        return None
    lines = dict(line.split(":", 1) for line in information.read_text("ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def check_memory(
    config: ModelConfig,
    batch: int,
    max_length: int,
    chunk_length: int,
    bytes_per_element: int,
    free: int | None,
    weights: int = 0,
) -> int:
    """Bytes that cache, scratch and `weights` (0: they are loaded already) will take; `free` None checks nothing.

    Raises ValueError with the numbers, and with the longest `max_length` that would fit.
    """
    cache = cache_bytes(config, batch, max_length, bytes_per_element)
    scratch = scratch_bytes(config, batch, chunk_length, bytes_per_element)
    needed = weights + cache + scratch
    if free is not None and needed > SHARE * free:
        left = SHARE * free - weights - scratch
        longest = max(0, int(max_length * left / cache))
        raise ValueError(
            f"batch = {batch} rows of max_length = {max_length} tokens need {cache / GIB:.2f} GiB of cache and "
            f"{scratch / GIB:.2f} GiB of scratch{f', the weights {weights / GIB:.2f} GiB' if weights else ''}: "
            f"expected at most {SHARE * free / GIB:.2f} GiB of the {free / GIB:.2f} that are free. "
            + (f"max_length = {longest} would fit" if longest else "not even one token would fit")
        )
    return needed
