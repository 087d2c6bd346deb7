"""The compiled executor: the same protocol, on a CPU, without Python between the layers.

Problem. The reference executor asks PyTorch for some thirty operations a layer; on a small model more than half of a
step is dispatch, and on a large one its products stay far below the memory's speed.

Idea. `minicpm_kernels.engine` compiles a whole step once (numba) and runs it on threads that stay. What is left to this
file is bookkeeping: which tokens go to which places, what length a row has, and which list of angles its keys stand at.
The rules are those of `TorchExecutor`, which is the oracle.

Two things are stronger here than the protocol asks: what a token computes is the same *in every bit* however its prompt
was cut, whoever shares its step, whether it was decoded or verified, in a chain or a tree, and on however many threads.

Left out so far: block-sparse attention. A model with a `sparse_config` is refused where it would become sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from minicpm_ref import backend
from minicpm_ref.config import ModelConfig
from minicpm_ref.engine.executor import Logits, check_tokens, depths
from minicpm_ref.lowbit.int4 import quantize_int4, quantize_int4_minimum
from minicpm_ref.lowbit.int8 import quantize_int8
from minicpm_ref.lowbit.layers import TernaryLinear
from minicpm_ref.lowbit.ternary import dequantize
from minicpm_ref.model import DecoderLayer, MiniCPM
from minicpm_ref.ops import rope_angles, rope_attention_factor

# weights -> formats of `minicpm_kernels.engine.formats` for the layers, and for output matrix and embedding
FORMATS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int4-minimum": ("int4_1", "int8"),
    "ternary": ("ternary128", "int8"),
}
QUANTIZERS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "int4_1": quantize_int4_minimum,
}
INTEGER_GROUP, TERNARY_GROUP = 32, 128  # columns with one scale


class CPUExecutor:
    """`Executor` over the weights of a `MiniCPM`, compiled for this CPU; see that protocol for the methods.

    `weights`: how matrices are stored. "float32" and "bfloat16" calculate in float32. "int8", "int4" and
    "int4-minimum" are rounded here (what GGUF's Q8_0, Q4_0 and Q4_1 hold is found again), and "ternary" is what the
    model's layers hold, all with activations rounded to int8; below eight bits, output matrix and embedding are int8.
    `cache`: element type of keys and values, "float16" or "float32". `chunk_length` bounds the tokens of a step,
    `verify_length` those of a draft. `threads` None takes as many as a step is fastest with. The first call ever
    compiles for some seconds; `progress` is called with a line a function.

    Raises ValueError for settings that do not exist, RuntimeError where numba is not installed.

    >>> executor = CPUExecutor(model, batch=2, max_length=512)
    >>> logits = executor.prefill(0, tokenizer.encode("import os"))  # float32 [V]
    >>> logits = executor.decode([0], [int(logits.argmax())])  # float32 [1, V]
    """

    def __init__(
        self,
        model: MiniCPM,
        batch: int = 1,
        max_length: int | None = None,
        weights: str = "float32",
        cache: str = "float16",
        chunk_length: int = 64,
        verify_length: int = 64,
        capture_layers: Sequence[int] = (),
        threads: int | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        self.config, self.batch = model.config, batch
        self.max_length = self.config.max_position_embeddings if max_length is None else max_length
        for name, value in (("batch", batch), ("max_length", self.max_length), ("chunk_length", chunk_length)):
            if value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if cache not in ("float16", "float32"):
            raise ValueError(f"cache = {cache!r}: expected 'float16' or 'float32'")
        if weights not in FORMATS:
            raise ValueError(f"weights = {weights!r}: expected one of {', '.join(FORMATS)}")
        layers = self.config.num_hidden_layers
        if any(not 0 <= layer <= layers for layer in capture_layers):
            raise ValueError(f"capture_layers = {list(capture_layers)}: expected layers from 0 to {layers}")
        if self.config.sparse_config is not None and self.max_length >= self.config.sparse_config.dense_len:
            raise ValueError(
                f"max_length = {self.max_length}: the compiled executor attends densely, so expected less than "
                f"dense_len = {self.config.sparse_config.dense_len}; TorchExecutor attends sparsely"
            )
        self.capture_layers, self.chunk_length, self.verify_length = tuple(capture_layers), chunk_length, verify_length
        self._kernels = backend.compiled_engine()
        packer = _Packer(self._kernels, weights)
        self._decoder = self._kernels.CompiledDecoder(
            _sizes(self.config, self._kernels),
            packer.layers(model),
            _norms(model),
            *packer.tables(model),
            _angles(self.config, self.max_length),
            form=packer.form,
            head_form=packer.head_form,
            cache_element=cache,
            batch=batch,
            room=max(chunk_length, batch, verify_length),
            wanted_room=max(batch, verify_length),
            capture_layers=self.capture_layers,
            threads=threads,
            progress=progress,
        )
        self._lengths, self._long = [0] * batch, [False] * batch
        self._captured: list[NDArray[np.float32] | None] = [None] * batch

    # ---- the protocol ------------------------------------------------------------------------------------------------

    def prefill(self, row: int, ids: Sequence[int], final_length: int | None = None) -> Logits:
        """Append a prompt, or a part of one; logits [V] of its last token."""
        past = self._check(row, ids)
        final = past + len(ids) if final_length is None else final_length
        if not past + len(ids) <= final <= self.max_length:
            raise ValueError(f"final_length = {final}: expected {past + len(ids)} to {self.max_length}")
        self._turn_keys(row, final)
        streams = []
        for start in range(0, len(ids), self.chunk_length):
            chunk = ids[start : start + self.chunk_length]
            wanted = [len(chunk) - 1] if start + len(chunk) == len(ids) else []
            logits = self._run([self._segment(row, chunk)], wanted)
            if self.capture_layers:
                streams.append(self._decoder.captured().copy())
        self._captured[row] = np.concatenate(streams, axis=1) if streams else None
        return logits[0]

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> Logits:
        """Append one token to each row; logits [len(rows), V]."""
        if len(rows) != len(ids) or len(set(rows)) != len(rows):
            raise ValueError(f"rows = {list(rows)}, ids = {list(ids)}: expected one token for each of distinct rows")
        for row, token in zip(rows, ids, strict=True):
            self._check(row, [token])
        for row in rows:
            self._turn_keys(row, self._lengths[row] + 1)
        segments = [self._segment(row, [token]) for row, token in zip(rows, ids, strict=True)]
        logits = self._run(segments, range(len(rows)))
        if self.capture_layers:
            for index, row in enumerate(rows):
                self._captured[row] = self._decoder.captured()[:, index : index + 1].copy()
        return logits

    def verify(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> Logits:
        """Append a chain or a tree of tokens; logits [n, V] of all of them."""
        past = self._check(row, ids)
        longest = len(ids)
        if len(ids) > self.verify_length:
            raise ValueError(f"{len(ids)} ids to verify: expected at most verify_length = {self.verify_length}")
        if parents is not None:
            if len(parents) != len(ids):
                raise ValueError(f"{len(parents)} parents for {len(ids)} ids: expected one each")
            longest = max(depths(parents)) + 1
        self._turn_keys(row, past + longest)
        logits = self._run([self._segment(row, ids, parents)], range(len(ids)))
        if self.capture_layers:
            self._captured[row] = self._decoder.captured().copy()
        return logits

    def keep(self, row: int, base: int, path: Sequence[int]) -> None:
        """Move the chosen tokens of a verified tree together; the rest is forgotten."""
        written = self.length(row) - base
        ordered = all(a < b for a, b in zip(path, path[1:], strict=False))
        if written < 0 or not ordered or (len(path) and not 0 <= path[0] <= path[-1] < written):
            raise ValueError(
                f"keep(base={base}, path={list(path)}): expected ascending indices into the {written} tokens that row "
                f"{row} holds behind {base}"
            )
        self._decoder.move(row, [base + index for index in path], base)
        self._lengths[row] = base + len(path)

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        if not 0 <= length <= self.length(row):
            raise ValueError(f"truncate row {row} to {length}: it holds {self.length(row)} tokens")
        self._lengths[row] = length

    def length(self, row: int) -> int:
        """Tokens in a row."""
        if not 0 <= row < self.batch:
            raise ValueError(f"row = {row}: expected 0 <= row < {self.batch}")
        return self._lengths[row]

    def hidden(self, row: int, layers: Sequence[int]) -> NDArray[np.float32]:
        """Residual streams [len(layers), n, C] of the row's last call."""
        missing = [layer for layer in layers if layer not in self.capture_layers]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]} was not kept: build the executor with capture_layers=[{missing[0]}]"
            )
        streams = self._captured[row]
        if streams is None:
            raise RuntimeError(f"row {row}: no call has appended tokens to it")
        return streams[[self.capture_layers.index(layer) for layer in layers]]

    def memory(self) -> dict[str, int]:
        """Bytes of weights, cache and scratch, all allocated when the executor was made."""
        return dict(self._decoder.nbytes)

    # ---- beyond it ---------------------------------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        """How many threads a step runs on."""
        return int(self._decoder.threads)

    def close(self) -> None:
        """End the threads; the executor is of no use afterwards. Collecting it does the same."""
        self._decoder.close()

    def _check(self, row: int, ids: Sequence[int]) -> int:
        """The row's length, once it is clear that `ids` are tokens and fit."""
        past = self.length(row)
        check_tokens(self, row, ids, past)
        return past

    def _segment(self, row: int, ids: Sequence[int], parents: Sequence[int] | None = None) -> Any:
        return self._kernels.Segment(row, ids, self._lengths[row], self._long[row], parents)

    def _run(self, segments: Sequence[Any], wanted: Sequence[int]) -> Logits:
        """A step; the rows are longer afterwards."""
        logits = self._decoder.run(segments, wanted)
        for segment in segments:
            self._lengths[segment.row] += len(segment.ids)
        return cast(Logits, logits.copy())

    def _turn_keys(self, row: int, final: int) -> None:
        """Bring a row's cached keys to the list of angles of a sequence of `final` tokens, if they stand at the other
        one."""
        scaling = self.config.rope_scaling
        long = scaling is not None and final > scaling.original_max_position_embeddings
        if long == self._long[row]:
            return
        self._long[row] = long
        if scaling is None or scaling.short_factor == scaling.long_factor or self._lengths[row] == 0:
            return
        positions = torch.arange(self._lengths[row])
        to_long = torch.ones_like(positions, dtype=torch.bool)
        turn = rope_angles(self.config, positions, to_long) - rope_angles(self.config, positions, ~to_long)
        turn = turn if long else -turn
        self._decoder.turn_keys(row, turn.cos().numpy(), turn.sin().numpy())


