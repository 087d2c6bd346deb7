"""The reference executor: PyTorch, on any device.

It runs the modules of a `MiniCPM` over the static `KVCache`, a layer at a time, for the tokens of several rows laid end
to end: the matrix products see them as one batch, attention sees each row alone. What it leaves out of a training
forward pass is what an engine pays for and does not need: the logits of every position of a prompt (the last one is
enough), the list of all layers' states, angles computed anew for each token.

Two rules of its own:

- *Angles.* A row's keys stand at the angles of the row's present length: when it crosses LongRoPE's original length, in
  either direction, the cache turns them (`KVCache.turn_keys`).
- *Trees in sparse attention.* Each draft of a tree chooses blocks as if its own branch were the text, which is what
  makes verification equal to plain decoding; the branch is copied behind the text for it. That is dull and slow.

Left out: CUDA graphs and paging.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from minicpm_ref.cache import KVCache
from minicpm_ref.engine.executor import Logits, check_tokens, depths
from minicpm_ref.model import Attention, DecoderLayer, MiniCPM
from minicpm_ref.ops import apply_rope, causal_attention, rope_angles, rope_attention_factor
from minicpm_ref.sparse import attend


@dataclass(frozen=True)
class _Piece:
    """New tokens of one row: `ids` behind `past` tokens, in a sequence of `final` tokens; `parents` if they are a
    tree."""

    row: int
    ids: Sequence[int]
    past: int
    final: int
    parents: Sequence[int] | None = None
    branches: list[list[int]] = field(default_factory=list)  # of a tree: each node with its ancestors, root first

    @property
    def positions(self) -> list[int]:
        """Where each token stands in its sequence."""
        steps = range(len(self.ids)) if self.parents is None else (len(branch) - 1 for branch in self.branches)
        return [self.past + step for step in steps]


class TorchExecutor:
    """`Executor` over a `MiniCPM`; see that protocol for the methods.

    `chunk_length` bounds the tokens that pass through the layers at once and with them the scratch memory.
    `capture_layers` lists the layers whose residual streams `hidden` can give. The cache has the model's dtype and its
    device.

    >>> executor = TorchExecutor(model, batch=2, max_length=512)
    >>> logits = executor.prefill(0, tokenizer.encode("import os"))  # float32 [V]
    >>> logits = executor.decode([0], [int(logits.argmax())])  # float32 [1, V]
    """

    def __init__(
        self,
        model: MiniCPM,
        batch: int = 1,
        max_length: int | None = None,
        chunk_length: int = 512,
        capture_layers: Sequence[int] = (),
    ):
        self.config, self.model, self.batch = model.config, model, batch
        self.max_length = self.config.max_position_embeddings if max_length is None else max_length
        if chunk_length < 1:
            raise ValueError(f"chunk_length = {chunk_length}: expected at least 1")
        if any(not 0 <= layer <= self.config.num_hidden_layers for layer in capture_layers):
            raise ValueError(
                f"capture_layers = {list(capture_layers)}: expected layers from 0 to {self.config.num_hidden_layers}"
            )
        self.chunk_length, self.capture_layers = chunk_length, tuple(capture_layers)
        self.cache = KVCache(self.config, batch, self.max_length, model.device, model.dtype)
        self._captured: list[list[Tensor]] = [[] for _ in range(batch)]  # a row's last call: [layers, n, C] a chunk
        self._angles = self._rope_table()  # cos and sin, short and long: [2, 2, S, D/2]

    # ---- the protocol ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> Logits:
        """Append a prompt, or a part of one; logits [V] of its last token."""
        past = self._check(row, ids)
        final = past + len(ids) if final_length is None else final_length
        if not past + len(ids) <= final <= self.max_length:
            raise ValueError(f"final_length = {final}: expected {past + len(ids)} to {self.max_length}")
        self._captured[row] = []
        last = torch.empty(0)
        for start in range(0, len(ids), self.chunk_length):
            chunk = ids[start : start + self.chunk_length]
            last = self._forward([_Piece(row, chunk, past + start, final)])[-1:]
        return self._logits(last)[0]

    @torch.no_grad()
    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> Logits:
        """Append one token to each row; logits [len(rows), V]."""
        if len(rows) != len(ids) or len(set(rows)) != len(rows):
            raise ValueError(f"rows = {list(rows)}, ids = {list(ids)}: expected one token for each of distinct rows")
        pieces = []
        for row, token in zip(rows, ids, strict=True):
            past = self._check(row, [token])
            pieces.append(_Piece(row, [token], past, past + 1))
        for row in rows:
            self._captured[row] = []
        return self._logits(self._forward(pieces))

    @torch.no_grad()
    def verify(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> Logits:
        """Append a chain or a tree of tokens; logits [n, V] of all of them."""
        past = self._check(row, ids)
        branches: list[list[int]] = []
        if parents is not None:
            if len(parents) != len(ids):
                raise ValueError(f"{len(parents)} parents for {len(ids)} ids: expected one each")
            depths(parents)  # checks them
            for node, parent in enumerate(parents):
                branches.append([*(branches[parent] if parent >= 0 else []), node])
        longest = max(map(len, branches), default=len(ids))
        self._captured[row] = []
        return self._logits(self._forward([_Piece(row, ids, past, past + longest, parents, branches)]))

    def keep(self, row: int, base: int, path: Sequence[int]) -> None:
        """Move the chosen tokens of a verified tree together; the rest is forgotten."""
        written = self.length(row) - base
        ordered = all(a < b for a, b in zip(path, path[1:], strict=False))
        if written < 0 or not ordered or (len(path) and not 0 <= path[0] <= path[-1] < written):
            raise ValueError(
                f"keep(base={base}, path={list(path)}): expected ascending indices into the {written} tokens that row "
                f"{row} holds behind {base}"
            )
        moved = [base + index for index in path]
        if moved != list(range(base, base + len(path))):
            for store in (self.cache.keys, self.cache.values):
                store[:, row, :, base : base + len(path)] = store[:, row, :, moved]
        if self.cache.compressed is not None:
            self.cache.compressed.truncate(row, base)
        self._set_length(row, base + len(path))

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        if not 0 <= length <= self.length(row):
            raise ValueError(f"truncate row {row} to {length}: it holds {self.length(row)} tokens")
        self._set_length(row, length)
        if self.cache.compressed is not None:
            self.cache.compressed.truncate(row, length)

    def length(self, row: int) -> int:
        """Tokens in a row."""
        if not 0 <= row < self.batch:
            raise ValueError(f"row = {row}: expected 0 <= row < {self.batch}")
        return int(self.cache.lengths[row])

    def hidden(self, row: int, layers: Sequence[int]) -> NDArray[np.float32]:
        """Residual streams [len(layers), n, C] of the row's last call."""
        missing = [layer for layer in layers if layer not in self.capture_layers]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]} was not kept: build the executor with capture_layers=[{missing[0]}]"
            )
        if not self._captured[row]:
            raise RuntimeError(f"row {row}: no call has appended tokens to it")
        streams = torch.cat(self._captured[row], dim=1)[[self.capture_layers.index(layer) for layer in layers]]
        return streams.float().cpu().numpy()

    def memory(self) -> dict[str, int]:
        """Bytes of weights, cache and scratch (the table of angles and one chunk's activations)."""
        compressed = self.cache.compressed.nbytes if self.cache.compressed is not None else 0
        weights = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        widest = max(self.config.hidden_size * 4, self.config.intermediate_size * 3)
        activations = self.chunk_length * widest * self.model.dtype.itemsize
        return {
            "weights": sum(weights.values()),
            "cache": self.cache.nbytes + compressed,
            "scratch": self._angles.nbytes + activations,
        }

    # ---- one pass through the layers ---------------------------------------------------------------------------------

    def _forward(self, pieces: list[_Piece]) -> Tensor:
        """Final residual stream [T, C] of the tokens of all pieces, end to end; the cache takes them."""
        device = self.model.device
        for piece in pieces:
            self.cache.turn_keys(piece.row, piece.final)
        ids = torch.tensor([token for piece in pieces for token in piece.ids], device=device)
        positions = torch.tensor([position for piece in pieces for position in piece.positions], device=device)
        long = torch.tensor([int(self.cache.long[piece.row]) for piece in pieces for _ in piece.ids], device=device)
        cos, sin = self._angles[:, long, positions][:, None]  # [1, T, D/2] each
        decoder = self.model.model
        x = decoder.embed_tokens(ids)[None] * self.config.scale_emb  # [1, T, C]
        captured = {0: x}
        for index, layer in enumerate(cast(Iterable[DecoderLayer], decoder.layers)):
            attended = self._attention(layer.self_attn, layer.input_layernorm(x), cos, sin, pieces)
            x = x + attended * layer.residual_scale
            x = x + layer.mlp(layer.post_attention_layernorm(x)) * layer.residual_scale
            if index + 1 in self.capture_layers:
                captured[index + 1] = x
        start = 0
        for piece in pieces:
            self._set_length(piece.row, piece.past + len(piece.ids))
            if self.capture_layers:
                own = [captured[layer][0, start : start + len(piece.ids)] for layer in self.capture_layers]
                self._captured[piece.row].append(torch.stack(own))
            start += len(piece.ids)
        return x[0]

    def _logits(self, x: Tensor) -> Logits:
        return self.model.logits(self.model.model.norm(x)).float().cpu().numpy()

    def _attention(self, attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, pieces: list[_Piece]) -> Tensor:
        """x [1, T, C] -> [1, T, C]: one product for all rows, then each row against its own keys."""
        merged = attention.qkv_proj
        qkv = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)) if merged is None else merged(x)
        q, k, v = (rearrange(part, "1 t (h d) -> h t d", d=attention.head_dim) for part in qkv)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out = torch.empty_like(q)  # [H, T, D]
        start = 0
        for piece in pieces:
            own = slice(start, start + len(piece.ids))
            keys, values = self.cache.append(attention.layer, piece.row, k[:, own], v[:, own])  # [G, S, D]
            out[:, own] = self._attend(attention.layer, q[:, own], keys, values, piece)
            start = own.stop
        return attention.o_proj(rearrange(out, "h t d -> 1 t (h d)"))

    def _attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, piece: _Piece) -> Tensor:
        """Attention of one piece: q [H, T, D] over keys, values [G, S, D] -> [H, T, D]."""
        config = self.config.sparse_config
        if config is None or piece.final < config.dense_len:
            if piece.parents is not None:
                return _masked_attention(q, keys, values, _tree_mask(piece, q.device))
            return causal_attention(q[None], keys[None], values[None])[0]
        if piece.parents is None:
            return attend(q[None], keys[None], values[None], config, self.cache.pooled(layer, piece.row, keys))[0]
        nodes = []
        for node, branch in enumerate(piece.branches):
            seen = [*range(piece.past), *(piece.past + index for index in branch)]
            nodes.append(attend(q[None, :, node : node + 1], keys[None, :, seen], values[None, :, seen], config)[0])
        return torch.cat(nodes, dim=1)

    # ---- rows and angles ---------------------------------------------------------------------------------------------

    def _check(self, row: int, ids: Sequence[int]) -> int:
        """The row's length, once it is clear that `ids` are tokens and fit."""
        past = self.length(row)
        check_tokens(self, row, ids, past)
        return past

    def _set_length(self, row: int, length: int) -> None:
        self.cache.lengths[row] = length

    def _rope_table(self) -> Tensor:
        """cos and sin of every position at the short and the long angles, [2 (cos, sin), 2 (short, long), S, D/2]."""
        positions = torch.arange(self.max_length, device=self.model.device)
        long = torch.tensor([[False], [True]], device=self.model.device).expand(2, self.max_length)
        angles = rope_angles(self.config, positions[None], long).expand(2, -1, -1)  # plain RoPE knows one list only
        return torch.stack((angles.cos(), angles.sin())) * rope_attention_factor(self.config)


def _masked_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of q [H, T, D] over keys and values [G, S, D] where mask [T, S] is True -> [H, T, D]."""
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask, enable_gqa=True)[0]


def _tree_mask(piece: _Piece, device: torch.device) -> Tensor:
    """Which of the past and new tokens each draft sees, bool [T, S]: the past, its ancestors, and itself."""
    mask = torch.zeros(len(piece.ids), piece.past + len(piece.ids), dtype=torch.bool)
    mask[:, : piece.past] = True
    for node, branch in enumerate(piece.branches):
        mask[node, [piece.past + index for index in branch]] = True
    return mask.to(device)
