"""The KV cache: keys and values of every token seen so far, in memory allocated once.

Decoding without a cache recomputes the whole prefix for every new token: T tokens cost O(T^2) layer passes. With the
keys and values kept, a new token costs one. The price is memory that grows with the context, which is why MiniCPM4
keeps only 2 key-value heads for 32 query heads, and why a small device wants that memory in one block of known size:
the cache is static, allocated at its full capacity, and a row that would overflow is refused instead of growing.

Each row of the batch has its own length, so prompts of different lengths share a batch without padding.

Keys are stored after rotary embedding, so with LongRoPE a row's keys stand at the angles of one of two lists, the one
for the row's length. When the length crosses the border, forwards by a token or backwards by a rejected draft, the keys
must be turned to the other list, once: each row remembers at which it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_ref.config import ModelConfig
from minicpm_ref.ops import apply_rope, is_long, rope_angles
from minicpm_ref.sparse import CompressedKeyCache, CompressedKeys


class KVCache:
    """Static key-value cache for `batch_size` rows of up to `capacity` tokens.

    `keys` and `values` are [L, B, G, S, D] with S = capacity; keys are stored after rotary embedding. `lengths` [B]
    (int64, on the CPU) counts the valid tokens of each row; what lies beyond them is never read. `long` [B] says whose
    keys stand at LongRoPE's long angles. `compressed` holds the pooled keys that sparse attention scores, or None when
    attention stays dense at this capacity.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        capacity: int = 1024,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"KVCache(batch_size={batch_size}, capacity={capacity}): expected both at least 1")
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.config = config
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.long = torch.zeros(batch_size, dtype=torch.bool)
        self.capacity = capacity
        self.compressed: CompressedKeyCache | None = None
        if config.sparse_config is not None and capacity >= config.sparse_config.dense_len:
            self.compressed = CompressedKeyCache(config, batch_size, capacity, device, dtype)

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value storage."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, new_tokens: Tensor) -> None:
        """Check that row b can take `new_tokens[b]` more tokens; raises ValueError naming the row otherwise."""
        for row, (length, new) in enumerate(zip(self.lengths.tolist(), new_tokens.tolist(), strict=True)):
            if length + new > self.capacity:
                raise ValueError(f"KV cache row {row}: {length} + {new} tokens exceed its capacity of {self.capacity}")

    def append(self, layer: int, row: int | slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [G, T, D] behind the valid tokens of one row and return all its keys and values [G, length + T,
        D]; with a slice of rows of equal lengths the same for [R, G, T, D].

        `lengths` moves only when `advance` is called, after the last layer has written.
        """
        start = int(self.lengths[row].max())
        stop = start + k.shape[-2]
        self.keys[layer, row, :, start:stop] = k
        self.values[layer, row, :, start:stop] = v
        if self.compressed is not None:
            self.compressed.truncate(row, start, layer)
        return self.keys[layer, row, :, :stop], self.values[layer, row, :, :stop]

    def pooled(self, layer: int, row: int | slice, keys: Tensor) -> CompressedKeys | None:
        """The compressed keys of `keys`, which `append` returned for the same row or rows; None where none are kept."""
        return None if self.compressed is None else self.compressed.update(layer, row, keys)

    def turn_keys(self, row: int, length: int) -> None:
        """Bring a row's keys to the angles of a sequence of `length` tokens, if they stand at the others.

        Rotations add, so turning a cached key by (long - short) makes its distance to a new query the one the long list
        means. Only the first layer's keys become what a prefill at the new length would store: deeper states were
        computed at the other angles, and only a recomputation can change that. In the published files both lists are
        equal and nothing turns.
        """
        long, past = is_long(self.config, length), int(self.lengths[row])
        if long == bool(self.long[row]):
            return
        scaling = self.config.rope_scaling
        if past and scaling is not None and scaling.short_factor != scaling.long_factor:
            positions = torch.arange(past, device=self.keys.device)
            ahead = torch.ones_like(positions, dtype=torch.bool)
            turn = rope_angles(self.config, positions, ahead) - rope_angles(self.config, positions, ~ahead)
            turn = turn if long else -turn
            keys = self.keys[:, row, :, :past]  # [L, G, S, D]
            keys.copy_(apply_rope(keys, turn.cos(), turn.sin()))
            if self.compressed is not None:
                self.compressed.truncate(row, 0)
        self.long[row] = long  # a call that fails later turns nothing twice

    def advance(self, new_tokens: Tensor) -> None:
        """Count `new_tokens` [B] as valid, once every layer has written them."""
        self.lengths += new_tokens

    def truncate(self, lengths: Tensor) -> None:
        """Forget every token from `lengths[b]` on (rejected drafts, say). Raises ValueError when a row is shorter than
        that."""
        if (lengths > self.lengths).any() or (lengths < 0).any():
            raise ValueError(f"truncate to {lengths.tolist()}: the rows hold {self.lengths.tolist()} tokens")
        self.lengths = lengths.to(self.lengths, copy=True)  # `advance` adds in place: the caller's tensor must not move

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.lengths.zero_()
