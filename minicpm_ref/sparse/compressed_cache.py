"""Compressed keys that grow with the key cache: what lets a decode step choose blocks without reading every key.

Problem. Stage 1 of sparse attention scores mean-pooled keys (`compress_keys`). Pooling the whole cache
again for every new token would read all the keys, which is what sparse attention is there to avoid.

Idea. A window of `kernel_size` keys never changes once it is complete, so it is pooled once, when its last key has
arrived: one new fine key every `kernel_stride` tokens, and one coarse key every four strides. The published code keeps
two tails of raw keys for this; the raw keys are in the key cache already, so here they are read from there. With that,
many tokens at once (chunked prefill, accepted drafts), tokens taken back (rejected drafts) and a late start (a sequence
that was dense until it reached `dense_len`) are no special cases.

Left out: paging. Source: arXiv 2509.24663, section 3.2, and the decode cache of the published MiniCPM4.1 model code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.sparse.blocks import COARSE_FACTOR, CompressedKeys, compress_keys, window_count


class CompressedKeyCache:
    """Fine and coarse compressed keys of every layer, beside a `KVCache` of the same rows and capacity.

    `fine` [L, B, G, Lf, D] and `coarse` [L, B, G, Lc, D] have room for every window that fits into `capacity` tokens.
    `pooled` [L, B] (int64, on the CPU) counts the tokens whose windows are in; what lies beyond is never read. What
    is in equals `compress_keys` of the whole key cache bit for bit.

    Raises ValueError when the config has no `sparse_config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        capacity: int = 1024,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        sparse = config.sparse_config
        if sparse is None:
            raise ValueError("config.sparse_config is None: a dense model has no compressed keys")
        self.windows = (
            (sparse.kernel_size, sparse.kernel_stride),
            (COARSE_FACTOR * sparse.kernel_size, COARSE_FACTOR * sparse.kernel_stride),
        )
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        self.fine, self.coarse = (
            torch.zeros(
                layers, batch_size, groups, window_count(capacity, *window), config.head_dim, device=device, dtype=dtype
            )
            for window in self.windows
        )
        self.pooled = torch.zeros(layers, batch_size, dtype=torch.int64)
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed keys."""
        return self.fine.nbytes + self.coarse.nbytes

    @torch.no_grad()
    def update(self, layer: int, row: int | slice, keys: Tensor) -> CompressedKeys:
        """Pool what is new in `keys` [G, S, D], all the cached keys of one row; return its (fine, coarse) [1, G, ., D].
        With a slice of R rows the same for [R, G, S, D] and [R, G, ., D].

        Raises ValueError when the row has shrunk since the last call without a `truncate`.
        """
        rows = slice(row, row + 1) if isinstance(row, int) else row
        pooled, new = self.pooled[layer, rows], keys.shape[-2]
        if not int(pooled.max()) <= new <= self.capacity:
            raise ValueError(
                f"row {row} of layer {layer} has {new} keys: expected {int(pooled.max())} (pooled) to "
                f"{self.capacity} (capacity)"
            )
        old = int(pooled.min())  # of several rows: pooling the same keys once more gives the same bits
        found = []
        for out, (size, stride) in zip((self.fine, self.coarse), self.windows, strict=True):
            done, count = window_count(old, size, stride), window_count(new, size, stride)
            # from the first key of the first new window on; a ragged tail waits for the next call
            out[layer, rows, :, done:count] = compress_keys(keys[..., done * stride :, :], size, stride)
            found.append(out[layer, rows, :, :count])
        self.pooled[layer, rows] = new
        return CompressedKeys(*found)

    def truncate(self, row: int | slice, length: int, layer: int | None = None) -> None:
        """Forget what depends on the tokens of a row, or of several, from `length` on, in one layer or (None) in all.

        Whoever writes into cached keys must call this with the first token that changes; `KVCache.append` does.
        """
        self.pooled[slice(None) if layer is None else layer, row].clamp_(max=length)