def _sizes(config: ModelConfig, kernels: Any) -> Any:
    return kernels.Sizes(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        embedding_scale=config.scale_emb,
        residual_scale=config.residual_scale,
        logit_divisor=config.logit_divisor,
    )


def _float32(weight: torch.Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", weight.detach().float().cpu().numpy())


class _Packer:
    """The matrices of a model in the numbers that a format holds."""

    def __init__(self, kernels: Any, weights: str):
        self.kernels, self.ternary = kernels, weights == "ternary"
        self.form, self.head_form = FORMATS[weights]

    def layers(self, model: MiniCPM) -> Iterator[Any]:
        """The seven matrices of each layer, one layer at a time."""
        for index, layer in enumerate(cast("list[DecoderLayer]", model.model.layers)):
            attention, mlp = layer.self_attn, layer.mlp
            found = []
            for part in (
                *(getattr(attention, f"{name}_proj") for name in "qkvo"),
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
            ):
                found.append(self._linear(part, f"layer {index}"))
            yield self.kernels.LayerMatrices(*found)

    def tables(self, model: MiniCPM) -> tuple[Any, Any]:
        """The output matrix, and the embedding if it is another."""
        embedding = model.model.embed_tokens.weight
        if model.config.tie_word_embeddings:
            return self._rounded(embedding, self.head_form, "embed_tokens"), None
        head = self._rounded(model.lm_head.weight, self.head_form, "lm_head")
        return head, self._rounded(embedding, self.head_form, "embed_tokens")

    def _linear(self, linear: torch.nn.Module, name: str) -> Any:
        if isinstance(linear, TernaryLinear):
            matrix = linear.matrix()
            if self.ternary and matrix.group_size % TERNARY_GROUP == 0:
                scales = matrix.scales.repeat_interleave(matrix.group_size // TERNARY_GROUP, dim=1)
                return self.kernels.Codes(matrix.codes.numpy(), scales.numpy())
            weight = dequantize(matrix.codes, matrix.scales, matrix.group_size)
        else:
            weight = cast(torch.Tensor, linear.weight)
        if self.ternary:
            raise ValueError(
                f"weights = 'ternary': {name} is no TernaryLinear with groups of a multiple of {TERNARY_GROUP}; "
                "see minicpm_ref.lowbit.to_ternary"
            )
        return self._rounded(weight, self.form, name)

    def _rounded(self, weight: torch.Tensor, form: str, name: str) -> Any:
        if form not in QUANTIZERS:
            return _float32(weight)
        missing = -weight.shape[1] % INTEGER_GROUP
        found = QUANTIZERS[form](F.pad(weight.detach().float(), (0, missing)), INTEGER_GROUP, name)
        return self.kernels.Codes(*(part.numpy() for part in found))


def _norms(model: MiniCPM) -> NDArray[np.float32]:
    """The weights of all norms in the order of their use, [2 layers + 1, C]."""
    norms = [model.model.norm]
    for layer in reversed(cast("list[DecoderLayer]", list(model.model.layers))):
        norms = [layer.input_layernorm, layer.post_attention_layernorm, *norms]
    return np.stack([_float32(norm.weight) for norm in norms])


def _angles(config: ModelConfig, positions: int) -> NDArray[np.float32]:
    """cos and sin at the short and at the long angles, [2 (short, long), S, 2 (cos, sin), D/2]."""
    long = torch.tensor([[False], [True]]).expand(2, positions)
    angles = rope_angles(config, torch.arange(positions)[None], long).expand(2, -1, -1)
    return _float32(torch.stack((angles.cos(), angles.sin()), dim=2) * rope_attention_factor(config))
